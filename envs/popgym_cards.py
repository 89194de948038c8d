"""POPGym's six card games as batches, equal to popgym 1.0.7 step by step, only faster.

Morad et al. 2023, https://arxiv.org/abs/2303.01859

A deck has 4 suits of 13 ranks. What the games show of a card is a number:

    colors    b r             0 and 1
    suits     ♠ ♦ ♣ ♥         0 ... 3
    ranks     a 2 ... j q k   0 ... 12, the ace is low

`num_decks` decks are shuffled into one when the episode begins. A player who knows every card gets a return
of 1, in Higher-Lower a little less. POPGym defines no success.
LEVELS at the end has the settings of POPGym's 18 ids.
"""
import colorsys

import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, check_whole, newest

NAMES = {"colors": [*"br"], "suits": [*"♠♦♣♥"], "ranks": ["a", *map(str, range(2, 11)), *"jqk"]}

SUITS = np.array([(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)], np.uint8)  # Okabe and Ito's
RANKS = np.linspace((0, 34, 78), (254, 232, 56), 13).astype(np.uint8)           # as cividis: blue to yellow


class CardsBatch(BatchEnv):
    """What the games share: a shuffled deck in each row, which is dealt card by card. A game defines

        spaces()         of one environment: what is observed, what is answered
        pay(actions)     the rewards [N]; called before the next card is dealt
    """

    deck_types = tuple(NAMES)

    def __init__(self, num_envs, num_decks, deck_type, **kwargs):
        check_whole(num_decks=num_decks)
        if deck_type not in self.deck_types:
            raise ValueError(f'deck_type must be one of {", ".join(self.deck_types)}, not "{deck_type}"')
        self.num_cards, self.deck_type = 52 * num_decks, deck_type
        self.names = NAMES[deck_type]
        self.kinds = len(self.names)
        super().__init__(*self.spaces(), num_envs, **kwargs)
        self.steps = self.num_cards - 1                     # of an episode
        self.t = np.zeros(num_envs, int)                    # [N]
        self.cards = np.zeros((num_envs, self.num_cards), int)              # in dealing order, or by place

    def spaces(self):
        return gym.spaces.Discrete(self.kinds), gym.spaces.Discrete(self.kinds)

    def shuffled(self, decks):
        cards = np.arange(self.num_cards)                   # four suits of aces, four suits of twos, ...
        kind = cards // 4 % 13 if self.deck_type == "ranks" else cards % self.kinds
        return self.np_random.permuted(np.tile(kind, (decks, 1)), axis=1)   # [decks, num_cards]

    def begin(self, rows):
        self.t[rows] = 0
        self.cards[rows] = self.shuffled(len(rows))

    def card(self, t):
        """Card t[n] of each row n."""
        return self.cards[np.arange(self.num_envs), t]

    def move(self, actions):
        reward = self.pay(actions)
        self.t = self.t + 1
        last = self.t == self.steps
        return reward, last, np.zeros_like(last), None

    def observe(self):
        return self.card(self.t)                            # [N]

    def asked(self, i):
        """Which card the answer of row i must name; below 0: none."""
        return -1

    def text(self, i):
        return f"card {self.t[i] + 1} of {self.num_cards}: {self.names[self.cards[i, self.t[i]]]}"

    def picture(self, i, size=24):
        """The cards that were dealt, 26 in a row, in the colours of their kinds; a frame: it is asked for."""
        dealt, asked = self.cards[i, : self.t[i] + 1], self.asked(i)
        colours = SUITS if self.kinds <= len(SUITS) else RANKS
        cells = np.full((self.num_cards, size, size, 3), 235, np.uint8)
        cells[: len(dealt)] = colours[dealt][:, None, None]
        cells[:, [0, -1]] = cells[:, :, [0, -1]] = 255
        if asked >= 0:
            edge = max(1, size // 6)
            inside = cells[asked, edge:-edge, edge:-edge].copy()
            cells[asked] = 0
            cells[asked, edge:-edge, edge:-edge] = inside
        rows = cells.reshape(-1, 26, size, size, 3).swapaxes(1, 2)
        return rows.reshape(-1, 26 * size, 3)


class RepeatPreviousBatch(CardsBatch):
    """Name the suit of a card that was shown a while ago: with k=1 the card in view, with k=2 the one before.

    Reward: 1 / (cards - k) for the right suit, minus that for another; 0 until k cards were shown.
    Length: cards - 1. The last card is shown but never asked for.
    Observation: the suit of the new card.
    """

    def __init__(self, num_envs=1, num_decks=1, k=4, **kwargs):
        check_whole(k=k)
        super().__init__(num_envs, num_decks, "suits", **kwargs)
        if k >= self.num_cards:
            raise ValueError(f"k must be below the number of cards, {self.num_cards}, not {k}")
        self.k = k

    def pay(self, actions):
        asked = self.t + 1 - self.k                         # [N] which card; below 0: none yet
        right = actions == self.card(asked)
        return (asked >= 0) * np.where(right, 1, -1) / (self.num_cards - self.k)

    def remembered(self):
        return {"card": newest(self.cards, self.t, min(10 * self.k, self.steps))}

    def asked(self, i):
        return self.t[i] + 1 - self.k

    def text(self, i):
        asked = self.asked(i)
        return super().text(i) + f"   asked: {self.names[self.cards[i, asked]] if asked >= 0 else '-'}"


class RepeatFirstBatch(CardsBatch):
    """Name the suit of the first card, in every step.

    Reward: 1 / (cards - 1) for the right suit, minus that for another. Length: cards - 1.
    Observation: the suit of the new card. Nothing marks the first one.
    """

    def __init__(self, num_envs=1, num_decks=1, **kwargs):
        super().__init__(num_envs, num_decks, "suits", **kwargs)

    def pay(self, actions):
        right = actions == self.cards[:, 0]
        return np.where(right, 1, -1) / (self.num_cards - 1)

    def remembered(self):
        return {"first card": self.cards[:, 0]}

    def asked(self, i):
        return 0

    def text(self, i):
        return super().text(i) + f"   asked: {self.names[self.cards[i, 0]]}"


class AutoencodeBatch(CardsBatch):
    """Watch all cards, then name their suits backwards, the last card first.

    Reward: 0 while watching, then 1 / cards for the right suit, minus that for another.
    Length: 2 * cards - 1. The last card is in view when the first suit is asked for.
    Observation: whether to watch, and the suit of the new card. Without a new card the suit reads 0.
    """

    def __init__(self, num_envs=1, num_decks=1, **kwargs):
        super().__init__(num_envs, num_decks, "suits", **kwargs)
        self.steps = 2 * self.num_cards - 1
        self.last = self.num_cards - 1                      # the step that shows the last card

    def spaces(self):
        suit = gym.spaces.Discrete(self.kinds)
        return gym.spaces.Tuple((gym.spaces.Discrete(2), suit)), suit

    def pay(self, actions):
        asked = self.last - np.abs(self.t - self.last)      # forwards, then backwards
        right = actions == self.card(asked)
        return (self.t >= self.last) * np.where(right, 1, -1) / self.num_cards

    def remembered(self):
        cards = newest(self.cards, np.minimum(self.t, self.last), self.num_cards)
        return {"card": np.where(self.t[:, None] <= self.last, cards, -1)}  # of those that are being shown

    def observe(self):
        suit = self.card(np.minimum(self.t, self.last))
        return (self.t < self.last).astype(int), np.where(self.t <= self.last, suit, 0)

    def text(self, i):
        seen = super().text(i) if self.t[i] <= self.last else "no card"
        asked = 2 * self.last - self.t[i]
        if self.t[i] < self.last or asked < 0:
            return seen
        return f"{seen}   asked: card {asked + 1}, {self.names[self.cards[i, asked]]}"


class CountRecallBatch(CardsBatch):
    """Every step shows a card and asks: how many of such a kind were shown so far, this card included?

    What is asked for comes from a second deck, shuffled by itself.
    Reward: 1 / (cards - 1) for the right number, minus that for another. Length: cards - 1.
    Observation: the new card and the kind that is asked for.
    """

    def __init__(self, num_envs=1, num_decks=1, deck_type="colors", **kwargs):
        super().__init__(num_envs, num_decks, deck_type, **kwargs)
        self.queries = np.zeros_like(self.cards)            # [N, cards] kinds
        self.counts = np.zeros((num_envs, self.kinds), int)                 # of the cards shown so far

    def spaces(self):
        most = self.num_cards // self.kinds
        return gym.spaces.MultiDiscrete([self.kinds] * 2), gym.spaces.Discrete(most + 1)

    def begin(self, rows):
        super().begin(rows)
        self.queries[rows] = self.shuffled(len(rows))
        self.counts[rows] = 0
        self.counts[rows, self.cards[rows, 0]] = 1

    def pay(self, actions):
        N = np.arange(self.num_envs)
        right = actions == self.counts[N, self.queries[N, self.t]]
        self.counts[N, self.card(self.t + 1)] += 1
        return np.where(right, 1, -1) / (self.num_cards - 1)

    def remembered(self):
        return {f"how many {self.names[0]}": self.counts[:, 0]}

    def observe(self):
        query = self.queries[np.arange(self.num_envs), self.t]
        return np.stack([self.card(self.t), query], axis=1)                 # [N, 2]

    def text(self, i):
        query = self.queries[i, self.t[i]]
        return super().text(i) + f"   asked: how many {self.names[query]}, {self.counts[i, query]}"


class HigherLowerBatch(CardsBatch):
    """Is the rank of the next card higher (action 0) or lower (1) than that of this one? Counting helps.

    Reward: 1 / cards if it is, minus that if not, 0 if the ranks are equal. Length: cards - 1.
    Observation: the rank of the new card.
    """

    def __init__(self, num_envs=1, num_decks=1, **kwargs):
        super().__init__(num_envs, num_decks, "ranks", **kwargs)

    def spaces(self):
        return gym.spaces.Discrete(self.kinds), gym.spaces.Discrete(2)

    def pay(self, actions):
        rise = self.card(self.t + 1) - self.card(self.t)
        return np.sign(rise) * np.where(actions == 0, 1, -1) / self.num_cards


class ConcentrationBatch(CardsBatch):
    """All cards lie face down. Turn two, one in each step; a pair of the same kind stays face up.

    Other pairs are turned back, also if both are the same card. So is a first card whose second lies face
    up already. A first card that lies face up already ends the turn at once.

    Reward of the step that ends a turn: 2 / cards for a pair, else -1 / (2 * cards) for each card turned.
    An episode terminates when all cards lie face up, and is truncated after 2 * cards steps.
    Observation: what is seen of each place while the last card is turned, `kinds` if it is face down. The
    two cards of a turn are seen together, once, whether they stay or not.
    """

    deck_types = "colors", "ranks"                          # POPGym: 13 cards of a suit make no pairs

    def __init__(self, num_envs=1, num_decks=1, deck_type="ranks", **kwargs):
        super().__init__(num_envs, num_decks, deck_type, **kwargs)
        self.steps = 2 * self.num_cards
        self.face_up = np.zeros(self.cards.shape, bool)     # [N, places] for the rest of the episode
        self.seen = np.zeros(self.cards.shape, bool)        # [N, places] in the last step
        self.first = np.zeros(num_envs, int)                # [N] place of the turn's first card; -1: none yet

    def spaces(self):
        board = gym.spaces.MultiDiscrete([self.kinds + 1] * self.num_cards)
        return board, gym.spaces.Discrete(self.num_cards)

    def begin(self, rows):
        super().begin(rows)
        self.face_up[rows], self.seen[rows], self.first[rows] = False, False, -1

    def move(self, actions):
        N = np.arange(self.num_envs)
        opens = self.first < 0
        first = np.where(opens, actions, self.first)
        was_up = self.face_up[N, actions]
        same_kind = self.card(first) == self.card(actions)
        pair = same_kind & (first != actions) & ~was_up
        goes_on = opens & ~was_up                           # with a second card
        self.seen = self.face_up.copy()
        self.seen[N, first] = self.seen[N, actions] = True
        self.face_up = np.where(pair[:, None], self.seen, self.face_up)
        self.first = np.where(goes_on, actions, -1)
        failure = -1 / self.steps * np.where(opens, 1, 2)
        reward = np.where(pair, 2 / self.num_cards, np.where(goes_on, 0, failure))
        self.t = self.t + 1
        return reward, self.face_up.all(1), self.t == self.steps, None

    def observe(self):
        return np.where(self.seen, self.cards, self.kinds)  # [N, places]

    def text(self, i):
        names = [*self.names, "?"]
        board = self.observe()[i].reshape(-1, 13)
        lines = [" ".join(f"{names[kind]:>2}" for kind in line) for line in board]
        found = f"{self.face_up[i].sum()} of {self.num_cards} cards lie face up after {self.t[i]} steps"
        return "\n".join([*lines, found])

    def picture(self, i, size=12):
        """A cell for each card: black and red, or a colour for each rank; grey if it is face down."""
        hues = [colorsys.hsv_to_rgb(kind / self.kinds, 0.8, 1) for kind in range(self.kinds)]
        colours = [(0, 0, 0), (1, 0, 0)] if self.deck_type == "colors" else hues
        colours = np.array([*colours, (0.6, 0.6, 0.6)])
        cells = (255 * colours[self.observe()[i].reshape(-1, 13)]).astype(np.uint8)
        image = cells.repeat(size, 0).repeat(size, 1)
        image[::size] = image[:, ::size] = 255              # a line between the cards
        return image


LEVELS = {
    "popgym-RepeatPreviousEasy-v0": (RepeatPreviousBatch, {"num_decks": 1, "k": 4}),
    "popgym-RepeatPreviousMedium-v0": (RepeatPreviousBatch, {"num_decks": 2, "k": 32}),
    "popgym-RepeatPreviousHard-v0": (RepeatPreviousBatch, {"num_decks": 3, "k": 64}),
    "popgym-RepeatFirstEasy-v0": (RepeatFirstBatch, {"num_decks": 1}),
    "popgym-RepeatFirstMedium-v0": (RepeatFirstBatch, {"num_decks": 8}),
    "popgym-RepeatFirstHard-v0": (RepeatFirstBatch, {"num_decks": 16}),
    "popgym-AutoencodeEasy-v0": (AutoencodeBatch, {"num_decks": 1}),
    "popgym-AutoencodeMedium-v0": (AutoencodeBatch, {"num_decks": 2}),
    "popgym-AutoencodeHard-v0": (AutoencodeBatch, {"num_decks": 3}),
    "popgym-CountRecallEasy-v0": (CountRecallBatch, {"num_decks": 1, "deck_type": "colors"}),
    "popgym-CountRecallMedium-v0": (CountRecallBatch, {"num_decks": 2, "deck_type": "suits"}),
    "popgym-CountRecallHard-v0": (CountRecallBatch, {"num_decks": 4, "deck_type": "ranks"}),
    "popgym-HigherLowerEasy-v0": (HigherLowerBatch, {"num_decks": 1}),
    "popgym-HigherLowerMedium-v0": (HigherLowerBatch, {"num_decks": 2}),
    "popgym-HigherLowerHard-v0": (HigherLowerBatch, {"num_decks": 3}),
    "popgym-ConcentrationEasy-v0": (ConcentrationBatch, {"num_decks": 1, "deck_type": "colors"}),
    "popgym-ConcentrationMedium-v0": (ConcentrationBatch, {"num_decks": 2, "deck_type": "colors"}),
    "popgym-ConcentrationHard-v0": (ConcentrationBatch, {"num_decks": 1, "deck_type": "ranks"}),
}

"""POPGym's bandit and its two board games as batches, equal to popgym 1.0.7 step by step, only faster.

Morad et al. 2023, https://arxiv.org/abs/2303.01859

The observation is what the last action brought, and 0 at first. It does not say what the action was: the
agent must be told by something else, as --prev-action does. POPGym defines no success.
LEVELS at the end has the settings of POPGym's 9 ids.
"""
import functools

import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, check_whole


class MultiarmedBanditBatch(BatchEnv):
    """Each bandit pays with its own probability, drawn in 0 ... 1 when the episode begins. Find the best.

    Reward: 1 / episode_length if the chosen bandit pays, minus that if not. Length: episode_length steps.
    Observation: whether it paid.
    """

    metadata = {**BatchEnv.metadata, "render_modes": ["ansi"]}

    def __init__(self, num_envs=1, num_bandits=10, episode_length=200, **kwargs):
        check_whole(num_bandits=num_bandits, episode_length=episode_length)
        super().__init__(gym.spaces.Discrete(2), gym.spaces.Discrete(num_bandits), num_envs, **kwargs)
        self.steps = episode_length
        self.t = np.zeros(num_envs, int)                    # [N]
        self.bandits = np.zeros((num_envs, num_bandits), np.float32)        # probabilities
        self.paid = np.zeros(num_envs, int)                 # [N] 0 or 1, what is observed

    def begin(self, rows):
        self.t[rows], self.paid[rows] = 0, 0
        self.bandits[rows] = self.np_random.random((len(rows), self.bandits.shape[1]), np.float32)

    def move(self, actions):
        chance = self.bandits[np.arange(self.num_envs), actions]
        drawn = self.np_random.random(self.num_envs)
        pays = drawn.astype(np.float32) < chance            # POPGym compares them as float32, too
        self.paid = pays.astype(int)
        self.t = self.t + 1
        last = self.t == self.steps
        return np.where(pays, 1, -1) / self.steps, np.zeros_like(last), last, None

    def observe(self):
        return self.paid.copy()                             # [N]

    def text(self, i):
        best = self.bandits[i].argmax()
        return f"step {self.t[i]:3d}   paid {self.paid[i]}   best: bandit {best}, {self.bandits[i, best]:.2f}"


class BoardBatch(BatchEnv):
    """What the board games show to us: the tiles as far as the agent knows them. A game defines

        tiles(i)      the board of row i, [H, W], a kind in each tile
        symbols       a letter for each kind
        colours       [kinds, 3] uint8
    """

    def text(self, i):
        return "\n".join("".join(self.symbols[kind] for kind in line) for line in self.tiles(i))

    def picture(self, i, size=12):
        image = self.colours[self.tiles(i)].repeat(size, 0).repeat(size, 1)
        image[::size] = image[:, ::size] = 255              # a line between the tiles
        return image


class BattleshipBatch(BoardBatch):
    """Ships lie on the board, along rows or columns, and may touch. Fire at one tile a step; sink them all.

    Reward: 1 / h for a hit, h is how many tiles the ships cover; -1 / (tiles - h) for a miss. A tile that was
    fired at before is a miss. All hits and no miss give 1, every tile once gives 0.
    Length: until all ships are sunk (terminated), at most as many steps as tiles (truncated).
    Observation: whether it was a hit. Action: row and column.
    """

    symbols = ".ox"                                         # unknown, miss, hit
    colours = np.array([(120, 120, 120), (60, 110, 220), (220, 40, 40)], np.uint8)

    def __init__(self, num_envs=1, board_size=10, ship_sizes=(2, 3, 3, 4), **kwargs):
        check_whole(board_size=board_size)
        if not all(1 <= size <= board_size for size in ship_sizes):
            raise ValueError(f"ship_sizes must be 1 ... {board_size}, the board's size, not {ship_sizes}")
        action_space = gym.spaces.MultiDiscrete([board_size, board_size])
        super().__init__(gym.spaces.Discrete(2), action_space, num_envs, **kwargs)
        self.board_size, self.ship_sizes = board_size, ship_sizes
        self.steps, self.needed = board_size**2, sum(ship_sizes)
        board = num_envs, board_size, board_size
        self.t = np.zeros(num_envs, int)                    # [N]
        self.ships = np.zeros(board, bool)                  # [N, rows, columns] where they lie
        self.guessed = np.zeros(board, bool)                # [N, rows, columns] what was fired at
        self.hits = np.zeros(num_envs, int)                 # [N] so far
        self.hit = np.zeros(num_envs, int)                  # [N] 0 or 1, what is observed

    def begin(self, rows):
        self.t[rows], self.hits[rows], self.hit[rows] = 0, 0, 0
        self.ships[rows], self.guessed[rows] = False, False
        for size in self.ship_sizes:
            left = rows                                     # boards without this ship
            while len(left):
                left = left[~self.place(left, size)]

    def place(self, rows, size):
        """Tries one random place for a ship on each board. Returns whether it was free, [K]."""
        start = self.np_random.integers(self.board_size, size=(len(rows), 2))
        axis, back = self.np_random.integers(2, size=(len(rows), 2)).T
        along = np.eye(2, dtype=int)[axis] * (1 - 2 * back[:, None])        # [K, 2] one tile further
        tiles = start[:, None] + along[:, None] * np.arange(size)[:, None]  # [K, size, 2]
        inside = (tiles[:, -1] >= 0) & (tiles[:, -1] < self.board_size)
        y, x = tiles.transpose(2, 0, 1) % self.board_size   # what is not inside is not placed
        board = rows[:, None]
        free = inside.all(1) & ~self.ships[board, y, x].any(1)
        self.ships[board[free], y[free], x[free]] = True
        return free

    def move(self, actions):
        N, (y, x) = np.arange(self.num_envs), actions.T
        hit = self.ships[N, y, x] & ~self.guessed[N, y, x]
        self.guessed[N, y, x] = True
        self.hit = hit.astype(int)
        self.hits = self.hits + hit
        self.t = self.t + 1
        reward = np.where(hit, 1 / self.needed, -1 / (self.steps - self.needed))
        return reward, self.hits == self.needed, self.t == self.steps, None

    def observe(self):
        return self.hit.copy()                              # [N]

    def tiles(self, i):
        return self.guessed[i] * (1 + self.ships[i])


@functools.cache
def near(size):
    """[y, x, y, x] which tiles of a board are one tile apart at most."""
    apart = np.abs(np.arange(size)[:, None] - np.arange(size)) <= 1         # two rows, or two columns
    return apart[:, None, :, None] & apart[None, :, None, :]


class MineSweeperBatch(BoardBatch):
    """Mines lie under the tiles. View all tiles without a mine, one a step.

    Reward, with s for the number of tiles without a mine:
        1 / s               a new tile
        -0.5 / (s - 2)      a tile that was viewed before
        -0.5 - 1 / s        a mine
    Length: until all s are viewed or a mine is (terminated), at most s steps (truncated). So one wasted step
    takes the chance to view them all.
    Observation: how many mines are on this tile and the eight around it. Action: row and column.
    """

    boards = {"easy": (4, 2), "medium": (6, 6), "hard": (8, 10)}            # size, mines
    symbols = "0123456789*."                                # mines around a viewed tile, a mine, not viewed
    colours = np.array([(240 - 5 * k, 240 - 25 * k, 240 - 25 * k) for k in range(10)]
                       + [(0, 0, 0), (120, 120, 120)], np.uint8)

    def __init__(self, num_envs=1, difficulty="easy", **kwargs):
        if difficulty not in self.boards:
            raise ValueError(f'difficulty must be one of {", ".join(self.boards)}, not "{difficulty}"')
        size, self.num_mines = self.boards[difficulty]
        observation_space = gym.spaces.Discrete(min(self.num_mines + 1, 10))
        super().__init__(observation_space, gym.spaces.MultiDiscrete([size, size]), num_envs, **kwargs)
        self.steps = size**2 - self.num_mines
        self.t = np.zeros(num_envs, int)                    # [N]
        self.mines = np.zeros((num_envs, size, size), bool)
        self.viewed = np.zeros((num_envs, size, size), bool)
        self.clue = np.zeros(num_envs, int)                 # [N] what is observed

    def begin(self, rows):
        self.t[rows], self.clue[rows], self.viewed[rows] = 0, 0, False
        mines = np.arange(self.mines[0].size) < self.num_mines
        shuffled = self.np_random.permuted(np.tile(mines, (len(rows), 1)), axis=1)
        self.mines[rows] = shuffled.reshape(-1, *self.mines[0].shape)

    def move(self, actions):
        N, (y, x) = np.arange(self.num_envs), actions.T
        mine, again = self.mines[N, y, x], self.viewed[N, y, x]
        self.viewed[N, y, x] = True
        self.clue = np.count_nonzero(self.mines & near(self.mines.shape[1])[y, x], axis=(1, 2))
        self.t = self.t + 1
        reward = np.where(again, -0.5 / (self.steps - 2), 1 / self.steps)
        reward = np.where(mine, -0.5 - 1 / self.steps, reward)
        terminated = mine | (self.mines | self.viewed).all((1, 2))
        return reward, terminated, (self.t == self.steps) & ~terminated, None

    def observe(self):
        return self.clue.copy()                             # [N]

    def tiles(self, i):
        clues = (self.mines[i] & near(self.mines.shape[1])).sum((2, 3))     # [H, W]
        return np.where(self.viewed[i], np.where(self.mines[i], 10, clues), 11)


LEVELS = {
    "popgym-MultiarmedBanditEasy-v0": (MultiarmedBanditBatch, {"num_bandits": 10, "episode_length": 200}),
    "popgym-MultiarmedBanditMedium-v0": (MultiarmedBanditBatch, {"num_bandits": 20, "episode_length": 400}),
    "popgym-MultiarmedBanditHard-v0": (MultiarmedBanditBatch, {"num_bandits": 30, "episode_length": 600}),
    "popgym-BattleshipEasy-v0": (BattleshipBatch, {"board_size": 8}),
    "popgym-BattleshipMedium-v0": (BattleshipBatch, {"board_size": 10}),
    "popgym-BattleshipHard-v0": (BattleshipBatch, {"board_size": 12}),
    "popgym-MineSweeperEasy-v0": (MineSweeperBatch, {"difficulty": "easy"}),
    "popgym-MineSweeperMedium-v0": (MineSweeperBatch, {"difficulty": "medium"}),
    "popgym-MineSweeperHard-v0": (MineSweeperBatch, {"difficulty": "hard"}),
}

"""POPGym's card games against POPGym's own environments: the same decks, step by step."""
import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401  registers POPGym's tasks
from envs.batch import row
from envs.popgym_cards import (
    LEVELS,
    AutoencodeBatch,
    ConcentrationBatch,
    CountRecallBatch,
    HigherLowerBatch,
    RepeatFirstBatch,
    RepeatPreviousBatch,
)

KINDS = {"colors": 2, "suits": 4, "ranks": 13}


def theirs(env_id):
    return gym.make(env_id).unwrapped


def ours(env_id, num_envs, **kwargs):
    batch_class, arguments = LEVELS[env_id]
    return batch_class(num_envs, **arguments, **kwargs)


def decks_of(world, deck_type):
    """The decks of POPGym's environment after its reset, as the batch keeps them."""
    if hasattr(world, "value_deck"):
        return [getattr(deck, f"{deck_type}_idx")[deck.idx[::-1]]
                for deck in (world.value_deck, world.query_deck)]
    cards = getattr(world.deck, f"{deck_type}_idx")[world.deck.idx]
    return [cards if hasattr(world, "facedown_card") else cards[::-1]]      # deals from the end


def copy_decks(batch, worlds):
    """From now on the batch's episodes have the decks of POPGym's environments, reset with new seeds.

    Returns the list of POPGym's first observations.
    """
    begin, first, seeds = batch.begin, [None] * len(worlds), iter(range(10**6))

    def begin_together(rows):
        for i in rows:
            first[i], _ = worlds[i].reset(seed=next(seeds))
        decks = zip(*(decks_of(worlds[i], batch.deck_type) for i in rows))
        batch.shuffled = lambda number: np.array(next(decks))
        begin(rows)

    batch.begin = begin_together
    return first


def knows_all(world):
    """The best action, read from the hidden state of POPGym's environment."""
    name, deck = type(world).__name__, getattr(world, "deck", None)
    if name.startswith("RepeatPrevious"):
        hand = deck["player"]
        return deck.suits_idx[hand[-world.k]] if len(hand) >= world.k else 0
    if name.startswith("RepeatFirst"):
        return world.card
    if name.startswith("Autoencode"):
        return deck.suits_idx[deck["system"][-1]]
    if name.startswith("CountRecall"):
        return world.counts[world.query]
    if name.startswith("HigherLower"):
        now, after = deck.ranks_idx[[deck["player"][-1], deck.idx[len(deck) - 1]]]
        return int(after < now)
    hidden = [place for place in range(len(deck)) if place not in deck["face_up_idx"]]
    if not deck["in_play"]:
        return hidden[0]
    first = deck["in_play_idx"][0]
    return next(place for place in hidden if place != first and world.state[place] == world.state[first])


def play(world, rng, skill):
    """With `skill` the best action; else a random one, or in Concentration one that turns no new card."""
    if rng.random() < skill:
        return int(knows_all(world))
    if hasattr(world, "facedown_card") and rng.random() < 0.5:
        return int(rng.choice([0, *world.deck["face_up_idx"], *world.deck["in_play_idx"]]))
    return int(rng.integers(world.action_space.n))


def equal(seen, expected):
    """Values, shapes and kinds."""
    if isinstance(expected, tuple):
        return isinstance(seen, tuple) and len(seen) == len(expected) and all(map(equal, seen, expected))
    return np.array_equal(seen, expected) and seen.dtype == np.asarray(expected).dtype == np.int64


@pytest.mark.parametrize("env_id", LEVELS)
def test_every_step_equals_popgyms(env_id):
    """Two episodes or more a row, by random and by good players, whose rows begin at different times."""
    skills = [0, 0, 0.7, 0.9, 1, 1]
    worlds, batch = [theirs(env_id) for _ in skills], ours(env_id, len(skills))
    first, rng = copy_decks(batch, worlds), np.random.default_rng(0)
    length = 2 * batch.num_cards
    obs, infos = batch.reset()
    episodes, returns, total = np.zeros(6, int), [], np.zeros(6)
    for t in range(3 * length):
        if t == 7:                                          # three rows begin anew, the others go on
            before = obs
            obs, _ = batch.reset(options={"reset_mask": np.arange(6) % 2 == 1})
            assert all(equal(row(obs, i), row(before, i)) for i in (0, 2, 4))
            assert all(equal(row(obs, i), first[i]) for i in (1, 3, 5))
            total[1::2] = 0
        actions = [play(world, rng, skill) for world, skill in zip(worlds, skills)]
        steps = [world.step(action) for world, action in zip(worlds, actions)]
        obs, reward, terminated, truncated, infos = batch.step(actions)
        total += reward
        for i, (expected, *ended, _) in enumerate(steps):
            assert [reward[i], terminated[i], truncated[i]] == ended
            done = terminated[i] or truncated[i]
            assert equal(infos["final_obs"][i] if done else row(obs, i), expected)
            assert batch.single_observation_space.contains(row(obs, i))
            if done:
                assert equal(row(obs, i), first[i])         # of the next episode, with its own deck
                assert infos["final_info"] == {}
                returns.append((skills[i], total[i]))
                total[i], episodes[i] = 0, episodes[i] + 1
        if (episodes >= 2).all():
            break
    assert (episodes >= 2).all()
    best = [total for skill, total in returns if skill == 1]
    np.testing.assert_allclose(best, 1, atol=0.15 if "Higher" in env_id else 1e-9)      # equal ranks pay 0
    assert max(total for skill, total in returns if skill == 0) < 0.5


@pytest.mark.quick
def test_concentration_every_kind_of_turn():
    """Each case of the rules once, on POPGym's environment and on the batch."""
    world, batch = theirs("popgym-ConcentrationHard-v0"), ours("popgym-ConcentrationHard-v0", 1)
    copy_decks(batch, [world])
    batch.reset()
    board, fails = batch.cards[0], 1 / 104
    a, b, c, d = np.flatnonzero(board == board[0])[[0, 1, 2, 3]]
    other = np.flatnonzero(board != board[0])[0]
    plan = [(a, 0), (a, -2 * fails),                        # the same card twice
            (a, 0), (other, -2 * fails),                    # two of different ranks
            (a, 0), (b, 1 / 26),                            # a pair
            (b, -fails),                                    # first card up: the turn ends
            (c, 0), (a, -2 * fails),                        # second card up, although of the same rank
            (d, 0), (c, 1 / 26)]
    for action, pays in plan:
        expected, reward, *_ = world.step(action)
        obs, rewards, *_ = batch.step([action])
        assert rewards[0] == reward == pays
        np.testing.assert_array_equal(obs[0], expected)
    assert (obs[0] != 13).sum() == 4 and batch.face_up.sum() == 4


def test_concentration_can_end_both_ways_at_once():
    """The last pair in the last step: terminated and truncated."""
    world, batch = theirs("popgym-ConcentrationEasy-v0"), ours("popgym-ConcentrationEasy-v0", 1)
    copy_decks(batch, [world])
    batch.reset()
    for t in range(104):
        action = 0 if t < 52 else knows_all(world)          # 26 times the same card twice
        expected = world.step(action)[1:4]
        _, reward, terminated, truncated, _ = batch.step([action])
        assert (reward[0], terminated[0], truncated[0]) == expected
    assert terminated[0] and truncated[0]


@pytest.mark.parametrize("env_id", [env_id for env_id in LEVELS if "Easy" in env_id or "Recall" in env_id
                                    or "ConcentrationHard" in env_id])
def test_decks_are_shuffled_as_popgyms(env_id):
    """Every deck is complete; each kind is as likely at each place, and after each other, as by chance."""
    world, batch, decks = theirs(env_id), ours(env_id, 2000), []
    batch.reset(seed=0)
    for seed in range(400):
        world.reset(seed=seed)
        decks.append(decks_of(world, batch.deck_type))
    mine = [batch.cards, batch.queries] if "Recall" in env_id else [batch.cards]
    kinds, cards = KINDS[batch.deck_type], batch.num_cards
    for both in zip(mine, map(np.array, zip(*decks))):
        for drawn in both:
            assert (np.sort(drawn, 1) == np.arange(kinds).repeat(cards // kinds)).all()
            noise = 5 / np.sqrt(len(drawn) * kinds)         # five standard deviations
            for kind in range(kinds):
                np.testing.assert_allclose((drawn == kind).mean(0), 1 / kinds, atol=noise)
            pairs = (drawn[:, 1:] == drawn[:, :-1]).mean()
            assert pairs == pytest.approx((cards / kinds - 1) / (cards - 1), abs=0.01)
    if "Recall" in env_id:                                  # the two decks know nothing of each other
        assert (batch.cards == batch.queries).mean() == pytest.approx(1 / kinds, abs=0.01)


@pytest.mark.quick
def test_bad_arguments():
    for batch_class, kwargs in ((RepeatFirstBatch, {"num_decks": 0}), (RepeatPreviousBatch, {"k": 0}),
                                (RepeatPreviousBatch, {"k": 52}), (CountRecallBatch, {"deck_type": "suit"}),
                                (ConcentrationBatch, {"deck_type": "suits"}),
                                (ConcentrationBatch, {"num_decks": 1.5})):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            batch_class(1, **kwargs)


@pytest.mark.quick
def test_what_is_printed():
    def begun(batch_class, *decks, **kwargs):
        batch = batch_class(1, render_mode="ansi", **kwargs)
        decks = [np.resize(deck, (1, 52)) for deck in decks]
        batch.shuffled = lambda number: decks.pop(0)
        batch.reset()
        return batch

    def printed(batch, *actions):
        for action in actions:
            batch.step([action])
        return batch.render()[0]

    batch = begun(RepeatPreviousBatch, [0, 1, 2, 3], k=2)
    assert printed(batch) == "card 1 of 52: ♠   asked: -"
    assert printed(batch, 0, 0) == "card 3 of 52: ♣   asked: ♦"
    assert printed(begun(RepeatFirstBatch, [3, 1]), 0) == "card 2 of 52: ♦   asked: ♥"
    batch = begun(AutoencodeBatch, [0, 1, 2, 3])
    assert printed(batch) == "card 1 of 52: ♠"
    assert printed(batch, *[0] * 51) == "card 52 of 52: ♥   asked: card 52, ♥"
    assert printed(batch, 0) == "no card   asked: card 51, ♣"
    batch = begun(CountRecallBatch, [0, 1], [1, 1])
    assert printed(batch) == "card 1 of 52: b   asked: how many r, 0"
    assert printed(batch, 0) == "card 2 of 52: r   asked: how many r, 1"
    assert printed(begun(HigherLowerBatch, [9, 12]), 0) == "card 2 of 52: k"
    batch = begun(ConcentrationBatch, [9, 9, 0, 12])
    *board, last = printed(batch, 0, 1, 3).split("\n")
    assert board[0].split() == ["10", "10", "?", "k", *"?????????"] and len(board) == 4
    assert {len(line) for line in board} == {38} and last == "2 of 52 cards lie face up after 3 steps"


@pytest.mark.quick
@pytest.mark.parametrize("level, rows", [("Easy", 4), ("Medium", 8), ("Hard", 4)])
def test_concentrations_picture(level, rows):
    batch = ours(f"popgym-Concentration{level}-v0", 1, render_mode="rgb_array")
    batch.reset(seed=0)
    grey = batch.render()[0]
    assert grey.shape == (12 * rows, 12 * 13, 3) and grey.dtype == np.uint8
    batch.step([15])
    changed = (batch.render()[0] != grey).any(2)[6::12, 6::12]              # the middle of each cell
    assert np.flatnonzero(changed).tolist() == [15]

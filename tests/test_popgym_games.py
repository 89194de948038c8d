"""POPGym's bandit and board games against POPGym's own environments: the same boards, step by step."""
import copy
from types import SimpleNamespace

import numpy as np
import popgym
import pytest

from envs.popgym_games import LEVELS, BattleshipBatch, MineSweeperBatch, MultiarmedBanditBatch

CLASSES = {kwargs["id"]: env_class for env_class, kwargs in popgym.envs.ALL.items()}
BANDITS, SHIPS, MINES = ([env_id for env_id in LEVELS if name in env_id]
                         for name in ("Multiarmed", "Battleship", "Mine"))
CLEAR, MINE, VIEWED = range(3)


def theirs(env_id):
    return CLASSES[env_id]()


def ours(env_id, num_envs, **kwargs):
    batch_class, arguments = LEVELS[env_id]
    return batch_class(num_envs, **arguments, **kwargs)


def hidden(game):
    """What an episode draws at its beginning, of POPGym's environment or [N, ...] of the batch."""
    if hasattr(game, "bandits"):
        return game.bandits
    if isinstance(game, BattleshipBatch):
        return game.ships
    if isinstance(game, MineSweeperBatch):
        return game.mines
    return game.board == 1 if hasattr(game, "board") else game.hidden_grid == MINE


def copy_boards(batch, worlds):
    """From now on the batch's episodes have the boards of POPGym's environments, reset with new seeds.

    Returns the list of POPGym's first observations.
    """
    begin, first, seeds = batch.begin, [None] * len(worlds), iter(range(10**6))

    def begin_together(rows):
        begin(rows)
        for i in rows:
            first[i], _ = worlds[i].reset(seed=next(seeds))
            hidden(batch)[i] = hidden(worlds[i])

    batch.begin = begin_together
    return first


def lend_draws(batch, worlds):
    """POPGym's bandits pay in the next step if the batch's do."""
    drawn = copy.deepcopy(batch.np_random).random(len(worlds))
    for i, world in enumerate(worlds):
        world.np_random = SimpleNamespace(random=lambda i=i: float(drawn[i]))


def play(world, rng, player):
    """"random"; "good": plays as if it saw everything; "bad": pays nothing or late, but steps on no mine."""
    if player == "random":
        return world.action_space.sample()
    if hasattr(world, "bandits"):
        return int(world.bandits.argmax() if player == "good" else world.bandits.argmin())
    if hasattr(world, "board"):                             # "bad" hits the last ship at the last moment
        new = world.guesses == 0
        wanted = new & (world.board == (player == "good"))
        tiles = np.argwhere(wanted if wanted.any() else new)
    else:                                                   # "bad" looks at each tile twice
        again = player == "bad" and world.timestep % 2
        tiles = np.argwhere(world.hidden_grid == (VIEWED if again else CLEAR))
    return tiles[rng.integers(len(tiles))]


def same(seen, expected):
    return seen == expected and seen.dtype == np.int64 and isinstance(expected, int)


@pytest.mark.parametrize("env_id", LEVELS)
def test_every_step_equals_popgyms(env_id):
    """Three episodes or more a row, by random, good and bad players, whose rows begin at different times."""
    players = ["random", "random", "random", "good", "good", "bad"]
    worlds, batch = [theirs(env_id) for _ in players], ours(env_id, len(players))
    for i, world in enumerate(worlds):
        world.action_space.seed(i)
    first, rng = copy_boards(batch, worlds), np.random.default_rng(0)
    met, returns = set(), {player: [] for player in players}
    obs, infos = batch.reset(seed=0)
    assert all(map(same, obs, first)) and infos == {}
    episodes, total, t = np.zeros(6, int), np.zeros(6), 0
    while (episodes < 3).any():
        if t == 7:                                          # three rows begin anew, the others go on
            before = obs
            obs, _ = batch.reset(options={"reset_mask": np.arange(6) % 2 == 1})
            assert all(same(obs[i], first[i] if i % 2 else before[i].item()) for i in range(6))
            total[1::2] = 0
        if env_id in BANDITS:
            lend_draws(batch, worlds)
        actions = [play(world, rng, player) for world, player in zip(worlds, players)]
        steps = [world.step(action) for world, action in zip(worlds, actions)]
        obs, reward, terminated, truncated, infos = batch.step(actions)
        assert (batch.observe() == obs).all() and batch.observation_space.contains(obs)
        total, t = total + reward, t + 1
        for i, (expected, *others, _) in enumerate(steps):
            assert [reward[i], terminated[i], truncated[i]] == others
            done = terminated[i] or truncated[i]
            assert same(infos["final_obs"][i] if done else obs[i], expected)
            if done:
                assert same(obs[i], 0) and batch.t[i] == 0  # of the next episode
                assert infos["final_info"] == {}
                met.add((terminated[i], truncated[i]))
                returns[players[i]].append(total[i])
                total[i], episodes[i] = 0, episodes[i] + 1
    if env_id in BANDITS:
        assert met == {(False, True)} and min(returns["good"]) > 0.5 > -0.5 > max(returns["bad"])
    else:
        np.testing.assert_allclose(returns["good"], 1)
        assert max(returns["random"]) < 0.9
    if env_id in SHIPS:
        assert met == {(True, False), (False, True), (True, True)}
        assert returns["bad"] == pytest.approx([0, 0, 0])   # every tile once
    if env_id in MINES:
        assert met == {(True, False), (False, True)}


@pytest.mark.parametrize("env_id", BANDITS + SHIPS)
def test_one_with_a_seed_is_popgyms_with_this_seed(env_id):
    """Bandits, ships and pay are drawn in POPGym's order; a second episode goes on with the same numbers.

    Not so mines: Generator.choice() draws for a single board only.
    """
    world, batch = theirs(env_id), ours(env_id, 1)
    world.action_space.seed(0)
    for seed in range(4):
        expected, _ = world.reset(seed=seed)
        obs, _ = batch.reset(seed=seed)
        episodes = 0
        while episodes < 2:
            np.testing.assert_array_equal(hidden(batch)[0], hidden(world))
            assert same(obs[0], expected)
            action = play(world, None, "random")
            expected, *others, _ = world.step(action)
            obs, *seen, infos = batch.step([action])
            assert [x[0] for x in seen] == others
            if infos:
                assert same(infos["final_obs"][0], expected)
                episodes, expected = episodes + 1, world.reset()[0]


@pytest.mark.quick
@pytest.mark.parametrize("env_id", SHIPS)
def test_ships_are_popgyms_from_the_same_seed(env_id):
    world, batch = theirs(env_id), ours(env_id, 1)
    for seed in range(300):
        world.reset(seed=seed)
        batch.reset(seed=seed)
        np.testing.assert_array_equal(batch.ships[0], world.board)


def drawn_by_both(env_id, rows=3000, resets=600):
    """What `rows` rows of the batch draw, at their second episode, and what POPGym draws."""
    world, batch, boards = theirs(env_id), ours(env_id, rows), []
    batch.reset(seed=0)
    batch.reset()
    for seed in range(resets):
        world.reset(seed=seed)
        boards.append(hidden(world))
    return hidden(batch), np.array(boards)


@pytest.mark.parametrize("env_id", SHIPS)
def test_ships_lie_where_popgyms_do(env_id):
    """How often a ship covers a tile, and two neighbours, up to 5 standard deviations."""
    mine, their = drawn_by_both(env_id)
    assert (mine.sum((1, 2)) == 12).all() and (their.sum((1, 2)) == 12).all()
    noise = 5 * np.sqrt(0.25 * (1 / 3000 + 1 / 600))
    for pairs in (lambda b: b, lambda b: b[:, 1:] & b[:, :-1], lambda b: b[:, :, 1:] & b[:, :, :-1]):
        np.testing.assert_allclose(pairs(mine).mean(0), pairs(their).mean(0), atol=noise)
        assert pairs(mine).mean() == pytest.approx(pairs(their).mean(), rel=0.04)
    flips = [mine[:, ::-1], mine[:, :, ::-1], mine.transpose(0, 2, 1)]      # no side is special
    for flipped in flips:
        np.testing.assert_allclose(flipped.mean(0), mine.mean(0), atol=5 * np.sqrt(0.5 / 3000))


@pytest.mark.quick
@pytest.mark.parametrize("env_id", MINES)
def test_mines_lie_where_popgyms_do(env_id):
    """Their number is exact; every tile, and every pair of neighbours, is as likely as another."""
    world, (mine, their) = theirs(env_id), drawn_by_both(env_id)
    mines, tiles = world.num_mines, mine[0].size
    p = mines / tiles
    for boards in (mine, their):
        assert (boards.sum((1, 2)) == mines).all()
        np.testing.assert_allclose(boards.mean(0), p, atol=5 * np.sqrt(p * (1 - p) / len(boards)))
        pairs = (boards[:, :, 1:] & boards[:, :, :-1]).mean()
        assert pairs == pytest.approx(p * (mines - 1) / (tiles - 1), rel=0.25)


@pytest.mark.quick
@pytest.mark.parametrize("env_id", BANDITS)
def test_bandits_are_drawn_as_popgyms(env_id):
    """Uniform in 0 ... 1, each by itself, and they pay as often as they say."""
    mine, their = drawn_by_both(env_id)
    assert mine.dtype == their.dtype == np.float32 and mine[0].shape == their[0].shape
    for bandits in (mine, their):
        assert bandits.min() >= 0 and bandits.max() < 1
        np.testing.assert_allclose(bandits.mean(0), 0.5, atol=5 * np.sqrt(1 / 12 / len(bandits)))
        np.testing.assert_allclose(bandits.std(0), np.sqrt(1 / 12), atol=0.04)
        assert np.abs(np.corrcoef(bandits.T) - np.eye(bandits.shape[1])).max() < 5 / np.sqrt(len(bandits))
    batch = ours(env_id, 5000)
    batch.reset(seed=0)
    batch.bandits[:] = np.linspace(0, 1, batch.bandits.shape[1])
    for bandit, chance in enumerate(batch.bandits[0].tolist()):
        obs, *_ = batch.step(np.full(5000, bandit))
        assert obs.mean() == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / 5000))


@pytest.mark.quick
@pytest.mark.parametrize("drawn", [0.1, np.float32(0.1).item(), 0.09999999])
def test_a_bandit_pays_below_its_chance_in_float32(drawn):
    world, batch = theirs(BANDITS[0]), ours(BANDITS[0], 1)
    world.reset(seed=0)
    batch.reset(seed=0)
    world.bandits[:] = batch.bandits[:] = 0.1
    world.np_random = SimpleNamespace(random=lambda: drawn)
    batch.np_random = SimpleNamespace(random=lambda size: np.full(size, drawn))
    assert same(batch.step([0])[0][0], world.step(0)[0])


@pytest.mark.quick
@pytest.mark.parametrize("env_id", MINES)
def test_clues_are_popgyms(env_id):
    """Of every tile; a mine counts itself."""
    world, batch = theirs(env_id), ours(env_id, 1, autoreset_mode="Disabled")
    for seed in range(5):
        batch.reset(seed=seed)
        world.reset(seed=seed)
        batch.mines[0] = world.hidden_grid == MINE
        for tile in np.ndindex(*world.dims):
            obs, *_ = batch.step([tile])
            assert obs[0] == world.neighbor_grid[tile]


@pytest.mark.quick
def test_minesweeper_every_kind_of_step():
    """POPGym's rewards, and what the last step says: a win is no truncation, one wasted step loses it."""
    tiles = [(y, x) for y in range(4) for x in range(4)][2:]                # without the two mines
    for plan, ends in ((tiles, (True, False)), (tiles[:1] + tiles[:13], (False, True)),
                       (tiles[:1] + tiles[:12] + [(0, 0)], (True, False)), ([(0, 1)], (True, False))):
        world, batch = theirs("popgym-MineSweeperEasy-v0"), ours("popgym-MineSweeperEasy-v0", 1)
        world.reset(seed=0)
        batch.reset(seed=0)
        world.hidden_grid[:], batch.mines[:] = CLEAR, False
        world.hidden_grid[0, :2], batch.mines[0, 0, :2] = MINE, True
        for tile in plan:
            _, reward, *_, terminated, truncated, _ = world.step(tile)
            _, *seen, _ = batch.step([tile])
            assert [x[0] for x in seen] == [reward, terminated, truncated]
        assert (terminated, truncated) == ends


@pytest.mark.quick
def test_bad_arguments():
    for batch_class, kwargs in ((MultiarmedBanditBatch, {"num_bandits": 0}),
                                (MultiarmedBanditBatch, {"episode_length": 1.5}),
                                (BattleshipBatch, {"board_size": 0}), (BattleshipBatch, {"ship_sizes": [11]}),
                                (MineSweeperBatch, {"difficulty": "Easy"})):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            batch_class(1, **kwargs)


@pytest.mark.quick
def test_what_is_printed():
    batch = ours("popgym-MultiarmedBanditEasy-v0", 1, render_mode="ansi")
    batch.reset(seed=0)
    batch.bandits[:] = np.linspace(0, 0.98, 10)
    batch.step([0])
    assert batch.render() == ("step   1   paid 0   best: bandit 9, 0.98",)
    batch = ours("popgym-BattleshipEasy-v0", 1, render_mode="ansi")
    batch.reset(seed=0)
    batch.ships[:], batch.ships[0, 0, 2] = False, True
    for tile in ((0, 2), (1, 0)):
        batch.step([tile])
    assert batch.render()[0].split("\n") == ["..x.....", "o......."] + ["........"] * 6
    batch = ours("popgym-MineSweeperEasy-v0", 1, render_mode="ansi", autoreset_mode="Disabled")
    batch.reset(seed=0)
    batch.mines[:] = False
    batch.mines[0, 0, :2] = True
    for tile in ((1, 0), (0, 2), (3, 3), (0, 0)):
        batch.step([tile])
    assert batch.render()[0].split("\n") == ["*.1.", "2...", "....", "...0"]


@pytest.mark.quick
@pytest.mark.parametrize("env_id", SHIPS + MINES)
def test_pictures_show_the_same_boards(env_id):
    batch = ours(env_id, 2, render_mode="rgb_array", autoreset_mode="Disabled")
    batch.reset(seed=0)
    side, seen = hidden(batch).shape[1], {}
    before = batch.render()[1]
    for tile in np.ndindex(side, side):
        batch.step([tile] * 2)
    pictures, texts = batch.render(), [batch.text(i) for i in range(2)]
    assert before.shape == (12 * side, 12 * side, 3) and before.dtype == np.uint8
    assert len(np.unique(before[6::12, 6::12].reshape(-1, 3), axis=0)) == 1
    for picture, text in zip(pictures, texts):              # the middle of each tile
        for colour, symbol in zip(picture[6::12, 6::12].reshape(-1, 3), text.replace("\n", "")):
            assert seen.setdefault(symbol, tuple(colour)) == tuple(colour)
    assert len({*seen.values(), tuple(before[6, 6])}) == len(seen) + 1

"""T-Maze, Visual Match, Key-to-Door: scripted policies, known returns, phases, what is drawn when."""
import itertools

import gymnasium as gym
import numpy as np
import pytest

import envs as tasks  # noqa: F401  (registers them)

RIGHT, UP, LEFT, DOWN = range(4)
NORTH, SOUTH, WEST, EAST = range(4)
PLAYER, APPLE, INDICATOR = (228, 148, 109), (140, 178, 0), (255, 255, 255)
PURE = {(255, 0, 0), (0, 255, 0), (0, 0, 255)}


def returns(envs, policy, seed=0):
    """One episode of every environment: (return, success) [N] each. policy(obs, t) -> actions [N]"""
    obs, _ = envs.reset(seed=seed)
    total, t = np.zeros(envs.num_envs), 0
    while True:
        obs, reward, terminated, truncated, infos = envs.step(policy(obs, t))
        total, t = total + reward, t + 1
        assert not truncated.any() and terminated.all() == terminated.any()     # all have one length
        if terminated.all():
            return total, infos["final_info"]["success"]


class Rememberer:
    """To the oracle, to the junction, then where the cue said."""

    def __init__(self, oracle, length):
        self.route = [LEFT] * oracle + [RIGHT] * (oracle + length)
        self.cue = 0

    def __call__(self, obs, t):
        self.cue = np.where(obs[:, 0] == 0, self.cue + obs[:, 1], self.cue)
        if t == len(self.route):
            return np.where(self.cue > 0, UP, DOWN)
        return np.full(len(obs), self.route[t])


@pytest.mark.quick
@pytest.mark.parametrize("env_id, oracle", [("TMazePassive-v0", 0), ("TMazeActive-v0", 1)])
@pytest.mark.parametrize("length", [1, 5, 50])
@pytest.mark.parametrize("penalty", ["pace", "wrong_action"])
def test_tmaze_optimal_policy(env_id, oracle, length, penalty):
    envs = gym.make_vec(env_id, 64, length=length, penalty=penalty)
    total, success = returns(envs, Rememberer(oracle, length))
    assert (total == 1.0).all() and success.all()
    total, success = returns(envs, lambda obs, t: np.full(64, RIGHT))       # walks on, never turns
    assert (total == 0.0).all() and not success.any()
    assert envs.steps == length + 1 + 2 * oracle


@pytest.mark.parametrize("env_id, always, worst, random", [("TMazePassive-v0", LEFT, -1.0, -0.93),
                                                           ("TMazeActive-v0", UP, -1.2, -0.94)])
def test_tmaze_worst_and_random_returns(env_id, always, worst, random):
    envs = gym.make_vec(env_id, 4_000, length=5)
    first = [LEFT] if env_id == "TMazeActive-v0" else []
    total, _ = returns(envs, lambda obs, t: np.full(4_000, (first + [always] * 20)[t]))
    assert total == pytest.approx(worst)
    rng = np.random.default_rng(0)
    total, _ = returns(envs, lambda obs, t: rng.integers(4, size=4_000))
    assert total.mean() == pytest.approx(random, abs=0.02)


@pytest.mark.parametrize("env_id", ["TMazePassive-v0", "TMazeActive-v0"])
def test_tmaze_best_memoryless_policy_gets_one_half(env_id):
    """All deterministic policies of the observation alone, both goals."""
    envs, best = gym.make_vec(env_id, 64, length=3), -2.0
    for corridor, cue_down, cue_up, junction in itertools.product(range(4), repeat=4):
        table = {(0, 0): corridor, (0, -1): cue_down, (0, 1): cue_up,
                 (1, 0): junction, (1, 1): UP, (1, -1): DOWN}
        total, _ = returns(envs, lambda obs, t: np.array([table[tuple(o)] for o in obs.astype(int).tolist()]))
        up, down = split(envs)
        best = max(best, (total[up].mean() + total[down].mean()) / 2)
    assert best == 0.5


def split(envs):
    """Which environments had which goal in the episode that has just ended: the same draws again."""
    envs.reset(seed=0)
    return envs.goal == 1, envs.goal == -1


@pytest.mark.quick
def test_tmaze_trace_penalties_and_variants():
    env = gym.make("TMazePassive-v0", length=5)
    seed = next(s for s in range(20) if env.reset(seed=s)[0].tolist() == [0, -1])
    trace = [env.reset(seed=seed)[0].tolist()]
    for action in [RIGHT] * 5 + [DOWN]:
        obs, reward, terminated, _, info = env.step(action)
        trace.append(obs.tolist())
    assert trace == [[0, -1]] + [[0, 0]] * 4 + [[1, 0], [1, -1]]
    assert (reward, terminated) == (1.0, True) and info["success"]
    for penalty, expected in (("pace", [-0.2] * 5 + [0.0]), ("wrong_action", [-0.2] + [0.0] * 5)):
        env = gym.make("TMazePassive-v0", length=5, penalty=penalty, distract_reward=0.5)
        env.reset(seed=0)
        rewards = [env.step(action)[1] for action in [LEFT] + [RIGHT] * 5]      # one wrong move
        assert rewards == pytest.approx([expected[0] + 0.5, *expected[1:]])
    env = gym.make("TMazeActive-v0", length=2, ambiguous_position=False, expose_goal=True, add_timestep=True)
    assert env.reset(seed=0)[0].tolist() == [1, 0, 0, 0]
    goal = env.step(LEFT)[0][2]
    assert abs(goal) == 1 and env.step(RIGHT)[0].tolist() == [1, 0, goal, 2]  # it stays in view
    env = gym.make("TMazeActive-v0", length=2)
    env.reset(seed=0)
    assert [abs(env.step(a)[0][1]) for a in (LEFT, LEFT, RIGHT, LEFT)] == [1, 0, 0, 0]  # once only


@pytest.mark.parametrize("kwargs, says", [({"length": 0}, "length"), ({"penalty": "none"}, "penalty"),
                                          ({"expose_goal": True}, "expose_goal needs")])
def test_tmaze_names_what_is_wrong(kwargs, says):
    with pytest.raises(ValueError, match=says):
        gym.make("TMazePassive-v0", **kwargs)


def colours(obs):
    """The colours of an image [3, 5, 5] as a set of triples, and as a 5 x 5 list."""
    rows = obs.transpose(1, 2, 0).tolist()
    return {tuple(c) for row in rows for c in row}, [[tuple(c) for c in row] for row in rows]


@pytest.mark.quick
def test_the_three_phases_and_their_lengths():
    """VisualMatch-60: 15 views of the coloured cell, 60 of the apples, 16 of the doors."""
    env = gym.make("VisualMatchPassive-v0")
    obs, _ = env.reset(seed=0)
    views, ends = [obs], []
    for _ in range(90):
        obs, reward, terminated, truncated, _ = env.step(SOUTH)
        views.append(obs)
        ends.append(terminated or truncated)
    assert ends == [False] * 89 + [True]
    pure = [bool(colours(v)[0] & PURE) for v in views]
    apples = [APPLE in colours(v)[0] for v in views]
    assert pure == [True] * 15 + [False] * 76 and not any(apples[:15]) and not any(apples[75:])
    assert all(v.transpose(1, 2, 0)[2, 2].tolist() == list(PLAYER) for v in views)


def test_visual_match_optimal_and_memoryless_success():
    """Without apples: an agent that remembers gets 5, one that takes the middle door a third of that."""
    envs = gym.make_vec("VisualMatchPassive-v0", 2_000)
    envs.reset(seed=0)
    target, shown = envs.target.copy(), envs.colours[np.arange(2_000), envs.target]
    walk = [[NORTH] * 3 + turn * 3 + [NORTH] for turn in ([WEST], [NORTH], [EAST])]
    assert (np.bincount(target) > 600).all() and len(set(shown)) == 3

    def knowing(obs, t):
        return np.array([walk[k][t - 75] if 75 <= t < 82 else SOUTH for k in target])

    total, success = returns(envs, knowing)
    assert (total == 5.0).all() and success.all()
    middle = [SOUTH] * 75 + walk[1] + [SOUTH] * 8
    total, success = returns(envs, lambda obs, t: np.full(2_000, middle[t]))
    assert success.mean() == pytest.approx(1 / 3, abs=0.04) and set(total) == {0.0, 5.0}


def test_one_choice_only():
    envs = gym.make_vec("VisualMatchPassive-v0", 300, distractor_length=1)
    route = [SOUTH] * 16 + [NORTH] * 4 + [WEST] * 3 + [EAST] * 6 + [SOUTH] * 2  # the middle door, the others
    total, success = returns(envs, lambda obs, t: np.full(300, route[t]))
    assert success.mean() == pytest.approx(1 / 3, abs=0.09) and total.max() == 5.0


def test_doors_get_new_colours_in_every_episode():
    envs = gym.make_vec("VisualMatchPassive-v0", 600)
    envs.reset(seed=0)
    seen = {tuple(c) for c in envs.colours.tolist()}
    assert len(seen) == 6
    first = envs.colours.copy()
    envs.reset()                                            # of the same object
    assert 0.1 < (envs.colours == first).all(1).mean() < 0.25                   # by chance: 1 in 6
    for seed in range(6):
        envs = gym.make_vec("VisualMatchPassive-v0", 50, colours_fixed=True)
        envs.reset(seed=seed)
        first = envs.colours.copy()
        assert len({tuple(c) for c in first.tolist()}) == 1
        envs.reset()
        assert (envs.colours == first).all()


def test_the_active_form_hides_the_colour_in_a_wall():
    """From the lower room it is not always in view. The player cannot enter it."""
    envs = gym.make_vec("VisualMatch-v0", 500)
    obs, _ = envs.reset(seed=0)
    in_view = [bool(colours(o)[0] & PURE) for o in obs]
    assert 0.2 < np.mean(in_view) < 0.8
    assert set(zip(envs.row.tolist(), envs.col.tolist())) == set(itertools.product((4, 5), range(3, 8)))
    rng = np.random.default_rng(0)
    for t in range(14):
        envs.step(rng.integers(4, size=500))
        assert (envs.cells[np.arange(500), envs.row, envs.col] == 0).all()  # always on a blank cell


def key_walk(envs, take):
    """Actions [N] for every step: to the key, if `take`, and at the end two steps north to the door."""
    keys = np.argwhere(envs.cells == 3)
    plans = []
    for n, (_, r, c) in enumerate(keys):
        row, col = envs.row[n], envs.col[n]
        to_gap = np.clip(col, 4, 6) - col
        plan = [EAST if to_gap > 0 else WEST] * abs(to_gap) + [NORTH] * (row - 2)
        across = c - (col + to_gap)
        plan += [EAST if across > 0 else WEST] * abs(across) + ([NORTH] if r == 1 else [])
        plans.append(plan if take else [])
    after = lambda t: NORTH if t < 15 or 75 <= t < 77 else SOUTH               # noqa: E731
    return lambda obs, t: np.array([p[t] if t < len(p) else after(t) for p in plans])


def test_key_to_door_pays_only_with_the_key():
    envs = gym.make_vec("KeyToDoor-v0", 500)
    envs.reset(seed=0)
    places = {tuple(p) for p in np.argwhere(envs.cells == 3)[:, 1:].tolist()}
    assert places == set(itertools.product((1, 2), range(3, 8)))
    total, success = returns(envs, key_walk(envs, True))
    assert (total == 5.0).all() and success.all()
    envs.reset(seed=0)
    south = lambda obs, t: np.full(500, NORTH if t >= 75 else SOUTH)            # noqa: E731
    total, success = returns(envs, south)
    assert (total == 0.0).all() and not success.any()


def test_the_door_is_shut_without_the_key_and_pays_once():
    for take in (False, True):
        env = gym.make("KeyToDoor-v0", distractor_length=1)
        env.reset(seed=0)
        batch = env.unwrapped.batch
        plan, rewards = key_walk(batch, take), []
        if not take:
            plan = lambda obs, t: np.array([SOUTH])                             # noqa: E731
        for t in range(15):
            obs, *_ = env.step(plan(None, t)[0])
        assert batch.has_key[0] == take
        env.step(SOUTH)
        # onto the door, off it, onto it again, through it
        colours = []                                        # of the cell that the player is on
        for action in (NORTH, NORTH, SOUTH, NORTH, NORTH, NORTH):
            obs, reward, *_ = env.step(action)
            rewards.append(reward)
            colours.append(tuple(obs[:, 2, 2].tolist()))
        assert rewards == [0, 5 * take, 0, 0, 0, 0]
        player, door = (228, 148, 109), (134, 206, 235)
        assert colours == [player, door if take else player, *[player] * 4]     # Memory-RL: door over player
        assert (batch.row[0], batch.col[0]) == ((0, 5) if take else (2, 5))  # the board ends there


def test_the_key_does_not_outlive_its_episode():
    env = gym.make("KeyToDoor-v0", distractor_length=1)
    env.reset(seed=0)
    batch = env.unwrapped.batch
    plan = key_walk(batch, True)
    for t in range(15):
        env.step(plan(None, t)[0])
    assert batch.has_key[0]                                 # and the door was not opened
    env.reset(seed=1)
    assert not batch.has_key[0]


def test_the_indicator_is_seen_once():
    env = gym.make("KeyToDoor-v0")
    env.reset(seed=0)
    plan = key_walk(env.unwrapped.batch, True)
    white = []
    for t in range(15):
        env.step(plan(None, t)[0])
        white.append((env.unwrapped.batch.picture(0, 1) == INDICATOR).all(-1).any())
    assert sum(white) == 1


def test_apples_pay_vanish_and_come_back_after_twenty_frames():
    envs = gym.make_vec("KeyToDoor-v0", 400, distractor_length=80)
    obs, _ = envs.reset(seed=0)
    rng, taken, waits = np.random.default_rng(0), {}, set()
    for t in range(1, 95):
        before = envs.cells == 5
        obs, reward, *_ = envs.step(rng.integers(4, size=400))
        here = np.arange(400), envs.row, envs.col
        if 16 <= t < 95:
            now = envs.cells == 5
            assert (before.sum((1, 2)) <= 10).all()
            np.testing.assert_array_equal(reward, before[here].astype(float))   # 1 an apple
            for n in np.flatnonzero(reward):
                taken[n, envs.row[n], envs.col[n]] = t
            for place in zip(*np.nonzero(now & ~before)):
                waits.add(t - taken.pop(place))
        if t == 15:
            assert ((envs.cells == 5).sum((1, 2)) == 10).all()
    assert waits == {21}


@pytest.mark.parametrize("env_id, mean, spread, successes", [("VisualMatchPassive-v0", 6.3, 2.9, 0.067),
                                                             ("KeyToDoor-v0", 5.2, 1.9, 0.017)])
def test_random_policy_gets_what_the_predecessor_measured(env_id, mean, spread, successes):
    """Its figures come from 60 episodes: within three standard errors."""
    envs, rng = gym.make_vec(env_id, 3_000), np.random.default_rng(0)
    total, success = returns(envs, lambda obs, t: rng.integers(4, size=3_000))
    assert total.mean() == pytest.approx(mean, abs=3 * spread / 60**0.5)
    assert total.std() == pytest.approx(spread, rel=0.3)
    standard_error = (successes * (1 - successes) / 60) ** 0.5
    assert success.mean() == pytest.approx(successes, abs=3 * standard_error)


def test_the_picture_of_a_tmaze_shows_the_cue():
    """Though the agent stands on the oracle, and which of the two goals is right."""
    shown = {}
    env = gym.make("TMazePassive-v0", render_mode="rgb_array")
    for seed in range(10):
        env.reset(seed=seed)
        oracle = env.render()[8:16, :8].reshape(-1, 3).tolist()
        assert [240, 150, 0] in oracle and [40, 80, 220] in oracle
        shown[int(env.unwrapped.batch.goal[0])] = oracle.index([0, 160, 0]) // 8
        env.step(0)
        assert [240, 150, 0] not in env.render()[8:16].reshape(-1, 3).tolist()
    assert shown == {1: 0, -1: 6}                           # an edge of the oracle, above or below

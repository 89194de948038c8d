"""POPGym's cart poles and pendulums against POPGym's own environments: the same states, step by step."""
import gymnasium as gym
import numpy as np
import popgym
import pytest

from envs.popgym_control import (
    LEVELS,
    NoisyPositionOnlyCartPoleBatch,
    PositionOnlyPendulumBatch,
    VelocityOnlyCartPoleBatch,
)

CLASSES = {kwargs["id"]: env_class for env_class, kwargs in popgym.envs.ALL.items()}
EASY = [env_id for env_id in LEVELS if "Easy" in env_id]


def theirs(env_id):
    return CLASSES[env_id]()


def ours(env_id, num_envs, **kwargs):
    batch_class, arguments = LEVELS[env_id]
    return batch_class(num_envs, **arguments, **kwargs)


class Recorder:
    """The generator of POPGym's environment; it keeps the last noise."""

    def __init__(self, rng):
        self.rng, self.uniform = rng, rng.uniform

    def normal(self, *args):
        self.noise = self.rng.normal(*args)
        return self.noise


def copy_states(batch, worlds):
    """From now on the batch begins as POPGym's environments do, and has their noise.

    Returns the list of POPGym's first observations.
    """
    begin, first = batch.begin, [None] * len(worlds)
    for seed, world in enumerate(worlds):
        world.reset(seed=seed)
        world.np_random = Recorder(world.np_random)

    def begin_together(rows):
        for i in rows:
            first[i], _ = worlds[i].reset()
        begin(rows)
        for i in rows:
            if hasattr(batch, "theta"):
                batch.theta[i], batch.velocity[i] = worlds[i].state
            else:
                batch.state[i] = worlds[i].state

    def draw_noise(rows):
        batch.noise[rows] = [worlds[i].np_random.noise for i in rows]

    batch.begin, batch.draw_noise = begin_together, draw_noise
    return first


def play(world, rng, skill):
    """With probability `skill` to balance the pole or to spin the pendulum, else at random."""
    knows = rng.random() < skill
    if isinstance(world.action_space, gym.spaces.Discrete):
        x, x_dot, theta, theta_dot = world.state
        return int(0.1 * x + 0.2 * x_dot + 3 * theta + theta_dot > 0) if knows else int(rng.integers(2))
    torque = 3 * np.sign(world.state[1]) if knows else rng.uniform(-3, 3)   # is clipped to 2
    return np.array([torque], np.float32)


def check(batch, i, reward, terminated, truncated, expected):
    """Row i of the step. x**2 of a single number rounds differently, in the pendulum's reward."""
    assert [terminated[i], truncated[i]] == [*expected[1:]]
    if hasattr(batch, "theta"):
        assert reward[i] == pytest.approx(expected[0], rel=0, abs=1e-12)
    else:
        assert reward[i] == expected[0]


def same(seen, expected):
    return np.array_equal(seen, expected) and seen.dtype == expected.dtype == np.float32


@pytest.mark.parametrize("env_id", LEVELS)
def test_every_step_equals_popgyms(env_id):
    """Two episodes or more a row, played badly and well, whose rows begin at different times."""
    skills = [0, 0, 0.5, 0.9, 1, 1]
    worlds, batch = [theirs(env_id) for _ in skills], ours(env_id, len(skills))
    first, rng, met = copy_states(batch, worlds), np.random.default_rng(0), set()
    obs, infos = batch.reset()
    assert all(map(same, obs, first)) and infos == {}
    episodes, total, best = np.zeros(6, int), np.zeros(6), -np.inf
    while (episodes < 2).any():
        if episodes.sum() == 0 and batch.t[0] == 7:         # three rows begin anew, the others go on
            before = obs
            obs, _ = batch.reset(options={"reset_mask": np.arange(6) % 2 == 1})
            assert all(same(obs[i], first[i] if i % 2 else before[i]) for i in range(6))
            total[1::2] = 0
        actions = [play(world, rng, skill) for world, skill in zip(worlds, skills)]
        steps = [world.step(action) for world, action in zip(worlds, actions)]
        obs, reward, terminated, truncated, infos = batch.step(actions)
        assert same(batch.observe(), obs) and batch.observation_space.contains(obs)
        total += reward
        for i, (expected, *others, _) in enumerate(steps):
            check(batch, i, reward, terminated, truncated, others)
            done = terminated[i] or truncated[i]
            assert same(infos["final_obs"][i] if done else obs[i], expected)
            if done:
                assert same(obs[i], first[i]) and batch.t[i] == 0           # of the next episode
                assert infos["final_info"] == {}
                met.add((terminated[i], truncated[i]))
                best, total[i], episodes[i] = max(best, total[i]), 0, episodes[i] + 1
    if "Pendulum" in env_id:
        assert met == {(False, True)} and best < 1
    else:
        assert met == {(True, False), (False, True)} and best == pytest.approx(1)


@pytest.mark.parametrize("env_id", LEVELS)
@pytest.mark.parametrize("seed", range(3))
def test_one_with_a_seed_is_popgyms_with_this_seed(env_id, seed):
    """States and noise are drawn in POPGym's order; three episodes go on with the same numbers."""
    world, batch, rng = theirs(env_id), ours(env_id, 1), np.random.default_rng(seed)
    expected, _ = world.reset(seed=seed)
    obs, _ = batch.reset(seed=seed)
    episodes, skill = 0, [0, 1, 0][seed]
    while episodes < 3:
        assert same(obs[0], expected)
        action = play(world, rng, skill)
        expected, *others, _ = world.step(action)
        obs, reward, terminated, truncated, infos = batch.step([action])
        check(batch, 0, reward, terminated, truncated, others)
        if infos:
            assert same(infos["final_obs"][0], expected)
            episodes, expected = episodes + 1, world.reset()[0]


@pytest.mark.quick
@pytest.mark.parametrize("env_id", [env_id for env_id in EASY if "Pole" in env_id])
def test_the_pole_can_fall_in_the_last_step(env_id):
    world, batch = theirs(env_id), ours(env_id, 1)
    world.reset(seed=0)
    batch.reset(seed=0)
    world.num_steps = batch.t[0] = 199
    world.state = np.array([2.39, 1, 0, 0])
    batch.state[0] = world.state
    expected = world.step(1)[1:4]
    _, reward, terminated, truncated, _ = batch.step([1])
    assert (reward[0], terminated[0], truncated[0]) == expected == (1 / 200, True, True)


@pytest.mark.quick
def test_the_first_velocity_only_observation_shows_positions():
    """As in POPGym, at the first reset and after the automatic one."""
    batch = VelocityOnlyCartPoleBatch(4, max_episode_length=2)
    obs, _ = batch.reset(seed=0)
    for _ in range(2):
        assert same(obs, batch.state[:, [0, 2]].astype(np.float32))
        obs, *_ = batch.step([0, 1, 0, 1])
        assert same(obs, batch.state[:, [1, 3]].astype(np.float32))
        obs, *_ = batch.step([0, 1, 0, 1])


@pytest.mark.quick
@pytest.mark.parametrize("env_id", EASY)
def test_states_are_drawn_as_popgyms(env_id):
    """The range, mean and spread of each number of the state, at the first reset and an automatic one."""
    batch = ours(env_id, 3000)
    high = np.array([np.pi, 1.0]) if "Pendulum" in env_id else np.full(4, 0.05)
    actions = batch.action_space.sample()
    for _ in range(2):
        batch.reset(seed=0)
        for _ in range(2):
            state = np.stack([batch.theta, batch.velocity], 1) if "Pendulum" in env_id else batch.state
            scaled = state / high                           # [3000, numbers]
            assert (np.abs(scaled) <= 1).all()
            np.testing.assert_allclose(scaled.mean(0), 0, atol=5 * np.sqrt(1 / 3 / 3000))
            np.testing.assert_allclose((scaled**2).mean(0), 1 / 3, atol=5 * np.sqrt(4 / 45 / 3000))
            assert np.abs(np.corrcoef(scaled.T) - np.eye(len(high))).max() < 0.1
            batch.t[:] = batch.max_steps - 1
            batch.step(actions)


@pytest.mark.quick
@pytest.mark.parametrize("env_id", [env_id for env_id in LEVELS if "Noisy" in env_id])
def test_noise_is_drawn_as_popgyms(env_id):
    """In every step anew, for every row and number by itself."""
    batch, drawn = ours(env_id, 2000), []
    batch.reset(seed=0)
    for _ in range(3):
        drawn.append(batch.noise.copy())
        batch.step(batch.action_space.sample())
    columns = np.concatenate(drawn, 1)                      # [2000, 6]
    sigma = theirs(env_id).noise_sigma[0]
    np.testing.assert_allclose(columns.mean(0), 0, atol=5 * sigma / np.sqrt(2000))
    np.testing.assert_allclose(columns.std(0), sigma, rtol=5 / np.sqrt(2 * 2000))
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.12


@pytest.mark.quick
def test_bad_arguments():
    for batch_class, kwargs in ((NoisyPositionOnlyCartPoleBatch, {"max_episode_length": 0}),
                                (PositionOnlyPendulumBatch, {"max_episode_length": 1.5})):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            batch_class(1, **kwargs)


@pytest.mark.quick
def test_what_is_printed():
    batch = ours("popgym-VelocityOnlyCartpoleEasy-v0", 1, render_mode="ansi")
    batch.reset(seed=0)
    batch.state[:], batch.t[:] = [[1, 2, 0.1, -3]], 5
    assert batch.render() == ("step   5   x +1.00 m   pole  +5.7 deg   seen [ 2. -3.]",)
    batch = ours("popgym-NoisyPositionOnlyPendulumEasy-v0", 1, render_mode="ansi")
    batch.reset(seed=0)
    batch.theta[:], batch.noise[:] = np.pi / 2, [[-0.5, 0.2]]
    assert batch.render() == ("step   0    90.0 deg   torque +0.00 Nm   seen [-0.5  1. ]",)


@pytest.mark.quick
@pytest.mark.parametrize("env_id", EASY)
def test_pictures_are_gymnasiums(env_id):
    batch, world = ours(env_id, 2, render_mode="rgb_array"), theirs(env_id)
    batch.reset(seed=0)
    world.reset(seed=0)
    world.render_mode = "rgb_array"
    action = batch.action_space.sample()
    batch.step(action)
    for i, picture in enumerate(batch.render()):
        if "Pendulum" in env_id:
            world.state, world.last_u = (batch.theta[i], batch.velocity[i]), action[i, 0]
        else:
            world.state = batch.state[i]
        np.testing.assert_array_equal(picture, world.render())

"""Tasks with continuous actions: dynamics against their definitions, what scripted policies get."""
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv

import envs as tasks  # noqa: F401  (registers them)


def asked(bits, mode, horizon):
    """What CountInput asks for after these bits, from its definition."""
    recent = bits[-horizon:]
    if mode == "count_input":
        return sum(recent)
    return next((i for i, bit in enumerate(reversed(recent)) if bit), horizon)


@pytest.mark.quick
@pytest.mark.parametrize("mode, horizon, divisor", [("count_input", 10, 10), ("count_input", 3, 4),
                                                    ("count_steps_since_last_input", 10, 10),
                                                    ("count_steps_since_last_input", 4, 5)])
def test_count_input_asks_pays_and_counts_hits(mode, horizon, divisor):
    kwargs = dict(mode=mode, horizon=horizon, divisor=divisor, episode_length=60)
    envs = gym.make_vec("CountInput-v0", 5, **kwargs)
    obs, _ = envs.reset(seed=0)
    rng, bits, hits = np.random.default_rng(0), [[] for _ in range(5)], np.zeros(5)
    for t in range(60):
        action = rng.uniform(-1.5, 1.5, (5, 1))             # clipped by the task
        numbers = []
        for i in range(5):
            bits[i].append(int(obs[i, 0]))
            numbers.append(asked(bits[i], mode, horizon))
        answer = divisor * action[:, 0].clip(-1, 1)
        hits += np.round(answer) == numbers
        obs, reward, terminated, truncated, infos = envs.step(action)
        np.testing.assert_allclose(reward, -np.abs(answer - numbers))
        assert not terminated.any() and truncated.all() == (t == 59)
    np.testing.assert_allclose(infos["final_info"]["success"], hits / 60)


def returns_of(policy, episodes=400, **kwargs):
    """Mean return of episodes played with policy(history of bits [N, t + 1]) -> answers [N]."""
    envs = gym.make_vec("CountInput-v0", episodes, **kwargs)
    obs, _ = envs.reset(seed=1)
    history, total, done = np.zeros((episodes, 0)), 0, False
    while not done:
        history = np.concatenate([history, obs], 1)
        obs, reward, _, truncated, _ = envs.step(policy(history)[:, None] / 10)
        total, done = total + reward, truncated.all()
    return total.mean()


def test_count_input_returns_of_known_policies():
    """The oracle gets exactly 0; the others the figures of the specification, per 2,000 steps."""
    long = dict(episodes=100, episode_length=2000)
    assert returns_of(lambda bits: bits[:, -10:].sum(1)) == 0
    assert returns_of(lambda bits: np.full(len(bits), 2.0), **long) == pytest.approx(-1933, abs=15)
    # the medians of the count, given the newest bit
    from_last_bit = returns_of(lambda bits: np.where(bits[:, -1] == 1, 3.0, 2.0), **long)
    assert from_last_bit == pytest.approx(-1882, abs=15)

    def wiped(bits):                                        # knows everything since the last multiple of 50
        since = (bits.shape[1] - 1) % 50 + 1
        known = min(10, since)
        guess = np.round((10 - known) * 0.2 - 1e-9) if bits.shape[1] > 50 else 0
        return bits[:, -known:].sum(1) + guess

    assert returns_of(wiped, **long) == pytest.approx(-230, abs=15)


def test_count_input_defaults_and_bad_arguments():
    for horizon, p in ((3, 0.5), (4, 0.5), (10, 0.2), (100, 0.02)):
        assert gym.make("CountInput-v0", horizon=horizon).unwrapped.batch.p == p
    bits = gym.make_vec("CountInput-v0", 2000, input_probability=0.3).reset(seed=0)[0]
    assert bits.mean() == pytest.approx(0.3, abs=0.03)      # the first bit is drawn too
    for kwargs in ({"mode": "count"}, {"horizon": 0}, {"episode_length": 1.5}, {"divisor": 0},
                   {"input_probability": 2}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            gym.make("CountInput-v0", **kwargs)


@pytest.mark.quick
@pytest.mark.parametrize("env_id", ["PendulumMasked-v1", "PendulumSignFlip-v1"])
def test_pendulums_are_gymnasiums(env_id):
    envs, rng = gym.make_vec(env_id, 6), np.random.default_rng(0)
    obs, _ = envs.reset(seed=3)
    singles = [PendulumEnv() for _ in range(6)]
    for i, env in enumerate(singles):
        env.reset(seed=0)
        env.state = np.array([envs.theta[i], envs.velocity[i]])
    assert set(envs.sign) == ({1} if "Masked" in env_id else {-1, 1})
    signs = envs.sign.astype(int)
    for t in range(200):
        action = rng.uniform(-3, 3, (6, 1)).astype(np.float32)
        obs, reward, terminated, truncated, infos = envs.step(action)
        full, rewards = zip(*(env.step(sign * a)[:2] for env, sign, a in zip(singles, signs, action)))
        np.testing.assert_allclose(reward, rewards, rtol=1e-5)
        if t < 199:
            if "Masked" in env_id:
                expected = np.array(full)[:, :2]
            else:
                expected = np.hstack([full, action.clip(-2, 2)])
            np.testing.assert_allclose(obs, expected, rtol=1e-4, atol=1e-5)
        assert truncated.all() == (t == 199) and not terminated.any()
    assert "success" not in infos["final_info"]


def test_the_sign_is_drawn_in_every_episode():
    envs, signs = gym.make_vec("PendulumSignFlip-v1", 50, max_steps=1), []
    envs.reset(seed=0)
    for _ in range(40):
        signs.append(envs.sign.copy())
        envs.step(np.zeros((50, 1)))
    assert np.mean(signs) == pytest.approx(0, abs=0.1) and np.std(np.mean(signs, 0)) < 0.3


def fly(envs, steer):
    """Plays one episode a row; returns [N] return, success, length."""
    obs, _ = envs.reset(seed=0)
    flags, N = obs[:, 7:].reshape(-1, 2, 2).copy(), envs.num_envs
    total, length = np.zeros(N), np.zeros(N, int)
    success, alive = np.zeros(N, bool), np.ones(N, bool)
    while alive.any():
        assert (obs[alive, 7:] == -1).all() or not length.any()             # shown at the first step only
        obs, reward, terminated, truncated, infos = envs.step(steer(obs, flags))
        total, length = total + reward * alive, length + alive
        ended = (terminated | truncated) & alive
        if ended.any():
            success[ended] = infos["final_info"]["success"][ended]
        alive &= ~ended
    return total, success, length


@pytest.mark.quick
def test_two_flags_with_memory_and_without():
    def to_the_wanted(obs, flags):
        wanted = np.where(obs[:, [5]] == 1, flags[:, 1], flags[:, 0])
        return (2 * (wanted - obs[:, :2]) - 0.5 * obs[:, 2:4]).clip(-1, 1)

    total, success, length = fly(gym.make_vec("TwoFlags-v0", 300), to_the_wanted)
    assert success.mean() > 0.95 and np.isin(total[success], 2000).all() and length[success].max() <= 200
    total, success, _ = fly(gym.make_vec("TwoFlags-v0", 300), lambda obs, flags: np.zeros((300, 2)))
    assert not success[total < 2000].any() and success.mean() < 0.05
    envs = gym.make_vec("TwoFlags-v0", 300, reward_scale=10)
    total, success, length = fly(envs, lambda obs, flags: np.ones((300, 2)))
    lost = ~success                                         # off the board, some after the first flag
    assert set(total[lost]) <= {-1.0, 9.0} and length[lost].max() < 120


def test_two_flags_moves_as_defined():
    envs, rng = gym.make_vec("TwoFlags-v0", 40, max_steps=50), np.random.default_rng(0)
    envs.reset(seed=2)
    for _ in range(60):
        position, velocity = envs.position.copy(), envs.velocity.copy()
        visited, flags = envs.visited.copy(), envs.flags.copy()
        action = rng.uniform(-2, 2, (40, 2))
        obs, reward, terminated, truncated, infos = envs.step(action)
        for i in range(40):
            p = position[i] + velocity[i] * 4 / 50
            v = np.clip(velocity[i] + 50 * np.clip(action[i], -1, 1) * 4 / 50, -5, 5)
            off = (p < 0).any() or (p > 10).any()
            reached = not off and np.hypot(*(p - flags[i, visited[i]])) < 1
            assert reward[i] == (-100 if off else 1000 * reached)
            assert terminated[i] == (off or visited[i] + reached == 2)
            seen = infos["final_obs"][i] if terminated[i] or truncated[i] else obs[i]
            np.testing.assert_allclose(seen[:4], [*p.clip(0, 10), *v], rtol=1e-5)
            stage = [-1, -1, -1]
            stage[visited[i] + reached] = 1
            assert seen[4:7].tolist() == stage


def test_two_flags_no_flag_at_the_edge_is_reached_by_leaving_the_board():
    envs = gym.make_vec("TwoFlags-v0", 1)
    envs.reset(seed=0)
    batch = envs.unwrapped
    batch.flags[:], batch.position[:], batch.velocity[:] = 0.0, 1e-6, -0.5
    _, reward, terminated, _, infos = envs.step(np.zeros((1, 2), np.float32))
    assert reward < 0 and terminated and not infos["final_info"]["success"][0]


# ---------------------------------------------------------------------- masked MuJoCo

@pytest.mark.parametrize("sees", ["positions", "velocities"])
@pytest.mark.parametrize("robot, positions, velocities", [
    ("HalfCheetah", 8, 9), ("Hopper", 5, 6), ("Walker2d", 8, 9), ("Ant", 13, 14)])
def test_masked_mujoco_is_gymnasiums_own_with_less_to_see(robot, positions, velocities, sees):
    mujoco = pytest.importorskip("mujoco", reason="pip install mujoco")
    whole, masked = gym.make(f"{robot}-v5"), gym.make(f"Masked{robot}-v5", sees=sees)
    data = masked.unwrapped.data
    assert isinstance(data, mujoco.MjData) and masked.action_space == whole.action_space

    def check(obs, seen):
        kept = obs[:positions] if sees == "positions" else obs[positions:][:velocities]
        np.testing.assert_array_equal(seen, kept)
        if sees == "positions":
            np.testing.assert_array_equal(seen, data.qpos[-positions:])
        else:                                               # Hopper and Walker2d clip them to 10
            np.testing.assert_array_equal(seen.clip(-10, 10), data.qvel.clip(-10, 10))
        assert masked.observation_space.contains(seen)

    whole.action_space.seed(0)
    check(whole.reset(seed=1)[0], masked.reset(seed=1)[0])
    ended = False
    for _ in range(1000):
        action = whole.action_space.sample()
        obs, *rest, _ = whole.step(action)
        seen, *as_rest, _ = masked.step(action)
        assert rest == as_rest
        ended = ended or any(rest[1:])
        if ended:
            break
        check(obs, seen)
    assert ended                                            # by a fall or by the time limit, at the same step


@pytest.mark.quick
def test_masked_mujoco_names_what_it_can_show():
    pytest.importorskip("mujoco", reason="pip install mujoco")
    with pytest.raises(ValueError, match='sees must be "positions" or "velocities", not "P"'):
        gym.make("MaskedHopper-v5", sees="P")

"""MysteryPath-Grid-v0 against Memory Gym's own environment: same seed, same episodes, step by step."""
import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("memory_gym", reason="pip install --no-deps memory-gym==1.0.2")

import envs  # noqa: E402, F401  registers the tasks
from envs.mystery_path import FORWARD, GRID, MysteryPathGridBatch, draw_episode  # noqa: E402

REWARDS = {"reward_goal": 2.5, "reward_fall_off": -0.3, "reward_path_progress": 0.1, "reward_step": -0.01}
OPTIONS = {
    "defaults": {},
    "shown": {"show_origin": True, "show_goal": True},
    "goal_shown": {"show_goal": True, "reward_path_progress": 0.1},
    "origin_shown": {"show_origin": True, "visual_feedback": False},
    "no_cross": {"visual_feedback": False, "reward_fall_off": -1},
    "rewards": REWARDS,
    "from_the_top": {"cardinal_origin_choice": [2], "agent_scale": 0.5},
    "left_or_bottom": {"cardinal_origin_choice": [3, 0, 3], **REWARDS},
    "short": {"max_steps": 24, **REWARDS},
    "no_limit": {"max_steps": -1, "show_goal": True, **REWARDS},
}


def theirs():
    return gym.make("memory_gym/MysteryPath-Grid-v0").unwrapped


def along_the_path(world):
    """The action that brings the agent of Memory Gym's environment closer to the goal."""
    path = [(node.x, node.y) for node in world.mystery_path.path][::-1]
    x, y = map(int, world.agent.grid_position)
    if world.is_off_path:
        return 0
    to_x, to_y = path[path.index((x, y)) + 1]
    direction = [(0, -1), (-1, 0), (0, 1), (1, 0)].index((to_x - x, to_y - y))
    return [FORWARD, 1, 2, 2][(direction - world.agent.rotation // 90) % 4]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_step_equals_memory_gyms(options):
    """A single environment and a batch that resets itself, of pictures and of their numbers.

    Every fourth episode goes on with the random numbers that the one before it has left.
    """
    world, env = theirs(), gym.make("MysteryPath-Grid-v0", views=False)
    numbered = not {"show_origin", "show_goal"} & {*options}
    batch = gym.make_vec("MysteryPath-Grid-v0", 1, views=numbered)
    show = batch.single_observation_space.images.__getitem__ if numbered else np.asarray
    rng, met = np.random.default_rng(0), set()
    for episode in range(60):
        seed = None if episode % 4 == 3 else episode
        expected, _ = world.reset(seed=seed, options=options)
        obs, _ = env.reset(seed=seed, options=options)
        if seed is not None:
            seen, _ = batch.reset(seed=seed, options=options)
        np.testing.assert_array_equal(obs, expected)
        np.testing.assert_array_equal(show(seen[0]), expected)
        to_goal, done = episode % 8 < 4 or options.get("max_steps") == -1, False
        while not done:
            follows = to_goal and rng.random() < 0.9
            action = along_the_path(world) if follows else int(rng.choice(4, p=[0.1, 0.2, 0.2, 0.5]))
            expected, reward, done, _, told = world.step(action)
            told = {name: told[name] for name in ("success", "num_fails") if done}
            obs, *ended, info = env.step(action)
            assert ended == [reward, done, False] and info == told
            np.testing.assert_array_equal(obs, expected)
            seen, *ended, infos = batch.step([action])
            assert [x[0] for x in ended] == [reward, done, False]
            assert {name: infos["final_info"][name][0] for name in told} == told
            np.testing.assert_array_equal(show(infos["final_obs"][0] if done else seen[0]), expected)
        met.add((told["success"], told["num_fails"] > 0, to_goal))
    assert (1, True, True) in met and ((0, True, False) in met) == (options.get("max_steps") != -1)


@pytest.mark.quick
def test_reset_options_are_memory_gyms():
    assert MysteryPathGridBatch.reset_options == type(theirs()).default_reset_parameters
    with pytest.raises(ValueError, match="reset options max_steps, agent_scale.*but got .*'max_step'"):
        gym.make("MysteryPath-Grid-v0").reset(options={"max_step": 3})
    for options in ({"show_goal": True}, {"show_origin": True}):
        with pytest.raises(ValueError, match="views=False"):
            gym.make("MysteryPath-Grid-v0").reset(options=options)
    for edges in ([], [4], 3, "0"):
        with pytest.raises(ValueError, match="cardinal_origin_choice"):
            gym.make("MysteryPath-Grid-v0").reset(options={"cardinal_origin_choice": edges})
    with pytest.raises(ValueError, match="max_steps"):
        gym.make("MysteryPath-Grid-v0").reset(options={"max_steps": "ten"})


@pytest.mark.quick
def test_paths_are_memory_gyms_from_the_same_random_numbers():
    from memory_gym.pygame_assets import MysteryPath

    ours, copy = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(2000):
        origin, goal, path = draw_episode(ours, [0, 1, 2, 3])
        copy.choice([0, 1, 2, 3]), copy.integers(0, GRID), copy.integers(0, GRID)
        found = MysteryPath(GRID, GRID, divmod(origin, GRID), divmod(goal, GRID), copy).path
        assert [divmod(cell, GRID) for cell in path] == [(node.x, node.y) for node in found]
        assert ours.bit_generator.state == copy.bit_generator.state


def test_the_batch_draws_what_memory_gym_draws():
    """Origins, goals and cells of the path, 4,000 episodes of the batch's own stream against 2,000 seeds."""
    batch, world = gym.make_vec("MysteryPath-Grid-v0", 4000), theirs()
    batch.reset(seed=0)
    counts = np.zeros((3, GRID**2))
    for seed in range(2000):
        world.reset(seed=seed)
        cells = [GRID * node.x + node.y for node in world.mystery_path.path]
        counts[0, cells[-1]] += 1
        counts[1, cells[0]] += 1
        counts[2, cells] += 1
    ours = [np.bincount(cells, minlength=GRID**2) / 4000 for cells in (batch.origin, batch.goal)]
    np.testing.assert_allclose([*ours, batch.path.mean(0)], counts / 2000, atol=0.04)
    assert (counts[:2] == 0).tolist() == [(x == 0).tolist() for x in ours]      # none inside


@pytest.mark.quick
def test_what_is_printed():
    """The path, where the agent fell, and the agent."""
    env = gym.make("MysteryPath-Grid-v0", render_mode="ansi")
    env.reset(seed=0)
    batch = env.unwrapped.batch
    batch.path[:], batch.origin[:], batch.goal[:], batch.cell[:] = False, 3, 45, 3
    batch.visited[:] = False
    batch.path[0, 3::7] = True                              # the middle row, from the left to the right
    for action in (FORWARD, 0, 2, FORWARD):
        env.step(action)
    empty = ["......."] * 2
    assert env.render().split("\n") == [*empty, "#......", "O>++++G", *empty, "......."]
    env.step(2)
    env.step(FORWARD)
    assert env.render().split("\n") == [*empty, "#......", "O+++++G", ".v.....", *empty, "fallen"]

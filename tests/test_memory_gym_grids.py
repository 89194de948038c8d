"""Memory Gym's grid tasks as we have them for the batch, against Memory Gym's own."""
import gymnasium as gym
import numpy as np
import pytest

import envs  # noqa: F401  registers the tasks
from envs.batch import row
from envs.mortar_mayhem import AFTER, COMMANDS, FACING, FIRST_CELL, NUMBER
from tests.conftest import needs_memory_gym

pytestmark = needs_memory_gym

MORTAR, MORTAR_B = "MortarMayhem-Grid-v0", "MortarMayhemB-Grid-v0"
NAMES = list(COMMANDS)
RECURRENT_PPO = {
    "agent_scale": 0.25, "arena_size": 5, "allowed_commands": 5, "command_count": [10],
    "explosion_duration": [2], "explosion_delay": [6],
    "reward_command_failure": 0.0, "reward_command_success": 0.1, "reward_episode_success": 0.0}
OPTIONS = {
    "defaults": {},
    "recurrent-ppo": RECURRENT_PPO,
    "short": {"command_count": [1, 2], "explosion_delay": [1, 2, 3], "explosion_duration": [1, 2]},
    "drawn": {"command_count": [1, 3, 5, 12], "command_show_duration": [0, 1, 4],
              "command_show_delay": [1, 2], "explosion_duration": [1, 3, 4], "explosion_delay": [4, 7]},
    "no pause": {"command_count": [3], "command_show_duration": [1, 2], "command_show_delay": [0]},
    "smallest": {"arena_size": 2, "allowed_commands": 9, "command_count": [4], "explosion_duration": [1]},
    "largest": {"arena_size": 6, "allowed_commands": 9, "command_count": [4], "explosion_delay": [3, 5]},
    "arena of 4": {"arena_size": 4, "allowed_commands": 4, "command_count": [6]},
    "unseen": {"arena_size": 3, "visual_feedback": False, "command_count": [2, 4], "agent_scale": 0.5},
    "rewards": {"arena_size": 3, "command_count": [2, 3], "explosion_delay": [3, 5],
                "reward_command_failure": -0.7, "reward_command_success": 0.25,
                "reward_episode_success": 2.0},
}
EPISODES = 44


def options_of(env_id, name):
    """Task B shows no commands."""
    return {option: value for option, value in OPTIONS[name].items()
            if env_id == MORTAR or not option.startswith("command_show")}


def cell_of(theirs, position):
    return NUMBER[theirs.arena.arena_size, int(position[0]), int(position[1])]


def right_action(theirs):
    """Towards the tile of the command, with as few turns as there can be."""
    x, y = (int(there - here) for there, here in zip(theirs._target_pos, theirs.agent.grid_position))
    if x == y == 0:
        return 0
    turns = theirs.agent.rotation // 90
    closer = [(new - turns) % 4 for new, (dx, dy) in enumerate(FACING) if dx * x > 0 or dy * y > 0]
    return 3 if 0 in closer else 1 if 1 in closer or 2 in closer else 2


def play(theirs, rng, seed, options, mistakes):
    """An episode of Memory Gym's: what was drawn, and all that was seen and done."""
    obs, _ = theirs.reset(seed=seed, options=options)
    task, done = theirs.unwrapped, False
    frames = task._command_visualization_clone if hasattr(task, "_command_visualization_clone") else []
    drawn = {
        "agent": cell_of(task, task.normalized_agent_position),
        "commands": [NAMES.index(name) for name in task._commands],
        "count": task.num_commands,
        "show_steps": sum(frame != "" for frame in frames) // task.num_commands,
        "show_every": len(frames) // task.num_commands,
        "explosion_delay": task._explosion_delay,
        "explosion_duration": task._explosion_duration}
    actions, seen, paid = [], [obs], []
    while not done:
        actions.append(int(rng.integers(4)) if rng.random() < mistakes else right_action(task))
        obs, reward, done, truncated, info = theirs.step(actions[-1])
        assert not truncated and bool(info) == done
        seen.append(obs), paid.append(reward)
    return drawn, actions, seen, paid, info


def assert_same(space, number, theirs):
    """Our observation and theirs, which has the picture where ours has its number."""
    if isinstance(theirs, dict):
        np.testing.assert_array_equal(number["vector_observation"], theirs["vector_observation"])
        space, number = space["visual_observation"], number["visual_observation"]
        theirs = theirs["visual_observation"]
    np.testing.assert_array_equal(space.images[number], theirs)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("env_id", [MORTAR, MORTAR_B])
def test_mortar_mayhem_equals_memory_gyms_step_by_step(env_id, name):
    """Their episodes in one batch: the first half played right, the others with mistakes."""
    options, rng = options_of(env_id, name), np.random.default_rng(0)
    theirs = gym.make(f"memory_gym/{env_id}")
    mistakes = [0] * (EPISODES // 2) + [0.05, 0.15, 0.5, 1] * (EPISODES // 8 + 1)
    episodes = [play(theirs, rng, seed, options, mistakes[seed]) for seed in range(EPISODES)]
    size = options.get("arena_size", 5)
    ours = gym.make_vec(env_id, EPISODES, arena_sizes=[4, size])                # the first one's lie before
    ours.reset(seed=0, options={**options, "arena_size": size})
    for i, (drawn, *_) in enumerate(episodes):
        for what, value in drawn.items():
            getattr(ours, what)[i] = np.resize(value, 101) if what == "commands" else value
    ours.derive(np.arange(EPISODES))
    obs, space = ours.observe(), ours.single_observation_space
    assert obs in ours.observation_space
    for i, (_, _, seen, _, _) in enumerate(episodes):
        assert_same(space, row(obs, i), seen[0])
    outcomes = set()
    for t in range(max(len(actions) for _, actions, *_ in episodes)):
        action = np.array([actions[t] if t < len(actions) else 0 for _, actions, *_ in episodes])
        obs, reward, terminated, truncated, infos = ours.step(action)
        for i, (_, actions, seen, paid, info) in enumerate(episodes):
            if t >= len(actions):                           # our row plays on: its next episode
                continue
            is_last = t == len(actions) - 1
            assert (reward[i], terminated[i], truncated[i]) == (paid[t], is_last, False)
            shown = infos["final_obs"][i] if is_last else row(obs, i)
            assert_same(space, shown, seen[t + 1])
            if is_last:
                final_info = {name: infos["final_info"][name][i] for name in info}
                assert final_info.pop("reward") == pytest.approx(info.pop("reward"))
                assert final_info == info
                outcomes.add((bool(info["success"]), reward[i] == options.get("reward_command_failure", 0)))
    assert {(True, False), (False, True)} <= outcomes       # done; failed on the way
    assert ours.facts().keys() == {"reward", "length", "commands_completed"}


def test_a_last_command_that_fails_is_a_success_to_memory_gym():
    """Ours say what theirs say."""
    for env_id in (f"memory_gym/{MORTAR}", MORTAR):
        env = gym.make(env_id)
        env.reset(seed=0, options={"command_count": [1], "allowed_commands": 4, "explosion_delay": [1]})
        for _ in range(20):
            _, reward, terminated, _, info = env.step(0)    # it stays where it is: wrong
            if terminated:
                break
        assert reward == 0 and info["success"] == info["commands_completed"] == 1


@pytest.mark.parametrize("env_id", [MORTAR, MORTAR_B])
def test_mortar_mayhem_has_memory_gyms_spaces_and_options(env_id):
    theirs, ours = gym.make(f"memory_gym/{env_id}"), gym.make(env_id, views=False)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    obs, _ = ours.reset(seed=0)
    assert obs in ours.observation_space
    assert ours.unwrapped.batch.reset_options == theirs.unwrapped.default_reset_parameters
    numbers, _ = gym.make(env_id).reset(seed=0)
    if env_id == MORTAR_B:
        obs, numbers = obs["visual_observation"], numbers["visual_observation"]
    assert (gym.make(MORTAR).observation_space.images[numbers] == obs).all()


def test_mortar_mayhem_draws_what_memory_gym_draws():
    """Start cells, commands where they are possible, and what is drawn from lists, equally likely."""
    options = {"arena_size": 3, "allowed_commands": 7, "command_count": [1, 3], "explosion_delay": [2, 4, 6],
               "explosion_duration": [1, 3], "command_show_duration": [1, 2], "command_show_delay": [0, 5]}
    num_theirs, num_ours = 2500, 20_000
    theirs = gym.make(f"memory_gym/{MORTAR}").unwrapped
    drawn = []
    for seed in range(num_theirs):
        theirs.reset(seed=seed, options=options)
        frames = theirs._command_visualization_clone
        per = len(frames) // theirs.num_commands
        shown = sum(frame != "" for frame in frames) // theirs.num_commands
        drawn.append((cell_of(theirs, theirs.normalized_agent_position), theirs.num_commands,
                      shown, per - shown, theirs._explosion_delay, theirs._explosion_duration,
                      [NAMES.index(name) for name in theirs._commands]))
    ours = gym.make_vec(MORTAR, num_ours, arena_sizes=[3])
    ours.reset(seed=0, options=options)
    ours_drawn = [*zip(ours.agent, ours.count, ours.show_steps, ours.show_every - ours.show_steps,
                       ours.explosion_delay, ours.explosion_duration, ours.commands.tolist())]

    def shares(episodes):
        """How often each value occurs, and each command in each cell."""
        *single, commands = zip(*episodes)
        found = [np.unique(values, return_counts=True) for values in single]
        leads = np.zeros((9, 9))
        for cell, count, given in zip(single[0], single[1], commands):
            for command in given[:count]:
                leads[cell - FIRST_CELL[3], command] += 1
                cell = AFTER[cell, command]
                assert cell >= 0                            # no command leads out of the arena
        return found, leads / leads.sum(1, keepdims=True), leads.sum(1) / leads.sum()

    (a, leads_a, cells_a), (b, leads_b, cells_b) = shares(drawn), shares(ours_drawn)
    for (values_a, counts_a), (values_b, counts_b) in zip(a, b):
        assert values_a.tolist() == values_b.tolist()
        np.testing.assert_allclose(counts_a / num_theirs, counts_b / num_ours, atol=0.04)
    assert ((leads_a > 0) == (leads_b > 0)).all()
    np.testing.assert_allclose(leads_a, leads_b, atol=0.08)
    np.testing.assert_allclose(cells_a, cells_b, atol=0.03)


@pytest.mark.parametrize("options, says", [
    ({"arena_size": 6}, r"arena_sizes, which is \[5, 3\], not 6"),
    ({"allowed_commands": 3}, "allowed_commands must be 4 to 9"),
    ({"command_count": 3}, "command_count must be a list of whole numbers from 1 to 100, not 3"),
    ({"command_count": [101]}, "command_count"),
    ({"explosion_delay": [0]}, "explosion_delay must be a list of whole numbers from 1 to inf"),
    ({"explosion_duration": []}, "explosion_duration"),
    ({"command_show_duration": [0], "command_show_delay": [0, 1]}, "must not both be 0"),
    ({"comand_count": [3]}, "comand_count"),
], ids=str)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        gym.make(MORTAR, arena_sizes=[5, 3]).reset(options=options)


def test_task_b_has_twenty_commands_at_most():
    with pytest.raises(ValueError, match="1 to 20"):
        gym.make(MORTAR_B).reset(options={"command_count": [21]})
    gym.make(MORTAR_B).reset(options={"command_count": [20]})


def test_several_arenas_in_one_batch():
    """Rows that are reset with other options play by these; the others go on by their own."""
    ours = gym.make_vec(MORTAR, 2, arena_sizes=[5, 2], autoreset_mode="Disabled")
    ours.reset(seed=0)
    only_second = {"reset_mask": np.array([False, True]), "arena_size": 2, "command_count": [1]}
    obs, _ = ours.reset(options=only_second)
    assert ours.count.tolist() == [10, 1]
    num_pictures = ours.single_observation_space.n
    assert num_pictures == 2825 + 4 * 13 + 4 * 4 * 4 and obs[0] < 2825 <= obs[1] < num_pictures
    with pytest.raises(ValueError, match="arena_sizes must be some of"):
        gym.make(MORTAR, arena_sizes=[7])

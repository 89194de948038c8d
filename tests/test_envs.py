"""The tasks: dynamics against their sources, batch = singles, seeding, autoreset, rendering, wrappers."""
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import popgym
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from minigrid.envs import MemoryEnv
from minigrid.wrappers import RGBImgPartialObsWrapper

import ppo_recurrent_sbb
from envs import POPGYM
from envs.batch import BatchEnv, SingleEnv
from envs.memory_gym import TASKS as MEMORY_GYM
from envs.vector import Episodes, make_envs, make_rendered
from envs.wrappers import PreviousActionReward, ResetOptions
from models.encoder import leaves
from tests.conftest import needs_memory_gym

OURS = [
    ("PocMemory-v0", {}),
    ("PocMemory-v0", {"freeze": False, "max_steps": 9}),
    ("CartPoleMasked-v0", {}),
    ("MinigridMemory-v0", {}),
    ("MinigridMemory-v0", {"views": False}),
    ("MinigridMemory-v0", {"rgb": False}),
    ("MinigridMemory-v0", {"rgb": False, "size": 13, "random_length": True}),
    ("TMazePassive-v0", {}),
    ("TMazeActive-v0", {"length": 5, "penalty": "wrong_action", "ambiguous_position": False,
                        "add_timestep": True}),
    ("VisualMatchPassive-v0", {"distractor_length": 9}),
    ("KeyToDoor-v0", {"distractor_length": 30}),
    ("VisualMatch-v0", {"colours_fixed": True, "distractor_length": 30}),
    ("CountInput-v0", {"episode_length": 40}),
    ("CountInput-v0", {"mode": "count_steps_since_last_input", "horizon": 4, "episode_length": 7}),
    ("PendulumMasked-v1", {}),
    ("PendulumSignFlip-v1", {"max_steps": 60}),
    ("TwoFlags-v0", {"max_steps": 50}),
    *((f"batch/{env_id}", {}) for env_id in POPGYM if "Easy" in env_id),
]
MEMORY_GYM_GRIDS = [
    ("MortarMayhem-Grid-v0", {}),
    ("MortarMayhemB-Grid-v0", {}),
    ("MortarMayhemB-Grid-v0", {"views": False, "arena_sizes": [2, 3]}),
    ("MysteryPath-Grid-v0", {}),
    ("MysteryPath-Grid-v0", {"views": False}),
]
TASKS = [*OURS, *(pytest.param(*task, marks=needs_memory_gym) for task in MEMORY_GYM_GRIDS)]
DRAWS = "Noisy", "Bandit"  # these draw random numbers in every step
ours = pytest.mark.parametrize("env_id, kwargs", TASKS)


def draw(rng, space, n):
    """Random actions [n, ...] of a single action space."""
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=n)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return rng.integers(space.nvec, size=(n, len(space.nvec)))
    return rng.uniform(space.low, space.high, (n, *space.shape)).astype(space.dtype)


@ours
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*infinity")
def test_gymnasiums_checker_is_content(env_id, kwargs):
    check_env(gym.make(env_id, **kwargs).unwrapped)


@pytest.mark.quick
@ours
def test_same_seed_same_episodes_another_seed_others(env_id, kwargs):
    def play(seed):
        envs = gym.make_vec(env_id, 3, **kwargs)
        space, actions = envs.single_observation_space, np.random.default_rng(0)
        out = leaves(space, envs.reset(seed=seed)[0])
        for _ in range(150):
            obs, reward, *_ = envs.step(draw(actions, envs.single_action_space, 3))
            np.random.seed(len(out))                        # the global generator must not matter
            out += [*leaves(space, obs), reward]
        return [x.tobytes() for x in out]

    assert play(1) == play(1) != play(2)


@pytest.mark.quick
@pytest.mark.parametrize(
    "env_id, kwargs", [task for task in TASKS if not any(name in str(task) for name in DRAWS)])
def test_the_batch_equals_single_environments_step_by_step(env_id, kwargs):
    envs = gym.make_vec(env_id, 4, **kwargs)
    obs, _ = envs.reset(seed=5)
    space = envs.single_observation_space
    singles = [gym.make(env_id, **kwargs) for _ in range(4)]
    for i, env in enumerate(singles):                       # each single takes over row i of the batch
        env.reset(seed=0)
        for name, value in envs.state_dict().items():
            if name != "np_random":
                getattr(env.unwrapped.batch, name)[...] = value[i : i + 1]
    actions, alive = np.random.default_rng(0), set(range(4))
    for _ in range(1000):
        action = draw(actions, envs.single_action_space, 4)
        obs, reward, terminated, truncated, infos = envs.step(action)
        for i in sorted(alive):
            o, r, te, tr, info = singles[i].step(action[i])
            assert (r, te, tr) == (reward[i], terminated[i], truncated[i])
            if te or tr:                                    # from here on the batch plays its next episode
                for mine, batchs in zip(leaves(space, o), leaves(space, infos["final_obs"][i]), strict=True):
                    np.testing.assert_array_equal(mine, batchs)
                final_info = infos["final_info"]
                assert info == {k: final_info[k][i] for k in info}
                assert ("success" in final_info) == bool(info)
                alive.discard(i)
            else:
                for mine, batchs in zip(leaves(space, o), leaves(space, obs), strict=True):
                    np.testing.assert_array_equal(mine, batchs[i])
    assert not alive


@ours
def test_a_saved_batch_continues_to_the_bit(env_id, kwargs):
    envs, copy = gym.make_vec(env_id, 3, **kwargs), gym.make_vec(env_id, 3, **kwargs)
    envs.reset(seed=1), copy.reset(seed=2)
    rng = np.random.default_rng(0)
    actions = [draw(rng, envs.single_action_space, 3) for _ in range(300)]
    for a in actions[:40]:
        envs.step(a)
    copy.load_state_dict(envs.state_dict())
    for a in actions[40:]:
        (obs, *rest, _), (copys_obs, *copys_rest, _) = envs.step(a), copy.step(a)
        space = envs.single_observation_space
        for x, y in zip([*leaves(space, obs), *rest], [*leaves(space, copys_obs), *copys_rest], strict=True):
            np.testing.assert_array_equal(x, y)


class Countdown(BatchEnv):
    """Observes the steps that are left twice: in a Tuple, there also in a Dict."""

    def __init__(self, num_envs=1, **kwargs):
        left = gym.spaces.Discrete(4)
        space = gym.spaces.Tuple([left, gym.spaces.Dict(left=left)])
        super().__init__(space, gym.spaces.Discrete(2), num_envs, **kwargs)
        self.left = np.zeros(num_envs, int)

    def begin(self, rows):
        self.left[rows] = self.np_random.integers(1, 4, size=len(rows))

    def move(self, actions):
        self.left = self.left - 1
        return np.zeros(self.num_envs), self.left == 0, np.zeros(self.num_envs, bool), None

    def observe(self):
        return self.left.copy(), {"left": self.left.copy()}


@pytest.mark.quick
def test_a_batch_observes_tuples_and_dicts():
    envs = Countdown(3)
    obs, _ = envs.reset(seed=0)
    envs.left[:] = 1, 2, 3
    for t in range(1, 4):
        before = envs.left.copy()
        obs, _, terminated, _, infos = envs.step(np.zeros(3, int))
        assert obs in envs.observation_space
        assert obs[0].tolist() == obs[1]["left"].tolist() == envs.left.tolist()
        assert terminated.tolist() == (before == 1).tolist() and terminated[t - 1]
        assert [*infos["final_obs"][terminated]] == [(0, {"left": 0})] * terminated.sum()


@pytest.mark.quick
@pytest.mark.parametrize("env_id", ["PocMemory-v0", "CartPoleMasked-v0"])
def test_no_phantom_transition(env_id):
    """The step that ends an episode returns the first observation of the next one. No step is wasted."""
    envs = gym.make_vec(env_id, 2, max_steps=7)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    envs.reset(seed=0)
    ends = [t for t in range(1, 71) if envs.step(np.array([t % 2, t % 2]))[3].all()]
    assert ends == list(range(7, 71, 7))
    with pytest.raises(ValueError, match="autoreset_mode"):
        gym.make_vec(env_id, 2, autoreset_mode="NextStep")


@pytest.mark.quick
@pytest.mark.quick
@pytest.mark.parametrize("env_id", ["TMazePassive-v0", "popgym-RepeatPreviousEasy-v0"])
def test_a_limit_of_the_flags_ends_episodes_of_our_batches(env_id):
    args = ppo_recurrent_sbb.Args(env_id=env_id, env_kwargs={"max_episode_steps": 3})
    envs = make_envs(args, num_envs=2)
    envs.reset(seed=0)
    ends = [envs.step(np.zeros(2, int))[2:4] for _ in range(9)]
    assert [truncated.tolist() for _, truncated in ends] == 3 * [[False] * 2, [False] * 2, [True] * 2]
    assert not any(terminated.any() for terminated, _ in ends)
    with pytest.raises(SystemExit):
        make_envs(ppo_recurrent_sbb.Args(env_id=env_id, env_kwargs={"max_episode_steps": 0}), num_envs=2)


def test_no_phantom_transition_in_other_peoples_tasks():
    """What make_envs trains on: an episode's last step is followed by the next one's first."""
    args = ppo_recurrent_sbb.Args(env_id="CartPole-v1", env_kwargs={"max_episode_steps": 3})
    envs = make_envs(args, 2)
    envs.reset(seed=0)
    steps = [envs.step(np.array([t % 2, t % 2])) for t in range(12)]
    assert [t for t, step in enumerate(steps) if step[3].all()] == [2, 5, 8, 11]
    assert all((step[1] == 1).all() for step in steps)      # a step that does nothing pays nothing


@pytest.mark.quick
@pytest.mark.parametrize("env_id", ["PocMemory-v0", "CartPoleMasked-v0", "Acrobot-v1"])
def test_environments_differ(env_id):
    """One seed, sixteen environments: they must not all play the same episode."""
    envs = gym.make_vec(env_id, 16)
    obs = [envs.reset(seed=0)[0]] + [envs.step(np.zeros(16, int))[0] for _ in range(5)]
    assert len({tuple(np.stack(obs)[:, i].flatten().tolist()) for i in range(16)}) >= 8


@pytest.mark.quick
def test_poc_memory_dynamics():
    env = gym.make("PocMemory-v0", render_mode="ansi")
    seen = set()
    for seed in range(40):
        obs, _ = env.reset(seed=seed)
        good = 1 if obs[2] > 0 else 0                       # action that leads to the good end
        sign = 1 if seed % 2 else -1                        # go to the good end, or to the bad one
        action = good if sign > 0 else 1 - good
        assert abs(obs[0]) == 1 and obs[0] == -obs[2] and abs(obs[1]) <= 0.4 + 1e-6
        seen.add((round(float(obs[1]), 1), good))
        start = obs[1]
        for _ in range(2):                                  # frozen, goals in view
            obs, reward, terminated, truncated, info = env.step(1)
            assert obs[1] == start and abs(obs[0]) == 1
            assert reward == 0 and not terminated and not info
        distance, moves = round(5 * (1 - start if action else 1 + start)), 0
        while not terminated:
            obs, reward, terminated, truncated, info = env.step(action)
            moves += 1
            assert obs[0] == obs[2] == 0                    # hidden
            assert reward == pytest.approx(-0.1 if not terminated else 1.6 * sign)
        assert moves == distance and info["success"] == (sign > 0) and not truncated
    assert seen == {(p, g) for p in (-0.4, -0.2, 0.0, 0.2, 0.4) for g in (0, 1)}


@pytest.mark.quick
def test_poc_memory_without_memory_reaches_0_7_at_most():
    """The bound stated in envs/poc_memory.py, exactly: every deterministic policy on the hidden cells."""
    best = 0
    for bits in range(2**9):
        goes_right = {cell: bits >> (cell + 4) & 1 for cell in range(-4, 5)}
        wins = 0
        for first in range(-2, 3):
            for good in (-1, 1):
                cell, steps = first + good, 0               # the first move is made with the goals in view
                while abs(cell) < 5 and steps < 100:
                    cell, steps = cell + (1 if goes_right[cell] else -1), steps + 1
                wins += cell == 5 * good
        best = max(best, wins / 10)
    assert best == 0.7


@pytest.mark.quick
def test_cartpole_equals_gymnasiums_with_velocities_hidden():
    envs, reference = gym.make_vec("CartPoleMasked-v0", 1), CartPoleEnv()
    actions, t = np.random.default_rng(0), 0
    envs.reset(seed=0), reference.reset(seed=0)
    reference.state = envs.state[0].copy()
    for _ in range(300):
        action = actions.integers(2, size=1)
        obs, reward, terminated, truncated, infos = envs.step(action)
        t += 1
        ref_obs, ref_reward, ref_terminated, _, _ = reference.step(int(action[0]))
        assert (reward[0], terminated[0], truncated[0]) == (ref_reward, ref_terminated, t == 200)
        obs = infos["final_obs"][0] if terminated[0] else obs[0]
        np.testing.assert_allclose(obs, ref_obs * [1, 0, 1, 0], rtol=1e-6)
        if terminated[0]:
            reference.reset(), setattr(reference, "state", envs.state[0].copy())
            t = 0


def test_cartpole_success_is_standing_for_200_steps():
    envs = gym.make_vec("CartPoleMasked-v0", 1)
    envs.reset(seed=0)
    envs.state[:], envs.t[:] = 0, 199
    *_, terminated, truncated, infos = envs.step(np.array([0]))
    assert truncated[0] and not terminated[0] and infos["final_info"]["success"][0]


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize("size, random_length", [(9, False), (13, True)])
def test_minigrid_memory_equals_the_engine(rgb, size, random_length):
    env = gym.make("MinigridMemory-v0", size=size, rgb=rgb, random_length=random_length)
    actions, outcomes = np.random.default_rng(0), set()
    for seed in range(12):
        obs, _ = env.reset(seed=seed)
        batch = env.unwrapped.batch
        layout, x, y, direction = batch.tables.where[batch.state[0]]
        engine = MemoryEnv(size=size, agent_view_size=3, random_length=random_length)
        view = RGBImgPartialObsWrapper(engine, tile_size=28) if rgb else engine
        view.reset(seed=seed)
        engine.grid, world = batch.tables.worlds[layout].grid.copy(), batch.tables.worlds[layout]
        engine.success_pos, engine.failure_pos = world.success_pos, world.failure_pos
        engine.agent_pos, engine.agent_dir = np.array((x, y)), int(direction)
        ref_obs = engine.gen_obs()
        ref_obs = view.observation(ref_obs) if rgb else ref_obs
        shown = env.observation_space.images.__getitem__ if rgb else np.asarray
        np.testing.assert_array_equal(shown(obs), ref_obs["image"])
        for _ in range(5 * size**2):
            action = actions.choice(3, p=[0.2, 0.2, 0.6])
            obs, reward, terminated, truncated, info = env.step(action)
            ref_obs, ref_reward, ref_terminated, ref_truncated, _ = view.step(action)
            np.testing.assert_array_equal(shown(obs), ref_obs["image"])
            assert (terminated, truncated) == (ref_terminated, ref_truncated)
            assert reward == pytest.approx(ref_reward)
            if terminated or truncated:
                outcomes.add((terminated, info["success"]))
                assert info["success"] == (ref_reward > 0)
                break
    assert {(True, True), (True, False)} <= outcomes


def test_minigrid_memory_draws_what_the_engine_draws():
    """All layouts and start positions, equally likely, as MemoryEnv._gen_grid draws them."""
    envs = gym.make_vec("MinigridMemory-v0", 4000, rgb=False)
    envs.reset(seed=0)
    where = envs.tables.where[envs.state]
    layouts, positions = np.bincount(where[:, 0]) / 4000, np.bincount(where[:, 1])[1:] / 4000
    assert len(layouts) == 4 and len(positions) == 6        # 2 x 2 objects; cells 1 to hallway_end = 6
    np.testing.assert_allclose(layouts, 1 / 4, atol=0.03)
    np.testing.assert_allclose(positions, 1 / 6, atol=0.03)
    assert (where[:, 2:] == [4, 0]).all()                   # in the middle row, looking right


@pytest.mark.parametrize("env_id", [
    *sorted({env_id for env_id, _ in OURS} - {"VisualMatchPassive-v0"}),
    *(pytest.param(env_id, marks=needs_memory_gym) for env_id, kwargs in MEMORY_GYM_GRIDS if not kwargs)])
def test_rendering(env_id):
    modes = gym.make(env_id).metadata["render_modes"]
    for mode in modes:
        env, rng = gym.make(env_id, render_mode=mode), np.random.default_rng(0)
        env.reset(seed=1)
        frames = [env.render()]
        for t in range(30):
            _, _, terminated, truncated, _ = env.step(draw(rng, env.action_space, 1)[0])
            if terminated or truncated:
                break
            frames.append(env.render())
        assert any(np.any(frame != frames[0]) for frame in frames)
        if mode == "ansi":
            assert all(isinstance(frame, str) for frame in frames)
        else:
            assert frames[0].dtype == np.uint8 and frames[0].ndim == 3 and frames[0].shape[2] == 3
    assert modes[0] == "ansi"
    assert "rgb_array" in modes or env_id.startswith("batch/")


@pytest.mark.quick
@pytest.mark.parametrize("env_id", POPGYM)
def test_popgyms_ids_give_popgyms_task_alone_and_ours_as_a_batch(env_id):
    theirs, batch = gym.make(env_id), gym.make_vec(env_id, 3)
    assert type(theirs.unwrapped).__module__.startswith("popgym.")
    assert isinstance(batch, BatchEnv)
    assert isinstance(gym.make(f"batch/{env_id}").unwrapped, SingleEnv)
    for mine, popgyms in ((batch.single_observation_space, theirs.observation_space),
                          (batch.single_action_space, theirs.action_space)):
        assert mine == popgyms and mine.dtype == popgyms.dtype
    assert batch.observation_space.contains(batch.reset(seed=0)[0])


@pytest.mark.quick
@ours
def test_what_a_batch_saves_has_a_row_for_each_environment(env_id, kwargs):
    """A constant among them would be given to a batch of another size by a resume."""
    envs = gym.make_vec(env_id, 3, **kwargs)
    envs.reset(seed=0)
    assert {name for name, x in envs.state_dict().items() if name != "np_random" and len(x) != 3} == set()


@pytest.mark.parametrize("env_id", ["popgym-RepeatPreviousEasy-v0", "popgym-BattleshipEasy-v0"])
def test_popgyms_tasks_are_shown_as_text(env_id):
    envs = make_rendered(ppo_recurrent_sbb.Args(env_id=env_id), "auto")
    envs.reset(seed=0)
    assert isinstance(envs.render()[0], str)


def test_every_id_of_popgym_has_a_batch():
    theirs = {spec["id"] for spec in popgym.envs.ALL.values()}
    assert set(POPGYM) == {env_id for env_id in theirs if "Labyrinth" not in env_id}


@ours
def test_unknown_reset_options_are_refused(env_id, kwargs):
    with pytest.raises(ValueError, match=r"reset options.* but got {'size': 3}"):
        gym.make(env_id, **kwargs).reset(options={"size": 3})


@pytest.mark.quick
def test_previous_action_and_reward_are_observed():
    envs = PreviousActionReward(gym.make_vec("PocMemory-v0", 2, max_steps=5), action=True, reward=True)
    assert envs.single_observation_space[1] == gym.spaces.Discrete(3, start=-1)
    obs, _ = envs.reset(seed=0)
    assert obs in envs.observation_space
    assert obs[1].tolist() == [-1, -1] and obs[2].tolist() == [0, 0]
    for t in range(1, 11):
        action = np.array([t % 2, 1 - t % 2])
        obs, reward, terminated, truncated, infos = envs.step(action)
        assert obs in envs.observation_space
        if t % 5 == 0:                                      # the old episode's last step is in final_obs
            assert [infos["final_obs"][i][1] for i in (0, 1)] == action.tolist()
            assert [infos["final_obs"][i][2] for i in (0, 1)] == pytest.approx(reward)
            action, reward = np.array([-1, -1]), np.zeros(2)
        assert obs[1].tolist() == action.tolist() and obs[2] == pytest.approx(reward)


def test_previous_action_survives_the_reset_of_another_environment():
    disabled = {"autoreset_mode": AutoresetMode.DISABLED}
    envs = gym.make_vec("PocMemory-v0", 3, "sync", disabled, freeze=False)
    envs = PreviousActionReward(envs, action=True, reward=True)
    envs.reset(seed=0)
    envs.step(np.array([1, 0, 1]))
    obs, _ = envs.reset(options={"reset_mask": np.array([True, False, False])})
    assert obs[1].tolist() == [-1, 0, 1] and obs[2] == pytest.approx([0, -0.1, -0.1])


def test_previous_action_of_multi_discrete_and_box():
    for env_id, none in (("popgym-BattleshipEasy-v0", [[-1, -1]] * 2),
                         ("popgym-PositionOnlyPendulumEasy-v0", [[0.0]] * 2)):
        same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
        envs = PreviousActionReward(gym.make_vec(env_id, 2, "sync", same_step), action=True, reward=False)
        obs, _ = envs.reset(seed=0)
        assert len(obs) == 2 and obs[1].tolist() == none and obs in envs.observation_space
        action = envs.action_space.sample()
        seen = action / 2 if "Pendulum" in env_id else action                   # bounds of -2 and 2 are units
        assert envs.step(action)[0][1].tolist() == seen.tolist()


@needs_memory_gym
@pytest.mark.parametrize("env_id", MEMORY_GYM)
def test_memory_gym_by_its_own_names(env_id):
    for _ in range(2):                                      # importing memory_gym must not take the names
        env = gym.make(env_id)
        obs, _ = env.reset(seed=1)
        kept = {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else {0: obs.copy()}
        for _ in range(12):
            assert isinstance(env.step(env.action_space.sample())[1], float)
        for k, v in kept.items():
            np.testing.assert_array_equal(v, obs[k] if isinstance(obs, dict) else obs)


@needs_memory_gym
@pytest.mark.parametrize("env_id", sorted(MEMORY_GYM))
def test_memory_gym_closes_no_other_task(env_id):
    first, second = gym.make(env_id), gym.make("MysteryPath-v0")
    first.reset(seed=0)
    second.close()                                          # as --capture-video closes one
    first.step(first.action_space.sample())
    first.close()


@needs_memory_gym
def test_an_id_of_ours_stays_ours():
    code = ("import gymnasium as gym, envs; gym.make('memory_gym/MysteryPath-Grid-v0'); "
            "print(gym.spec('MysteryPath-Grid-v0').entry_point, gym.spec('MysteryPath-v0').entry_point)")
    for first in ("", "import memory_gym; "):
        command = [sys.executable, "-W", "error", "-c", first + code]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.stdout.split()[-2:] == ["envs.mystery_path:MysteryPathGrid", "envs.memory_gym:make"]


@needs_memory_gym
def test_memory_gym_reset_options():
    options = {"command_count": [2], "explosion_delay": [3]}
    env = ResetOptions(gym.make("memory_gym/MortarMayhem-Grid-v0"), options)
    for _ in range(2):                                      # the second, plain reset has them too
        env.reset()
        assert env.unwrapped.num_commands == 2
    with pytest.raises(ValueError, match="not valid"):
        gym.make("memory_gym/MortarMayhem-Grid-v0").reset(options={"comand_count": [2]})


@needs_memory_gym
def test_memory_gyms_own_task_beside_ours_of_the_same_name():
    ours, theirs = gym.make("MortarMayhem-Grid-v0"), gym.make("memory_gym/MortarMayhem-Grid-v0")
    again = gym.make("MortarMayhem-Grid-v0")                # to import memory_gym took no name
    assert isinstance(ours.unwrapped, SingleEnv) and isinstance(again.unwrapped, SingleEnv)
    assert type(theirs.unwrapped).__module__ == "memory_gym.mortar_mayhem_grid"


@pytest.mark.parametrize("env_id", ["MortarMayhem-Grid-v0", "memory_gym/MortarMayhem-Grid-v0"])
def test_memory_gym_missing_is_one_sentence(env_id):
    code = ("import sys; sys.modules['memory_gym'] = None; import gymnasium as gym, envs; "
            f"gym.make('{env_id}')")
    error = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert f"{env_id} needs Memory Gym: pip install --no-deps memory-gym==1.0.2" in error


def test_sdl_is_left_alone_until_a_memory_gym_task_is_made():
    code = "import os, envs; print('SDL_VIDEODRIVER' in os.environ, 'SDL_AUDIODRIVER' in os.environ)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDL")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "False False\n"


class Clocks(gym.vector.VectorEnv):
    """Row n pays n + 1 a step. Its episodes end after n + 2 steps, row 0's are a success."""

    num_envs = 3

    def __init__(self):
        self.t = np.zeros(3, int)

    def step(self, actions):
        self.t += 1
        done = self.t == np.array([2, 3, 4])
        self.t[done] = 0
        infos = {"success": np.array([1.0, 0, 0]), "_success": done}
        return None, np.array([1.0, 2, 3]), done, np.zeros(3, bool), infos


@pytest.mark.quick
def test_what_is_logged_are_means_of_the_last_100_episodes():
    envs, ended = Episodes(Clocks(), "task"), []
    for t in range(1, 150):
        envs.step(None)
        ended += [((n + 1) * (n + 2), n + 2, n == 0) for n in range(3) if t % (n + 2) == 0]
        means = list(envs.mean_of_episodes().values())
        if ended:
            np.testing.assert_allclose(means[:3], np.mean(ended[-100:], axis=0))
        assert means[3] == min(len(ended), 100)
    assert len(ended) > 150

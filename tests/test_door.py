"""Other people's tasks: what they do to arrays, infos and types does not reach the learner."""
import gc

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import vector
from envs.poc_memory import PocMemoryBatch
from envs.wrappers import whether_success
from models import play, to_tensors
from models.heads import to_bounds
from tests.conftest import CONTINUOUS, DISCRETE_OFF_POLICY, PPO
from tests.helpers import comparable, run, weights_of


class Stranger(gym.Env):
    """Episodes of 5 steps: odd ones end by a time limit, even ones by death. Attributes: its manners."""

    reuses_arrays, last, gives_reward, tells, observation = False, 0.0, None, "success", None
    action_space = gym.spaces.Discrete(3, start=2, dtype=np.int8)
    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.episode, self.array = 0, np.zeros(2, np.float32)

    def observe(self):
        if self.observation is not None and self.t == 3:
            return self.observation
        self.array[:] = self.t, self.cue
        return self.array if self.reuses_arrays else self.array.astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert options is None
        self.t, self.cue, self.episode = 0, self.np_random.integers(2), self.episode + 1
        return self.observe(), {"ragged": [0] * self.episode, "success": "not yet"}

    def step(self, action):
        assert self.action_space.contains(action), (action, type(action))
        self.t += 1
        ended, by_death = self.t == 5, self.episode % 2 == 0
        reward = float(np.sum(action) > 2) if self.gives_reward is None or self.t < 3 else self.gives_reward
        obs = self.observe()
        if ended and by_death:
            obs = obs + np.float32(self.last)
        infos = {"ragged": [0] * self.t, "text": "t" * self.t, "success": None}
        infos[self.tells] = self.cue == 1
        return obs, reward, ended and by_death, ended and not by_death, infos


class StrangerBox(Stranger):
    action_space = gym.spaces.Box(-1, 3, (2,), np.float16)


def register(name, script, **manners):
    base = StrangerBox if script.__name__ in CONTINUOUS else Stranger
    gym.registry.pop(name, None)
    gym.register(name, type(name, (base,), manners))
    return dict(env_id=name, env_kwargs={})


def test_arrays_that_a_task_uses_again(script, tmp_path):
    """The last observation of an episode is its own, not the first one of the next episode."""
    fresh, _ = run(tmp_path, script, run_name="fresh", **register("Fresh-v0", script))
    again, _ = run(tmp_path, script, run_name="again", **register("Again-v0", script, reuses_arrays=True))
    assert comparable(fresh) == comparable(again)


@pytest.mark.parametrize("prev_action", [False, True])
def test_actions_are_of_the_spaces_own_type(script, tmp_path, prev_action):
    """Stranger asserts that its space contains them: int8 from 2 on, or float16."""
    task = register("Typed-v0", script)
    rows, folder = run(tmp_path, script, prev_action=prev_action, eval_every=128, eval_episodes=2, **task)
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "1"])
    assert len(rows) == 3


@pytest.mark.quick
def test_the_previous_action_of_small_types(tmp_path):
    """No action yet is one below the space's start: -1, which uint8 does not have."""
    space = gym.spaces.MultiDiscrete([3, 200], dtype=np.uint8)
    envs = gym.make_vec("CartPole-v1", 2, "sync")
    envs.single_action_space = space
    joined = vector.wrappers.PreviousActionReward(envs, action=True, reward=False)
    assert joined.no_action.tolist() == [-1, -1]
    assert joined.single_observation_space[1].contains(joined.no_action)
    assert joined.single_observation_space[1].contains(np.array([2, 199]))


@pytest.mark.parametrize("name", ["success", "is_success"])
def test_success_is_read_under_both_names_and_nothing_else(tmp_path, name):
    import ppo_recurrent_tbb as ppo

    rows, _ = run(tmp_path, ppo, eval_every=128, eval_episodes=8, **register("Telling-v0", ppo, tells=name))
    assert 0 < float(rows[-1]["charts/success"]) < 1 and rows[-1]["eval/success"]
    rows, _ = run(tmp_path / "b", ppo, **register("Silent-v0", ppo, tells="other"))
    assert not rows[-1]["charts/success"]


def test_what_is_observed_after_a_death_may_be_nan(script, tmp_path):
    """0 x nan is nan: the losses must not meet it."""
    _, folder = run(tmp_path, script, **register("Mortal-v0", script, last=np.nan))
    assert all(w.isfinite().all() for w in weights_of(folder).values())


@pytest.mark.quick
@pytest.mark.parametrize("manners, says", [
    ({"gives_reward": np.nan}, "gave the reward nan in environment 0 after"),
    ({"observation": np.array([np.inf, 0], np.float32)},
     "left its space Box(-10.0, 10.0, (2,), float32) with [inf  0.] in environment 0 after"),
    ({"observation_space": gym.spaces.MultiDiscrete([6, 2]), "observation": np.array([4, 2])},
     "left its space MultiDiscrete([6 2]) with [4 2] in environment 0 after"),
])
def test_what_cannot_be_learned_from_is_named(tmp_path, capsys, manners, says):
    import ppo_recurrent_sbb as ppo

    with pytest.raises(SystemExit) as stop:
        run(tmp_path, ppo, **register("Faulty-v0", ppo, **manners))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--env-id Faulty-v0 {says}" in error and "Traceback" not in error


@pytest.mark.quick
@pytest.mark.parametrize("begins, kept", [(20, False), (300, True)])
def test_a_fault_in_a_run_leaves_what_was_learned_and_nothing_else(script, tmp_path, begins, kept):
    """begins: the step of the run's 384 from which rewards are nan."""
    class Late(StrangerBox if script.__name__ in CONTINUOUS else Stranger):
        steps = 0

        def step(self, action):
            Late.steps += 1
            obs, reward, *others = super().step(action)
            return obs, np.nan if Late.steps > begins else reward, *others

    gym.registry.pop("Late-v0", None)
    gym.register("Late-v0", Late)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, script, env_id="Late-v0", env_kwargs={})
    assert stop.value.code == 2 and (tmp_path / "run" / "checkpoint.pt").exists() == kept
    assert kept or not list(tmp_path.iterdir())


class Endless(gym.Env):
    """Never ends by itself."""

    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None, length=None):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return 0, {}

    def step(self, action):
        self.t += 1
        return self.t % 2, 1.0, self.t == self.length, False, {"success": True}


gym.register("Endless-v0", Endless)


@pytest.mark.parametrize("script", DISCRETE_OFF_POLICY, indirect=True)
def test_a_task_that_never_ends_is_said_to(script, tmp_path, capsys):
    """They draw ended episodes: until one has ended they cannot learn. A limit of the task's own mends it."""
    rows, _ = run(tmp_path, script, env_id="Endless-v0", env_kwargs={})
    assert "no gradient step was made until step 128" in "".join(capsys.readouterr())
    assert float(rows[-1]["charts/gradient_steps"]) == 0
    rows, _ = run(tmp_path / "b", script, env_id="Endless-v0", env_kwargs={"max_episode_steps": 9})
    assert "warning" not in "".join(capsys.readouterr()) and float(rows[-1]["charts/gradient_steps"]) > 0


@pytest.mark.quick
def test_long_episodes_are_played_to_their_end_and_endless_ones_are_cut_aloud(capsys, monkeypatch):
    import ppo_recurrent_tbb as ppo

    args = ppo.Args(env_id="Endless-v0", env_kwargs={"length": 10_500}, memory="none", device="cpu")
    envs = vector.make_envs(args, 1, training=False)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    assert play.play(agent, envs, 1, seed=0).T.tolist() == [[10_500, 10_500, 1]]
    monkeypatch.setattr(play, "LIMIT", 40)
    assert play.play(agent, envs, 1, seed=0)[:2].T.tolist() == [[40, 40]]
    assert "an episode was cut after 40 steps" in "".join(capsys.readouterr())
    args.env_kwargs["max_episode_steps"] = 60               # the task's own limit counts
    envs = vector.make_envs(args, 1, training=False)
    assert play.play(agent, envs, 1, seed=0)[:2].T.tolist() == [[60, 60]]
    assert "cut" not in "".join(capsys.readouterr())


@pytest.mark.quick
def test_a_task_of_the_working_directory_is_found(tmp_path, monkeypatch):
    import ppo_recurrent_tbb as ppo

    (tmp_path / "a_task_nearby.py").write_text(
        "import gymnasium as gym\ngym.register('Nearby-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n")
    monkeypatch.chdir(tmp_path)
    envs = vector.make_envs(ppo.Args(env_id="a_task_nearby:Nearby-v0"), 2)
    assert envs.num_envs == 2


class Spoilt(PocMemoryBatch):
    """One of our own batches, with a fault in it."""

    fault = "reward"

    def move(self, actions):
        reward, *ends = super().move(actions)
        return reward + (np.nan if self.fault == "reward" else 0), *ends

    def observe(self):
        obs = super().observe()
        return obs * np.nan if self.fault == "observation" and self.t.min() == 3 else obs


@pytest.mark.quick
@pytest.mark.parametrize("fault, says", [
    ("reward", "gave the reward nan in environment 0 after 1 steps"),
    ("observation", "left its space Box(-1.0, 1.0, (3,), float32) with [nan nan nan] in environment 0")])
def test_faults_of_our_own_batches_are_named(tmp_path, capsys, fault, says):
    import ppo_recurrent_tbb as ppo

    gym.registry.pop("Spoilt-v0", None)
    gym.register("Spoilt-v0", vector_entry_point=type("Fault", (Spoilt,), {"fault": fault}))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, ppo, env_id="Spoilt-v0")
    assert stop.value.code == 2 and f"--env-id Spoilt-v0 {says}" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize("space", [
    gym.spaces.Discrete(3, dtype=np.int32), gym.spaces.Discrete(3, start=200, dtype=np.uint8),
    gym.spaces.MultiDiscrete([3, 2], dtype=np.int8), gym.spaces.MultiDiscrete([3, 200], dtype=np.uint8),
    gym.spaces.Box(0, 4, (2,), np.int32), gym.spaces.Box(-100, 100, (2,), np.int8),
    gym.spaces.Box(-1, 3, (2,), np.float16), gym.spaces.Box(-1, 3, (2,), np.float64)], ids=str)
@pytest.mark.parametrize("prev_action", [False, True])
def test_every_type_of_action(script, space, prev_action):
    """The space contains the actions; with gradients on, too."""
    continuous, box = script.__name__ in CONTINUOUS, isinstance(space, gym.spaces.Box)
    if continuous != box and not (box and script.__name__ in PPO):
        return
    gym.registry.pop("Typed-v0", None)
    gym.register("Typed-v0", type("Typed", (Stranger,), {"action_space": space}))
    args = script.Args(env_id="Typed-v0", prev_action=prev_action, memory="gru", device="cpu")
    envs = vector.make_envs(args, 4)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    state, start = agent.memory.initial_state(4), torch.ones(4, dtype=torch.bool)
    obs, _ = envs.reset(seed=1)
    for _ in range(6):                                      # Stranger asserts that its space contains them
        obs = to_tensors(envs.single_observation_space, obs, "cpu")
        action, state = agent.act(obs, state, start)
        obs = envs.step(action)[0]


@pytest.mark.quick
def test_whole_numbers_within_bounds_are_all_taken():
    low, high = np.array([0, -100], np.int8), np.array([4, 100], np.int8)
    ends = to_bounds(torch.tensor([[-1.0, -1.0], [0.9, 1.0], [1.0, 0.0]]), low, high)
    assert ends.tolist() == [[0, -100], [4, 100], [4, 0]] and ends.dtype == torch.int8


@pytest.mark.quick
@pytest.mark.parametrize("low, high, given, seen", [
    (100, 200, 175, 0.5), (-0.01, 0.01, -0.01, -1), (-1, 1, 0.3, 0.3), (-np.inf, np.inf, 7, 7)])
def test_previous_actions_are_in_units_of_the_bounds(low, high, given, seen):
    space = gym.spaces.Box(low, high, (1,), np.float32)
    gym.registry.pop("Typed-v0", None)
    gym.register("Typed-v0", type("Typed", (Stranger,), {"action_space": space}))
    envs = gym.make_vec("Typed-v0", 2, "sync")
    joined = vector.wrappers.PreviousActionReward(envs, action=True, reward=False)
    assert joined.reset(seed=1)[0][1].tolist() == [[0], [0]]
    assert joined.step(np.full((2, 1), given, np.float32))[0][1] == pytest.approx(np.full((2, 1), seen))


class Unwanted(gym.vector.VectorEnv):
    def __init__(self, *_, **__):
        raise AssertionError("other people's vectors are not made")


@pytest.mark.quick
def test_vectors_of_others_are_not_used_and_what_is_made_is_made_once_and_closed(tmp_path):
    import ppo_recurrent_tbb as ppo

    made, closed = [], []

    class Counted(Stranger):
        def __init__(self, render_mode=None, obs_type="ram"):
            super().__init__()
            made.append(obs_type)

        def state_dict(self):
            raise AssertionError("its own matter")

        def close(self):
            closed.append(1)

    gym.registry.pop("Counted-v0", None)
    gym.register("Counted-v0", Counted, vector_entry_point=Unwanted)
    run(tmp_path, ppo, env_id="Counted-v0", env_kwargs={"obs_type": "rgb"}, num_envs=1, num_minibatches=1)
    gc.collect()
    assert made == ["rgb"] and len(closed) == 1


@pytest.mark.quick
@pytest.mark.parametrize("told, found", [
    (True, {"success": 1.0}), (0.5, {"success": 0.5}), ([True], {"success": 1.0}),
    (np.array([0]), {"success": 0.0}), (None, {}), ("yes", {}), ([1, 0], {}), (np.nan, {})])
def test_what_counts_as_success(told, found):
    assert whether_success({"success": told}) == whether_success({"is_success": told}) == found

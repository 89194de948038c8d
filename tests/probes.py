"""What a run of a replay script does, seen from outside: a task of telling numbers, and probes."""
import collections
import copy
import inspect
import types

import gymnasium as gym
import numpy as np
import torch

from envs.batch import BatchEnv, SingleEnv
from tests.helpers import run


class NumbersBatch(BatchEnv):
    """An observation is (episode, step), a reward 100 * episode + step. Episodes have 3 to 5 steps.

    Even episodes terminate, odd ones are truncated.   discrete: actions are one of 3, otherwise a Box
    """

    def __init__(self, num_envs=1, discrete=False, **kwargs):
        actions = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-2, 6, (1,))
        super().__init__(gym.spaces.Box(0, np.inf, (2,)), actions, num_envs, **kwargs)
        self.episode, self.t = np.full(num_envs, -1), np.zeros(num_envs, int)
        self.got = []                                       # the actions of every step

    def begin(self, rows):
        self.episode[rows] += 1
        self.t[rows] = 0

    def move(self, actions):
        self.got.append(np.array(actions))
        reward = 100.0 * self.episode + self.t
        self.t = self.t + 1
        ended, even = self.t == 3 + self.episode % 3, self.episode % 2 == 0
        return reward, ended & even, ended & ~even, None

    def observe(self):
        return np.stack([self.episode, self.t], axis=1).astype(np.float32)


class Numbers(SingleEnv):
    batch_class = NumbersBatch


gym.register("Numbers-v0", Numbers, vector_entry_point=NumbersBatch)
NUMBERS = dict(env_id="Numbers-v0", env_kwargs={}, prev_action=False)


def watched(tmp_path, monkeypatch, script, every=1, **changes):
    """Trains, and returns one record a gradient step, and the rows of progress.csv.

    every: of so many gradient steps only the last has a record: copies take longer than training. It holds:

    agent, target   copies of the networks as they were before the step
    batch           what was drawn
    random          the state of the generator after drawing
    clipped         gradients before clipping: the critics' and then, if it learns, the policy's
    late            the agent when the last of these was clipped
    after           agent and target after the step
    gradients       what is then left in .grad, by name
    """
    seen, made, drawn = [], {}, []
    replay = getattr(script, "SequenceReplay", None) or script.Replay
    sample, clip, make_agent = replay.sample, torch.nn.utils.clip_grad_norm_, script.make_agent

    def recording_make_agent(*args):
        made["agent"], device = make_agent(*args)
        return made["agent"], device

    def recording_deepcopy(x):
        made["target"] = copy.deepcopy(x)
        return made["target"]

    def recorded():
        """Whether this gradient step is."""
        return len(drawn) % every == 0

    def recording_sample(*args):
        batch = sample(*args)
        drawn.append(batch)
        if recorded():
            agent, target = copy.deepcopy((made["agent"], made["target"]))
            seen.append(types.SimpleNamespace(
                agent=agent, target=target, batch=batch, random=torch.get_rng_state(), clipped=[]))
        return batch

    def recording_clip(parameters, max_norm):
        parameters = list(parameters)
        if recorded():
            seen[-1].clipped.append([zeros_for_none(p.grad, p).clone() for p in parameters])
            seen[-1].late = copy.deepcopy(made["agent"])
        return clip(parameters, max_norm)

    class RecordingRun(script.Run):
        def lap(self, name):
            if name == "update" and recorded():
                seen[-1].after = copy.deepcopy((made["agent"], made["target"]))
                parameters = made["agent"].named_parameters()
                seen[-1].gradients = {name: copy.deepcopy(p.grad) for name, p in parameters}
            super().lap(name)

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_agent", recording_make_agent)
        patch.setattr(script, "copy", types.SimpleNamespace(deepcopy=recording_deepcopy))
        patch.setattr(replay, "sample", recording_sample)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
        patch.setattr(script, "Run", RecordingRun)
        rows, _ = run(tmp_path, script, **changes)
    return seen, rows


def zeros_for_none(gradient, parameter):
    return torch.zeros_like(parameter) if gradient is None else gradient


def acted(tmp_path, monkeypatch, script, **changes):
    """Trains; returns step by step what the policy was given as `start`, [N], and what entered the replay."""
    starts, entered = [], []
    name, replay = ("pi", "SequenceReplay") if hasattr(script, "SequenceReplay") else ("forward", "Replay")
    policy, replay = getattr(script.Agent, name), getattr(script, replay)
    add, signature = replay.add, inspect.signature(replay.add)

    def recording_policy(agent, obs, state, start):
        if len(start) == 1:                                 # acting, not training
            starts.append(start[0].clone())
        return policy(agent, obs, state, start)

    def recording_add(*args):
        step = signature.bind(*args).arguments
        entered.append(types.SimpleNamespace(**copy.deepcopy({k: v for k, v in step.items() if k != "self"})))
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Agent, name, recording_policy)
        patch.setattr(replay, "add", recording_add)
        run(tmp_path, script, **changes)
    return starts, entered


def check_what_enters_the_replay(tmp_path, monkeypatch, script, to_env, **changes):
    """Observations, rewards and ends as the task made them; an episode's last observation is its own."""
    made = []
    init = NumbersBatch.__init__

    def recording_init(task, *args, **kwargs):
        init(task, *args, **kwargs)
        made.append(task)

    monkeypatch.setattr(NumbersBatch, "__init__", recording_init)
    _, entered = acted(tmp_path, monkeypatch, script, **{**NUMBERS, **changes})
    tasks = [task for task in made if len(task.got) > len(entered) > 90]  # the first step was a trial
    at = np.array([[entered[0].obs[0][n, 0], 0] for n in range(4)])     # episode and step of each
    ends = collections.Counter()
    for i, now in enumerate(entered, 1):
        got = np.concatenate([task.got[i] for task in tasks])
        np.testing.assert_array_equal(now.obs[0], at)
        np.testing.assert_array_equal(now.reward, 100 * at[:, 0] + at[:, 1])
        np.testing.assert_allclose(got, to_env(now.action.numpy()), atol=1e-5)
        ended = at[:, 1] + 1 == 3 + at[:, 0] % 3
        assert list(now.ended) == np.flatnonzero(ended).tolist()
        np.testing.assert_array_equal(now.terminated, ended & (at[:, 0] % 2 == 0))
        last = [leaves[0].tolist() for leaves in now.last_obs]
        assert last == [[at[n, 0], at[n, 1] + 1] for n in now.ended]
        ends.update(at[now.ended, 0] % 2)
        after = np.stack([at[:, 0] + 1, 0 * at[:, 1]], axis=1)
        at = np.where(ended[:, None], after, at + [0, 1])
    assert min(ends[0], ends[1]) > 20                       # ends of both kinds

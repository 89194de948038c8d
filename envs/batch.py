"""How our tasks are written: as a batch of N environments in numpy. One is a batch of one."""
import json

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space


def check_whole(**arguments):
    """Raises ValueError unless each is a whole number of 1 or more."""
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, not {value}")


def row(obs, n):
    """What environment n observes."""
    if isinstance(obs, dict):
        return {name: row(part, n) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(row(part, n) for part in obs)
    return obs[n]


def newest(values, t, K):
    """What there was 0, 1, ... K - 1 steps ago, [N, K]; -1: nothing yet.   values [N, steps]; t [N] now"""
    when = t[:, None] - np.arange(K)
    return np.where(when < 0, -1, np.take_along_axis(values, when.clip(0), axis=1))


class BatchEnv(gym.vector.VectorEnv):
    """N environments that step together: row n of every array belongs to environment n.

    A task sets its two single spaces and its arrays in __init__ and defines

        begin(rows)     draw new episodes for these rows (integer array), from self.np_random only
        move(actions)   advance every row; returns reward [N] float, terminated [N] and truncated [N]
                        bool, and success [N], or None if the task does not define it
        observe()       the observations, a new array [N, ...], or of a Dict or Tuple a dict or tuple of
                        these; it changes nothing, it may be called twice
        text(n)         what to print of row n       (render_mode "ansi")
        picture(n)      row n, [H, W, 3] uint8       (render_mode "rgb_array")
        facts()         what else the info of an episode's last step says, {name: array [N]}; may be left out
        remembered()    what an agent has to remember now, {name: whole numbers [N] or [N, K]}, for --probe; a
                        number below 0 is none yet. Of [N, K] column k is k steps old. May be left out

    What forbids actions is a part `action_mask` of a Dict observation, its space an ActionMask(action_space)
    in models/action_mask.py: 1 is allowed; something always is, also in the last observation.

    Whatever changes in an episode lives in numpy arrays [N, ...], made in __init__ with their final
    dtype: these attributes are what a resume restores. Constants are no array attributes.

    `success` is reported in the info of an episode's last step; rows that go on are not looked at.

    A task with reset options names them with their defaults in the class's `reset_options`. Those of the
    last reset are in self.options; the automatic resets that follow use them too.

    What happens after the last step of an episode depends on the AutoresetMode.
    SAME_STEP: the next episode begins at once. The last observation and info of the old one are in
    infos["final_obs"] and infos["final_info"].
    DISABLED: the row must be reset, by reset(options={"reset_mask": mask}), before the next step.

    One generator serves the whole batch: reset(seed=s) repeats all N streams of episodes, but row i
    of a batch of N is not the single environment with the seed s + i.
    """

    reset_options = {}
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(self, observation_space, action_space, num_envs=1, render_mode=None,
                 autoreset_mode="SameStep", max_episode_steps=None):
        mode = AutoresetMode(autoreset_mode)
        if mode == AutoresetMode.NEXT_STEP:
            # PITFALL: NEXT_STEP, Gymnasium's default, puts a phantom transition (action ignored,
            #   reward 0) between two episodes. Symptom: one step more per episode than the task has,
            #   and an agent that learns from it. Test: test_envs.py::test_no_phantom_transition.
            raise ValueError("autoreset_mode must be SameStep or Disabled")
        self.metadata = self.metadata | {"autoreset_mode": mode}
        if max_episode_steps is not None:
            check_whole(max_episode_steps=max_episode_steps)
        self.num_envs, self.render_mode = num_envs, render_mode
        self.max_episode_steps = max_episode_steps          # a limit beside the task's own; None: none
        self.elapsed = np.zeros(num_envs, int)              # [N] steps of the running episode
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = dict(options or {})
        rows = options.pop("reset_mask", np.ones(self.num_envs, bool))
        unknown = {name: value for name, value in options.items() if name not in self.reset_options}
        if unknown:
            known = f"the reset options {', '.join(self.reset_options)}" if self.reset_options else \
                "no reset options"
            raise ValueError(f"this task has {known}, but got {unknown}; its arguments go to gym.make")
        self.options = {**self.reset_options, **options}
        self.elapsed[rows] = 0
        self.begin(np.flatnonzero(rows))
        return self.observe(), {}

    def step(self, actions):
        reward, terminated, truncated, success = self.move(np.asarray(actions))
        for name, ends in (("terminated", terminated), ("truncated", truncated)):
            if getattr(ends, "dtype", None) != np.bool_ or ends.shape != (self.num_envs,):
                raise ValueError(f"move() must return {name} as a bool array [N], not {ends!r}")
        self.elapsed += 1
        if self.max_episode_steps is not None:
            truncated = truncated | (self.elapsed >= self.max_episode_steps)
        obs, infos, done = self.observe(), {}, terminated | truncated
        if done.any():
            facts = self.facts() if success is None else {"success": success, **self.facts()}
            infos = facts | {f"_{name}": done for name in facts}
            if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
                final_obs = np.full(self.num_envs, None, dtype=object)
                for i in np.flatnonzero(done):
                    final_obs[i] = row(obs, i)
                infos = {"final_obs": final_obs, "_final_obs": done,
                         "final_info": infos, "_final_info": done}
                self.elapsed[done] = 0
                self.begin(np.flatnonzero(done))
                obs = self.observe()
        return obs, reward, terminated, truncated, infos

    def facts(self):
        return {}

    def remembered(self):
        return {}

    def render(self):
        """A tuple of N frames: text for "ansi", [H, W, 3] uint8 for "rgb_array"."""
        draw = self.text if self.render_mode == "ansi" else self.picture
        return tuple(draw(i) for i in range(self.num_envs))

    def state_dict(self):
        """What a resume needs: every array of the task, and the random generator as a string."""
        arrays = {k: v.copy() for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return arrays | {"np_random": json.dumps(self.np_random.bit_generator.state)}

    def load_state_dict(self, state):
        for name, value in state.items():
            if name == "np_random":
                self.np_random.bit_generator.state = json.loads(value)
            else:
                getattr(self, name)[...] = value


class SingleEnv(gym.Env):
    """The batch of one as a plain gymnasium.Env.

    A task names its batch:   class Task(SingleEnv): batch_class = TaskBatch
    """

    def __init_subclass__(cls):
        cls.metadata = cls.batch_class.metadata

    def __init__(self, render_mode=None, **kwargs):
        self.batch = self.batch_class(1, render_mode=render_mode, autoreset_mode="Disabled", **kwargs)
        self.render_mode = render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch.np_random = self.np_random
        obs, info = self.batch.reset(options=options)
        return row(obs, 0), info

    def step(self, action):
        obs, reward, terminated, truncated, infos = self.batch.step([action])
        info = {name: fact[0].item() for name, fact in infos.items() if not name.startswith("_")}
        return row(obs, 0), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self):
        return self.batch.render()[0]


def single(batch_class):
    """The SingleEnv of a batch, where it needs no name of its own."""
    return type("Single" + batch_class.__name__, (SingleEnv,), {"batch_class": batch_class})

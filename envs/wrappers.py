"""Wrappers around tasks: other people's at the door, reset options, smaller pictures, previous action."""
import re

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.core.mission import MissionSpace
from minigrid.envs.babyai.core.roomgrid_level import BabyAIMissionSpace

from models.action_mask import ActionMask
from models.encoder import leaves
from models.flags import fail
from models.images import channels_last, is_picture
from models.views import Views

WORDS = """a after and at avoid ball behind blue box door end fetch find from front get go goal green grey
    hallway in key lava left matching maze must near next object of on open opening pick purple put reach red
    right room rooms square the then to traverse unlock up use yellow you your""".split()
TOKENS = {word: token for token, word in enumerate(WORDS, start=2)}  # 0: no word, 1: an unknown one


class Symbols(gym.ObservationWrapper):
    """MiniGrid and BabyAI in integers: `image` [H, W, 3] as object, colour and state, `mission` as words."""

    def __init__(self, env):
        super().__init__(env)
        # PITFALL: the image has bounds of 0 and 255 and is no picture: divided by 255 its symbols are too
        #   alike to be told apart. Symptom: MiniGrid-Empty-8x8-v0 stays at a return of .64.
        #   Test: test_spaces.py::test_minigrid_is_read_as_symbols.
        spaces = dict(env.observation_space.spaces)
        symbols = len(OBJECT_TO_IDX), len(COLOR_TO_IDX), 4  # of an object, or where the agent looks
        nvec = np.broadcast_to(symbols, spaces["image"].shape)
        spaces["image"] = gym.spaces.MultiDiscrete(nvec, dtype=np.uint8)
        self.length = length_of(spaces["mission"])
        spaces["mission"] = gym.spaces.MultiDiscrete([len(TOKENS) + 2] * self.length, dtype=np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)

    def observation(self, obs):
        words = re.findall(r"\w+", obs["mission"].lower())[:self.length]
        mission = np.zeros(self.length, np.uint8)
        mission[:len(words)] = [TOKENS.get(word, 1) for word in words]
        return {**obs, "mission": mission}


def length_of(mission):
    """The most words that a mission of this space has."""
    if isinstance(mission, BabyAIMissionSpace):             # "put a red ball in front of you next to a box
        return 72                                           # on your left", four times, with an and, a then
    placeholders = mission.ordered_placeholders or ()
    longest = [max(words, key=lambda text: len(text.split())) for words in placeholders]
    return len(mission.mission_func(*longest).split())


def in_symbols(env):
    """What MiniGrid's interface shows, in integers; other tasks as they are."""
    space = env.observation_space
    theirs = isinstance(space, gym.spaces.Dict) and isinstance(space.spaces.get("mission"), MissionSpace)
    return Symbols(env) if theirs and "image" in space.spaces else env


class Masked(gym.Wrapper):
    """A task's action mask becomes a leaf of its observation, if it gives one: models/action_mask.py.

    In a Dict observation it is the part `action_mask`. Otherwise one reset tells whether infos hold a mask;
    then the observation becomes Tuple(observation, mask).
    """

    def __init__(self, env):
        super().__init__(env)
        space, self.mask = env.observation_space, ActionMask(env.action_space)
        self.shown = isinstance(space, gym.spaces.Dict) and "action_mask" in space.spaces
        self.given = self.shown or "action_mask" in env.reset()[1]
        if self.shown:
            parts = [(name, self.mask if name == "action_mask" else part) for name, part in space.items()]
            self.observation_space = gym.spaces.Dict(parts)
        elif self.given:
            self.observation_space = gym.spaces.Tuple([space, self.mask])

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.with_mask(obs, info), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.with_mask(obs, info, terminated), reward, terminated, truncated, info

    def with_mask(self, obs, info, terminated=False):
        mask = (obs if self.shown else info).get("action_mask")
        if (mask is None) == self.given:
            self.refuse("at some steps and not at others")
        if mask is None:
            return obs
        parts = [np.ravel(part) for part in (mask if isinstance(mask, tuple) else [mask])]
        lengths = [len(part) for part in parts]             # of one array, or of one a branch
        if lengths not in ([self.mask.n], self.mask.sizes):
            self.refuse(f"of {' + '.join(map(str, lengths))} numbers for {self.action_space}")
        mask = np.int8(np.concatenate(parts) != 0)          # its own copy
        if terminated and not self.mask.leaves_a_choice(mask):                  # as many games: nothing will
            mask[:] = 1                                     # be chosen there, but losses must not meet nan
        return {**obs, "action_mask": mask} if self.shown else (obs, mask)

    def refuse(self, what):
        fail(f"--env-id {self.spec.id} gives an action_mask {what}; --no-action-mask leaves masks out")


def masked(env):
    """With its mask as a leaf, where it has actions that can be forbidden."""
    space = env.action_space
    one_dimension = isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1
    return Masked(env) if one_dimension or isinstance(space, gym.spaces.Discrete) else env


class NoActionMask(gym.vector.VectorWrapper):
    """--no-action-mask: a Dict's `action_mask` is left out. What a space does not name is not looked at."""

    def __init__(self, envs):
        super().__init__(envs)
        space = envs.single_observation_space
        if isinstance(space, gym.spaces.Dict):
            parts = [(name, part) for name, part in space.items() if name != "action_mask"]
            self.single_observation_space = gym.spaces.Dict(parts)
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)


class Guest(gym.Wrapper):
    """One of other people's environments: what it does to its arrays and infos later does not reach us.

    An episode's last observation is a copy (the others are copied into the batch anyway). After a death it is
    never looked at, but 0 x nan is nan: what is not finite there becomes 0. Of the infos only `success` or
    `is_success` of an episode's last step comes in. reset() gets options=None, no empty dict.
    """

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options or None)[0], {}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            last_obs = deep_copy(obs, finite=terminated)
            return last_obs, reward, bool(terminated), bool(truncated), whether_success(info)
        return obs, reward, False, False, {}


class Checked(gym.vector.VectorWrapper):
    """Names what nobody can learn from: nan and inf in an observation or a reward, integers outside their
    space, masks that forbid everything.
    """

    def __init__(self, envs):
        super().__init__(envs)
        self.spaces = leaves(envs.single_observation_space)
        self.names = names_of(envs.single_observation_space)
        self.bounds = [bounds_of(space) for space in self.spaces]

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        obs, infos = self.env.reset(seed=seed, options=options)
        self.check(obs)
        return obs, infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self.steps += 1
        if not np.isfinite(rewards.sum()) and not np.isfinite(rewards).all():
            self.refuse(~np.isfinite(rewards), rewards, "gave the reward")
        self.check(obs)
        if "final_obs" in infos and truncated.any():        # after a death it is not looked at
            last_obs = infos["final_obs"][truncated]
            batch = create_empty_array(self.single_observation_space, n=len(last_obs))
            self.check(concatenate(self.single_observation_space, last_obs, batch))
        return obs, rewards, terminated, truncated, infos

    def check(self, obs):
        found = leaves(self.single_observation_space, obs)
        for name, space, bounds, leaf in zip(self.names, self.spaces, self.bounds, found):
            if isinstance(space, ActionMask) and not space.leaves_a_choice(leaf).all():
                self.refuse(~space.leaves_a_choice(leaf), leaf, "forbids every action with the action_mask")
            if bounds is None or (leaf.dtype.kind == "f" and np.isfinite(leaf.sum())):
                continue
            inside = (leaf >= bounds[0]) & (leaf <= bounds[1])  # nan is in no bounds
            if not inside.all():
                outside = ~inside.reshape(len(leaf), -1).all(1)                 # [N]
                self.refuse(outside, leaf, f"left its space {name}{space} with")

    def refuse(self, rows, values, what):
        n = np.flatnonzero(rows)[0]
        fail(f"--env-id {self.env.spec.id} {what} {values[n]} in environment {n} after {self.steps} steps")


def names_of(space, name=""):
    """Where each leaf is found, in the order of leaves(): "hand[0]: "; "" if there is only one."""
    parts = getattr(space, "spaces", None)
    if parts is None:
        return [f"{name}: " if name else ""]
    parts = parts if isinstance(space, gym.spaces.Dict) else dict(enumerate(parts))
    names = {key: f"{name}[{key}]" if name else f"{key}" for key in parts}
    return sum((names_of(part, names[key]) for key, part in parts.items()), [])


def bounds_of(space):
    """The smallest and the largest value of a leaf that an encoder can take; None: all."""
    if isinstance(space, gym.spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if np.issubdtype(space.dtype, np.floating):
        largest = np.finfo(space.dtype).max                 # others' Boxes are rarely exact
        return -largest, largest
    return None


def deep_copy(obs, finite):
    if isinstance(obs, dict):
        return {name: deep_copy(leaf, finite) for name, leaf in obs.items()}
    if isinstance(obs, tuple):
        return tuple(deep_copy(leaf, finite) for leaf in obs)
    return np.nan_to_num(obs, posinf=0, neginf=0) if finite else np.array(obs)


def whether_success(info):
    """{"success": 0.0 or 1.0, or a share}, or {} where the task does not say it in one number."""
    for name in ("success", "is_success"):
        value = np.asarray(info.get(name))
        if value.dtype.kind in "biuf" and value.size == 1 and np.isfinite(value).all():
            return {"success": float(value.item())}
    return {}


class ResetOptions(gym.Wrapper):
    """Gives the same options to every reset. (A vector environment's own autoresets pass none.)"""

    def __init__(self, env, options):
        super().__init__(env)
        self.options = options

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={**self.options, **(options or {})})


class BatchResetOptions(gym.vector.VectorWrapper):
    """The same for our own batches, which keep the options for their automatic resets."""

    def __init__(self, envs, options):
        super().__init__(envs)
        self.options = options

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={**self.options, **(options or {})})


class ShrunkImages(gym.vector.VectorWrapper):
    """Every square of `factor` x `factor` pixels becomes their mean; rows and columns left over are cut.

    Numbered pictures (Views) are shrunk once, and their numbers stay.
    """

    def __init__(self, envs, factor):
        super().__init__(envs)
        self.factor = factor
        whole = envs.single_observation_space
        pictures = [space for space in leaves(whole) if isinstance(space, Views) or is_picture(space)]
        if not pictures:
            raise ValueError("--shrink-images finds no picture in what the task shows; leave it out")
        self.single_observation_space = self.shrunk_space(whole)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def shrunk_space(self, space):
        if isinstance(space, gym.spaces.Dict):
            return gym.spaces.Dict({name: self.shrunk_space(part) for name, part in space.items()})
        if isinstance(space, gym.spaces.Tuple):
            return gym.spaces.Tuple([self.shrunk_space(part) for part in space])
        if isinstance(space, Views):
            return Views(self.shrink(space.images, space.picture_space))
        if not is_picture(space):
            return space
        shape = self.shrink(np.zeros(space.shape, space.dtype), space).shape
        if channels_last(shape) != channels_last(space.shape):                  # an encoder could not tell
            raise ValueError(f"--shrink-images {self.factor} leaves too little of a picture: {shape}")
        return gym.spaces.Box(space.low.min(), space.high.max(), shape, space.dtype)

    def shrink(self, obs, space):
        """An observation of this space, single or batched."""
        if isinstance(space, gym.spaces.Dict):
            return {name: self.shrink(obs[name], part) for name, part in space.items()}
        if isinstance(space, gym.spaces.Tuple):
            return tuple(self.shrink(o, part) for o, part in zip(obs, space))
        if not is_picture(space):
            return obs
        last, k = channels_last(space.shape) and len(space.shape) > 2, self.factor
        x = np.moveaxis(obs, -1, -3) if last else obs       # [..., H, W]
        h, w = x.shape[-2] // k, x.shape[-1] // k
        if not h or not w:
            size = f"{x.shape[-2]} x {x.shape[-1]}"
            raise ValueError(f"--shrink-images {k} leaves nothing of a picture of {size} pixels")
        x = x[..., :h * k, :w * k].reshape(*x.shape[:-2], h, k, w, k).mean((-3, -1), dtype=np.float32)
        x = x.round() if np.issubdtype(obs.dtype, np.integer) else x
        return np.ascontiguousarray(np.moveaxis(x, -3, -1) if last else x, obs.dtype)

    def reset(self, *, seed=None, options=None):
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.shrink(obs, self.env.single_observation_space), infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        space = self.env.single_observation_space
        for i in np.flatnonzero(infos.get("_final_obs", [])):
            infos["final_obs"][i] = self.shrink(infos["final_obs"][i], space)
        return self.shrink(obs, space), rewards, terminated, truncated, infos


class PreviousActionReward(gym.vector.VectorWrapper):
    """The observation becomes Tuple(observation[, previous action][, previous reward]).

    At the first step of an episode there is no previous action: integers then read one below the
    space's start, a Box reads 0. There is no previous reward either: it reads 0. The actions of a Box are in
    units that put its finite bounds at -1 and 1, as policies give them.
    """

    def __init__(self, envs, action, reward):
        super().__init__(envs)
        space, parts = envs.single_action_space, [envs.single_observation_space]
        kinds = gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.Box
        if not isinstance(space, kinds) or len(space.shape) > 1:
            raise ValueError(f"action space {space} is not supported: it can be a Discrete, or a "
                             "MultiDiscrete or Box of one dimension")
        if action and isinstance(space, gym.spaces.Discrete):
            parts.append(gym.spaces.Discrete(int(space.n) + 1, start=int(space.start) - 1))
        elif action and isinstance(space, gym.spaces.MultiDiscrete):
            nvec = space.nvec.astype(np.int64)
            start = space.start.astype(np.int64)            # uint8 has no -1
            parts.append(gym.spaces.MultiDiscrete(nvec + 1, start=start - 1))
        elif action:
            low, high = space.low.astype(float), space.high.astype(float)
            finite = high - low < 1e9                       # what is wider is no bound
            self.scale = np.where(finite, (high - low) / 2, 1.0)
            self.centre = np.where(finite, low + self.scale, 0.0)
            self.scale[self.scale == 0] = 1.0
            bound = np.where(finite, 1, np.inf).astype(np.float32)
            parts.append(gym.spaces.Box(-bound, bound, dtype=np.float32))
        if reward:
            parts.append(gym.spaces.Box(-np.inf, np.inf, (), np.float32))
        self.action, self.reward = action, reward
        self.box = isinstance(space, gym.spaces.Box)
        if self.box:
            self.no_action = np.zeros(space.shape, np.float32)
        else:
            self.no_action = np.asarray(space.start, np.int64) - 1
        self.last_actions = np.stack([self.no_action] * self.num_envs)
        self.last_rewards = np.zeros(self.num_envs)
        self.single_observation_space = gym.spaces.Tuple(parts)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def join(self, obs, action, reward):
        parts = [obs]
        if self.action:
            parts.append(np.copy(action))
        if self.reward:
            parts.append(np.float32(reward))
        return tuple(parts)

    def reset(self, *, seed=None, options=None):
        begin = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        obs, infos = self.env.reset(seed=seed, options=options)
        self.last_actions[begin], self.last_rewards[begin] = self.no_action, 0
        return self.join(obs, self.last_actions, self.last_rewards), infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        if self.action and self.box:
            actions = (actions - self.centre) / self.scale
        self.last_actions = np.array(actions, self.no_action.dtype)
        self.last_rewards = np.array(rewards)
        for i in np.flatnonzero(infos.get("_final_obs", [])):   # obs[i] opens an episode
            final_obs = infos["final_obs"][i]
            infos["final_obs"][i] = self.join(final_obs, self.last_actions[i], self.last_rewards[i])
            self.last_actions[i], self.last_rewards[i] = self.no_action, 0
        obs = self.join(obs, self.last_actions, self.last_rewards)
        return obs, rewards, terminated, truncated, infos

"""Somebody else's environments: what they show is given by hand, and seen through the wrappers of ours."""
import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from envs.wrappers import Masked, Symbols
from models.encoder import leaves


class Given(gym.vector.VectorEnv):
    """N environments that show what show() was given last.   like: our own vector of the same task"""

    def __init__(self, like, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = like.single_observation_space
        self.single_action_space = like.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.symbols, self.masked = wrapper(like, Symbols), wrapper(like, Masked)
        if self.masked and not self.masked.given:
            self.masked = None
        self.masks_in_infos = self.masked is not None and not self.masked.shown

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, actions):
        nowhere = np.zeros(self.num_envs, bool)
        return self.obs, self.rewards, nowhere, nowhere, {}

    def show(self, obs, rewards, masks):
        """What N environments show next, as a vector environment gives it.   masks: those of their infos"""
        if self.masks_in_infos and masks is None:
            raise ValueError("the task's infos hold masks: call policy(obs, action_mask=info['action_mask'])")
        self.rewards = np.zeros(self.num_envs) if rewards is None else np.reshape(rewards, self.num_envs)
        space = self.single_observation_space
        if self.symbols or self.masked:
            theirs = (self.symbols or self.masked).env.observation_space
            rows = iterate(batch_space(theirs, self.num_envs), obs)
            masks = [None] * self.num_envs if masks is None else masks
            rows = [self.seen(row, mask) for row, mask in zip(rows, masks)]
            obs = concatenate(space, rows, create_empty_array(space, self.num_envs))
        for part, leaf in zip(leaves(space), leaves(space, obs)):
            if np.shape(leaf)[1:] != part.shape:
                raise ValueError(f"an observation of {part} has the shape {part.shape}, not "
                                 f"{np.shape(leaf)[1:]}; for many environments give start too")
        self.obs = obs

    def seen(self, obs, mask):
        """One environment's observation as our wrappers inside the vector leave it."""
        if self.symbols:
            obs = self.symbols.observation(obs)
        return self.masked.with_mask(obs, {"action_mask": mask}) if self.masked else obs


def batch_of_one(obs):                                      # [...] -> [1, ...]
    if isinstance(obs, dict):
        return {name: batch_of_one(part) for name, part in obs.items()}
    return tuple(map(batch_of_one, obs)) if isinstance(obs, tuple) else np.asarray(obs)[None]


def wrapper(envs, kind):
    """That of the first environment, None if there is none."""
    env, *_ = getattr(envs, "envs", [None])
    while isinstance(env, gym.Wrapper) and not isinstance(env, kind):
        env = env.env
    return env if isinstance(env, kind) else None

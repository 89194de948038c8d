"""Action masks: which actions a task allows at a step.

A mask is a leaf of the observation (models/encoder.py), so whatever stores or carries observations holds the
masks too. No network reads it: the encoder leaves it out, and the heads apply it.
"""
import gymnasium as gym
import numpy as np


class ActionMask(gym.spaces.MultiBinary):
    """1: the action is allowed. Those of a MultiDiscrete's branches are one after the other."""

    def __init__(self, action_space):
        discrete = isinstance(action_space, gym.spaces.Discrete)
        self.sizes = [int(action_space.n)] if discrete else action_space.nvec.tolist()
        self.action_space = action_space
        super().__init__(sum(self.sizes))

    def __repr__(self):
        return f"ActionMask({self.action_space})"

    def branches(self, masks):                              # [..., n] -> [..., size] of each branch
        return np.split(masks, np.cumsum(self.sizes)[:-1], axis=-1)

    def leaves_a_choice(self, masks):                       # [..., n] -> [...] bool
        """Whether something is allowed, in every branch."""
        return np.all([branch.any(-1) for branch in self.branches(masks)], axis=0)

    def first_allowed(self, masks):                         # [N, n] -> [N, *action_space.shape]
        """The first allowed action of each row, as the environment takes it."""
        actions = np.stack([branch.argmax(-1) for branch in self.branches(masks)], axis=-1)
        actions = actions.reshape(len(masks), *self.action_space.shape) + self.action_space.start
        return actions.astype(self.action_space.dtype)

"""Heads: features -> a distribution over actions, or the values of actions."""
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from models.distributions import Categorical, DiagonalGaussian, MultiCategorical
from models.layers import init


def to_bounds(action, low, high):
    """[-1, 1] -> a Box's bounds, in their dtype: integers are rounded.   action [..., A]; low, high: numpy"""
    lowest, highest = low.astype(float), high.astype(float)                     # int8 has no 200
    return scaled(action + 1, lowest, (highest - lowest) / 2, low, high)


def scaled(action, offset, scale, low, high):
    """offset + scale * action, clipped, in the bounds' dtype.   All except the action: numpy [A]"""
    offset, scale, lowest, highest = (
        torch.as_tensor(x.astype(float), device=action.device) for x in (offset, scale, low, high))
    action = offset + scale * action
    action = action.round() if np.issubdtype(low.dtype, np.integer) else action
    return action.clamp(lowest, highest).to(getattr(torch, low.dtype.name))


def from_start(action, space):
    """Integers from 0 -> those of a Discrete or MultiDiscrete, in its dtype."""
    start = torch.as_tensor(np.asarray(space.start, np.int64), device=action.device)
    return (action + start).to(getattr(torch, space.dtype.name))


class PolicyHead(nn.Module):
    """[..., F] -> distribution. Discrete: categorical. MultiDiscrete: one categorical a branch.
    Box: Gaussian with one learned log-std a dimension, as CleanRL, in units that put finite bounds at
    -1 and 1; the environment gets the actions clipped to the bounds.

    action_shape, action_dtype: of one stored action.   Raises ValueError for any other space.
    """

    def __init__(self, in_size, space):
        super().__init__()
        self.space, self.action_shape, self.action_dtype = space, space.shape, torch.long
        if isinstance(space, gym.spaces.Discrete):
            out_size = int(space.n)
        elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes = space.nvec.tolist()
            out_size = sum(self.sizes)
        elif isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
            out_size, self.action_dtype = space.shape[0], torch.float32
            self.log_std = nn.Parameter(torch.zeros(out_size))
            low, high = space.low.astype(float), space.high.astype(float)
            finite = high - low < 1e9                       # what is wider is no bound
            # PITFALL: a Gaussian of mean 0 and spread 1 in the task's own units. Symptom: with bounds of
            #   [100, 200] every action is 100. Test: test_spaces.py::test_actions_fill_their_bounds.
            self.scale = np.where(finite, (high - low) / 2, 1.0)
            self.centre = np.where(finite, low + self.scale, 0.0)
        else:
            raise ValueError(f"action space {space} is not supported: it can be a Discrete, or a "
                             "MultiDiscrete or Box of one dimension")
        self.linear = init(nn.Linear(in_size, out_size), 0.01)

    def forward(self, y, mask=None):
        """mask [..., n] bool: the allowed actions; the others have probability 0."""
        out = self.linear(y)
        if mask is not None:                                # -inf would be nan in the entropy, and where
            out = out.masked_fill(~mask, -1e8)              # nothing is allowed: behind deaths, in padding
        if isinstance(self.space, gym.spaces.Discrete):
            return Categorical(out)
        if isinstance(self.space, gym.spaces.MultiDiscrete):
            return MultiCategorical(out, self.sizes)
        return DiagonalGaussian(out, self.log_std)

    def in_env(self, action):
        """Actions as the environment takes them: Box scaled and clipped, integers from its start."""
        if isinstance(self.space, gym.spaces.Box):
            return scaled(action, self.centre, self.scale, self.space.low, self.space.high)
        return from_start(action, self.space)

    def to_env(self, action):
        """The same in numpy."""
        return self.in_env(action.detach().cpu()).numpy()   # waits for the device


class ActionValues:
    """Q of every action of a Discrete or MultiDiscrete space.

    Actions are [..., K]: K branches, one if Discrete.
    Q(a) of several branches is the sum of theirs (value decomposition, Sunehag et al. 2018), so the
    best action is made of each branch's best. With a mask both kinds of choice are among allowed actions.
    """

    def __init__(self, q, sizes, mask=None):                # [..., sum(sizes)]
        self.branches = q.split(sizes, dim=-1)
        self.masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=-1)

    def greedy(self):
        # PITFALL: a mask in acting only. Symptom: targets bootstrap from actions that are never taken, whose
        #   values nothing corrects. Test: test_masks.py::test_targets_never_use_a_forbidden_action.
        best = [q if mask is None else q.masked_fill(~mask, -torch.inf)
                for q, mask in zip(self.branches, self.masks)]
        return torch.stack([q.argmax(-1) for q in best], dim=-1)

    def epsilon_greedy(self, epsilon):
        """Uniformly random with probability epsilon, else the greedy one."""
        explore = torch.rand(self.branches[0].shape[:-1], device=self.branches[0].device) < epsilon
        random = [self.random(q, mask) for q, mask in zip(self.branches, self.masks)]
        return torch.where(explore[..., None], torch.stack(random, dim=-1), self.greedy())

    @staticmethod
    def random(q, mask):                                    # [..., A] -> [...]
        """Uniform over a branch's allowed actions. What is forbidden is drawn again: so a mask of ones, which
        forbids nothing, leaves the random stream as it is."""
        action = torch.randint(q.shape[-1], q.shape[:-1], device=q.device)
        if mask is None or mask.gather(-1, action[..., None]).all():            # waits for the device
            return action
        k = (torch.rand(action.shape, device=q.device) * mask.sum(-1)).long()
        again = (mask.cumsum(-1) > k[..., None]).long().argmax(-1)              # the k-th allowed
        return torch.where(mask.gather(-1, action[..., None]).squeeze(-1), action, again)

    def numbers(self):
        """By name, what of a step is worth showing."""
        return {"value": self.of(self.greedy()), "action_values": torch.cat(self.branches, dim=-1)}

    def of(self, action):                                   # [..., K] -> [...]
        chosen = [q.gather(-1, a[..., None]) for q, a in zip(self.branches, action.unbind(-1))]
        return sum(chosen).squeeze(-1)


class QHead(nn.Module):
    """[..., F] -> ActionValues.   Raises ValueError unless Discrete or MultiDiscrete."""

    def __init__(self, in_size, space):
        super().__init__()
        self.space = space
        if isinstance(space, gym.spaces.Discrete):
            self.sizes = [int(space.n)]
        elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes = space.nvec.tolist()
        else:
            raise ValueError(f"action space {space} is not supported: it can be a Discrete, or a "
                             "MultiDiscrete of one dimension")
        self.linear = init(nn.Linear(in_size, sum(self.sizes)), 0.01)

    def forward(self, y, mask=None):
        return ActionValues(self.linear(y), self.sizes, mask)

    def in_env(self, action):
        """Actions [N, K] as the environment takes them: from its start, [N] if Discrete."""
        return from_start(action.reshape(-1, *self.space.shape), self.space)

    def to_env(self, action):
        """The same in numpy."""
        return self.in_env(action.cpu()).numpy()            # waits for the device

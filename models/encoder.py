"""Observations of any supported space -> one feature vector a step.

A space is a tree (Dict, Tuple) of leaves (Box, Discrete, MultiDiscrete, MultiBinary). Scripts hold
an observation as the flat tuple of its leaves' tensors, like a memory's state: tuple(o[index] for o
in obs) indexes every kind.
"""
import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from models.images import Image
from models.layers import init
from models.running_stats import RunningMeanStd


def leaves(space, obs=None):
    """The leaf spaces of `space`, or the leaves of an observation (single or batched), in the same order."""
    if isinstance(space, gym.spaces.Dict):
        keys = space.spaces.keys()
    elif isinstance(space, gym.spaces.Tuple):
        keys = range(len(space.spaces))
    else:
        return [space if obs is None else obs]
    found = []
    for key in keys:
        found += leaves(space.spaces[key], None if obs is None else obs[key])
    return found


def to_tensors(space, obs, device):
    """A (batched) observation as a flat tuple of tensors, one a leaf. float64 becomes float32."""
    tensors = (torch.as_tensor(np.asarray(o, order="C"), device=device) for o in leaves(space, obs))
    return tuple(o.float() if o.dtype == torch.float64 else o for o in tensors)


class OneHot(nn.Module):
    """Integers [..., K] -> one-hots side by side [..., sum of their alphabets].   Discrete: K = 1

    With a linear layer behind it this is an embedding. The ones are scaled to a mean square of 1
    over the features. Plain ones are too weak for a layer that is initialised for unit inputs:
    MinigridMemory then takes three times as long to learn.
    """

    def __init__(self, space):
        super().__init__()
        sizes = space.n if isinstance(space, gym.spaces.Discrete) else space.nvec
        sizes = np.atleast_1d(sizes).flatten()
        offset = np.cumsum(sizes) - sizes - np.asarray(space.start).flatten()
        self.ndim, self.out_size = len(space.shape), int(sizes.sum())
        self.one = (self.out_size / len(sizes)) ** 0.5
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.long), persistent=False)

    def forward(self, x):
        index = x.reshape(*x.shape[: x.dim() - self.ndim], -1).long() + self.offset         # [..., K]
        zeros = torch.zeros(*index.shape[:-1], self.out_size, device=x.device)
        return zeros.scatter_(-1, index, self.one)


class Vector(nn.Module):
    """Numbers [..., *shape] -> floats [..., prod(shape)].   normalize: by running statistics"""

    def __init__(self, space, normalize=False):
        super().__init__()
        self.ndim, self.out_size = len(space.shape), math.prod(space.shape)
        self.stats = RunningMeanStd(self.out_size) if normalize else None

    def forward(self, x):
        x = self.flat(x)
        return x if self.stats is None else self.stats.normalize(x)

    def flat(self, x):
        return x.reshape(*x.shape[: x.dim() - self.ndim], self.out_size).float()

    def update(self, x):
        if self.stats is not None:
            self.stats.update(self.flat(x))


class Encoder(nn.Module):
    """Flat tuple of leaves, each [..., *leaf.shape] -> [..., out_size].

    The leaves' features side by side; with size > 0 then one linear layer with ReLU.
    Raises ValueError for a space that it cannot encode.
    """

    def __init__(self, space, size=0, normalize=False):
        super().__init__()
        self.leaves = nn.ModuleList(self.leaf(s, normalize) for s in leaves(space))
        self.out_size = sum(leaf.out_size for leaf in self.leaves)
        self.linear = nn.Identity()
        if size > 0:
            self.linear = nn.Sequential(init(nn.Linear(self.out_size, size), 2**0.5), nn.ReLU())
            self.out_size = size

    @staticmethod
    def leaf(space, normalize):
        if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
            return OneHot(space)
        if isinstance(space, gym.spaces.Box) and len(space.shape) == 3:
            return Image(space)
        if isinstance(space, gym.spaces.Box):
            return Vector(space, normalize)
        if isinstance(space, gym.spaces.MultiBinary):
            return Vector(space)
        raise ValueError(f"observation space {space} is not supported: it can be a Box, Discrete, "
                         "MultiDiscrete or MultiBinary, or a Dict or Tuple of these")

    def forward(self, obs):
        features = [leaf(o) for leaf, o in zip(self.leaves, obs)]
        return self.linear(torch.cat(features, dim=-1) if len(features) > 1 else features[0])

    def update_stats(self, obs):
        """Add these observations to the running statistics of the vectors among them."""
        for leaf, o in zip(self.leaves, obs):
            if isinstance(leaf, Vector):
                leaf.update(o)

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
import torch.nn.functional as F

from models.action_mask import ActionMask
from models.images import Image, is_picture
from models.layers import init
from models.running_stats import RunningMeanStd
from models.views import Views, ViewTable, Whitened


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
    """A (batched) observation as a flat tuple of tensors, one a leaf. All floats become float32."""
    arrays = (np.asarray(o, order="C") for o in leaves(space, obs))
    arrays = (o.astype(np.int64) if o.dtype.kind == "u" and o.itemsize > 1 else o for o in arrays)
    tensors = (torch.as_tensor(o, device=device) for o in arrays)           # torch knows only uint8 well
    return tuple(o.float() if o.is_floating_point() else o for o in tensors)


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
    """Numbers [..., *shape] -> floats [..., prod(shape)].   normalize: by running statistics

    Integers with bounds, as a console's RAM, are scaled to [0, 1]; bounds of 2^31 and more are none.
    """

    def __init__(self, space, normalize=False):
        super().__init__()
        self.ndim, self.out_size = len(space.shape), math.prod(space.shape)
        self.scaled = isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.integer)
        if self.scaled:
            low, width = space.low.astype(float), space.high.astype(float) - space.low.astype(float)
            bounded = (width > 0) & (width < 2**31 - 1)
            low, width = np.where(bounded, low, 0).flatten(), np.where(bounded, width, 1).flatten()
            self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32), persistent=False)
            self.register_buffer("width", torch.as_tensor(width, dtype=torch.float32), persistent=False)
        self.stats = RunningMeanStd(self.out_size) if normalize else None

    def forward(self, x):
        x = self.flat(x)
        return x if self.stats is None else self.stats.normalize(x)

    def flat(self, x):
        x = x.reshape(*x.shape[: x.dim() - self.ndim], self.out_size).float()
        return (x - self.low) / self.width if self.scaled else x

    def update(self, x):
        if self.stats is not None:
            self.stats.update(self.flat(x))


class Encoder(nn.Module):
    """Flat tuple of leaves, each [..., *leaf.shape] -> [..., out_size].

    The leaves' features side by side; with size > 0 then one linear layer with ReLU.
    normalize: vectors by running statistics; whiten: numbered pictures by their principal components
    An action mask among the leaves is no feature: mask() gives it to the heads.
    Raises ValueError for a space that it cannot encode.
    """

    def __init__(self, space, size=0, normalize=False, whiten=False):
        super().__init__()
        parts = leaves(space)
        self.mask_at = next((i for i, part in enumerate(parts) if isinstance(part, ActionMask)), None)
        self.leaves = nn.ModuleList(self.leaf(part, normalize, whiten) for part in self.seen(parts))
        if not self.leaves:
            raise ValueError("the task shows nothing, or nothing but an action_mask")
        if whiten and not any(isinstance(leaf, Whitened) for leaf in self.leaves):
            raise ValueError("--whiten-images finds no picture in what the task shows; leave it out")
        self.out_size = sum(leaf.out_size for leaf in self.leaves)
        self.linear = nn.Identity()
        if size > 0:
            self.linear = nn.Sequential(init(nn.Linear(self.out_size, size), 2**0.5), nn.ReLU())
            self.out_size = size
        self.linear_in_tables = size > 0 and any(isinstance(leaf, ViewTable) for leaf in self.leaves)

    @staticmethod
    def leaf(space, normalize, whiten):
        if whiten and (isinstance(space, Views) or is_picture(space)):
            return Whitened(space)
        if isinstance(space, Views):
            return ViewTable(space)
        if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
            return OneHot(space)
        if is_picture(space):
            return Image(space)
        if isinstance(space, gym.spaces.Box):
            return Vector(space, normalize)
        if isinstance(space, gym.spaces.MultiBinary):
            return Vector(space)
        raise ValueError(f"observation space {space} is not supported: it can be a Box, Discrete, "
                         "MultiDiscrete or MultiBinary, or a Dict or Tuple of these; a "
                         "gymnasium.ObservationWrapper can turn it into one, as Symbols in envs/wrappers.py")

    def forward(self, obs):
        if self.linear_in_tables:
            return self.through_tables(obs)
        features = [leaf(o) for leaf, o in zip(self.leaves, self.seen(obs))]
        return self.linear(torch.cat(features, dim=-1) if len(features) > 1 else features[0])

    def through_tables(self, obs):
        """The same, but the linear layer sees a picture once: it is a sum of layers, one for each leaf."""
        linear, relu = self.linear
        weights = linear.weight.split([leaf.out_size for leaf in self.leaves], dim=1)
        ys = [leaf(o, w) if isinstance(leaf, ViewTable) else F.linear(leaf(o), w)
              for leaf, o, w in zip(self.leaves, self.seen(obs), weights)]
        return relu(sum(ys) + linear.bias)

    def update_stats(self, obs):
        """Add these observations to the running statistics of the vectors among them."""
        for leaf, o in zip(self.leaves, self.seen(obs)):
            if isinstance(leaf, Vector):
                leaf.update(o)

    def seen(self, parts):
        """All except the mask."""
        return [part for i, part in enumerate(parts) if i != self.mask_at]

    def mask(self, obs, first=0):                           # [T - first, ..., n] bool
        """The allowed actions, from step `first` on; None where the task gives no mask."""
        return None if self.mask_at is None else obs[self.mask_at][first:].bool()

"""Observations of any supported space -> one feature vector a step.

A space is a tree (Dict, Tuple) of leaves (Box, Discrete, MultiDiscrete, MultiBinary). Scripts hold an observation as the
flat tuple of its leaves' tensors, like a memory's state: tuple(o[index] for o in obs) indexes every kind of observation.
"""
import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from models.running_stats import RunningMeanStd


def leaves(space, obs=None):
    """The leaf spaces of `space`, or, given an observation (single or batched), its leaves in the same order."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        keys = space.spaces.keys() if isinstance(space, gym.spaces.Dict) else range(len(space.spaces))
        return [leaf for k in keys for leaf in leaves(space.spaces[k], None if obs is None else obs[k])]
    return [space if obs is None else obs]


def to_tensors(space, obs, device):
    """A (batched) observation as a flat tuple of tensors, one a leaf. Floats become float32, uint8 stays uint8."""
    tensors = (torch.as_tensor(np.asarray(o, order="C"), device=device) for o in leaves(space, obs))
    return tuple(o.float() if o.dtype == torch.float64 else o for o in tensors)


class OneHot(nn.Module):
    """Integers [..., K], each with its own alphabet (Discrete: K = 1) -> concatenated one-hots [..., sum of alphabets].

    With a linear layer behind it this is an embedding. The ones are scaled to a mean square of 1 over the features: plain
    ones are whispers to a layer initialised for unit inputs (MinigridMemory: the same lesson takes three times as long).
    """

    def __init__(self, space):
        super().__init__()
        sizes = np.atleast_1d(space.n if isinstance(space, gym.spaces.Discrete) else space.nvec).flatten()
        offset = np.cumsum(sizes) - sizes - np.asarray(space.start).flatten()
        self.ndim, self.out_size = len(space.shape), int(sizes.sum())
        self.one = (self.out_size / len(sizes)) ** 0.5
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.long), persistent=False)

    def forward(self, x):
        index = x.reshape(*x.shape[: x.dim() - self.ndim], -1).long() + self.offset        # [..., K]
        return torch.zeros(*index.shape[:-1], self.out_size, device=x.device).scatter_(-1, index, self.one)


class Vector(nn.Module):
    """Numbers [..., *shape] -> floats [..., prod(shape)], normalised by running statistics if asked to."""

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


class Image(nn.Module):
    """Images [..., H, W, C] or [..., C, H, W] -> features. Integers are scaled to [0, 1] by the space's upper bound.

    From 36 pixels on: the three layers of Mnih et al. 2015 (Nature). Below: three 3x3 layers.
    """

    def __init__(self, space):
        super().__init__()
        h, w, c = space.shape
        self.channels_last = h == w or (w != c and c < h)
        if not self.channels_last:
            c, h, w = space.shape
        integer = np.issubdtype(space.dtype, np.integer)
        self.scale = 1.0 / float(space.high.max()) if integer else 1.0
        sizes = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)] if min(h, w) >= 36 else [
            (16, 3, 1, 1), (32, 3, 2, 1), (64, 3, 2, 1)]                # out channels, kernel, stride, padding
        layers = []
        for out, kernel, stride, padding in sizes:
            layers += [init(nn.Conv2d(c, out, kernel, stride, padding), 2**0.5), nn.ReLU()]
            c = out
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.out_size = self.cnn(torch.zeros(1, layers[0].in_channels, h, w)).shape[1]

    def forward(self, x):
        batch = x.shape[:-3]
        x = x.flatten(0, -4)                                            # [M, *space.shape]
        x, where = distinct(x) if x.device.type == "cpu" else (x, None)
        x = x.permute(0, 3, 1, 2) if self.channels_last else x          # [M, C, H, W]
        y = self.cnn(x * self.scale)
        return (y if where is None else y[where]).view(*batch, -1)


def distinct(x):
    """The different images among x [M, ...] and where each of the M is found:  images[where] = x.

    PERF: grid worlds show the same few views over and over. Encoding each once is the same function and the same gradient
    for a fraction of the convolutions; where no image repeats, looking (6 ms for 512 images) is lost beside convolving them.
    """
    rows = x.flatten(1)
    rows = rows.view(torch.int64) if rows.dtype == torch.uint8 and rows.shape[1] % 8 == 0 else rows
    _, where = rows.unique(dim=0, return_inverse=True)                  # [M]
    first = torch.empty(int(where.max()) + 1, dtype=torch.long)
    first[where] = torch.arange(len(x))
    return x[first], where


class Encoder(nn.Module):
    """Flat tuple of leaves, each [..., *leaf.shape] -> [..., out_size]: every leaf's features side by side, then, with
    size > 0, one linear layer with ReLU.   Raises ValueError for a space it cannot encode."""

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
        raise ValueError(f"observation space {space} is not supported: it can be a Box, Discrete, MultiDiscrete or "
                         "MultiBinary, or a Dict or Tuple of these")

    def forward(self, obs):
        features = [leaf(o) for leaf, o in zip(self.leaves, obs)]
        return self.linear(torch.cat(features, dim=-1) if len(features) > 1 else features[0])

    def update_stats(self, obs):
        """Add these observations to the running statistics of the vectors among them."""
        for leaf, o in zip(self.leaves, obs):
            if isinstance(leaf, Vector):
                leaf.update(o)


def init(layer, gain):
    """Orthogonal weights of this gain, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer

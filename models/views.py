"""Numbered pictures: worlds that show few different pictures give the picture's number.

`Views` is a space of integers that carries its pictures. An agent sees the same pixels through the same
layers: function and gradient are those of the picture, and a saved model plays on either. What changes is
the cost. A minibatch encodes each of its pictures once, acting encodes a picture once between two gradient
steps, and a rollout or a replay holds integers.
"""
import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from models.images import Image

gradient_steps = 0                                          # of all optimizers in this process


def count_step(*_):
    global gradient_steps
    gradient_steps += 1


register_optimizer_step_post_hook(count_step)


class Views(gym.spaces.Discrete):
    """Which of these pictures [K, H, W, C] is seen."""

    def __init__(self, images):
        super().__init__(len(images))
        self.images = np.ascontiguousarray(images)

    def __repr__(self):
        return f"Views({self.n} pictures of {' x '.join(map(str, self.images.shape[1:]))})"

    def __eq__(self, other):
        """To an agent, which sees pixels, other pictures of this size are the same space."""
        return isinstance(other, Views) and self.images.shape[1:] == other.images.shape[1:]

    @property
    def picture_space(self):
        """The space of the pictures themselves."""
        return gym.spaces.Box(0, 255, self.images.shape[1:], np.uint8)


class ViewTable(Image):
    """Numbers of views [...] -> features of their pictures, passed through a linear layer of the caller's."""

    def __init__(self, space):
        super().__init__(space.picture_space)
        self.register_buffer("images", torch.as_tensor(space.images), persistent=False)     # [K, H, W, C]
        self.made_by = None                                 # the weights that made the table

    def forward(self, view, weight=None):
        """[..., out_size], or with weight [size, out_size] those times the weight, [..., size]."""
        if torch.compiler.is_exporting():
            return self.features(view.flatten(), weight).unflatten(0, view.shape)
        if torch.is_grad_enabled():
            views, where = view.unique(return_inverse=True)                 # waits for the device
            return F.embedding(where, self.features(views, weight))
        # PITFALL: weights changed by a fused optimizer or through .data keep their version. Symptom: the
        #   policy in training is not the one that acted, first_logratio of 0.2 to 4.
        #   Test: test_views.py::test_no_picture_is_remembered_from_other_weights.
        weights = [*self.parameters()] if weight is None else [*self.parameters(), weight]
        made_by = gradient_steps, *(w._version for w in weights)
        if made_by != self.made_by:
            self.made_by = made_by
            size = self.out_size if weight is None else len(weight)
            with torch.inference_mode(False):               # it may be filled with and without
                self.table = torch.zeros(len(self.images), size, device=view.device)
                self.is_known = torch.zeros(len(self.images), dtype=torch.bool, device=view.device)
        new = view[~self.is_known[view]].unique()           # waits
        if len(new):
            self.table[new], self.is_known[new] = self.features(new, weight), True
        return self.table[view]

    def features(self, views, weight):
        y = self.encode(self.images[views])                 # [k, out_size]
        return y if weight is None else F.linear(y, weight)


class Whitened(nn.Module):
    """Numbers of views, or their pictures, [...] -> whitened pixels [..., out_size].   Not trained.

    The principal components of the pixels over all pictures of a task, each scaled to the same spread, so
    that all pictures are about equally far apart. To a new CNN a key on a large floor is almost the same as
    a ball. A step costs what it costs with symbols. The features have a mean square of 1.
    """

    def __init__(self, space, out_size=256):
        super().__init__()
        self.numbered, self.out_size = isinstance(space, Views), out_size
        pixels = math.prod(space.images.shape[1:] if self.numbered else space.shape)
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("directions", torch.zeros(out_size, pixels))
        self.made_by = None                                 # the version of directions that made the table
        if self.numbered:
            self.register_buffer("images", torch.as_tensor(space.images), persistent=False)     # [K, H, W, C]
            self.fit(self.images.flatten(1).float())

    def fit(self, x):
        """x [K, pixels]"""
        self.mean.copy_(x.mean(0))
        _, spread, components = torch.linalg.svd(x - self.mean, full_matrices=False)
        components = components[: self.out_size]
        spread = spread[: self.out_size, None] / len(x) ** 0.5  # its standard deviations
        kept = spread > 1e-4 * spread[0]                    # the others are rounding
        self.directions[: len(components)] = torch.where(kept, components / spread, 0)
        self.directions *= (self.out_size / kept.sum()) ** 0.5

    def forward(self, x):
        if not self.numbered:
            return self.whiten(x.flatten(-3))
        if torch.compiler.is_exporting():
            return self.whiten(self.images.flatten(1)[x])
        if self.made_by != self.directions._version:        # new, loaded, or elsewhere
            self.made_by = self.directions._version
            with torch.inference_mode(False):               # training uses it too
                self.table = self.whiten(self.images.flatten(1))                # [K, out_size]
        return self.table[x]

    def whiten(self, x):
        return F.linear(x.float() - self.mean, self.directions)

"""Numbered pictures: worlds that show few different pictures give the picture's number.

`Views` is a space of integers that carries its pictures. An agent sees the same pixels through the same
layers: function and gradient are those of the picture, and a saved model plays on either. What changes is
the cost. A minibatch encodes each of its pictures once, acting encodes a picture once between two gradient
steps, and a rollout or a replay holds integers.
"""
import gymnasium as gym
import numpy as np
import torch
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
        self.images = images

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

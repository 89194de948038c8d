"""The encoder of images: one kind of leaf in models/encoder.py."""
import math

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from models.layers import init


def is_picture(space):
    """Boxes of three dimensions and stacks of four; of two only 0 to 255 and at least 8 x 8."""
    if not isinstance(space, gym.spaces.Box):
        return False
    if len(space.shape) == 2:
        return space.low.min() >= 0 and space.high.max() == 255 and min(space.shape) >= 8
    return len(space.shape) in (3, 4)


def channels_last(shape):
    """Whether a picture's shape ends in its channels: C is last if H = W, or smaller than H and not W."""
    h, w, c = (*shape, 1)[-3:] if len(shape) == 2 else shape[-3:]
    return h == w or (w != c and c < h)


class Image(nn.Module):
    """Images [..., H, W, C] or [..., C, H, W] -> features. Integers and 0 to 255 are divided by their bound.

    [..., H, W] has one channel. Of a stack [..., K, H, W, C] or [..., K, C, H, W] all are channels.

    From 36 pixels on: the three layers of Mnih et al. 2015 (Nature). From 8: three 3x3 layers. Below, pixels
    are cells of a board, each with its own meaning: they are the features.
    """

    def __init__(self, space):
        super().__init__()
        self.shape = (*space.shape, 1) if len(space.shape) == 2 else space.shape
        self.ndim = len(space.shape)
        self.channels_last = channels_last(self.shape)
        h, w, c = self.shape[-3:]
        if not self.channels_last:
            c, h, w = self.shape[-3:]
        c *= math.prod(self.shape[:-3])                     # K
        high = float(space.high.max())
        scaled = np.issubdtype(space.dtype, np.integer) or (space.low.min() >= 0 and high == 255)
        self.scale = 1.0 / high if scaled else 1.0
        if min(h, w) >= 36:                                 # out channels, kernel, stride, padding
            sizes = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
        elif min(h, w) >= 8:
            sizes = [(16, 3, 1, 1), (32, 3, 2, 1), (64, 3, 2, 1)]
        else:
            sizes = []
        layers, in_channels = [], c
        for out, kernel, stride, padding in sizes:
            layers += [init(nn.Conv2d(c, out, kernel, stride, padding), 2**0.5), nn.ReLU()]
            c = out
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.out_size = self.cnn(torch.zeros(1, in_channels, h, w)).shape[1]

    def forward(self, x):
        batch = x.shape[:-self.ndim]
        x = x.reshape(-1, *self.shape)                      # [M, H, W, C], [M, C, H, W] or [M, K, ...]
        repeats = x.device.type == "cpu" and not torch.compiler.is_exporting()
        if repeats and len(self.cnn) > 1:                   # cells have no convolutions to save
            images, where = distinct(x)
            y = self.encode(images)[where]
        else:
            y = self.encode(x)
        return y.view(*batch, -1)

    def encode(self, x):
        x = x.movedim(-1, -3) if self.channels_last else x  # [M, C, H, W] or [M, K, C, H, W]
        x = x.flatten(1, -3)                                # [M, K C, H, W]
        return self.cnn(x * self.scale)


def distinct(x):
    """The different images among x [M, ...], and where each of the M is found:  images[where] = x.

    PERF: grid worlds show the same few views again and again. To encode each once gives the same
    values and the same gradients for a fraction of the convolutions. Where no image repeats, the
    search (6 ms for 512 images) is short compared with the convolutions.
    """
    rows = x.flatten(1)
    rows = rows.view(torch.int64) if rows.dtype == torch.uint8 and rows.shape[1] % 8 == 0 else rows
    _, where = rows.unique(dim=0, return_inverse=True)      # [M]
    first = torch.empty(int(where.max()) + 1, dtype=torch.long)
    first[where] = torch.arange(len(x))
    return x[first], where

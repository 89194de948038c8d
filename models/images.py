"""The encoder of images: one kind of leaf in models/encoder.py."""
import numpy as np
import torch
import torch.nn as nn

from models.layers import init


class Image(nn.Module):
    """Images [..., H, W, C] or [..., C, H, W] -> features. Integers are divided by their bound.

    From 36 pixels on: the three layers of Mnih et al. 2015 (Nature). Below: three 3x3 layers. The
    order is guessed from the sizes: C is last if H = W, or else if it is smaller than H and not
    equal to W.
    """

    def __init__(self, space):
        super().__init__()
        h, w, c = space.shape
        self.channels_last = h == w or (w != c and c < h)
        if not self.channels_last:
            c, h, w = space.shape
        integer = np.issubdtype(space.dtype, np.integer)
        self.scale = 1.0 / float(space.high.max()) if integer else 1.0
        if min(h, w) >= 36:                                 # out channels, kernel, stride, padding
            sizes = [(32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0)]
        else:
            sizes = [(16, 3, 1, 1), (32, 3, 2, 1), (64, 3, 2, 1)]
        layers = []
        for out, kernel, stride, padding in sizes:
            layers += [init(nn.Conv2d(c, out, kernel, stride, padding), 2**0.5), nn.ReLU()]
            c = out
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            self.out_size = self.cnn(torch.zeros(1, layers[0].in_channels, h, w)).shape[1]

    def forward(self, x):
        batch = x.shape[:-3]
        x = x.flatten(0, -4)                                # [M, *space.shape]
        if x.device.type == "cpu":
            images, where = distinct(x)
            y = self.encode(images)[where]
        else:
            y = self.encode(x)
        return y.view(*batch, -1)

    def encode(self, x):
        x = x.permute(0, 3, 1, 2) if self.channels_last else x              # [M, C, H, W]
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

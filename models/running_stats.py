"""Running mean and variance. They are buffers, so they are saved with the weights."""
import torch
import torch.nn as nn


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen so far. They begin as mean 0, variance 1.

    New observations are added by the parallel update of Chan, Golub and LeVeque.
    """

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x):                                    # x [..., *shape]
        x = x.reshape(-1, *self.mean.shape).double()
        n, delta = len(x), x.mean(0) - self.mean
        within = self.var * self.count + x.var(0, unbiased=False) * n       # sums of squared deviations
        between = delta**2 * self.count * n / (self.count + n)
        self.count += n
        self.mean += delta * n / self.count
        self.var.copy_((within + between) / self.count)

    def normalize(self, x):
        """(x - mean) / std, clipped to +-10."""
        std = (self.var.to(x.dtype) + 1e-8).sqrt()
        return ((x - self.mean.to(x.dtype)) / std).clamp(-10, 10)

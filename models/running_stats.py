"""Running mean and variance, kept with the weights, so that they travel with the model."""
import torch
import torch.nn as nn


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen so far (Chan, Golub and LeVeque's parallel update). Starts as mean 0, var 1."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x):                                    # x [..., *shape]
        x = x.reshape(-1, *self.mean.shape).double()
        n, delta = len(x), x.mean(0) - self.mean
        m2 = self.var * self.count + x.var(0, unbiased=False) * n + delta**2 * self.count * n / (self.count + n)
        self.count += n
        self.mean += delta * n / self.count
        self.var.copy_(m2 / self.count)

    def normalize(self, x):
        """(x - mean) / std, clipped to +-10."""
        return ((x - self.mean.to(x.dtype)) / (self.var.to(x.dtype) + 1e-8).sqrt()).clamp(-10, 10)

"""Distributions over actions, as a policy's output gives them.

sample() and mode() give actions, log_prob(actions) and entropy() one number a step, numbers() what describes
the distribution, by name. The first three classes do what their namesakes in torch.distributions do, without
the checks and copies there: with 16 environments these cost more than the network.
"""
import math

import torch
import torch.nn.functional as F


class Categorical:
    def __init__(self, logits):                             # [..., A]
        self.logp = logits.log_softmax(-1)

    @property
    def branches(self):
        return [self]

    def sample(self):
        # The exponential race: argmin of E_a / p_a with E_a ~ Exp(1) is a with probability p_a.
        # multinomial() takes twice as long.
        return (self.logp.exp() / torch.empty_like(self.logp).exponential_()).argmax(-1)

    def mode(self):
        return self.logp.argmax(-1)

    def log_prob(self, action):                             # [...]
        return self.logp.gather(-1, action[..., None]).squeeze(-1)

    def entropy(self):
        return -(self.logp.exp() * self.logp).sum(-1)

    def numbers(self):                                      # [..., A]
        return {"probabilities": self.logp.exp()}


class MultiCategorical:
    """Independent categoricals, one a branch: log-probabilities and entropies add up."""

    def __init__(self, logits, sizes):                      # [..., sum(sizes)]
        self.branches = [Categorical(branch) for branch in logits.split(sizes, dim=-1)]

    def sample(self):
        return torch.stack([b.sample() for b in self.branches], dim=-1)

    def mode(self):
        return torch.stack([b.mode() for b in self.branches], dim=-1)

    def log_prob(self, action):                             # [..., K]
        return sum(b.log_prob(a) for b, a in zip(self.branches, action.unbind(-1)))

    def entropy(self):
        return sum(b.entropy() for b in self.branches)

    def numbers(self):                                      # [..., sum(sizes)]
        return {"probabilities": torch.cat([b.logp.exp() for b in self.branches], dim=-1)}


class DiagonalGaussian:
    def __init__(self, mean, log_std):                      # [..., D], [D]
        std = log_std.exp().expand_as(mean)
        self.normal = torch.distributions.Normal(mean, std, validate_args=False)

    def sample(self):
        return self.normal.sample()

    def mode(self):
        return self.normal.mean

    def log_prob(self, action):                             # [..., D]
        return self.normal.log_prob(action).sum(-1)

    def entropy(self):
        return self.normal.entropy().sum(-1)

    def numbers(self):                                      # [..., D]
        return {"mean": self.normal.mean, "std": self.normal.stddev}


class SquashedGaussian:
    """a = tanh(u) with u ~ N(mean, std).   mean, log_std: [..., A]"""

    def __init__(self, mean, log_std):
        self.mean, self.log_std = mean, log_std.clamp(-20, 2)

    def rsample(self):
        """Returns the action [..., A] and its log-probability [...], both with a gradient."""
        noise = torch.randn_like(self.mean)
        u = self.mean + self.log_std.exp() * noise
        # PITFALL: log(1 - tanh(u)^2) is -inf for u > 9; with + 1e-6 its gradient is wrong from u = 7 on.
        #   Symptom: an infinite loss, or actions stuck at their bounds against the entropy. Here: exact.
        #   Test: test_sac_td3.py::test_log_probabilities_are_those_of_the_squashed_normal.
        log_normal = -(noise**2) / 2 - self.log_std - math.log(2 * math.pi) / 2
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))              # log(1 - tanh(u)^2)
        return u.tanh(), (log_normal - log_slope).sum(-1)

    def mode(self):
        return self.mean.tanh()

    def numbers(self):                                      # of u
        return {"mean": self.mean, "std": self.log_std.exp()}

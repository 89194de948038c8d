"""Heads: features -> a distribution over the actions of a Discrete, MultiDiscrete or Box space, or the values of actions.

The three distributions do what torch.distributions' namesakes do, without the checks and copies that cost more than the
network when 16 environments act.   sample() and mode() give actions, log_prob(actions) and entropy() one number a step.
"""
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from models.encoder import init


class Categorical:
    def __init__(self, logits):                             # [..., A]
        self.logp = logits.log_softmax(-1)

    @property
    def branches(self):
        return [self]

    def sample(self):
        # The exponential race: argmin E_a / p_a with E_a ~ Exp(1) picks a with probability p_a. multinomial() costs twice that.
        return (self.logp.exp() / torch.empty_like(self.logp).exponential_()).argmax(-1)

    def mode(self):
        return self.logp.argmax(-1)

    def log_prob(self, action):                             # [...]
        return self.logp.gather(-1, action[..., None]).squeeze(-1)

    def entropy(self):
        return -(self.logp.exp() * self.logp).sum(-1)


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


class DiagonalGaussian:
    def __init__(self, mean, log_std):                      # [..., D], [D]
        self.normal = torch.distributions.Normal(mean, log_std.exp().expand_as(mean), validate_args=False)

    def sample(self):
        return self.normal.sample()

    def mode(self):
        return self.normal.mean

    def log_prob(self, action):                             # [..., D]
        return self.normal.log_prob(action).sum(-1)

    def entropy(self):
        return self.normal.entropy().sum(-1)


class PolicyHead(nn.Module):
    """[..., F] -> distribution. Discrete: categorical. MultiDiscrete: one categorical a branch. Box: Gaussian with one
    learned log-std a dimension (as CleanRL); the environment gets its actions clipped to the bounds.

    action_shape, action_dtype: of one stored action.   Raises ValueError for any other space.
    """

    def __init__(self, in_size, space):
        super().__init__()
        self.space, self.action_shape, self.action_dtype = space, space.shape, torch.long
        self.first = getattr(space, "start", 0)             # integers are stored from 0
        if isinstance(space, gym.spaces.Discrete):
            out_size = int(space.n)
        elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes = space.nvec.tolist()
            out_size = sum(self.sizes)
        elif isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
            out_size, self.action_dtype = space.shape[0], torch.float32
            self.log_std = nn.Parameter(torch.zeros(out_size))
        else:
            raise ValueError(f"action space {space} is not supported: it can be a Discrete, or a MultiDiscrete or Box of "
                             "one dimension")
        self.linear = init(nn.Linear(in_size, out_size), 0.01)

    def forward(self, y):
        out = self.linear(y)
        if isinstance(self.space, gym.spaces.Discrete):
            return Categorical(out)
        if isinstance(self.space, gym.spaces.MultiDiscrete):
            return MultiCategorical(out, self.sizes)
        return DiagonalGaussian(out, self.log_std)

    def to_env(self, action):
        """Actions as the environment wants them: numpy, Box clipped to its bounds, integers from the space's start."""
        action = action.cpu().numpy()
        if isinstance(self.space, gym.spaces.Box):
            return np.clip(action, self.space.low, self.space.high).astype(self.space.dtype)
        return action + self.first


class ActionValues:
    """Q of every action of a Discrete or MultiDiscrete space. Actions are [..., K]: K branches, one if Discrete.

    Q(a) of several branches is the sum of theirs (value decomposition, Sunehag et al. 2018): the best action is made of each
    branch's best.
    """

    def __init__(self, q, sizes):                           # [..., sum(sizes)]
        self.branches = q.split(sizes, dim=-1)

    def greedy(self):
        return torch.stack([q.argmax(-1) for q in self.branches], dim=-1)

    def epsilon_greedy(self, epsilon):
        """Uniformly random with probability epsilon, else the greedy one."""
        explore = torch.rand(self.branches[0].shape[:-1], device=self.branches[0].device) < epsilon
        random = [torch.randint(q.shape[-1], explore.shape, device=q.device) for q in self.branches]
        return torch.where(explore[..., None], torch.stack(random, dim=-1), self.greedy())

    def of(self, action):                                   # [..., K] -> [...]
        return sum(q.gather(-1, a[..., None]).squeeze(-1) for q, a in zip(self.branches, action.unbind(-1)))


class QHead(nn.Module):
    """[..., F] -> ActionValues.   branches: K.   Raises ValueError for a space that is not Discrete or MultiDiscrete."""

    def __init__(self, in_size, space):
        super().__init__()
        self.space, self.first = space, getattr(space, "start", 0)     # integers are stored from 0
        if isinstance(space, gym.spaces.Discrete):
            self.sizes = [int(space.n)]
        elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
            self.sizes = space.nvec.tolist()
        else:
            raise ValueError(f"action space {space} is not supported: it can be a Discrete, or a MultiDiscrete of one "
                             "dimension")
        self.linear = init(nn.Linear(in_size, sum(self.sizes)), 0.01)

    def forward(self, y):
        return ActionValues(self.linear(y), self.sizes)

    def to_env(self, action):
        """Actions [N, K] as the environment takes them: numpy, integers from the space's start, [N] if Discrete."""
        return action.cpu().numpy().reshape(-1, *self.space.shape) + self.first

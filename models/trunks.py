"""Encoder -> memory as one module. Off-policy agents have one for the policy and one for the critics.

To its callers a trunk is a memory (models/memory.py) whose x are the leaves of observations, [T, B,
...] each. Both classes read the flags encoder_size, whiten_images, memory, hidden_size, num_layers
and memory_kwargs from args.
"""
import torch.nn as nn

from models.encoder import Encoder
from models.memory import MEMORIES


def encoder_and_memory(observation_space, args):
    encoder = Encoder(observation_space, args.encoder_size, whiten=args.whiten_images)
    memory_class = MEMORIES[args.memory]
    memory = memory_class(encoder.out_size, args.hidden_size, args.num_layers, **args.memory_kwargs)
    return encoder, memory


class Trunk(nn.Module):
    """One encoder and one memory."""

    def __init__(self, observation_space, args):
        super().__init__()
        self.encoder, self.memory = encoder_and_memory(observation_space, args)

    def initial_state(self, batch_size):
        return self.memory.initial_state(batch_size)

    def forward(self, obs, state, start):
        """Returns the features [T, B, H] and the state."""
        return self.memory(self.encoder(obs), state, start)


class Trunks(nn.ModuleList):
    """One trunk for the policy and one for the critics, or, with --shared-encoder, one for both.

    Its state is the states of all its trunks, one after the other.
    """

    def __init__(self, observation_space, args):
        super().__init__()
        for _ in range(1 if args.shared_encoder else 2):
            encoder, memory = encoder_and_memory(observation_space, args)
            self.append(nn.ModuleDict({"encoder": encoder, "memory": memory}))

    def initial_state(self, batch_size):
        return sum((trunk["memory"].initial_state(batch_size) for trunk in self), ())

    def forward(self, obs, state, start):
        """Returns the features [T, B, H] of the policy, those of the critics, and the state."""
        ys, after = [], ()
        n = len(state) // len(self)                         # tensors in the state of one trunk
        for i, trunk in enumerate(self):
            y, trunk_state = trunk["memory"](trunk["encoder"](obs), state[i * n : (i + 1) * n], start)
            ys.append(y)
            after += trunk_state
        return ys[0], ys[-1], after

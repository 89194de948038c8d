"""A transformer as a memory: what it remembers are the keys and values of the last steps.

Acting appends one step to them and never runs the past again: O(window) a step. Training attends
within a call and to what was carried into it. A step sees itself and the earlier steps of its
episode, at most `window` steps in all.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cpu_speed import Linear
from models.layers import check_sizes


class GPT(nn.Module):
    """Decoder-only transformer of pre-norm blocks (Radford et al. 2019, GPT-2).

    Positions are rotary (Su et al. 2021, https://arxiv.org/abs/2104.09864): a score depends on the
    distance of two steps only, so no step needs to know when its episode began. Keys are kept
    before the rotation. There is no dropout: what acts is trained.

    State: age [B, 1], how many of the kept steps belong to this episode, then the keys and values
    of every layer, [B, window - 1, H] each. Kept steps of earlier episodes are zeros.
    """

    def __init__(self, input_size, hidden_size, num_layers=1, window=128, head_size=32):
        super().__init__()
        check_sizes(window=window, head_size=head_size)
        if hidden_size % 2 or head_size == 1:
            raise ValueError("hidden_size must be even, and head_size at least 2")
        while hidden_size % head_size or head_size % 2:     # the next lower even divisor
            head_size -= 1
        self.hidden_size, self.kept = hidden_size, window - 1
        self.embed = Linear(input_size, hidden_size)
        heads = hidden_size // head_size
        self.blocks = nn.ModuleList(Block(hidden_size, heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        # DEVIATION (Su et al. 2021, speeds 10,000^(-2i / head_size)): from 1 to 1/10,000, both included.
        #   Test: test_equations.py::test_a_memory_equals_its_equations.
        speed = 10_000 ** -torch.linspace(0, 1, head_size // 2)             # radians a step
        self.register_buffer("speed", speed.repeat(heads), persistent=False)    # [H / 2]

    def initial_state(self, batch_size):
        p = self.norm.weight
        size = batch_size, self.kept, self.hidden_size
        return (p.new_zeros(batch_size, 1), *(p.new_zeros(size) for _ in range(2 * len(self.blocks))))

    def forward(self, x, state, start):
        """
            |        kept: W steps         |  x: T steps   |
                   |         used          |
                              |    old     |
                                |      after: W steps      |

        old: the kept steps that some row can see.
        used: those, and the kept steps that stay in the state after this call.
        """
        T, W = len(x), self.kept
        age = state[0].clamp(0, W).masked_fill(start[0, :, None], 0)        # [B, 1]
        exporting = torch.compiler.is_exporting()           # no shape may depend on numbers then
        old = W if exporting else int(age.max().ceil())     # waits for the device
        used = max(old, W - T)
        kept = carried(state[1:], used, start[0])
        earlier = earlier_steps(age, start, W)              # [T, B]
        restarts = T > 1 and bool(start[1:].any())          # waits for the device
        sees_all = old == 0 and T <= W + 1 and not restarts      # every step sees all before it
        mask = None if sees_all else window_mask(earlier, old)
        turns = self.turns(old + T)

        x = self.embed(x).transpose(0, 1).contiguous()      # [B, T, H]
        after = []
        for block, kept_keys, kept_values in zip(self.blocks, kept[::2], kept[1::2]):
            x, keys, values = block(x, kept_keys, kept_values, mask, turns)
            after += [keys[:, used + T - W :], values[:, used + T - W :]]   # [B, W, H] each

        age = (earlier[-1] + 1).clamp(max=W)[:, None]       # [B, 1]
        if restarts:
            dead = torch.arange(W, device=x.device) < W - age               # [B, W]
            after = [s.masked_fill(dead[..., None], 0) for s in after]
        return self.norm(x).transpose(0, 1), (age, *after)

    def turns(self, n):
        """The rotations of positions 0 ... n - 1: complex numbers of length 1, [n, H / 2]."""
        positions = torch.arange(n, device=self.speed.device, dtype=self.speed.dtype)
        angles = positions[:, None] * self.speed
        return torch.polar(torch.ones_like(angles), angles)


def carried(kept, used, start):
    """The last `used` of the kept steps [B, W, H], zeros in the rows that start [B]."""
    kept = tuple(s[:, s.shape[1] - used :] for s in kept)
    if used and (torch.compiler.is_exporting() or start.any()):     # waits for the device
        kept = tuple(s.masked_fill(start[:, None, None], 0) for s in kept)
    return kept


def earlier_steps(age, start, most):
    """How many earlier steps of its episode each step sees, [T, B], `most` at most.

    age [B, 1]: steps of the episode before this call; start [T, B]
    """
    t = torch.arange(len(start), device=start.device)[:, None]              # [T, 1]
    last_start = torch.where(start, t, -1)                  # [T, B], -1: none yet
    if len(start) > 1:
        last_start = last_start.cummax(0).values
    in_this_call = (t - last_start).to(age.dtype)
    return torch.where(last_start < 0, age.T + t, in_this_call).clamp(max=most)


def window_mask(earlier, old):
    """[B, 1, T, old + T] bool: a step sees itself and the `earlier` [T, B] steps before it."""
    T, device = len(earlier), earlier.device
    query = old + torch.arange(T, device=device)
    key = torch.arange(old + T, device=device)
    distance = query[:, None] - key                         # [T, old + T]
    return ((distance >= 0) & (distance <= earlier.T[..., None]))[:, None]


class Block(nn.Module):
    """One layer: x + W attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.qkv = Linear(size, 3 * size)
        self.out = Linear(size, size)
        layers = nn.LayerNorm(size), Linear(size, 4 * size), nn.GELU(), Linear(4 * size, size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x, kept_keys, kept_values, mask, turns):
        """x [B, T, H] -> x [B, T, H], keys and values [B, used + T, H].

        kept_keys, kept_values: [B, used, H]. Of keys and values, steps see the last len(turns) = old + T.
        mask: [B, 1, T, old + T], or None if every step sees all before it.
        """
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        if kept_keys.shape[1]:                              # whole episodes need no copy
            k = torch.cat([kept_keys, k], dim=1)
            v = torch.cat([kept_values, v], dim=1)
        visible = len(turns)
        x = x + self.out(self.attention(q, k[:, -visible:], v[:, -visible:], mask, turns))
        return x + self.mlp(x), k, v

    def attention(self, q, k, v, mask, turns):
        """q [B, T, H], k, v [B, old + T, H] -> [B, T, H]"""
        q = self.rotate(q, turns[-q.shape[1] :])
        k = self.rotate(k, turns)
        v = self.split(v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)

    def split(self, x):
        """[B, T, H] -> [B, heads, T, head_size]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def rotate(self, x, turns):
        """Turn pairs of numbers, taken as complex ones.   x [B, T, H] -> [B, heads, T, head_size]"""
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns            # [B, T, H / 2]
        return self.split(torch.view_as_real(turned).flatten(-2))

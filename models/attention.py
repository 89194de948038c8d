"""A transformer behind the memory interface: what it remembers are the keys and values of the last steps.

Acting appends one step to them and never runs the past again: O(window) a step. Training attends within a call and to what was
carried into it. A step sees the earlier steps of its episode, at most `window` of them, itself included.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cpu import Linear


class GPT(nn.Module):
    """Decoder-only transformer of pre-norm blocks, x + W attention(LN(x)), then x + MLP(LN(x)) (Radford et al. 2019, GPT-2).

    Positions are rotary (Su et al. 2021, https://arxiv.org/abs/2104.09864): a score depends on the distance of two steps only,
    so that no step needs to know when its episode began; keys are kept before the rotation. No dropout: what acts is trained.
    State: age [B, 1], how many of the kept steps are of this episode, then the keys and values of every layer, each
    [B, window - 1, H] with zeros before that.
    """

    def __init__(self, input_size, hidden_size, num_layers=1, window=128, head_size=32):
        super().__init__()
        while hidden_size % head_size or head_size % 2:                 # the largest even divisor that is not larger
            head_size -= 1
        self.hidden_size, self.kept, self.heads = hidden_size, window - 1, hidden_size // head_size
        self.embed = Linear(input_size, hidden_size)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm": nn.LayerNorm(hidden_size), "qkv": Linear(hidden_size, 3 * hidden_size),
            "out": Linear(hidden_size, hidden_size),
            "mlp": nn.Sequential(nn.LayerNorm(hidden_size), Linear(hidden_size, 4 * hidden_size), nn.GELU(),
                                 Linear(4 * hidden_size, hidden_size))}) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.register_buffer("speed", 10_000 ** -torch.linspace(0, 1, head_size // 2), persistent=False)      # [head_size / 2]

    def initial_state(self, batch_size):
        p = self.norm.weight
        kept = p.new_zeros(batch_size, self.kept, self.hidden_size)
        return (p.new_zeros(batch_size, 1), *[kept] * (2 * len(self.blocks)))

    def forward(self, x, state, start):
        T, W = len(x), self.kept
        age, restarts = state[0].clamp(0, W).masked_fill(start[0, :, None], 0), start[1:].any()
        old = int(age.max().ceil())                                     # kept steps that a row can see
        used = max(old, W - T)                                          # and those that the state goes on to keep
        kept = tuple(s[:, W - used :] for s in state[1:])
        if used and start[0].any():
            kept = tuple(s.masked_fill(start[0, :, None, None], 0) for s in kept)
        t = torch.arange(T, device=x.device)[:, None]                   # [T, 1]
        last_start = torch.where(start, t, -1).cummax(0).values         # [T, B]
        seen = torch.where(last_start < 0, age.T + t, (t - last_start).to(age.dtype)).clamp(max=W)     # [T, B] earlier steps
        causal = old == 0 and T <= W + 1 and not restarts               # nothing but one beginning each: no mask needed
        mask = None
        if not causal:
            distance = old + t - torch.arange(old + T, device=x.device)                     # [T, old + T]
            mask = ((distance >= 0) & (distance <= seen.T[..., None]))[:, None]             # [B, 1, T, old + T]
        x, after = self.embed(x).transpose(0, 1).contiguous(), [(seen[-1] + 1).clamp(max=W)[:, None]]          # [B, T, H]
        for block, k_kept, v_kept in zip(self.blocks, kept[::2], kept[1::2]):
            q, k, v = block["qkv"](block["norm"](x)).chunk(3, dim=-1)
            if used:                                                                        # whole episodes need no copy
                k, v = torch.cat([k_kept, k], dim=1), torch.cat([v_kept, v], dim=1)         # [B, used + T, H]
            after += k[:, used + T - W :], v[:, used + T - W :]
            k, v = k[:, used - old :], v[:, used - old :]                                   # [B, old + T, H]
            y = F.scaled_dot_product_attention(self.rotate(q, old), self.rotate(k, 0), self.split(v), mask, is_causal=causal)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + block["mlp"](x)
        if restarts:
            dead = (torch.arange(W, device=x.device) < W - after[0])[..., None]             # [B, W, 1]
            after[1:] = [s.masked_fill(dead, 0) for s in after[1:]]
        return self.norm(x).transpose(0, 1), tuple(after)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # [B, heads, T, head_size]

    def rotate(self, x, first):
        """Turn each pair of numbers, a complex one, by its position times its speed.   [B, T, H] -> [B, heads, T, head_size]"""
        angle = (first + torch.arange(x.shape[1], device=x.device, dtype=x.dtype))[:, None] * self.speed.to(x.dtype)
        pairs = torch.view_as_complex(x.unflatten(-1, (self.heads, -1, 2)))                 # [B, T, heads, head_size / 2]
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]                          # [T, 1, head_size / 2]
        return torch.view_as_real(pairs * turn).flatten(-2).transpose(1, 2)

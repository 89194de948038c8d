"""What truncated backpropagation does: the gradient that a cue gets, against its distance.   python benchmark/truncation.py

One rollout, one long episode, one agent; the value of every step is asked how strongly it pulls on the input d steps earlier.
ppo_recurrent_sbb.py's segments of L = 4, 8, 16 let the gradient through up to the segment's edge: with distance ever fewer
steps have the cue in their own segment, and none from L on. Whole episodes, cut or on the tape (ppo_recurrent_tbb.py), let all
of it through. The values themselves are the same everywhere: the stored state carries the past forward.
Writes benchmark/results/truncation.csv and .png.
"""
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ppo_recurrent_sbb as sbb  # noqa: E402
import ppo_recurrent_tbb as tbb  # noqa: E402


@dataclass
class Args:
    memories: tuple[str, ...] = ("lstm", "lru")  # untrained ones
    lengths: tuple[int, ...] = (4, 8, 16)  # L
    steps: int = 104  # T, steps of the episode; T - distance a multiple of every L: all places in a segment count alike
    distance: int = 40  # the largest distance shown
    out: str = str(ROOT / "benchmark/results")  # where truncation.csv and .png go


def gradients(memory, L, T):
    """|d value_t / d x_s| of every pair of steps, [T, T], and the values [T]. L: segment length, -1 whole, None the tape."""
    torch.manual_seed(0)
    script = tbb if L is None else sbb
    agent = script.Agent(gym.spaces.Box(-1, 1, (4,), np.float32), gym.spaces.Discrete(2),
                         script.Args(memory=memory, hidden_size=32, num_layers=1))
    x, starts = torch.randn(T, 1, 4, requires_grad=True), torch.zeros(T, 1, dtype=torch.bool)
    starts[0] = True
    first = agent.memory.initial_state(1)
    if L is None:
        _, values, _ = agent((x,), first, starts)                               # [T, 1]
    else:
        states, state = [], first
        with torch.no_grad():                                                   # acting stores the state before each step
            for t in range(T):
                states.append(state)
                _, _, state = agent((x[t : t + 1],), state, starts[t : t + 1])
        when, col, mask = sbb.cut_segments(starts, T if L == -1 else L)
        state = tuple(torch.stack(s)[when[0], col] for s in zip(*states))
        _, values, _ = agent((x[when[mask], 0],), state, starts[when, col] & mask, mask)
        values = torch.zeros(T).index_put((when[mask],), values)[:, None]       # [T, 1] back in order
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0].norm(dim=-1)[:, 0] for v in values[:, 0]]
    return torch.stack(rows), values[:, 0].detach()


def by_distance(pairs, distance):
    """Means over t of |d value_t / d x_{t-d}| for d = 0 .. distance; steps t < distance are left out."""
    return [pairs.diagonal(-d)[distance - d :].mean().item() for d in range(distance + 1)]


def main(argv=None):
    args = tyro.cli(Args, args=argv)
    torch.set_num_threads(1)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(args.memories), figsize=(4 * len(args.memories), 3), layout="constrained", squeeze=False)
    with (out / "truncation.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("memory", "arm", *range(args.distance + 1)))
        for memory, axis in zip(args.memories, axes[0]):
            arms = {f"SBB, L = {L}": L for L in args.lengths} | {"SBB, whole": -1, "TBB": None}
            for arm, L in arms.items():
                curve = by_distance(gradients(memory, L, args.steps)[0], args.distance)
                writer.writerow((memory, arm, *(f"{y:.4g}" for y in curve)))
                line, = axis.semilogy([y or float("nan") for y in curve], label=arm, alpha=0.4 if arm == "SBB, whole" else 1,
                                      linewidth=3 if arm == "SBB, whole" else 1.2)
                if L in args.lengths:                                           # from here on: zero
                    axis.axvline(L, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(title=memory, xlabel="distance of the cue, steps", ylabel="mean |d value / d cue|")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle("a cue L steps back or more (dotted) gets no gradient", fontsize=10)
    figure.savefig(out / "truncation.png", dpi=120)


if __name__ == "__main__":
    main()

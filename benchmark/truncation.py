"""What truncated backpropagation does: the gradient that a cue gets, against its distance.

    python benchmark/truncation.py

One rollout, one long episode, one agent. How strongly does the value of a step pull on the input d steps
earlier? ppo_recurrent_sbb.py's segments of L = 4, 8, 16 let the gradient through up to the segment's edge.
The longer the distance, the fewer steps have the cue in their own segment, and from L on none has. Whole
episodes, cut or on the tape (ppo_recurrent_tbb.py), let all of it through. The values themselves are the same
everywhere: the stored state carries the past forward. Writes benchmark/results/truncation.csv and .png.
"""
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ppo_recurrent_sbb as sbb  # noqa: E402
import ppo_recurrent_tbb as tbb  # noqa: E402
from models import MEMORIES  # noqa: E402
from models.command_line import command_line, fail  # noqa: E402
from models.files import make_out  # noqa: E402


@dataclass
class Args:
    memories: tuple[str, ...] = ("lstm", "lru")  # untrained ones
    lengths: tuple[int, ...] = (4, 8, 16)  # L
    # T - distance is a multiple of every L: all places in a segment count alike
    steps: int = 104  # T, steps of the episode
    distance: int = 40  # the largest distance shown
    out: str = str(ROOT / "benchmark/results")  # where truncation.csv and .png go


def make_agent(script, memory):
    """An untrained agent, the same for both scripts."""
    torch.manual_seed(0)
    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    args = script.Args(memory=memory, hidden_size=32, num_layers=1)
    return script.Agent(observation_space, gym.spaces.Discrete(2), args)


def values_on_tape(memory, x, starts):
    """[T] the values of all steps, computed on one tape.   x [T, 1, F]; starts [T, 1]"""
    agent = make_agent(tbb, memory)
    _, values, _ = agent((x,), agent.memory.initial_state(1), starts)           # [T, 1]
    return values[:, 0]


def values_in_segments(memory, x, starts, L):
    """[T] the values of all steps, computed in segments of L steps, from stored states."""
    agent, states = make_agent(sbb, memory), []
    state = agent.memory.initial_state(1)
    with torch.no_grad():                                   # acting stores the state before each step
        for t in range(len(x)):
            states.append(state)
            _, _, state = agent((x[t : t + 1],), state, starts[t : t + 1])
    when, col, mask = sbb.cut_segments(starts, L)           # [L, S], [S], [L, S]
    state = tuple(torch.stack(s)[when[0], col] for s in zip(*states))
    _, values, _ = agent((x[when[mask], 0],), state, starts[when, col] & mask, mask)        # [M]
    return torch.zeros(len(x)).index_put((when[mask],), values)


def gradients(memory, L, T):
    """|d value_t / d x_s| of all pairs of steps, [T, T], and the values [T].

    L: steps of a segment; -1: whole episodes; None: the tape
    """
    torch.manual_seed(0)
    x, starts = torch.randn(T, 1, 4, requires_grad=True), torch.zeros(T, 1, dtype=torch.bool)
    starts[0] = True
    if L is None:
        values = values_on_tape(memory, x, starts)
    else:
        values = values_in_segments(memory, x, starts, T if L == -1 else L)
    pairs = []
    for value in values:
        gradient, = torch.autograd.grad(value, x, retain_graph=True)            # [T, 1, F]
        pairs.append(gradient.norm(dim=-1)[:, 0])
    return torch.stack(pairs), values.detach()


def by_distance(pairs, distance):
    """Means over t of |d value_t / d x_{t-d}| for d = 0 .. distance; steps t < distance are left out."""
    return [pairs.diagonal(-d)[distance - d :].mean().item() for d in range(distance + 1)]


def check(args):
    """Refuses what cannot run."""
    for memory in args.memories:
        if memory not in MEMORIES:
            fail(f"--memories {memory} is not one of {', '.join(MEMORIES)}")
    for L in args.lengths:
        if not 1 <= L <= 2**12:
            fail(f"--lengths {L} must be at least 1 and at most {2**12}")
    for name in ("memories", "lengths"):
        if not getattr(args, name):
            fail(f"--{name} needs a value")
    if not 1 <= args.steps <= 2**12:
        fail(f"--steps {args.steps} must be at least 1 and at most {2**12}")
    if not 0 <= args.distance < args.steps:
        fail(f"--distance {args.distance} must be at least 0 and less than --steps {args.steps}")


def main(argv=None):
    args = command_line(Args, argv)
    check(args)
    torch.set_num_threads(1)
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    out = Path(args.out)
    make_out(out)
    columns = len(args.memories)
    figure, axes = plt.subplots(
        1, columns, figsize=(4 * columns, 3), layout="constrained", squeeze=False)
    arms = {f"SBB, L = {L}": L for L in args.lengths} | {"SBB, whole": -1, "TBB": None}
    with (out / "truncation.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("memory", "arm", *range(args.distance + 1)))
        for memory, axis in zip(args.memories, axes[0]):
            for arm, L in arms.items():
                pairs, _ = gradients(memory, L, args.steps)
                curve = by_distance(pairs, args.distance)
                writer.writerow((memory, arm, *(f"{y:.4g}" for y in curve)))
                below = {"alpha": 0.4, "linewidth": 3} if L == -1 else {"linewidth": 1.2}   # under TBB's
                line, = axis.semilogy([y or float("nan") for y in curve], label=arm, **below)
                if L in args.lengths:                       # from here on: zero
                    axis.axvline(L, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(title=memory, xlabel="distance of the cue, steps", ylabel="mean |d value / d cue|")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle("a cue L steps back or more (dotted) gets no gradient", fontsize=10)
    figure.savefig(out / "truncation.png", dpi=120)


if __name__ == "__main__":
    main()

"""--probe: what a linear readout of the memory's state knows of what the task says is to be remembered."""
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from models.files import write
from models.play import play
from models.strip import BLUE, DPI, VERMILLION

NUMBERS = 512  # of a larger state (GPT's) so many random sums are read
SAMPLES = 4096  # of a quantity that is asked of several delays
SHRINKAGE = 0.03  # of the covariance towards that of independent numbers

plt.switch_backend("Agg")


def probe(agent, envs, args):
    """Reads what envs.remembered() names from the state, on fresh episodes, and draws how well, by delay.

    With --forget-at also where the state was wiped.
    """
    curves = {"state kept": readouts(agent, envs, args.seed, 0)}
    if args.forget_at:
        curves[f"state wiped at step {args.forget_at}"] = readouts(agent, envs, args.seed, args.forget_at)
    for arm, found in curves.items():
        for name, (xlabel, points) in found.items():
            x, right, chance = np.array(points).T
            print(f"{arm}: {name} is read from the state, {xlabel} {x[0]:.0f} to {x[-1]:.0f}, in "
                  f"{right.mean():.3f}, at least {right.min():.3f} of cases (best guess {chance.mean():.3f})")
    draw(Path(args.model).with_suffix("").as_posix() + "-probe", curves, f"{args.env_id}, {args.memory}")


def readouts(agent, envs, seed, forget_at):
    """{name: (what is on the x axis, [(x, accuracy, share of the most frequent answer), ...])}"""
    steps, found = record(agent, envs, seed, forget_at), {}
    for name, example in steps[0][2].items():
        if example.ndim == 1:                               # a readout of its own at every step
            xlabel, samples = "step", [(t, state, named[name]) for t, state, named in steps]
        else:                                               # one for each delay, over all steps
            states = np.concatenate([state for _, state, _ in steps])
            values = np.concatenate([named[name] for _, _, named in steps])             # [n, K]
            some = np.random.default_rng(0).permutation(len(states))[:SAMPLES]
            xlabel = "steps ago"
            samples = [(k, states[some], values[some, k]) for k in range(values.shape[1])]
        points = [(x, *accuracy(state[value >= 0], value[value >= 0])) for x, state, value in samples
                  if (value >= 0).sum() >= 100]
        found[name] = xlabel, points
    return found


def record(agent, envs, seed, forget_at):
    """[(t, states [n, U], what is named then {name: [n] or [n, K]}), ...] of the first episode of each row.

    Every step up to 64, every second one up to 128, every fourth one up to 256, ...
    """
    steps, act, begun, t = [], agent.act, np.zeros(envs.num_envs, int), 0

    def noted(obs, state, start):
        nonlocal t, begun
        begun = begun + start.cpu().numpy()
        named, running = envs.unwrapped.remembered(), begun == 1
        action, state = act(obs, state, start)
        if t % 2 ** max(0, t.bit_length() - 6) == 0 and running.any():
            steps.append((t, rows_of(state, envs.num_envs)[running],
                          {name: value[running] for name, value in named.items()}))
        t += 1
        return action, state

    agent.act = noted
    try:
        play(agent, envs, envs.num_envs, seed + 20_000, forget_at=forget_at)
    finally:
        del agent.act                                       # the class's own is back
    return steps


def rows_of(state, N):
    """The state's numbers, [N, U], complex ones as two."""
    real = [torch.view_as_real(s) if s.is_complex() else s for s in state]
    rows = torch.cat([torch.zeros(N, 0), *(s.cpu().float().reshape(N, -1) for s in real)], dim=1)
    if rows.shape[1] > NUMBERS:
        rows = rows @ torch.randn(rows.shape[1], NUMBERS, generator=torch.Generator().manual_seed(0))
    return rows.numpy()


def accuracy(x, y):
    """Of linear discriminant analysis: how many of the second half it gets right, and how many the most
    frequent answer does.   x [n, U]; y [n] whole numbers
    """
    fit = np.arange(len(x)) < len(x) // 2
    x = (x - x[fit].mean(0)) / (x[fit].std(0) + 1e-6)
    answers, which, counts = np.unique(y[fit], return_inverse=True, return_counts=True)
    means = np.stack([x[fit][which == i].mean(0) for i in range(len(answers))])         # [answers, U]
    apart = x[fit] - means[which]
    covariance = (1 - SHRINKAGE) * apart.T @ apart / len(apart) + SHRINKAGE * np.eye(x.shape[1])
    weights = np.linalg.solve(covariance, means.T)          # [U, answers]
    bias = np.log(counts) - (means * weights.T).sum(1) / 2
    right = answers[(x @ weights + bias).argmax(1)] == y
    return right[~fit].mean(), (y[~fit] == answers[counts.argmax()]).mean()


def draw(name, curves, title):
    """A figure with a panel for each quantity, and its numbers."""
    quantities = list(next(iter(curves.values())))
    figure, axes = plt.subplots(1, len(quantities), figsize=(4.2 * len(quantities), 2.8), dpi=DPI,
                                layout="constrained", squeeze=False)
    rows = []
    for quantity, axis in zip(quantities, axes[0]):
        for (arm, found), colour in zip(curves.items(), (BLUE, VERMILLION)):
            xlabel, points = found[quantity]
            x, right, chance = np.array(points).T
            axis.plot(x, right, color=colour, label=arm, marker="." if len(x) < 80 else None)
            rows += [(arm, quantity, xlabel, f"{k:.0f}", f"{a:.4f}", f"{c:.4f}") for k, a, c in points]
        axis.plot(x, chance, color="gray", linestyle=":", label="best guess")
        axis.set(title=f"{title}: {quantity}", xlabel=xlabel, ylabel="readout is right", ylim=(0, 1.05))
        axis.title.set_fontsize(9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    write(Path(f"{name}.png"), lambda beside: figure.savefig(beside, format="png"))
    plt.close(figure)

    def save(beside):
        with beside.open("w", newline="") as f:
            table = csv.writer(f, lineterminator="\n")
            table.writerow(("state", "quantity", "x", "at", "accuracy", "chance"))
            table.writerows(rows)

    write(Path(f"{name}.csv"), save)
    print(f"wrote {name}.png and {name}.csv")

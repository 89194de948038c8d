"""The figures of docs/memory.md, each by one command.

    python benchmark/lessons.py segments     a gradient that segments cut
    python benchmark/lessons.py late         a state that was saved one step too late
    python benchmark/lessons.py cue          a GRU, an LRU and GPT that remember the same cue

Writes benchmark/results/lesson-<name>.png. Agents are those in benchmark/models.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmark"))

from horizon import load_model  # noqa: E402
from truncation import gradients  # noqa: E402

from models.command_line import command_line  # noqa: E402
from models.files import make_out, write  # noqa: E402
from models.play import play  # noqa: E402
from models.run_folder import make_agent  # noqa: E402
from models.strip import BLUE, DPI, VERMILLION, strip  # noqa: E402
from models.watch import witness  # noqa: E402

MODELS = ROOT / "benchmark/models"
L = 8  # steps of a segment
ZERO = 1e-4  # where a logarithmic axis has its 0


@dataclass
class Args:
    figure: Annotated[Literal["segments", "late", "cue"], tyro.conf.Positional]  # which one
    out: str = str(ROOT / "benchmark/results")  # where lesson-<figure>.png goes


def segments(T=32):
    """How strongly the last step's value pulls on what was seen at each step, by an untrained LRU."""
    figure, axes = plt.subplots(
        2, 1, sharex=True, sharey=True, figsize=(7, 3.6), dpi=DPI, layout="constrained")
    titles = "on the tape: nothing is cut", f"in segments of {L} steps: nothing from before the last one"
    for axis, length, title in zip(axes, (None, L), titles):
        pairs, _ = gradients("lru", length, T)              # [T, T] |d value_t / d x_s|
        for s, (gradient, colour) in enumerate(zip(pairs[-1], [VERMILLION] + [BLUE] * (T - 1))):
            axis.plot(s, max(gradient, ZERO), "o", color=colour, fillstyle="full" if gradient else "none")
        axis.set_yscale("log")
        axis.set_ylim(ZERO / 2, 2)
        axis.set_yticks([ZERO, 0.001, 0.01, 0.1, 1], ["exactly 0", "0.001", "0.01", "0.1", "1"])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9, loc="left")
        axis.text(0, 0.7, "the cue", fontsize=8, color=VERMILLION, ha="center",
                  transform=axis.get_xaxis_transform())
    for edge in range(L, T, L):
        axes[1].axvline(edge - 0.5, color="black", linewidth=0.8)
    axes[1].set_xlabel("step at which something was seen", fontsize=8)
    figure.supylabel(f"gradient of the value of step {T - 1}", fontsize=8)
    return of_figure(figure)


@torch.no_grad()
def late():
    """A trained agent acts. Then its segments are computed again, from two kinds of stored states."""
    agent, envs, args = agent_of("default")
    acted, act = [], agent.act

    def noted(obs, state, start):
        acted.append((obs, state, start))
        return act(obs, state, start)

    agent.act = noted
    play(agent, envs, 1, args.seed)
    T = len(acted) // L * L
    obs = torch.stack([obs for (obs,), _, _ in acted])      # [T, 1]
    start = torch.stack([start for _, _, start in acted])   # [T, 1]
    whole, _, _ = agent((obs,), agent.memory.initial_state(1), start)
    actions = whole.mode()                                  # [T, 1]
    figure, axis = plt.subplots(figsize=(7, 2.6), dpi=DPI, layout="constrained")
    for shift, label, colour in ((0, "state saved before the step: right", BLUE),
                                 (1, "state saved after the step: one step too late", VERMILLION)):
        chances = []
        for begin in range(0, T, L):
            _, state, _ = acted[begin + shift]
            piece = slice(begin, begin + L)
            dist, _, _ = agent((obs[piece],), state, start[piece])
            chances += dist.log_prob(actions[piece])[:, 0].exp().tolist()
        axis.plot(chances, color=colour, label=label, marker=".")
        difference = max(abs(np.log(chances) - whole.log_prob(actions)[:T, 0].numpy()))
        print(f"{label}: log-probabilities differ by {difference:.1e} at most")
    for edge in range(0, T, L):
        axis.axvline(edge - 0.5, color="black", linewidth=0.8)
    axis.set_xlabel("step; a segment begins at every line", fontsize=8)
    axis.set_ylabel("probability, in training,\nof the action taken", fontsize=8)
    figure.legend(fontsize=8, loc="outside upper center", ncols=2, frameon=False)
    return of_figure(figure)


def cue():
    """Strips of three agents that walk the same corridor, after one cue and after the other."""
    rows = []
    for memory in ("gru", "lru", "gpt"):
        agent, envs, args = agent_of(f"tmaze-50-memories__tmaze__{memory}__sbb")
        args.episodes = 2
        steps, _, _ = witness(agent, envs, args, forget_at=0)
        second = [t for t, step in enumerate(steps) if step["age"] == 0][1]
        down, _ = strip(agent, steps, slice(0, second), f"{memory}, the cue is down", width=440)
        up, _ = strip(agent, steps, slice(second, len(steps)), f"{memory}, the cue is up", width=440)
        rows.append(np.concatenate([down, up], axis=1))
    return np.concatenate(rows)


def agent_of(name):
    """An agent of benchmark/models, its task and its flags."""
    script, args, saved, envs = load_model(str(MODELS / f"{name}.safetensors"))
    agent, _ = make_agent(script.Agent, args, envs, saved)
    return agent, envs, args


def of_figure(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def main(argv=None):
    args = command_line(Args, argv)
    torch.set_num_threads(1)
    make_out(Path(args.out))
    picture = {"segments": segments, "late": late, "cue": cue}[args.figure]()
    path = Path(args.out) / f"lesson-{args.figure}.png"
    write(path, lambda beside: imageio.imwrite(beside, picture, "PNG"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

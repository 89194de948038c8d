"""How far back a trained agent's memory reaches, and how much delay it bears.

    python benchmark/horizon.py --model runs/.../model.safetensors
    python benchmark/horizon.py --model runs/.../model.safetensors --sweep k 2 4 8 16         popgym-RepeatPreviousEasy-v0's
    python benchmark/horizon.py --model runs/.../model.safetensors --sweep env-id popgym-RepeatFirst{Easy,Medium,Hard}-v0

Plays episodes with the most likely actions and draws, against k, how strongly the value and the policy of step t depend on what
was seen k steps before: |d value_t / d x_{t-k}| and |d logit_t / d x_{t-k}|, logit_t the largest output of the policy's last
layer (its probability is flat where the policy is sure) and x the encoder's features (observations may be integers), averaged
over t; with the number of steps that training's gradient could flow through. --sweep plays the task again with other values of
one of its arguments, or other tasks, and draws the return (and the success, where the task defines it) against them: recall
against delay, past the delay of training. Writes horizon.csv and horizon.png (sweep.csv, sweep.png) beside the model.
"""
import csv
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("ppo_recurrent_sbb", "ppo_recurrent_tbb")  # a file must not name any other module to import


@dataclass
class Args:
    model: str  # model.safetensors of one of the scripts
    steps: int = 256  # steps to play
    targets: int = 32  # steps t whose gradients are averaged
    sweep: tuple[str, ...] = ()  # an argument of the task and its values, as JSON, to play with; or env-id and tasks
    episodes: int = 100  # episodes for each value
    out: str | None = None  # folder; default: the model's


def fail(message):
    """Bad input: one sentence, exit code 2."""
    print(f"horizon.py: {message}", file=sys.stderr)
    sys.exit(2)


def read(path):
    """The script's module, Args and weights of a model file."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            name = (f.metadata() or {}).get("script")
    except Exception as e:                                  # missing, damaged, another program's
        fail(f"--model {path} cannot be read ({type(e).__name__}); give a model.safetensors of this repository")
    if name not in SCRIPTS:
        fail(f"--model {path} is not a model of {' or '.join(SCRIPTS)}")
    script = importlib.import_module(name)
    content = script.load("--model", path, script.read_model)
    return script, content["args"], content["agent"]


@torch.no_grad()
def record(script, args, agent, envs, steps):
    """Features [T, 1, F] and starts [T, 1] of `steps` steps."""
    obs, state, start, features, starts = envs.reset(seed=args.seed)[0], agent.memory.initial_state(1), True, [], []
    for _ in range(steps):
        leaves = script.add_time(script.to_tensors(envs.single_observation_space, obs, torch.device("cpu")))
        starts.append(start and args.reset_state)
        dist, _, state = agent(leaves, state, torch.tensor([[starts[-1]]]))
        features.append(agent.encoder(leaves)[0])
        obs, _, terminated, truncated, _ = envs.step(agent.policy.to_env(dist.mode()[0]))
        start = bool(terminated[0] | truncated[0])
        if start:
            obs, _ = envs.reset()
    return torch.stack(features), torch.tensor(starts)[:, None]


def outputs(agent, x, start):
    """Value and largest policy output of every step, both [T].   x [T, 1, F]; start [T, 1]"""
    y, _ = agent.memory(x, agent.memory.initial_state(1), start)
    for_policy, for_value = agent.hidden(y).relu().chunk(2, dim=-1)
    return agent.value(for_value)[:, 0, 0], agent.policy.linear(for_policy)[:, 0].amax(-1)


def gradients(agent, x, start, targets):
    """For every target t: norms of the gradients of its value and policy with respect to every step's features, [2, T]."""
    x = x.clone().requires_grad_()
    both = outputs(agent, x, start)
    for t in targets:
        yield torch.stack([torch.autograd.grad(out[t], x, retain_graph=True)[0].norm(dim=-1)[:, 0] for out in both])


def sensitivity(agent, x, start, targets):
    """The same by distance k = t - s, within the episode of t.

    x [T, 1, F]; targets: steps t. Returns [2, K], K = T: the means over t, nan where no episode reaches back k steps.
    """
    T, episode = len(x), start[:, 0].cumsum(0)
    total, count = torch.zeros(2, T), torch.zeros(T)
    for t, norms in zip(targets, gradients(agent, x, start, targets)):
        reach = int((episode[: t + 1] == episode[t]).sum())                     # steps of this episode up to t
        total[:, :reach] += norms[:, t - reach + 1 : t + 1].flip(1)
        count[:reach] += 1
    return total / count                                    # 0 / 0 is nan


def draw(path, columns, x, xlabel, ylabel, log, marks=()):
    """A CSV file and a figure of the same columns against x."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.with_suffix(".csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow((xlabel.split(" ")[0], *columns))   # "k (steps back)" is k
        writer.writerows(zip(x, *([f"{v:.4g}" for v in column] for column in columns.values())))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, column in columns.items():
        axis.plot(x, column, label=name, linewidth=1, marker="." if len(x) < 20 else None)
    for name, at in marks:
        axis.axvline(at, color="gray", linestyle=":", linewidth=1, label=name)
    if log:
        axis.set_yscale("log")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
    print(f"wrote {path.with_suffix('.csv')} and {path.with_suffix('.png')}")


def sweep(script, args, agent, envs, options, path):
    """Plays with each value of the argument (or each task) and draws the means.   envs: the task as it was trained on"""
    name, *values = options.sweep
    if not values:
        fail(f"--sweep {name} needs values to try, such as --sweep k 2 4 8")
    kwargs, results, space = json.loads(args.env_kwargs), [], (envs.single_observation_space, envs.single_action_space)
    trained = kwargs.get(name, getattr(envs.unwrapped.envs[0].unwrapped, name, None))      # most tasks keep their arguments
    if name != "env-id":
        try:
            values = [json.loads(value) for value in values]
        except json.JSONDecodeError:
            fail(f"--sweep {' '.join(options.sweep)}: values are JSON, as numbers or true")
    for value in values:
        if name == "env-id":
            args.env_id = value
        else:
            args.env_kwargs = json.dumps(kwargs | {name: value})
        envs = script.make_envs(args, min(16, options.episodes), play=True)
        if (envs.single_observation_space, envs.single_action_space) != space:
            fail(f"--sweep {name} {value} has other observations or actions than the task of training")
        results.append(script.play(agent, envs, args, options.episodes, args.seed).mean(axis=1))
        print(f"{name} = {value}: mean return of {options.episodes} episodes {results[-1][0]:.3f}")
    returns, _, successes = np.array(results).T
    columns = {"return": returns} | ({} if np.isnan(successes).any() else {"success": successes})
    marks = [("training", trained)] if isinstance(trained, (int, float)) else []
    draw(path, columns, values, name, f"mean of {options.episodes} episodes", log=False, marks=marks)


def check(options):
    """Refuses what cannot run."""
    for name in ("steps", "targets", "episodes"):
        if getattr(options, name) < 1:
            fail(f"--{name} {getattr(options, name)} must be at least 1")
    try:
        Path(options.out or ".").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--out {options.out} cannot be made ({e.strerror})")


def main(argv=None):
    options = tyro.cli(Args, args=argv)
    check(options)
    torch.set_num_threads(1)
    script, args, weights = read(options.model)
    args.device, out = "cpu", Path(options.out or Path(options.model).parent)
    envs = script.make_envs(args, 1, play=True)
    agent = script.make_agent(args, envs, weights)
    if options.sweep:
        return sweep(script, args, agent, envs, options, out / "sweep")
    x, start = record(script, args, agent, envs, options.steps)
    targets = np.linspace(options.steps // 4, options.steps - 1, options.targets).astype(int)
    value, policy = sensitivity(agent, x, start, targets)
    K = int(value.isfinite().sum())
    marks = [("rollout", args.num_steps)]                   # where the gradient of training ends: with the rollout,
    if getattr(args, "seq_len", -1) > 0:
        marks = [("truncated BPTT", args.seq_len)]          # with SBB's segment,
    elif getattr(args, "full_episodes", False):
        marks = [("prefix", args.max_prefix + args.num_steps)]      # or with what --full-episodes keeps
    marks = [(name, at) for name, at in marks if at < K]
    draw(out / "horizon", {"value": value[:K].tolist(), "policy": policy[:K].tolist()}, range(K),
         "k (steps back)", "norm of the gradient", log=True, marks=marks)


if __name__ == "__main__":
    main()

"""How far back a trained agent's memory reaches, and how much delay it bears.

    python benchmark/horizon.py --model runs/.../model.safetensors
    python benchmark/horizon.py --model runs/.../model.safetensors --sweep k 2 4 8 16    (RepeatPreviousEasy)
    python benchmark/horizon.py --model runs/.../model.safetensors \\
        --sweep env-id popgym-RepeatFirst{Easy,Medium,Hard}-v0

Plays episodes with the most likely actions. Draws, against k, how strongly the value and the policy of step t
depend on what was seen k steps before: |d value_t / d x_{t-k}| and |d logit_t / d x_{t-k}|, averaged over t.
    x          the encoder's features: observations may be integers
    logit_t    the largest output of the policy's last layer: its probability is flat where the policy is sure
A dotted line is the number of steps that training's gradient could flow through.

--sweep plays the task again with other values of one of its arguments, or other tasks, and draws the return
(and the success, where the task defines it) against them: recall against delay, past the delay of training.

Writes horizon.csv and horizon.png (sweep.csv and sweep.png) beside the model.
"""
import csv
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from envs.vector import make_envs  # noqa: E402
from models import to_tensors  # noqa: E402
from models.files import command_line, make_out  # noqa: E402
from models.flags import fail, parse, read_model  # noqa: E402
from models.play import play  # noqa: E402
from models.run_folder import make_agent  # noqa: E402

# a file must not name any other module to import
SCRIPTS = "ppo_recurrent_sbb", "ppo_recurrent_tbb", "ppo_recurrent_tbb_multigpu"


@dataclass
class Args:
    model: str  # model.safetensors of one of the PPO scripts
    steps: int = 256  # steps to play
    targets: int = 32  # steps t whose gradients are averaged
    sweep: tuple[str, ...] = ()  # an argument of the task and its values, as JSON; or env-id and tasks
    episodes: int = 100  # episodes for each value
    out: str | None = None  # folder; default: the model's


def script_of(path):
    """The script that trained a model, as a module."""
    try:
        name = read_model(path)["script"]
    except Exception as e:                                  # missing, damaged, another program's
        fail(f"--model {path} cannot be read ({type(e).__name__}); give a model.safetensors of this "
             "repository")
    if name not in SCRIPTS:
        fail(f"--model {path} is not a model of {' or '.join(SCRIPTS)}")
    return importlib.import_module(name)


@torch.no_grad()
def record(agent, envs, seed, steps):
    """Features [T, 1, F] and starts [T, 1] of `steps` steps."""
    state, features, starts = agent.memory.initial_state(1), [], []
    start = torch.ones(1, dtype=torch.bool)
    obs, _ = envs.reset(seed=seed)
    for _ in range(steps):
        obs = to_tensors(envs.single_observation_space, obs, "cpu")             # leaves of [1, ...]
        features.append(agent.encoder(obs))
        starts.append(start & agent.reset_state)
        action, state = agent.act(obs, state, start)
        obs, _, terminated, truncated, _ = envs.step(action)
        start = torch.as_tensor(terminated | truncated)
        if start:
            obs, _ = envs.reset()
    return torch.stack(features), torch.stack(starts)


def outputs(agent, x, start):
    """Value and largest policy output of every step, both [T].   x [T, 1, F]; start [T, 1]"""
    y, _ = agent.memory(x, agent.memory.initial_state(1), start)                # [T, 1, H]
    value = agent.value(agent.value_hidden(y).relu())       # [T, 1, 1]
    logits = agent.policy.linear(agent.policy_hidden(y).relu())                 # [T, 1, A]
    return value[:, 0, 0], logits[:, 0].amax(-1)


def gradients(agent, x, start, targets):
    """For every target t: norms of the gradients of its value and policy by every step's features, [2, T]."""
    x = x.clone().requires_grad_()
    both = outputs(agent, x, start)
    for t in targets:
        of_both = [torch.autograd.grad(out[t], x, retain_graph=True)[0] for out in both]    # [T, 1, F] each
        yield torch.stack([gradient.norm(dim=-1)[:, 0] for gradient in of_both])


def sensitivity(agent, x, start, targets):
    """The same by distance k = t - s, within the episode of t.

    x [T, 1, F]; targets: steps t. Returns [2, K], K = T: means over t, nan where no episode reaches k back.
    """
    T, episode = len(x), start[:, 0].cumsum(0)
    total, count = torch.zeros(2, T), torch.zeros(T)
    for t, norms in zip(targets, gradients(agent, x, start, targets)):
        reach = int((episode[: t + 1] == episode[t]).sum())     # steps of this episode up to t
        total[:, :reach] += norms[:, t - reach + 1 : t + 1].flip(1)
        count[:reach] += 1
    return total / count                                    # 0 / 0 is nan


def draw(path, columns, x, xlabel, ylabel, log, marks=()):
    """A CSV file and a figure of the same columns against x."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
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


def sweep(agent, args, envs, options, path):
    """Plays with each value of the argument (or each task) and draws the means.   envs: of the training"""
    name, *values = options.sweep
    if not values:
        fail(f"--sweep {name} needs values to try, such as --sweep k 2 4 8")
    if name != "env-id":
        try:
            values = [json.loads(value) for value in values]
        except json.JSONDecodeError:
            fail(f"--sweep {' '.join(options.sweep)}: values are JSON, as numbers or true")
    # most tasks keep their arguments under the same names
    task = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped                 # ours are one batch
    trained = args.env_kwargs.get(name, getattr(task, name, None))
    kwargs, space = args.env_kwargs, (envs.single_observation_space, envs.single_action_space)
    results = []
    for value in values:
        if name == "env-id":
            args.env_id = value
        else:
            args.env_kwargs = kwargs | {name: value}
        envs = make_envs(args, min(16, options.episodes), training=False)
        if (envs.single_observation_space, envs.single_action_space) != space:
            fail(f"--sweep {name} {value} has other observations or actions than the task of training")
        results.append(play(agent, envs, options.episodes, args.seed).mean(axis=1))
        print(f"{name} = {value}: mean return of {options.episodes} episodes {results[-1][0]:.3f}")
    returns, _, successes = np.array(results).T
    columns = {"return": returns}
    if not np.isnan(successes).any():
        columns["success"] = successes
    marks = [("training", trained)] if isinstance(trained, (int, float)) else []
    draw(path, columns, values, name, f"mean of {options.episodes} episodes", log=False, marks=marks)


def reach_of_training(args):
    """A name and a number of steps: where the gradient of training ended."""
    if getattr(args, "seq_len", -1) > 0:
        return "truncated BPTT", args.seq_len
    if getattr(args, "full_episodes", False):
        return "prefix", args.max_prefix + args.num_steps
    return "rollout", args.num_steps


def check(options):
    """Refuses what cannot run."""
    for name, high in {"steps": 2**16, "targets": 2**12, "episodes": 2**20}.items():
        if not 1 <= getattr(options, name) <= high:
            fail(f"--{name} {getattr(options, name)} must be at least 1 and at most {high}")


def main(argv=None):
    options = command_line(Args, argv)
    check(options)
    torch.set_num_threads(1)
    script = script_of(options.model)
    args, saved = parse(script.Args, script.SCRIPT, ["--model", options.model, "--device", "cpu"])
    out = Path(options.model).parent if options.out is None else Path(options.out)
    envs = make_envs(args, 1, training=False)
    agent, _ = make_agent(script.Agent, args, envs, saved)
    make_out(out)
    if options.sweep:
        return sweep(agent, args, envs, options, out / "sweep")
    x, start = record(agent, envs, args.seed, options.steps)
    targets = np.linspace(options.steps // 4, options.steps - 1, options.targets).astype(int)
    value, policy = sensitivity(agent, x, start, targets)
    K = int(value.isfinite().sum())
    columns = {"value": value[:K].tolist(), "policy": policy[:K].tolist()}
    name, at = reach_of_training(args)
    marks = [(name, at)] if at < K else []
    draw(out / "horizon", columns, range(K), "k (steps back)", "norm of the gradient", log=True, marks=marks)


if __name__ == "__main__":
    main()

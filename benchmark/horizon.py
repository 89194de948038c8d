"""How far back a trained agent's memory reaches, and how much delay it bears.

    python benchmark/horizon.py --model runs/.../model.safetensors
    python benchmark/horizon.py --model runs/.../model.safetensors --sweep k 2 4 8 16    (RepeatPreviousEasy)
    python benchmark/horizon.py --model runs/.../model.safetensors \\
        --sweep env-id popgym-RepeatFirst{Easy,Medium,Hard}-v0

Plays episodes with the most likely actions, with a model of any script. Draws, against k, how strongly the
value and the policy of step t depend on what was seen k steps before: |d value_t / d x_{t-k}| and
|d policy_t / d x_{t-k}|, averaged over t.
    x           the encoder's features: observations may be integers. If policy and critics have an encoder
                each, each curve is of its own features
    value_t     PPO: the value. PQN, DQN and SAC-Discrete: the largest Q. SAC and TD3: Q of the most likely
                action, which is held fixed. Of two critics the smaller Q
    policy_t    PPO and SAC-Discrete: the largest output of the policy's last layer, for its probability is
                flat where the policy is sure. SAC and TD3: the mean of the action's first number before the
                tanh, which is flat at the bounds. PQN and DQN: none, Q is their policy
Where the task gives an action mask, only allowed actions count: nothing corrects what a forbidden one would
give. A dotted line is the number of steps that training's gradient could flow through, unless it was the
episode.

--sweep plays the task again with other values of one of its arguments, or other tasks, and draws the return
(and the success, where the task defines it) against them: recall against delay, past the delay of training.
Of several arguments at once: `--sweep env-kwargs '{"size": 17, "random_length": true}' ...`. Given several
models it draws one curve for each memory, the mean over its models: of success if the task defines it. Of
more than eight curves it draws a picture in colours.

Writes horizon.csv and horizon.png (sweep.csv and sweep.png) beside the (first) model.
"""
import collections
import csv
import functools
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from envs.vector import make_envs  # noqa: E402
from models import to_tensors  # noqa: E402
from models.command_line import command_line  # noqa: E402
from models.files import make_out  # noqa: E402
from models.flags import fail, parse, read_model  # noqa: E402
from models.heads import ActionValues  # noqa: E402
from models.play import play  # noqa: E402
from models.run_folder import make_agent  # noqa: E402


@dataclass
class Args:
    model: tuple[str, ...]  # model.safetensors of any script; with --sweep also several
    steps: int = 256  # steps to play
    targets: int = 32  # steps t whose gradients are averaged
    sweep: tuple[str, ...] = ()  # an argument of the task and its values, as JSON; env-id; env-kwargs
    episodes: int = 100  # episodes for each value
    out: str | None = None  # folder; default: the model's


# ------------------------------------------------ what is drawn of every step, [T, B] each
# y_policy, y_critics: what the memories give, [T, B, H] each; the same if there is one memory
# mask: the allowed actions, [T, B, A]; None where the task gives no mask

def of_ppo(agent, y_policy, y_critics, mask=None):
    logits = agent.policy.linear(agent.policy_hidden(y_policy).relu())          # [T, B, A]
    value = agent.value(agent.value_hidden(y_critics).relu()).squeeze(-1)
    return {"value": value, "policy": largest(logits, mask)}


def of_dqn(agent, y_policy, y_critics, mask=None):
    q = agent.q(agent.hidden(y_critics).relu(), mask)
    return {"value": q.of(q.greedy())}


def of_sac_discrete(agent, y_policy, y_critics, mask=None):
    *hidden, head = agent.policy
    logits = head.linear(nn.Sequential(*hidden)(y_policy))  # [T, B, A]
    q1, q2 = (torch.cat(critic(y_critics).branches, dim=-1) for critic in (agent.q1, agent.q2))
    q = ActionValues(torch.minimum(q1, q2), agent.q1[-1].sizes, mask)
    return {"value": q.of(q.greedy()), "policy": largest(logits, mask)}


def largest(logits, mask):
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).amax(-1)


def of_continuous(agent, y_policy, y_critics, mask=None):
    means = agent.policy(y_policy)[..., : len(agent.low)]   # [T, B, A], then come SAC's log-stds
    value = torch.minimum(*agent.critics(y_critics, means.tanh().detach()))
    return {"value": value, "policy": means[..., 0]}


OUTPUTS = {  # a file must not name any other module to import
    "ppo_recurrent_sbb": of_ppo, "ppo_recurrent_tbb": of_ppo, "ppo_recurrent_tbb_multigpu": of_ppo,
    "pqn_recurrent_tbb": of_dqn, "dqn_recurrent_sbb": of_dqn, "dqn_recurrent_tbb": of_dqn,
    "sac_discrete_sbb": of_sac_discrete, "sac_gru": of_continuous, "td3_gru": of_continuous}


def script_of(path):
    """The script that trained a model, as a module."""
    try:
        name = read_model(path)["script"]
    except Exception as e:                                  # missing, damaged, another program's
        fail(f"--model {path} cannot be read ({type(e).__name__}); give a model.safetensors of this "
             "repository")
    if name not in OUTPUTS:
        fail(f"--model {path} was made by none of {', '.join(OUTPUTS)}: give a model of one of these")
    return importlib.import_module(name)


def trunks_of(agent):
    """The parts with an encoder and a memory: the policy's and the critics', or one for both."""
    return [part for part in agent.modules() if hasattr(part, "encoder") and hasattr(part, "memory")]


@torch.no_grad()
def record(agent, envs, seed, steps):
    """Features [T, 1, F] of `steps` steps, of each trunk, starts [T, 1], where the memory forgets, and the
    allowed actions [T, 1, A], None where the task gives no mask."""
    trunks, features, starts, masks = trunks_of(agent), [], [], []
    state, length = agent.memory.initial_state(1), 0
    wipe_every = getattr(agent, "wipe_state_every", 0)
    start = torch.ones(1, dtype=torch.bool)
    obs, _ = envs.reset(seed=seed)
    for _ in range(steps):
        if wipe_every and length % wipe_every == 0:
            start = torch.ones_like(start)
        obs = to_tensors(envs.single_observation_space, obs, "cpu")             # leaves of [1, ...]
        features.append([trunk.encoder(obs) for trunk in trunks])
        starts.append(start & getattr(agent, "reset_state", True))
        masks.append(trunks[0].encoder.mask(obs))
        action, state = agent.act(obs, state, start)
        obs, _, terminated, truncated, _ = envs.step(action)
        length += 1
        start = torch.as_tensor(terminated | truncated)
        if start:
            obs, _ = envs.reset()
            length = 0
    mask = None if masks[0] is None else torch.stack(masks)
    return [torch.stack(xs) for xs in zip(*features)], torch.stack(starts), mask


def outputs(of, agent, xs, start):
    """What `of` draws of every step, {name: [T]}.   xs: features [T, 1, F] of each trunk; start [T, 1]"""
    ys = []
    for trunk, x in zip(trunks_of(agent), xs, strict=True):
        y, _ = trunk.memory(x, trunk.memory.initial_state(1), start)            # [T, 1, H]
        ys.append(y)
    return {name: out[:, 0] for name, out in of(agent, ys[0], ys[-1]).items()}


def gradients(of, agent, xs, start, targets):
    """For every target t: norms of the gradients of each output by every step's features, [outputs, T]."""
    xs = [x.clone().requires_grad_() for x in xs]
    drawn, by = outputs(of, agent, xs, start), {"value": xs[-1], "policy": xs[0]}
    for t in targets:
        of_all = [torch.autograd.grad(out[t], by[name], retain_graph=True)[0] for name, out in drawn.items()]
        yield torch.stack([gradient.norm(dim=-1)[:, 0] for gradient in of_all])


def sensitivity(of, agent, xs, start, targets):
    """The same by distance k = t - s, within the episode of t.

    targets: steps t. Returns [outputs, K], K = T: means over t, nan where no episode reaches k back.
    """
    T, episode = len(start), start[:, 0].cumsum(0)
    total, count = 0, torch.zeros(T)
    for t, norms in zip(targets, gradients(of, agent, xs, start, targets)):
        reach = int((episode[: t + 1] == episode[t]).sum())     # steps of this episode up to t
        total += F.pad(norms[:, t - reach + 1 : t + 1].flip(1), (0, T - reach))
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
    if len(columns) > 8:                                    # lines that nobody could tell apart
        grid = np.array(list(columns.values()))             # [curves, values]
        image = axis.imshow(grid, cmap="cividis", aspect="auto")
        axis.set_xticks(range(len(x)), x, fontsize=7)
        axis.set_yticks(range(len(columns)), columns, fontsize=7)
        for _, at in marks:
            if at in x:
                axis.axvline(list(x).index(at), color="red", linestyle=":", linewidth=1)
        figure.colorbar(image).set_label(ylabel, fontsize=8)
        ylabel = None
    else:
        for name, column in columns.items():
            axis.plot(x, column, label=name, linewidth=1, marker="." if len(x) < 20 else None)
        for name, at in marks:
            axis.axvline(at, color="gray", linestyle=":", linewidth=1, label=name)
        axis.legend(frameon=False, fontsize=8)
    if log:
        axis.set_yscale("log")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
    print(f"wrote {path.with_suffix('.csv')} and {path.with_suffix('.png')}")


def values_of(sweep):
    """What is tried of --sweep's first word."""
    name, *words = sweep
    if not words:
        fail(f"--sweep {name} needs values to try, such as --sweep k 2 4 8")
    if name == "env-id":
        return words
    try:
        values = [json.loads(word) for word in words]
    except json.JSONDecodeError:
        fail(f"--sweep {' '.join(sweep)}: values are JSON, as numbers or true")
    if name == "env-kwargs" and not all(isinstance(value, dict) for value in values):
        fail(f"--sweep {' '.join(sweep)}: values of env-kwargs are JSON objects, as '{{\"size\": 17}}'")
    return values


def sweep(script, args, saved, envs, options):
    """Mean return and success with each value of the argument (or each task), [2, values].

    saved: the model; envs: of the training
    """
    name = options.sweep[0]
    kwargs, space = args.env_kwargs, (envs.single_observation_space, envs.single_action_space)
    means = []
    for value in values_of(options.sweep):
        if name == "env-id":
            args.env_id = value
        else:
            args.env_kwargs = kwargs | (value if name == "env-kwargs" else {name: value})
        envs = make_envs(args, min(16, options.episodes), training=False)
        if (envs.single_observation_space, envs.single_action_space) != space:
            fail(f"--sweep {name} {value} has other observations or actions than the task of training")
        agent, _ = make_agent(script.Agent, args, envs, saved)      # numbered pictures may have other numbers
        means.append(play(agent, envs, options.episodes, args.seed).mean(axis=1))
        print(f"{args.memory}, {name} = {value}: mean return of {options.episodes} episodes "
              f"{means[-1][0]:.3f}, success {means[-1][2]:.2f}", flush=True)
    returns, _, successes = np.array(means).T
    return returns, successes


def draw_sweep(options, out):
    name, values, curves = options.sweep[0], values_of(options.sweep), collections.defaultdict(list)
    for path in options.model:
        script, args, saved, envs = load_model(path)
        # most tasks keep their arguments under the same names
        task = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped             # ours are one batch
        trained = args.env_kwargs.get(name, getattr(task, name, None))
        curves[args.memory].append(sweep(script, args, saved, envs, options))
    means = {memory: np.mean(found, axis=0) for memory, found in curves.items()}    # [2, values] each
    has_success = not np.isnan([successes for _, successes in means.values()]).any()
    if len(options.model) > 1:
        columns = {memory: mean[int(has_success)] for memory, mean in means.items()}
        measure = "success" if has_success else "return"
    else:
        (returns, successes), = means.values()
        columns = {"return": returns} | ({"success": successes} if has_success else {})
        measure = "mean"
    marks = [("training", trained)] if isinstance(trained, (int, float)) else []
    shown = [json.dumps(value) if isinstance(value, dict) else value for value in values]
    ylabel = f"{measure} of {options.episodes} episodes"
    draw(out / "sweep", columns, shown, name, ylabel, log=False, marks=marks)


def reach_of_training(args):
    """A name and a number of steps: where the gradient of training ended."""
    if getattr(args, "seq_len", -1) > 0:
        return "truncated BPTT", args.seq_len
    if not hasattr(args, "num_steps"):                      # off-policy
        return "whole episodes", math.inf
    if getattr(args, "full_episodes", False):
        return "prefix", args.max_prefix + args.num_steps
    return "rollout", args.num_steps


def check(options):
    """Refuses what cannot run."""
    for name, high in {"steps": 2**16, "targets": 2**12, "episodes": 2**20}.items():
        if not 1 <= getattr(options, name) <= high:
            fail(f"--{name} {getattr(options, name)} must be at least 1 and at most {high}")
    if len(options.model) != 1 and not (options.model and options.sweep):
        fail(f"--model takes one model ({len(options.model)} are given), or with --sweep several")


def load_model(path):
    """Its script, its flags, what is saved in it, and the task of its training."""
    script = script_of(path)
    args, saved = parse(script.Args, script.SCRIPT, ["--model", path, "--device", "cpu"])
    return script, args, saved, make_envs(args, 1, training=False)


def main(argv=None):
    options = command_line(Args, argv)
    check(options)
    torch.set_num_threads(1)
    script, args, saved, envs = load_model(options.model[0])
    agent, _ = make_agent(script.Agent, args, envs, saved)  # a wrong one shows before anything is written
    out = Path(options.model[0]).parent if options.out is None else Path(options.out)
    make_out(out)
    if options.sweep:
        return draw_sweep(options, out)
    xs, start, mask = record(agent, envs, args.seed, options.steps)
    of = functools.partial(OUTPUTS[script.SCRIPT], mask=mask)
    targets = np.linspace(options.steps // 4, options.steps - 1, options.targets).astype(int)
    curves = sensitivity(of, agent, xs, start, targets)
    K = int(curves[0].isfinite().sum())
    columns = {name: curve[:K].tolist() for name, curve in zip(outputs(of, agent, xs, start), curves)}
    name, at = reach_of_training(args)
    marks = [(name, at)] if at < K else []
    draw(out / "horizon", columns, range(K), "k (steps back)", "norm of the gradient", log=True, marks=marks)


if __name__ == "__main__":
    main()

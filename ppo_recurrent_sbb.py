"""Recurrent PPO with segment-based batching (SBB): truncated backpropagation through time, stored states, padding masked.

    python ppo_recurrent_sbb.py                                           trains PocMemory-v0 in seconds
    python ppo_recurrent_sbb.py --env-id CartPoleMasked-v0 --memory lstm --seq-len 8
    python ppo_recurrent_sbb.py --model runs/.../model.safetensors        watches the trained agent
    tensorboard --logdir runs                                             draws the curves

PPO: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347). The recurrent details follow Pleines et al. 2022,
"Memory Gym" and its baseline recurrent-ppo-truncated-bptt. The idea: act for T steps in N environments, cut the rollout
into segments of at most L steps of one episode, and run the memory over each segment from the state it had while acting.
The gradient flows through at most L steps.

Symbols: T rollout steps, N environments, L segment length, S segments, M real (unpadded) steps of a minibatch,
b segments of a minibatch, H hidden size, A actions. Sequences are time-major: [T, N, ...], [L, S, ...].
"""
import collections
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.batch import BatchEnv  # importing envs registers its tasks
from envs.wrappers import PreviousActionReward, ResetOptions
from models import MEMORIES, Encoder, PolicyHead, RunningMeanStd, init, keep_freed_memory, linear_scan, to_tensors

SCRIPT = Path(__file__).stem
TAGS = ("charts/episodic_return charts/episodic_length charts/success charts/SPS charts/learning_rate eval/episodic_return "
        "eval/return_std eval/success losses/policy_loss losses/value_loss losses/entropy losses/approx_kl losses/clipfrac "
        "losses/grad_norm losses/explained_variance debug/first_logratio debug/padding time/policy time/env time/batch "
        "time/update time/log").split()


@dataclass
class Args:
    env_id: str = "PocMemory-v0"  # any Gymnasium id; popgym-*, Memory Gym's and our own are registered
    env_kwargs: str = "{}"  # JSON, passed to the task's constructor
    reset_options: str = "{}"  # JSON, passed to every reset(options=...)
    seed: int = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: int = 1  # torch threads; more than one pays for images
    num_envs: int = 16  # N
    num_steps: int = 128  # T, steps per environment and rollout
    total_timesteps: int = 61_440  # environment steps

    memory: Literal[tuple(MEMORIES)] = "gru"  # the memory model
    hidden_size: int = 32  # H, of the memory
    num_layers: int = 1  # of the memory
    memory_kwargs: str = "{}"  # JSON, passed to the memory's layers, as '{"state_size": 32}' for the lru
    encoder_size: int = 0  # linear layer with ReLU between observation features and memory; 0: none
    mlp_size: int = 64  # hidden layer of policy and of value
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory
    seq_len: int = 8  # L, the length of truncated BPTT; -1: whole episodes (as far as the rollout holds them)
    burn_in: int = 0  # steps before a segment that refresh its stored state with today's weights (R2D2); at most seq-len
    reset_state: bool = True  # whether the memory forgets between episodes

    learning_rate: tuple[float, ...] = (3e-4,)  # schedule: initial [final [power [decay-steps]]]
    ent_coef: tuple[float, ...] = (1e-3, 1e-4)  # schedule of the entropy bonus
    clip_coef: tuple[float, ...] = (0.2,)  # schedule of PPO's clip range
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of generalized advantage estimation
    num_minibatches: int = 8  # minibatches of whole segments per epoch
    update_epochs: int = 4  # passes over the rollout
    norm_adv: bool = True  # normalise advantages in each minibatch, over its real steps
    clip_vloss: bool = True  # clip the value loss as PPO clips the policy's
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient clipping
    target_kl: float | None = None  # stop the epochs of an update once approx_kl is beyond this
    norm_obs: bool = False  # normalise vector observations by running statistics
    norm_reward: bool = False  # scale rewards by the running standard deviation of the discounted return

    eval_every: int = 0  # environment steps between evaluations with the deterministic policy; 0: none
    eval_episodes: int = 100  # episodes per evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints
    runs_dir: str = "runs"  # where run folders go
    run_name: str | None = None  # folder name; default <env-id>__<script>__<seed>__<time>
    track: bool = False  # also log to Weights & Biases, which `pip install wandb` brings
    wandb_project_name: str = "recurrent-rl-baselines"  # its project
    wandb_entity: str | None = None  # its team or user; default: yours
    capture_video: bool = False  # with every checkpoint a GIF of an episode without exploring, in the run's videos/
    resume: str | None = None  # continue the run in this folder
    model: str | None = None  # do not train: play this model.safetensors
    episodes: int = 10  # episodes to play with --model
    render_mode: Literal["auto", "human", "ansi", "rgb_array", "none"] = "auto"  # with --model; rgb_array writes a GIF


def make_envs(args, num_envs, play=False, render_mode=None):
    """Environments for training, which reset in the step that ends an episode, or to play in, which wait for reset()."""
    kwargs, options = json.loads(args.env_kwargs), json.loads(args.reset_options)
    # PITFALL: Gymnasium >= 1.0 resets on the *next* step by default, which puts a phantom transition (action ignored,
    #   reward 0) between episodes. Symptom: episodes one step too long. Test: test_envs.py::test_no_phantom_transition.
    # KNOWN BUG (recurrent-ppo worker.py): all workers inherit one random generator. Symptom: 16 workers begin with the same
    #   episode. Here: reset(seed) seeds every environment apart. Test: test_envs.py::test_environments_differ.
    autoreset = gym.vector.AutoresetMode.DISABLED if play else gym.vector.AutoresetMode.SAME_STEP
    try:
        spec = gym.make(args.env_id, **kwargs).spec
        wrappers = [functools.partial(ResetOptions, options=options)] if options else []
        if batched := spec.vector_entry_point and not (options or render_mode):
            envs = gym.make_vec(args.env_id, num_envs, **kwargs)             # written for the batch: many times faster
            if isinstance(envs, BatchEnv):
                envs.metadata["autoreset_mode"] = autoreset                  # others can but one
        if not batched or envs.metadata["autoreset_mode"] != autoreset:
            kwargs |= {"render_mode": render_mode} if render_mode else {}
            envs = gym.make_vec(args.env_id, num_envs, "sync", {"autoreset_mode": autoreset}, wrappers, **kwargs)
        if args.prev_action or args.prev_reward:
            envs = PreviousActionReward(envs, args.prev_action, args.prev_reward)
        envs.reset(seed=args.seed)
        envs.step(envs.action_space.sample())               # what is wrong with the flags shows here, before a run exists
    except Exception as e:                                  # whatever somebody's environment raises
        fail(f"--env-id {args.env_id} does not work with --env-kwargs {args.env_kwargs} and --reset-options "
             f"{args.reset_options}: {' '.join(str(e).split()) or type(e).__name__}")
    return envs


class Agent(nn.Module):
    """Encoder -> memory -> policy and value.   obs: flat tuple of leaves, each [T, B, ...]; start [T, B] bool."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.encoder = Encoder(observation_space, args.encoder_size, args.norm_obs)
        self.memory = MEMORIES[args.memory](self.encoder.out_size, args.hidden_size, args.num_layers,
                                            **json.loads(args.memory_kwargs))
        # DEVIATION (recurrent-ppo model.py): no shared layer between memory and the two hidden layers, policy gain 0.01 as
        #   CleanRL. The hidden layers are one matrix; its gain 2 is sqrt(2) for each half.
        #   Test: test_models.py::test_initial_policy_is_uniform.
        self.hidden = init(nn.Linear(args.hidden_size, 2 * args.mlp_size), 2)
        self.policy = PolicyHead(args.mlp_size, action_space)
        self.value = init(nn.Linear(args.mlp_size, 1), 1.0)
        self.return_stats = RunningMeanStd()                # scales rewards, with --norm-reward
        self.reset_state = args.reset_state

    def forward(self, obs, state, start, mask=None):
        """Returns a distribution and values, both [T, B], and the state after them.

        With mask [L, b], obs holds the M real steps only, [M, ...], and so do the outputs: padding exists between the two
        lines that make and drop it, in the memory, and nowhere else.
        """
        x = self.encoder(obs)                               # [T, B, F] or [M, F]
        if mask is not None:
            # KNOWN BUG (recurrent-ppo readme): reshape to (L, b) what is ordered (b, L). Symptom: no better than a random
            #   agent for any L > 1. Here: steps go where the mask says.
            #   Test: test_ppo_recurrent_sbb.py::test_classic_bug_reshape.
            x = x.new_zeros(*mask.shape, x.shape[-1]).index_put_((mask,), x)                # [L, b, F]
        y, state = self.memory(x, state, start)             # [T, B, H]
        y = y if mask is None else y[mask]                  # [M, H]
        for_policy, for_value = self.hidden(y).relu().chunk(2, dim=-1)                      # [T, B, mlp_size]
        return self.policy(for_policy), self.value(for_value).squeeze(-1), state

    def act(self, obs, state, start):
        """The most likely actions, as the environment takes them, and the state after them.   obs: leaves of [B, ...]"""
        dist, _, state = self(add_time(obs), state, (start & self.reset_state)[None])
        return self.policy.to_env(dist.mode()[0]), state


def gae(rewards, values, starts, final_values, next_value, next_start, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016). Memory changes nothing here.   [T, N]; next_* [N]

    final_values[t] is V(last observation) where a time limit cut the episode at t, and 0 elsewhere.
    """
    next_values, next_starts = torch.cat([values[1:], next_value[None]]), torch.cat([starts[1:], next_start[None]])
    # KNOWN BUG (CleanRL ppo_atari_lstm.py, recurrent-ppo's wrappers): a time limit treated as death. Symptom: values too
    #   low near the limit. Here: final_values. Test: test_ppo.py::test_gae_equals_its_definition.
    deltas = rewards + gamma * (next_values * ~next_starts + final_values) - values         # [T, N]
    # A_t = delta_t + gamma lam A_{t+1}, cut where an episode starts: a linear recurrence, backwards in time.
    return linear_scan((gamma * lam * ~next_starts).flip(0), deltas.flip(0), torch.zeros_like(next_value)).flip(0)


def cut_segments(starts, L):
    """Cut a rollout into S segments, each of at most L steps of one episode.   starts [T, N] bool

    A segment begins at t = 0, at every episode start, and L steps after the last cut. Returned as indices: x[when, col] is
    [L, S, ...] for any rollout tensor x [T, N, ...]; mask [L, S] is False on padding. L shrinks to the longest segment.
    """
    (T, N), device = starts.shape, starts.device
    t = torch.arange(T, device=device)[:, None]             # [T, 1]
    episode_start = torch.where(starts, t, 0).cummax(dim=0).values                          # [T, N]
    cut = (t - episode_start) % L == 0                      # [T, N]
    first = cut.T.flatten().nonzero().flatten()             # [S] where segments begin if columns are laid end to end
    length = first.diff(append=first.new_tensor([T * N]))   # [S]
    # KNOWN BUG (recurrent-ppo buffer.py:161): pads to the longest *episode*, not segment. Symptom: same loss, 25 times the
    #   work (L = 8, 200-step episodes). Here: rows <= L. Test: test_ppo_recurrent_sbb.py::test_segments_partition_the_rollout.
    offset = torch.arange(int(length.max()), device=device)[:, None]                        # [L, 1]
    return (first + offset).clamp(max=T * N - 1) % T, first // T, offset < length           # when [L, S], col [S], mask


def polynomial(schedule, step, total_steps):
    """v(t) = (v0 - v1) (1 - t/D)^power + v1, then v1.   schedule: (v0[, v1[, power[, D]]]), D in environment steps"""
    defaults = (schedule[0], schedule[0], 1.0, total_steps)
    v0, v1, power, decay_steps = schedule + defaults[len(schedule) :]
    return (v0 - v1) * max(0.0, 1 - step / decay_steps) ** power + v1


@torch.no_grad()
def play(agent, envs, args, episodes, seed, show=lambda: None):
    """Plays without exploring. Returns three arrays: return, length, success (nan: not defined) of each episode.

    Every environment plays its share: taking the first episodes to finish would prefer the short ones. An episode without
    end counts as it stands after 10,000 steps.
    """
    N, device = envs.num_envs, next(agent.parameters()).device
    share = np.array([len(x) for x in np.array_split(np.arange(episodes), N)])              # [N] episodes left to play
    obs, state, start = envs.reset(seed=seed)[0], agent.memory.initial_state(N), np.ones(N, bool)
    returns, lengths, results = np.zeros(N), np.zeros(N), []
    while share.any():
        show()
        obs = to_tensors(envs.single_observation_space, obs, device)
        action, state = agent.act(obs, state, torch.as_tensor(start, device=device))
        obs, reward, terminated, truncated, infos = envs.step(action)
        returns, lengths = returns + reward, lengths + 1
        start = terminated | truncated | (lengths == 10_000)
        if start.any():
            show()
            for n in np.flatnonzero(start & (share > 0)):
                results.append((returns[n], lengths[n], success_of(infos, n)))
            share, returns, lengths = np.maximum(share - start, 0), returns * ~start, lengths * ~start
            obs, _ = envs.reset(options={"reset_mask": start})
    return np.array(results).T                              # [3, episodes]


def success_of(infos, n):
    """Whether environment n's episode, which has just ended, was a success; nan where the task does not say."""
    infos = infos.get("final_info", infos)
    return float(infos["success"][n]) if infos.get("_success", {n: False})[n] else float("nan")


def add_time(obs):
    return tuple(o[None] for o in obs)                      # leaves of [B, ...] -> [1, B, ...]


def make_rendered(args, render_mode):
    """One environment to play in that draws itself, and how: render_mode, or what "auto" finds."""
    modes = make_envs(args, 1, play=True).metadata.get("render_modes", [])
    if render_mode == "auto":
        render_mode = "ansi" if "ansi" in modes else "none"
    if render_mode != "none" and render_mode not in modes and not (render_mode == "human" and "rgb_array" in modes):
        fail(f"--render-mode {render_mode}{'' if args.model else ', for --capture-video,'} is not one of {args.env_id}'s: "
             f"{', '.join(modes) or 'none'}")
    return make_envs(args, 1, play=True, render_mode=render_mode if render_mode != "none" else None), render_mode


def write_gif(path, frames, envs):
    duration = 1000 / envs.metadata.get("render_fps", 10)   # ms a frame
    save_atomically(path, lambda path: imageio.mimsave(path, frames, "GIF", duration=duration, loop=0))


def enjoy(args, weights):
    """Plays --episodes of the task, one after the other; prints text frames or writes a GIF beside the model."""
    envs, render_mode = make_rendered(args, args.render_mode)
    agent, frames = make_agent(args, envs, weights), []
    show = {"ansi": lambda: print(envs.render()[0]), "rgb_array": lambda: frames.append(envs.render()[0])}
    results = []
    for episode in range(args.episodes):
        results.append(play(agent, envs, args, 1, args.seed + episode, show.get(render_mode, lambda: None))[:, 0])
        episode_return, length, success = results[-1]
        print(f"episode {episode + 1}: return {episode_return:.2f}, length {length:.0f}"
              + ("" if np.isnan(success) else f", success {success:.2f}"))
    returns, lengths, successes = np.array(results).T
    print(f"mean of {args.episodes}: return {returns.mean():.2f} +- {returns.std():.2f}, length {lengths.mean():.1f}"
          + ("" if np.isnan(successes).any() else f", success {successes.mean():.2f}"))
    if frames:
        path = Path(args.model).with_suffix(".gif")
        write_gif(path, frames, envs)
        print(f"wrote {path}")


def fail(message):
    """Bad input: one sentence, exit code 2."""
    print(f"{SCRIPT}.py: {message}", file=sys.stderr)
    sys.exit(2)


def check(args):
    """Refuses what cannot run, before anything is made."""
    def flag(name):
        return f"--{name.replace('_', '-')} {getattr(args, name)}"

    ranges = dict.fromkeys(("num_threads num_envs num_steps total_timesteps hidden_size num_layers mlp_size num_minibatches "
                            "update_epochs eval_episodes checkpoint_every episodes").split(), (1, 2**40))
    ranges |= dict.fromkeys(("seed", "encoder_size", "burn_in", "eval_every"), (0, 2**40))
    ranges |= dict.fromkeys(("gamma", "gae_lambda"), (0, 1)) | dict.fromkeys(("vf_coef", "max_grad_norm"), (0, 1e9))
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            fail(f"{flag(name)} must be at least {low} and at most {high}")
    for name in ("learning_rate", "ent_coef", "clip_coef"):
        v0, v1, power, decay_steps = (*getattr(args, name), *(0.0, 0.0, 1.0, 1.0)[len(getattr(args, name)) :])[:4]
        if not (1 <= len(getattr(args, name)) <= 4 and 0 <= v0 < 1e9 and 0 <= v1 < 1e9 and 0 < power < 1e9 and decay_steps > 0):
            fail(f"{flag(name)} must be one to four numbers, initial, final, power and decay steps: the first two not "
                 "negative, the others positive")
    for name in ("env_kwargs", "reset_options", "memory_kwargs"):
        try:
            dict(**json.loads(getattr(args, name)))
        except (json.JSONDecodeError, TypeError):
            fail(f"""{flag(name)} is not a JSON object; write '{{"name": value}}'""")
    if args.seq_len < 1 and args.seq_len != -1:
        fail(f"--seq-len {args.seq_len} must be at least 1, or -1 for whole episodes")
    if args.burn_in > max(args.seq_len, 0):
        fail(f"--burn-in {args.burn_in} must not exceed --seq-len {args.seq_len} (whole episodes need none)")
    if args.total_timesteps < args.num_envs * args.num_steps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, --num-envs x --num-steps = "
             f"{args.num_envs * args.num_steps}")
    segments = args.num_envs * (1 if args.seq_len == -1 else -(-args.num_steps // args.seq_len))
    if args.num_minibatches > segments:
        fail(f"--num-minibatches {args.num_minibatches} do not fit: a rollout may hold no more than {segments} segments; "
             "raise --num-envs or --num-steps, or lower --seq-len")


def save_atomically(path, write):
    """Write beside, then rename: whenever the process dies, `path` is the old file or the new one, whole."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    os.replace(beside, path)


def read_model(path):
    """Weights and Args of a model file. safetensors holds numbers and text: a stranger's file cannot run code."""
    with safetensors.safe_open(path, "pt") as f:
        return {**f.metadata(), "agent": {name: f.get_tensor(name) for name in f.keys()}}


def read_checkpoint(run):
    return torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)


def load(flag, path, read):
    """What `read` finds at `path`, with "args" as Args; flags that this version does not know are left out."""
    try:
        content = read(path)
        script, saved = content["script"], json.loads(content["args"])
        known = {f.name for f in dataclasses.fields(Args)}
        content["args"] = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known})
    except FileNotFoundError:
        fail(f"{flag} {path} does not exist; training ends by printing what to play and what to resume")
    except Exception as e:                                  # damaged files raise all kinds
        fail(f"{flag} {path} cannot be read ({type(e).__name__}): it is damaged or another program's")
    if script != SCRIPT:
        fail(f"{flag} {path} was trained by {script}: use python {script}.py")
    return content


def make_agent(args, envs, weights=None):
    try:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(pick_device(args))
    except ValueError as e:
        fail(f"--env-id {args.env_id}: {e}")
    except (TypeError, RuntimeError) as e:
        fail(f"--memory {args.memory} does not work with --memory-kwargs {args.memory_kwargs}: {str(e).splitlines()[0]}")
    try:
        agent.load_state_dict(weights or agent.state_dict())
    except RuntimeError:
        fail("the saved network has other sizes than the flags and the task ask for; leave those flags out")
    return agent


def pick_device(args):
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).cpu().new_empty(0, device=name).device
    except Exception as e:
        fail(f"--device {args.device} cannot be used here: {str(e).splitlines()[0]}")


def open_progress(path, global_step):
    """progress.csv for appending: a new one, or the old one without the rows after the checkpoint."""
    old = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    kept = [row for row in old if int(row.split(",")[0]) <= global_step]
    save_atomically(path, lambda p: p.write_text(",".join(("global_step", "seconds", *TAGS)) + "\n" + "".join(kept)))
    return path.open("a", buffering=1)                      # one write a line


def track(args, run):
    """Weights & Biases copies what TensorBoard gets; a resumed run goes on as the same one."""
    try:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, id=run.name, dir=run.parent, save_code=True,
                   resume="allow" if args.resume else "never", config=dataclasses.asdict(args), sync_tensorboard=True)
    except Exception as e:                                  # not installed, not logged in, no network
        if not args.resume:
            run.rmdir()
        fail(f"--track: {' '.join(str(e).split())}; pip install wandb, wandb login or WANDB_MODE=offline may help")


def train(args, checkpoint=None):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    T, N, device = args.num_steps, args.num_envs, pick_device(args)
    envs = make_envs(args, N)
    eval_envs = make_envs(args, min(N, args.eval_episodes), play=True) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array")[0] if args.capture_video else None
    tensors = functools.partial(to_tensors, envs.single_observation_space, device=device)
    agent = make_agent(args, envs, checkpoint and checkpoint["agent"])
    parameters = list(agent.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate[0], fused=True)

    global_step, seconds, recent = 0, 0.0, collections.deque(maxlen=100)    # recent: return, length, success of episodes
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool, device=device)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    discounted = torch.zeros(N, device=device)              # running discounted return, for --norm-reward
    episode_return, episode_length = np.zeros(N), np.zeros(N)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        global_step, seconds = checkpoint["global_step"], checkpoint["seconds"]
        recent.extend(checkpoint["recent"])
        same = all(getattr(args, k) == getattr(checkpoint["args"], k) for k in ("env_id", "env_kwargs", "num_envs"))
        if checkpoint["envs"] and same:                     # our own tasks go on to the bit, as if never interrupted
            envs.unwrapped.load_state_dict(checkpoint["envs"])
            next_obs, state, (next_start, discounted) = (tuple(x.to(device) for x in xs) for xs in checkpoint["tensors"])
            episode_return, episode_length = (x.numpy() for x in checkpoint["episodes"])
        else:                                               # others cannot be saved: new episodes, not the first ones again
            next_obs = tensors(envs.reset(seed=args.seed + global_step)[0])

    obs = tuple(torch.zeros(T, *o.shape, dtype=o.dtype, device=device) for o in next_obs)   # leaves of [T, N, ...]
    actions = torch.zeros(T, N, *agent.policy.action_shape, dtype=agent.policy.action_dtype, device=device)
    logprobs, rewards, values, final_values = (torch.zeros(T, N, device=device) for _ in range(4))
    starts = torch.zeros(T, N, dtype=torch.bool, device=device)

    name = args.run_name or re.sub("[/:]", "-", f"{args.env_id}__{SCRIPT}__{args.seed}__{int(1000 * time.time())}")
    run = Path(args.resume or Path(args.runs_dir) / name)
    try:
        run.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as e:
        fail(f"--run-name {name} cannot be made in --runs-dir {args.runs_dir} ({e.strerror}); choose another or --resume {run}")
    if args.track:
        track(args, run)
    args_json = json.dumps({**dataclasses.asdict(args), "resume": None}, indent=2)
    save_atomically(run / "args.json", lambda path: path.write_text(args_json))
    progress = open_progress(run / "progress.csv", global_step)
    writer = SummaryWriter(run, purge_step=global_step + 1)
    writer.add_text("args", "```\n" + args_json + "\n```")

    def save():
        metadata = {"script": SCRIPT, "args": args_json, "global_step": str(global_step), "torch": torch.__version__,
                    "gymnasium": gym.__version__, "observation_space": str(envs.single_observation_space),
                    "action_space": str(envs.single_action_space)}
        env_state = envs.unwrapped.state_dict() if hasattr(envs.unwrapped, "state_dict") else {}
        everything = {
            "script": SCRIPT, "args": args_json, "global_step": global_step, "seconds": seconds, "recent": list(recent),
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "envs": {k: v if isinstance(v, str) else torch.as_tensor(v) for k, v in env_state.items()},
            "tensors": (next_obs, state, (next_start, discounted)),
            "episodes": (torch.as_tensor(episode_return), torch.as_tensor(episode_length))}
        save_atomically(run / "model.safetensors",
                        lambda path: safetensors.torch.save_file(agent.state_dict(), path, metadata))
        save_atomically(run / "checkpoint.pt", lambda path: torch.save(everything, path))
        if args.capture_video:
            frames = []
            play(agent, film_envs, args, 1, args.seed + 10_000, lambda: frames.append(film_envs.render()[0]))
            (run / "videos").mkdir(exist_ok=True)
            write_gif(run / "videos" / f"{global_step}.gif", frames, film_envs)

    save()                                                  # whenever the process dies, there is something to resume
    interrupted = []

    def on_ctrl_c(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, default_handler)
        tqdm.write("Ctrl-C: finishing this update, then saving; a second one leaves at once")

    default_handler = signal.signal(signal.SIGINT, on_ctrl_c)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    memory_starts = starts if args.reset_state else torch.zeros_like(starts)                # [T, N] when the memory forgets

    clock, spent = time.perf_counter(), collections.Counter()

    def lap(name):
        """Add the time since the last lap to spent[name]."""
        nonlocal clock
        spent[name] += (now := time.perf_counter()) - clock
        clock = now

    while global_step + T * N <= args.total_timesteps and not interrupted:
        learning_rate, ent_coef, clip_coef = (polynomial(schedule, global_step, args.total_timesteps) for schedule in
                                              (args.learning_rate, args.ent_coef, args.clip_coef))
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        states = []                                         # T tuples of [N, ...]: the memory *before* step t
        final_values.zero_()
        for t in range(T):
            for o, next_o in zip(obs, next_obs):
                o[t] = next_o
            starts[t] = next_start
            # KNOWN BUG (recurrent-ppo readme): saving the state after the step or the reset. Symptom: logratio != 0 before
            #   the first gradient step, learning a little worse. Here: saved before both; `start` repeats the reset in
            #   training. Test: test_ppo_recurrent_sbb.py::test_classic_bug_state_saved_too_late.
            states.append(state)
            with torch.inference_mode():                    # acting is a sequence of length 1
                dist, value, state = agent(add_time(next_obs), state, memory_starts[t : t + 1])
                action = dist.sample()                      # [1, N, ...]
                logprobs[t], actions[t], values[t] = dist.log_prob(action)[0], action[0], value[0]
            lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.policy.to_env(action[0]))
            lap("env")

            next_obs, rewards[t] = tensors(next_obs), torch.as_tensor(reward)
            time_limit = np.flatnonzero(truncated & ~terminated)
            if len(time_limit):                             # not a death: the episode's last observation has a value
                last_obs = tuple(torch.stack(o)[None] for o in zip(*map(tensors, infos["final_obs"][time_limit])))
                goes_on = torch.zeros(1, len(time_limit), dtype=torch.bool, device=device)
                with torch.no_grad():
                    _, value, _ = agent(last_obs, tuple(s[time_limit] for s in state), goes_on)
                final_values[t, time_limit] = value[0]
            done, episode_return, episode_length = terminated | truncated, episode_return + reward, episode_length + 1
            next_start = torch.as_tensor(done, device=device)
            for n in np.flatnonzero(done):
                recent.append((float(episode_return[n]), float(episode_length[n]), success_of(infos, n)))
                episode_return[n], episode_length[n] = 0, 0
        global_step += T * N

        # -------------------------------------------------------------- targets
        if args.norm_reward:
            discounted_returns = linear_scan(args.gamma * ~starts, rewards, discounted)    # [T, N], of the episode so far
            discounted = discounted_returns[-1]
            agent.return_stats.update(discounted_returns)
            rewards /= agent.return_stats.var.sqrt().float() + 1e-8
        with torch.no_grad():
            _, next_value, _ = agent(add_time(next_obs), state, (next_start & args.reset_state)[None])
            advantages = gae(rewards, values, starts, final_values, next_value[0], next_start, args.gamma, args.gae_lambda)
        b_obs = tuple(o.flatten(0, 1) for o in obs)         # leaves of [T N, ...]
        b_actions, b_logprobs, b_values, b_advantages, b_returns = (
            x.flatten(0, 1) for x in (actions, logprobs, values, advantages, advantages + values))          # [T N]

        # -------------------------------------------------------------- batch: the [T, N] rollout becomes [L, S]
        when, col, mask = cut_segments(starts, T if args.seq_len == -1 else args.seq_len)
        seg_index = when * N + col                          # [L, S] place of a step in b_*
        seg_start = memory_starts[when, col] & mask         # [L, S] True in row 0 at most: no cut inside a fused call
        states = tuple(torch.stack(s) for s in zip(*states))                                # tuple of [T, N, ...]
        # PITFALL: starting segments from initial_state() trains a policy that never acted. Symptom: logratio != 0 before
        #   the first gradient step; the curve may look fine. Test: test_ppo_recurrent_sbb.py::test_first_logratio_is_zero.
        seg_state = tuple(s[when[0], col] for s in states)  # tuple of [S, ...]
        # R2D2 (Kapturowski et al. 2019): stored states grow stale while the weights change. With --burn-in, a segment that
        # continues an episode of this rollout gets its state from the steps before it, run with today's weights.
        continues = (when[0] > 0) & ~starts[when[0], col]   # [S]
        burn = (when[0] + torch.arange(-args.burn_in, 0, device=device)[:, None]).clamp(min=0)              # [burn_in, S]
        lap("batch")

        # -------------------------------------------------------------- update: minibatches of whole segments
        stats, first_logratio = [], None
        for epoch in range(args.update_epochs):
            for mb in torch.randperm(len(col), device=device).tensor_split(args.num_minibatches):           # [b] segments
                m = mask[:, mb]                             # [L, b]
                index = seg_index[:, mb][m]                 # [M] the real steps
                mb_state = tuple(s[mb] for s in seg_state)  # tuple of [b, ...]
                c = continues[mb]                           # [b]
                if args.burn_in and c.any():
                    at = burn[:, mb[c]], col[mb[c]]         # [burn_in, c], [c]
                    first = at[0][0], at[1]
                    with torch.no_grad():
                        _, _, fresh = agent(tuple(o[at] for o in obs), tuple(s[first] for s in states), memory_starts[at])
                    for s, f in zip(mb_state, fresh):
                        s[c] = f
                dist, newvalue, _ = agent(tuple(o[index] for o in b_obs), mb_state, seg_start[:, mb], m)
                # Padding is behind us: from here on this is the loss of a memoryless PPO on M steps.
                logratio = dist.log_prob(b_actions[index]) - b_logprobs[index]
                ratio = logratio.exp()
                if first_logratio is None:                  # no gradient step yet: the policy is still the one that acted
                    first_logratio = logratio.abs().max().item()

                mb_advantages = b_advantages[index]
                if args.norm_adv:
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std(correction=0) + 1e-8)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
                v_loss = (newvalue - b_returns[index]) ** 2
                if args.clip_vloss:
                    v_clipped = b_values[index] + (newvalue - b_values[index]).clamp(-clip_coef, clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - b_returns[index]) ** 2)
                v_loss, entropy = 0.5 * v_loss.mean(), dist.entropy().mean()
                loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    approx_kl, clipfrac = ((ratio - 1) - logratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()
                    stats.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm]))
            if args.target_kl is not None and approx_kl > args.target_kl:
                break
        if args.norm_obs:                                   # only now: this update had to see what the acting policy saw
            agent.encoder.update_stats(b_obs)
        lap("update")

        # -------------------------------------------------------------- log, checkpoint
        stats = torch.stack(stats).mean(0).tolist()
        if not np.isfinite(stats).all():
            bar.close()
            sys.exit(f"the loss is not finite at step {global_step}; the last checkpoint is {run}/checkpoint.pt: try --resume "
                     f"{run} with a smaller --learning-rate or --max-grad-norm")
        if first_logratio > 1e-3:
            tqdm.write(f"warning: log-probabilities differ by {first_logratio:.1e} before the update's first gradient step: "
                       "the policy in training is not the one that acted")
        seconds += spent.total()
        row = dict(zip(("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
                        "losses/grad_norm"), stats))
        row |= {f"time/{name}": value for name, value in spent.items()}
        row |= {"charts/SPS": T * N / spent.total(), "charts/learning_rate": learning_rate,
                "debug/first_logratio": first_logratio, "debug/padding": mask.numel() / (T * N),
                "losses/explained_variance": 1 - (advantages.var() / (advantages + values).var()).item()}
        if recent:
            row |= zip(("charts/episodic_return", "charts/episodic_length", "charts/success"), np.mean(recent, axis=0))
        spent.clear()
        due = lambda every: every and global_step // every > (global_step - T * N) // every  # noqa: E731
        if due(args.eval_every):
            returns, _, successes = play(agent, eval_envs, args, args.eval_episodes, args.seed + 10_000)
            row |= {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std(), "eval/success": successes.mean()}
        row = {tag: value for tag, value in row.items() if np.isfinite(value)}
        cells = (f"{row[tag]:.6g}" if tag in row else "" for tag in TAGS)
        progress.write(",".join((str(global_step), f"{seconds:.3f}", *cells)) + "\n")
        for tag, value in row.items():
            writer.add_scalar(tag, value, global_step)
        bar.set_postfix({name: f"{row[tag]:.{digits}f}" for name, tag, digits in
                         (("SPS", "charts/SPS", 0), ("return", "charts/episodic_return", 2), ("success", "charts/success", 2))
                         if tag in row})
        bar.update(T * N)
        if due(args.checkpoint_every):
            save()
        lap("log")

    save()
    signal.signal(signal.SIGINT, default_handler)
    bar.close()
    writer.close()
    progress.close()
    print(f"{'interrupted' if interrupted else 'done'} at step {global_step}; everything is in {run}")
    if interrupted:
        print(f"continue:  python {SCRIPT}.py --resume {run}")
    print(f"watch it:  python {SCRIPT}.py --model {run / 'model.safetensors'}")
    return run


def main(argv=None):
    args, content = tyro.cli(Args, args=argv), None
    if args.model:
        content = load("--model", args.model, read_model)
    elif args.resume:
        content = load("--resume", args.resume, read_checkpoint)
    if content:                                             # flags given now override the saved ones
        args = tyro.cli(Args, args=argv, default=content["args"])
    check(args)
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    if args.model:
        enjoy(args, content["agent"])
    else:
        train(args, content)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

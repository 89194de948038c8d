"""Recurrent PPO with tape-based batching (TBB): resets inside the memory, nothing cut, nothing padded, plain losses.

    python ppo_recurrent_tbb.py                                           trains popgym-RepeatPreviousEasy-v0 in seconds
    python ppo_recurrent_tbb.py --env-id popgym-RepeatFirstEasy-v0 --memory mingru
    python ppo_recurrent_tbb.py --model runs/.../model.safetensors        watches the trained agent
    tensorboard --logdir runs                                             draws the curves
    torchrun --standalone --nproc_per_node=2 ppo_recurrent_tbb.py         the same run, divided between two devices

PPO: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347). Tape-based batching: Morad et al. 2024, "Revisiting recurrent
reinforcement learning with memory monoids" (https://arxiv.org/abs/2402.09900). The idea: act for T steps in N environments;
every environment's rollout is a column of tape, its episodes laid end to end, and the memory forgets by itself where an
episode starts. One call runs the memory over whole columns, and the loss is that of a memoryless PPO. The gradient flows
through everything an episode has on the tape. ppo_recurrent_sbb.py cuts instead: diff the two.

Symbols: T rollout steps, N environments, P earlier steps of unfinished episodes (--full-episodes), b columns of a minibatch,
H hidden size, A actions. Sequences are time-major: [T, N, ...].
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
        "losses/grad_norm losses/explained_variance debug/first_logratio time/policy time/env time/batch "
        "time/update time/log").split()
# torchrun starts this script several times. Each process steps its share of the environments, and gradients are averaged: that
# is exact, as losses are means over equally many steps. In ppo_recurrent_sbb.py every process has another number of real ones.
RANK, LOCAL_RANK, WORLD_SIZE = int(os.getenv("RANK", 0)), int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("WORLD_SIZE", 1))


@dataclass
class Args:
    env_id: str = "popgym-RepeatPreviousEasy-v0"  # any Gymnasium id; popgym-*, Memory Gym's and our own are registered
    env_kwargs: str = "{}"  # JSON, passed to the task's constructor
    reset_options: str = "{}"  # JSON, passed to every reset(options=...)
    seed: int = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: int = 1  # torch threads; more than one pays for images
    num_envs: int = 64  # N, in all: torchrun's processes divide them
    num_steps: int = 64  # T, steps per environment and rollout
    total_timesteps: int = 400_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "lru"  # the memory model
    hidden_size: int = 64  # H, of the memory
    num_layers: int = 1  # of the memory
    memory_kwargs: str = "{}"  # JSON, passed to the memory's layers, as '{"state_size": 32}' for the lru
    encoder_size: int = 0  # linear layer with ReLU between observation features and memory; 0: none
    mlp_size: int = 64  # hidden layer of policy and of value
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory
    full_episodes: bool = False  # the tape also holds unfinished episodes' earlier steps: no stale state, no truncation
    max_prefix: int = 1024  # with --full-episodes: at most this many earlier steps
    reset_state: bool = True  # whether the memory forgets between episodes

    learning_rate: tuple[float, ...] = (2e-3, 0.0)  # schedule: initial [final [power [decay-steps]]]
    ent_coef: tuple[float, ...] = (1e-2, 0.0)  # schedule of the entropy bonus
    clip_coef: tuple[float, ...] = (0.2,)  # schedule of PPO's clip range
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of generalized advantage estimation
    num_minibatches: int = 4  # minibatches of whole columns per epoch
    update_epochs: int = 3  # passes over the rollout
    norm_adv: bool = True  # normalise advantages in each minibatch, over its steps
    clip_vloss: bool = True  # clip the value loss as PPO clips the policy's
    vf_coef: float = 0.5  # weight of the value loss
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

    def forward(self, obs, state, start, prefix=0):
        """Returns a distribution and values of the steps after the first `prefix`, both [T, B], and the state after them."""
        y, state = self.memory(self.encoder(obs), state, start)                             # [P + T, B, H]
        for_policy, for_value = self.hidden(y[prefix:]).relu().chunk(2, dim=-1)             # [T, B, mlp_size]
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
    ranges |= dict.fromkeys(("seed", "encoder_size", "max_prefix", "eval_every"), (0, 2**40))
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
    if args.total_timesteps < args.num_envs * args.num_steps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, --num-envs x --num-steps = "
             f"{args.num_envs * args.num_steps}")
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} cannot be divided among {WORLD_SIZE} processes; choose a multiple of {WORLD_SIZE}")
    if args.num_minibatches > args.num_envs // WORLD_SIZE:
        fail(f"--num-minibatches {args.num_minibatches} do not fit: minibatches are made of whole columns, and a process has "
             f"{args.num_envs // WORLD_SIZE} of --num-envs {args.num_envs}; lower the one or raise the other")
    if args.device in ("auto", "cuda") and 1 <= torch.cuda.device_count() <= LOCAL_RANK:
        fail(f"--device {args.device}: there are fewer GPUs than processes; lower --nproc_per_node or use --device cpu")


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


def gather(x):                                              # [T, N, ...] -> [T, WORLD_SIZE * N, ...]
    """The columns of all processes side by side, as one process would have them. Waits until all of them have called it."""
    if WORLD_SIZE == 1:
        return x
    columns = list(x.new_empty(WORLD_SIZE, *x.shape))
    torch.distributed.all_gather(columns, x.contiguous())
    return torch.cat(columns, dim=1)


def train(args, checkpoint=None):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    if LOCAL_RANK > 0 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)                   # "cuda" now means this one
    T, N, device = args.num_steps, args.num_envs // WORLD_SIZE, pick_device(args)
    batch_size, env_seed = T * args.num_envs, args.seed + RANK * N      # steps of all processes; apart for each
    envs = make_envs(args, N)
    eval_envs = make_envs(args, min(args.num_envs, args.eval_episodes), play=True) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array")[0] if args.capture_video else None
    tensors = functools.partial(to_tensors, envs.single_observation_space, device=device)
    agent = make_agent(args, envs, checkpoint and checkpoint["agent"])
    parameters = list(agent.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate[0], fused=True)

    global_step, seconds, recent = 0, 0.0, collections.deque(maxlen=100)    # recent: return, length, success of episodes
    next_obs = tensors(envs.reset(seed=env_seed)[0])        # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool, device=device)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    discounted = torch.zeros(N, device=device)              # running discounted return, for --norm-reward
    episode_return, episode_length = np.zeros(N), np.zeros(N)
    K, prefix = len(next_obs), tuple(x.new_zeros(0, *x.shape) for x in (*next_obs, next_start))             # [P, N, ...] each
    tape_state = state                                      # the memory before the tape's first step, the only one kept
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        global_step, seconds = checkpoint["global_step"], checkpoint["seconds"]
        recent.extend(checkpoint["recent"])
        same = all(getattr(args, k) == getattr(checkpoint["args"], k) for k in ("env_id", "env_kwargs", "num_envs"))
        if checkpoint["envs"] and same and WORLD_SIZE == 1:  # our own tasks go on to the bit, as if never interrupted
            envs.unwrapped.load_state_dict(checkpoint["envs"])
            tensors_of = (tuple(x.to(device) for x in xs) for xs in checkpoint["tensors"])
            next_obs, state, (next_start, discounted), prefix, tape_state = tensors_of
            episode_return, episode_length = (x.numpy() for x in checkpoint["episodes"])
        else:                                               # others cannot be saved: new episodes, not the first ones again
            next_obs = tensors(envs.reset(seed=env_seed + global_step)[0])
    if RANK > 0:                                            # the same weights as rank 0, other actions
        torch.manual_seed(args.seed + RANK + global_step)

    obs = tuple(torch.zeros(T, *o.shape, dtype=o.dtype, device=device) for o in next_obs)   # leaves of [T, N, ...]
    actions = torch.zeros(T, N, *agent.policy.action_shape, dtype=agent.policy.action_dtype, device=device)
    logprobs, rewards, values, final_values = (torch.zeros(T, N, device=device) for _ in range(4))
    starts = torch.zeros(T, N, dtype=torch.bool, device=device)

    name = args.run_name or re.sub("[/:]", "-", f"{args.env_id}__{SCRIPT}__{args.seed}__{int(1000 * time.time())}")
    run = Path(args.resume or Path(args.runs_dir) / name)
    args_json = json.dumps({**dataclasses.asdict(args), "resume": None}, indent=2)
    if RANK == 0:                                           # the only one that writes
        try:
            run.mkdir(parents=True, exist_ok=bool(args.resume))
        except OSError as e:
            fail(f"--run-name {name} cannot be made in --runs-dir {args.runs_dir} ({e.strerror}); choose another or "
                 f"--resume {run}")
        if args.track:
            track(args, run)
        save_atomically(run / "args.json", lambda path: path.write_text(args_json))
        progress = open_progress(run / "progress.csv", global_step)
        writer = SummaryWriter(run, purge_step=global_step + 1)
        writer.add_text("args", "```\n" + args_json + "\n```")

    def save():
        metadata = {"script": SCRIPT, "args": args_json, "global_step": str(global_step), "torch": torch.__version__,
                    "gymnasium": gym.__version__, "observation_space": str(envs.single_observation_space),
                    "action_space": str(envs.single_action_space)}
        # Rank 0 knows only its own environments: a run of several processes is resumed with new episodes.
        env_state = envs.unwrapped.state_dict() if hasattr(envs.unwrapped, "state_dict") and WORLD_SIZE == 1 else {}
        everything = {
            "script": SCRIPT, "args": args_json, "global_step": global_step, "seconds": seconds, "recent": list(recent),
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "envs": {k: v if isinstance(v, str) else torch.as_tensor(v) for k, v in env_state.items()},
            "tensors": (next_obs, state, (next_start, discounted), prefix, tape_state),
            "episodes": (torch.as_tensor(episode_return), torch.as_tensor(episode_length))}
        save_atomically(run / "model.safetensors",
                        lambda path: safetensors.torch.save_file(agent.state_dict(), path, metadata))
        save_atomically(run / "checkpoint.pt", lambda path: torch.save(everything, path))
        if args.capture_video:
            frames = []
            play(agent, film_envs, args, 1, args.seed + 10_000, lambda: frames.append(film_envs.render()[0]))
            (run / "videos").mkdir(exist_ok=True)
            write_gif(run / "videos" / f"{global_step}.gif", frames, film_envs)

    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if RANK == 0:
        save()                                              # whenever the process dies, there is something to resume
    interrupted = []

    def on_ctrl_c(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, default_handler)
        tqdm.write("Ctrl-C: finishing this update, then saving; a second one leaves at once")

    default_handler = signal.signal(signal.SIGINT, on_ctrl_c if RANK == 0 else signal.SIG_IGN)
    if WORLD_SIZE > 1:                                      # torchrun passes on the Ctrl-C that the terminal has already sent
        default_handler = signal.SIG_IGN                    # to all, and at a second one ends its processes itself
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, disable=RANK > 0)
    memory_starts = starts if args.reset_state else torch.zeros_like(starts)                # [T, N] when the memory forgets

    clock, spent = time.perf_counter(), collections.Counter()

    def lap(name):
        """Add the time since the last lap to spent[name]."""
        nonlocal clock
        spent[name] += (now := time.perf_counter()) - clock
        clock = now

    while global_step + batch_size <= args.total_timesteps and not gather(torch.tensor([[len(interrupted)]])).any():
        learning_rate, ent_coef, clip_coef = (polynomial(schedule, global_step, args.total_timesteps) for schedule in
                                              (args.learning_rate, args.ent_coef, args.clip_coef))
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        P = len(prefix[0])
        if P:                                               # act on with what today's weights make of the episode so far
            with torch.no_grad():
                _, _, state = agent(prefix[:K], tape_state, prefix[K])
            state = tuple(s.clone() for s in state)         # not views of the whole prefix: checkpoints would hold all of it
        final_values.zero_()
        ended = np.zeros((T, N, 3))                         # return, length, success of episodes; 0 where none ends
        for t in range(T):
            for o, next_o in zip(obs, next_obs):
                o[t] = next_o
            starts[t] = next_start
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
                ended[t, n] = episode_return[n], episode_length[n], success_of(infos, n)
                episode_return[n], episode_length[n] = 0, 0
        every = gather(torch.from_numpy(ended))
        recent.extend(every[every[..., 1] > 0].tolist())
        global_step += batch_size

        # -------------------------------------------------------------- targets
        if args.norm_reward:
            discounted_returns = linear_scan(args.gamma * ~starts, rewards, discounted)    # [T, N], of the episode so far
            discounted = discounted_returns[-1]
            agent.return_stats.update(gather(discounted_returns))
            rewards /= agent.return_stats.var.sqrt().float() + 1e-8
        with torch.no_grad():
            _, next_value, _ = agent(add_time(next_obs), state, (next_start & args.reset_state)[None])
            advantages = gae(rewards, values, starts, final_values, next_value[0], next_start, args.gamma, args.gae_lambda)
        returns = advantages + values                       # [T, N]

        # -------------------------------------------------------------- batch: columns of tape, as they are
        # With --full-episodes the tape begins P steps earlier. What is not of an unfinished episode there needs no mask: the
        # next start makes the memory forget it.
        tape = tuple(torch.cat(pair) for pair in zip(prefix, (*obs, memory_starts)))        # [P + T, N, ...] each
        tape_obs, tape_starts = tape[:K], tape[K]
        # PITFALL: starting columns from initial_state() or the newest state, not tape_state, trains a policy that never acted.
        #   Symptom: logratio != 0 before the first gradient step; the curve may look fine.
        #   Test: test_ppo_recurrent_tbb.py::test_pitfall_columns_from_another_state.
        lap("batch")

        # -------------------------------------------------------------- update: minibatches of whole columns
        stats, first_logratio = [], None
        for epoch in range(args.update_epochs):
            for mb in torch.randperm(N, device=device).tensor_split(args.num_minibatches):  # [b] columns
                mb_obs, mb_state = tuple(o[:, mb] for o in tape_obs), tuple(s[mb] for s in tape_state)
                dist, newvalue, _ = agent(mb_obs, mb_state, tape_starts[:, mb], P)          # [T, b]
                # The memory did the rest: from here on this is the loss of a memoryless PPO on T b steps.
                logratio = dist.log_prob(actions[:, mb]) - logprobs[:, mb]
                ratio = logratio.exp()
                if first_logratio is None:                  # no gradient step yet: the policy is still the one that acted
                    first_logratio = logratio.abs().max().item()

                mb_advantages = advantages[:, mb]
                if args.norm_adv:
                    every = gather(mb_advantages)
                    mb_advantages = (mb_advantages - every.mean()) / (every.std(correction=0) + 1e-8)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean()
                v_loss = (newvalue - returns[:, mb]) ** 2
                if args.clip_vloss:
                    v_clipped = values[:, mb] + (newvalue - values[:, mb]).clamp(-clip_coef, clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - returns[:, mb]) ** 2)
                v_loss, entropy = 0.5 * v_loss.mean(), dist.entropy().mean()
                loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                if WORLD_SIZE > 1:                          # the mean of all processes' gradients, as one flat vector
                    grads = [p.grad for p in parameters]
                    flat = nn.utils.parameters_to_vector(grads)
                    torch.distributed.all_reduce(flat)
                    nn.utils.vector_to_parameters(flat / WORLD_SIZE, grads)
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    approx_kl, clipfrac = ((ratio - 1) - logratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()
                    stats.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm]))
            if args.target_kl is not None and gather(approx_kl.view(1, 1)).mean() > args.target_kl:
                break
        if args.norm_obs:                                   # only now: this update had to see what the acting policy saw
            agent.encoder.update_stats(tuple(gather(o).flatten(0, 1) for o in obs))
        oldest = 0
        if args.full_episodes:                              # the next tape begins with the steps of the episodes that go on
            row = torch.arange(P + T, device=device)[:, None]
            age = P + T - torch.where(tape_starts, row, 0).amax(0)                          # [N] steps since the last start
            oldest = int(torch.where(next_start & args.reset_state, 0, age).max())
        P = min(args.max_prefix, oldest)
        cut = len(tape_starts) - P                          # where the next tape begins in this one
        if P == 0:
            tape_state = state
        elif P < oldest:                                    # --max-prefix cuts an episode: today's weights, no stale state
            with torch.no_grad():
                _, _, tape_state = agent(tuple(o[:cut] for o in tape_obs), tape_state, tape_starts[:cut])
            tape_state = tuple(s.clone() for s in tape_state)
        prefix = tuple(x[cut:].clone() for x in tape)
        lap("update")

        # -------------------------------------------------------------- log, checkpoint
        stats = gather(torch.stack(stats).mean(0)[:, None]).mean(1).tolist()                # the mean over all processes
        first_logratio = gather(torch.tensor([[first_logratio]])).max().item()
        explained_variance = 1 - (gather(advantages).var() / gather(advantages + values).var()).item()
        if not np.isfinite(stats).all():                    # on all ranks alike
            bar.close()
            sys.exit(1 if RANK > 0 else f"the loss is not finite at step {global_step}; the last checkpoint is "
                     f"{run}/checkpoint.pt: try --resume {run} with a smaller --learning-rate or --max-grad-norm")
        if RANK > 0:
            continue
        if first_logratio > 1e-3:
            tqdm.write(f"warning: log-probabilities differ by {first_logratio:.1e} before the update's first gradient step: "
                       "the policy in training is not the one that acted")
        seconds += spent.total()
        row = dict(zip(("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
                        "losses/grad_norm"), stats))
        row |= {f"time/{name}": value for name, value in spent.items()}
        row |= {"charts/SPS": batch_size / spent.total(), "charts/learning_rate": learning_rate,
                "debug/first_logratio": first_logratio,
                "losses/explained_variance": explained_variance}
        if recent:
            row |= zip(("charts/episodic_return", "charts/episodic_length", "charts/success"), np.mean(recent, axis=0))
        spent.clear()
        due = lambda every: every and global_step // every > (global_step - batch_size) // every  # noqa: E731
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
        bar.update(batch_size)
        if due(args.checkpoint_every):
            save()
        lap("log")

    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return None
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

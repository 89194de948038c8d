"""Recurrent double DQN with segment-based batching (SBB): episodes cut in segments, padded, masked.

    python dqn_recurrent_sbb.py                                           trains popgym-RepeatPreviousEasy-v0
    python dqn_recurrent_sbb.py --seq-len -1                              on whole episodes
    python dqn_recurrent_sbb.py --burn-in 10                              from stored states (R2D2)
    python dqn_recurrent_sbb.py --model runs/.../model.safetensors        watches the trained agent
    tensorboard --logdir runs                                             draws the curves

Double DQN: van Hasselt et al. 2016 (https://arxiv.org/abs/1509.06461). Recurrent replay: Hausknecht and Stone 2015
(https://arxiv.org/abs/1507.06527); stored states and burn-in: R2D2, Kapturowski et al. 2019. Episodes are cut in segments of at
most L steps; an update takes segments, padded to one length, and starts each from zeros, whatever the episode held before, or
from the state that acting left there. dqn_recurrent_tbb.py does not cut: diff the two.

Symbols: N environments, T steps they make between two visits to the replay, C positions of an environment's ring, S segments
of an update, L steps of the longest, W burn-in steps, H hidden size, K branches of an action (1 if Discrete). Sequences are
time-major: [L + 1, S, ...].
"""
import collections
import copy
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
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.batch import BatchEnv  # importing envs registers its tasks
from envs.wrappers import PreviousActionReward, ResetOptions
from models import MEMORIES, Encoder, QHead, init, keep_freed_memory, to_tensors

SCRIPT = Path(__file__).stem
TAGS = ("charts/episodic_return charts/episodic_length charts/success charts/SPS charts/learning_rate charts/epsilon "
        "charts/gradient_steps charts/transitions eval/episodic_return eval/return_std eval/success losses/td_loss "
        "losses/q_values losses/grad_norm time/policy time/env time/batch time/update time/log").split()


@dataclass
class Args:
    env_id: str = "popgym-RepeatPreviousEasy-v0"  # any Gymnasium id; popgym-*, Memory Gym's and our own are registered
    env_kwargs: str = "{}"  # JSON, passed to the task's constructor
    reset_options: str = "{}"  # JSON, passed to every reset(options=...)
    seed: int = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: int = 1  # torch threads; more than one pays for images
    num_envs: int = 16  # N
    total_timesteps: int = 50_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "lru"  # the memory model
    hidden_size: int = 64  # H, of the memory
    num_layers: int = 1  # of the memory
    memory_kwargs: str = "{}"  # JSON, passed to the memory's layers, as '{"state_size": 32}' for the lru
    encoder_size: int = 0  # linear layer with ReLU between observation features and memory; 0: none
    mlp_size: int = 64  # hidden layer of the action values
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory

    buffer_size: int = 200_000  # positions in the replay; an episode of n steps takes n + 1
    learning_starts: int = 5_000  # environment steps with random actions, before any learning
    train_every: int = 64  # environment steps between two visits to the replay
    replay_ratio: float = 0.015  # gradient steps per environment step
    batch_size: int = 1_000  # steps of an update: segments are drawn until there are as many
    seq_len: int = 20  # L, steps of a segment at most; -1: whole episodes
    burn_in: int | None = None  # start from stored states, so many steps before the segment; none: zeros, at its first step
    omit_first_obs: bool = False  # keep a known bug of memory-monoids, to see what it costs: targets do not know o_0
    start_e: float = 1.0  # epsilon, the probability of a random action, at first
    end_e: float = 0.05  # and at last
    exploration_fraction: float = 0.3  # of total_timesteps, in which epsilon falls

    learning_rate: tuple[float, ...] = (1e-3,)  # schedule: initial [final [power [decay-steps]]]
    gamma: float = 0.99  # discount
    n_step: int = 1  # rewards summed before the bootstrap
    loss: Literal["huber", "mse"] = "huber"  # of the temporal-difference error
    tau: float = 0.01  # share of the online network that goes into the target network; 1: periodic copies
    target_network_frequency: int = 1  # gradient steps between two updates of the target network
    max_grad_norm: float = 1.0  # gradient clipping

    log_every: int = 1_000  # environment steps between rows of progress.csv
    eval_every: int = 0  # environment steps between evaluations with the greedy policy; 0: none
    eval_episodes: int = 100  # episodes per evaluation
    checkpoint_every: int = 100_000  # environment steps between checkpoints, which hold the replay
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
    """Encoder -> memory -> action values.   obs: flat tuple of leaves, each [T, B, ...]; start [T, B] bool."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.encoder = Encoder(observation_space, args.encoder_size)
        self.memory = MEMORIES[args.memory](self.encoder.out_size, args.hidden_size, args.num_layers,
                                            **json.loads(args.memory_kwargs))
        self.hidden = init(nn.Linear(args.hidden_size, args.mlp_size), 2**0.5)
        self.q = QHead(args.mlp_size, action_space)

    def forward(self, obs, state, start):
        """Returns the ActionValues of all steps, [T, B], and the state after them."""
        y, state = self.memory(self.encoder(obs), state, start)                             # [T, B, H]
        return self.q(self.hidden(y).relu()), state

    def act(self, obs, state, start):
        """The greedy actions, as the environment takes them, and the state after them.   obs: leaves of [B, ...]"""
        q, state = self(add_time(obs), state, start[None])
        return self.q.to_env(q.greedy()[0]), state


class Replay:
    """The newest steps of N environments, a ring of C positions each, and an index of the segments that lie there whole.

    An episode of n steps takes n + 1 positions, o_0 ... o_n. What belongs to step t lies beside o_t; beside o_n lies nothing.
    The episode that still runs is not in the index; a segment whose first position is overwritten leaves it.
    """

    def __init__(self, size, step, seq_len, burn_in):
        """step: arrays of [N, ...], an example: leaves of observations, start, action, reward, terminated, leaves of states."""
        self.N, self.C, self.L, self.W = len(step[0]), size // len(step[0]), seq_len, burn_in
        self.nbytes = self.N * self.C * sum(x[0].nbytes for x in step)
        if self.nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError
        # zeros() of the system: pages take memory when they are first written
        self.data = tuple(np.zeros((self.N, self.C, *x.shape[1:]), x.dtype) for x in step)
        self.head = np.zeros(self.N, np.int64)              # [N] positions written so far; the next one is head % C
        self.first = np.zeros(self.N, np.int64)             # [N] where the running episode began
        self.index = collections.deque()                    # (environment, where burn-in begins, first, last), oldest first

    def add(self, step, ended, last_obs):
        """One step of every environment.   step: as in __init__; ended [E]: whose episodes ended; last_obs: their o_n"""
        for x, value in zip(self.data, step):
            x[np.arange(self.N), self.head % self.C] = value
        self.head += 1
        for n, obs in zip(ended.tolist(), last_obs):
            for x, value in zip(self.data, (*obs, False)):  # the last observation, which starts nothing
                x[n, self.head[n] % self.C] = value
            begin, end = int(self.first[n]), int(self.head[n])
            for first in range(begin, end, end - begin if self.L == -1 else self.L):
                self.index.append((n, max(begin, first - self.W), first, end if self.L == -1 else min(first + self.L, end)))
            self.head[n] += 1
            self.first[n] = self.head[n]
        while self.index and not self.whole(*self.index[0]):
            self.index.popleft()

    def whole(self, n, begin, first, last):
        return begin >= self.head[n] - self.C

    def sample(self, batch_size):
        """Segments drawn uniformly, with replacement, until there are batch_size steps, side by side.

        Returns tensors [W + L + 1, S, ...]: which steps are real, then the data. The first W rows burn in.
        Rows before an episode repeat its first position, which starts it anew; padding repeats a segment's last.
        """
        segments, steps = [], 0
        while steps < batch_size:
            n, begin, first, last = segment = self.index[torch.randint(len(self.index), ()).item()]
            if self.whole(*segment):
                segments.append(segment)
                # KNOWN BUG (memory-monoids buffer.py): padding counts as data: 14 to 65 % of the segment arm's rows, none
                #   of the tape arm's. Symptom: fewer steps an update. Here: real steps are counted.
                #   Test: test_replay.py::test_both_arms_train_on_the_same_number_of_steps.
                steps += last - first
        n, begin, first, last = np.array(segments).T                                        # [S] each
        t = np.arange(-self.W, (last - first).max() + 1)[:, None]                           # [W + L + 1, 1]
        rows = n * self.C + np.clip(first + t, begin, last) % self.C                        # [W + L + 1, S]
        data = (torch.from_numpy(x.reshape(-1, *x.shape[2:])[rows]) for x in self.data)
        return torch.from_numpy((t >= 0) & (first + t < last)), *data

    def forget_running(self):
        """The running episodes will not go on: their positions are lost."""
        self.first = self.head.copy()

    def state_dict(self):
        return {"data": tuple(map(torch.from_numpy, self.data)), "head": torch.from_numpy(self.head),
                "first": torch.from_numpy(self.first), "index": torch.tensor(self.index, dtype=torch.long)}

    def load_state_dict(self, saved):
        for x, value in zip(self.data, saved["data"], strict=True):
            np.copyto(x, value.numpy())
        self.head, self.first = saved["head"].numpy().copy(), saved["first"].numpy().copy()
        self.index = collections.deque(map(tuple, saved["index"].tolist()))


def td_targets(rewards, terminated, real, values, gamma, n_step):
    """y_t = r_t + gamma r_{t+1} + ... + gamma^n V(o_{t+n}), fewer rewards where an episode or segment ends before.   all [P, B]

    values[t] = V(o_t). real[t]: there is a step t, so that t + 1 is in the same piece. Elsewhere y_t = V(o_t).
    """
    # PITFALL: a time limit treated as death. Symptom: values too low near the limit. Here: only termination cuts the bootstrap.
    #   Test: test_dqn.py::test_td_targets_equal_their_definition.
    y = values
    for _ in range(n_step):
        y = torch.where(real, rewards + gamma * ~terminated * y.roll(-1, 0), values)
    return y


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
    return np.array(results).T


def success_of(infos, n):
    """Whether environment n's episode, which has just ended, was a success; nan where the task does not say."""
    infos = infos.get("final_info", infos)
    return float(infos["success"][n]) if infos.get("_success", {n: False})[n] else float("nan")


def add_time(obs):
    return tuple(o[None] for o in obs)


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

    ranges = dict.fromkeys(("num_threads num_envs total_timesteps hidden_size num_layers mlp_size train_every batch_size "
                            "n_step target_network_frequency log_every eval_episodes checkpoint_every "
                            "episodes").split(), (1, 2**40))
    ranges |= dict.fromkeys(("seed", "encoder_size", "learning_starts", "eval_every"), (0, 2**40))
    ranges |= dict.fromkeys(("gamma", "tau", "start_e", "end_e"), (0, 1)) | {"exploration_fraction": (1e-6, 1)}
    ranges |= dict.fromkeys(("replay_ratio", "max_grad_norm"), (0, 1e9)) | {"buffer_size": (2 * args.num_envs, 2**40)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            fail(f"{flag(name)} must be at least {low} and at most {high}")
    if args.seq_len != -1 and args.seq_len < 1:
        fail(f"{flag('seq_len')} must be at least 1, or -1 for whole episodes")
    if args.burn_in is not None and not 0 <= args.burn_in <= 2**20:
        fail(f"{flag('burn_in')} must be at least 0 and at most {2**20}")
    v0, v1, power, decay_steps = (*args.learning_rate, *(0.0, 0.0, 1.0, 1.0)[len(args.learning_rate) :])[:4]
    if not (1 <= len(args.learning_rate) <= 4 and 0 <= v0 < 1e9 and 0 <= v1 < 1e9 and 0 < power < 1e9 and decay_steps > 0):
        fail(f"{flag('learning_rate')} must be one to four numbers, initial, final, power and decay steps: the first two not "
             "negative, the others positive")
    for name in ("env_kwargs", "reset_options", "memory_kwargs"):
        try:
            dict(**json.loads(getattr(args, name)))
        except (json.JSONDecodeError, TypeError):
            fail(f"""{flag(name)} is not a JSON object; write '{{"name": value}}'""")
    if args.total_timesteps < max(args.train_every, args.num_envs):
        fail(f"--total-timesteps {args.total_timesteps} is less than the steps before the first visit to the replay, "
             f"--train-every {args.train_every} or --num-envs {args.num_envs}")


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
    return path.open("a", buffering=1)


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
    T, N, device = max(1, args.train_every // args.num_envs), args.num_envs, pick_device(args)
    envs = make_envs(args, N)
    eval_envs = make_envs(args, min(N, args.eval_episodes), play=True) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array")[0] if args.capture_video else None
    tensors = functools.partial(to_tensors, envs.single_observation_space, device="cpu")    # the replay is there
    agent = make_agent(args, envs, checkpoint and checkpoint["agent"])
    target = copy.deepcopy(agent).requires_grad_(False)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate[0], fused=True)

    global_step, gradient_steps, seconds = 0, 0, 0.0
    recent = collections.deque(maxlen=100)                  # return, length, success of the last episodes
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    episode_return, episode_length = np.zeros(N), np.zeros(N)
    example = (*next_obs, next_start, torch.zeros(N, len(agent.q.sizes), dtype=torch.long), torch.zeros(N), next_start)
    example += () if args.burn_in is None else tuple(s.cpu() for s in state)
    K, W = len(next_obs), args.burn_in or 0                 # leaves of an observation, burn-in steps
    try:
        replay = Replay(args.buffer_size, tuple(x.numpy() for x in example), args.seq_len, W)
    except MemoryError:
        size = args.buffer_size // N * sum(x.nbytes for x in example)
        fail(f"--buffer-size {args.buffer_size} needs {size / 2**30:,.1f} GiB of memory, more than this machine has: lower it")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        target.load_state_dict(checkpoint["target"])
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)
        global_step, gradient_steps, seconds = (checkpoint[k] for k in ("global_step", "gradient_steps", "seconds"))
        recent.extend(checkpoint["recent"])
        try:
            replay.load_state_dict(checkpoint["replay"])
        except ValueError:
            fail("the saved replay has other sizes than the flags and the task ask for; leave those flags out")
        same = all(getattr(args, k) == getattr(checkpoint["args"], k) for k in ("env_id", "env_kwargs", "num_envs"))
        if checkpoint["envs"] and same:                     # our own tasks go on to the bit, as if never interrupted
            envs.unwrapped.load_state_dict(checkpoint["envs"])
            next_obs, state, (next_start,) = checkpoint["tensors"]
            state = tuple(s.to(device) for s in state)
            episode_return, episode_length = (x.numpy() for x in checkpoint["episodes"])
        else:                                               # others cannot be saved: new episodes, not the first ones again
            next_obs = tensors(envs.reset(seed=args.seed + global_step)[0])
            replay.forget_running()

    name = args.run_name or re.sub("[/:]", "-", f"{args.env_id}__{SCRIPT}__{args.seed}__{int(1000 * time.time())}")
    run = Path(args.resume or Path(args.runs_dir) / name)
    try:
        run.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as e:
        fail(f"--run-name {name} cannot be made in --runs-dir {args.runs_dir} ({e.strerror}); choose another or --resume {run}")
    if args.track:
        track(args, run)
    print(f"replay: {replay.N * replay.C:,} positions, {replay.nbytes / 2**20:,.1f} MiB when full")
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
            "script": SCRIPT, "args": args_json, "global_step": global_step, "gradient_steps": gradient_steps,
            "seconds": seconds, "recent": list(recent), "agent": agent.state_dict(), "target": target.state_dict(),
            "optimizer": optimizer.state_dict(), "replay": replay.state_dict(), "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "envs": {k: v if isinstance(v, str) else torch.as_tensor(v) for k, v in env_state.items()},
            "tensors": (next_obs, state, (next_start,)),
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
    clock, spent, stats, logged_step = time.perf_counter(), collections.Counter(), [], global_step

    def lap(name):
        """Add the time since the last lap to spent[name]."""
        nonlocal clock
        spent[name] += (now := time.perf_counter()) - clock
        clock = now

    while global_step + T * N <= args.total_timesteps and not interrupted:
        learning_rate = polynomial(args.learning_rate, global_step, args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate
        schedule = (args.start_e, args.end_e, 1.0, args.exploration_fraction * args.total_timesteps)
        epsilon = 1.0 if global_step < args.learning_starts else polynomial(schedule, global_step, args.total_timesteps)

        # -------------------------------------------------------------- rollout: T steps in N environments
        for t in range(T):
            obs, start, stored = next_obs, next_start, () if args.burn_in is None else tuple(s.cpu() for s in state)
            with torch.inference_mode():                    # acting is a sequence of length 1, also when the action is random
                q, state = agent(add_time(o.to(device) for o in obs), state, start[None].to(device))
                action = q.epsilon_greedy(epsilon)[0]       # [N, K]
            lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.q.to_env(action))
            lap("env")

            next_obs, done = tensors(next_obs), terminated | truncated
            next_start, ended = torch.as_tensor(done), np.flatnonzero(done)
            episode_return, episode_length = episode_return + reward, episode_length + 1
            step = (*obs, start, action.cpu(), reward, terminated, *stored)
            replay.add(step, ended, [tensors(infos["final_obs"][n]) for n in ended])
            for n in ended:
                recent.append((float(episode_return[n]), float(episode_length[n]), success_of(infos, n)))
                episode_return[n], episode_length[n] = 0, 0
            lap("batch")
        global_step += T * N

        # -------------------------------------------------------------- update: one batch of segments a gradient step
        while replay.index and gradient_steps < args.replay_ratio * (global_step - args.learning_starts):
            real, *batch = (x.to(device) for x in replay.sample(args.batch_size))           # [W + L + 1, S, ...] each
            # PITFALL: segments that start from zeros, as in most recurrent replays. Symptom: what lies more than L steps back
            #   does not exist; no state is old in training, all are in acting. Here: kept, as the baseline; see --burn-in.
            #   Test: test_dqn.py::test_stored_states_are_those_of_the_whole_episode.
            seg_state = target_state = tuple(s[0] for s in batch[K + 4 :]) or agent.memory.initial_state(real.shape[1])
            if W:                                           # both networks make the stored states their own, without gradient
                with torch.no_grad():
                    seg_state, target_state = (net(tuple(o[:W] for o in batch[:K]), seg_state, batch[K][:W])[-1]
                                               for net in (agent, target))
            real, *seg_obs, seg_starts, actions, rewards, terminated = (x[W:] for x in (real, *batch[: K + 4]))
            lap("batch")

            # One online forward gives q and, for double DQN, the best next action: next observations are in the segments.
            q, _ = agent(seg_obs, seg_state, seg_starts)                                    # [L + 1, S]
            with torch.no_grad():
                best, target_starts = q.greedy(), seg_starts
                # KNOWN BUG (memory-monoids losses.py): target histories are o_1, o_2, ... with a fresh memory at o_1. Symptom:
                #   targets cannot know what only o_0 shows; see --omit-first-obs, which forgets o_0 by starting at o_1.
                #   Test: test_dqn.py::test_target_histories_contain_the_first_observation.
                if args.omit_first_obs:
                    target_starts = (torch.arange(len(real), device=device) == 1)[:, None].expand_as(real)
                    best = agent(seg_obs, seg_state, target_starts)[0].greedy()
                values = target(seg_obs, target_state, target_starts)[0].of(best)
                targets = td_targets(rewards, terminated, real, values, args.gamma, args.n_step)
            # KNOWN BUG (memory-monoids losses.py): the segment arm takes huber(mean |error|), the tape arm mean huber(error).
            #   Symptom: an L1 and an L2 regression are compared, not two batchings. Here: both scripts take the mean of hubers.
            #   Test: test_dqn.py::test_segments_as_long_as_episodes_equal_the_tape.
            error = (F.smooth_l1_loss if args.loss == "huber" else F.mse_loss)(q.of(actions), targets, reduction="none")
            loss = (error * real).sum() / real.sum()

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            gradient_steps += 1
            with torch.no_grad():
                if gradient_steps % args.target_network_frequency == 0:
                    for target_parameter, parameter in zip(target.parameters(), parameters):
                        target_parameter.lerp_(parameter, args.tau)
                q_mean = (q.of(actions) * real).sum() / real.sum()
                stats.append(torch.stack([loss, q_mean, grad_norm, real.sum()]))
            lap("update")

        if not replay.index and (replay.head - replay.first).max() > replay.C:
            fail(f"episodes do not fit: each of --num-envs {N} environments has --buffer-size / --num-envs = {replay.C} "
                 "positions; raise --buffer-size")

        # -------------------------------------------------------------- log, checkpoint
        if stats and not stats[-1].isfinite().all():
            bar.close()
            sys.exit(f"the loss is not finite at step {global_step}; the last checkpoint is {run}/checkpoint.pt: try --resume "
                     f"{run} with a smaller --learning-rate or --max-grad-norm")
        due = lambda every: every and global_step // every > (global_step - T * N) // every  # noqa: E731
        if due(args.log_every) or due(args.eval_every):
            row = {"charts/SPS": (global_step - logged_step) / spent.total(), "charts/learning_rate": learning_rate,
                   "charts/epsilon": epsilon, "charts/gradient_steps": gradient_steps}
            if stats:
                row |= zip(("losses/td_loss", "losses/q_values", "losses/grad_norm", "charts/transitions"),
                           torch.stack(stats).mean(0).tolist())
            if recent:
                row |= zip(("charts/episodic_return", "charts/episodic_length", "charts/success"), np.mean(recent, axis=0))
            row |= {f"time/{name}": value for name, value in spent.items()}
            seconds += spent.total()
            spent.clear()
            if due(args.eval_every):
                returns, _, successes = play(agent, eval_envs, args, args.eval_episodes, args.seed + 10_000)
                row |= {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std(),
                        "eval/success": successes.mean()}
            row = {tag: value for tag, value in row.items() if np.isfinite(value)}
            cells = (f"{row[tag]:.6g}" if tag in row else "" for tag in TAGS)
            progress.write(",".join((str(global_step), f"{seconds:.3f}", *cells)) + "\n")
            for tag, value in row.items():
                writer.add_scalar(tag, value, global_step)
            bar.set_postfix({name: f"{row[tag]:.{digits}f}" for name, tag, digits in
                             (("SPS", "charts/SPS", 0), ("return", "charts/episodic_return", 2),
                              ("success", "charts/success", 2)) if tag in row})
            bar.update(global_step - logged_step)
            stats, logged_step = [], global_step
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

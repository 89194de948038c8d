"""Recurrent TD3 for continuous actions: a policy and two critics with memory, on sequences that begin anywhere in an episode.

    python td3_gru.py                                                     trains PendulumMasked-v1
    python td3_gru.py --memory lru                                        with any registered memory
    python td3_gru.py --model runs/.../model.safetensors                  watches the trained agent
    tensorboard --logdir runs                                             draws the curves

TD3: Fujimoto et al. 2018 (https://arxiv.org/abs/1802.09477). With memory: Heess et al. 2015 (https://arxiv.org/abs/1512.04455)
and Ni et al. 2022 (https://arxiv.org/abs/2110.05038). Histories, sequences and the ways to draw them are those of sac_gru.py,
whose head explains them; diff the two.

    critics   y_t = r_t + gamma (1 - terminated_t) min Q'(h'_{t+1}, pi'(h'_{t+1}) + clipped noise)            mean (Q - y)^2
    policy    mean of -Q_1(h_t, pi(h_t)), by pi(h_t): through the policy's memory to the sequence's first step

Symbols: N environments, T steps they make between two visits to the replay, C positions of an environment's ring, S sequences
of an update, L steps of the longest, A numbers of an action, H hidden size. Sequences are time-major: [L + 1, S, ...].
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
from models import MEMORIES, Encoder, init, keep_freed_memory, to_tensors

SCRIPT = Path(__file__).stem
TAGS = ("charts/episodic_return charts/episodic_length charts/success charts/SPS charts/learning_rate charts/gradient_steps "
        "eval/episodic_return eval/return_std eval/success losses/qf_loss losses/qf_values losses/qf_grad_norm "
        "losses/actor_loss losses/actor_grad_norm time/policy time/env time/batch time/update "
        "time/log").split()


@dataclass
class Args:
    env_id: str = "PendulumMasked-v1"  # any Gymnasium id; popgym-*, Memory Gym's and our own are registered
    env_kwargs: str = "{}"  # JSON, passed to the task's constructor
    reset_options: str = "{}"  # JSON, passed to every reset(options=...)
    seed: int = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: int = 1  # torch threads; more than one pays for images
    num_envs: int = 16  # N
    total_timesteps: int = 100_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "gru"  # the memory model
    hidden_size: int = 64  # H, of the memory
    num_layers: int = 1  # of the memory
    memory_kwargs: str = "{}"  # JSON, passed to the memory's layers, as '{"state_size": 32}' for the lru
    encoder_size: int = 0  # linear layer with ReLU between observation features and memory; 0: none
    mlp_size: int = 128  # hidden layer of the policy and of each critic
    prev_action: bool = True  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory

    buffer_size: int = 200_000  # positions in the replay; an episode of n steps takes n + 1
    learning_starts: int = 1_000  # environment steps with uniformly random actions, before any learning
    policy_learning_starts: int = 1_000  # environment steps before the policy learns too; until then only the critics do
    train_every: int = 64  # environment steps between two visits to the replay
    replay_ratio: float = 0.1  # gradient steps of the critics per environment step
    policy_frequency: int = 2  # gradient steps of the critics to one of the policy
    batch_size: int = 64  # S, sequences of an update
    seq_len: int = 20  # L, steps of a sequence at most
    always_sample_from_initial_state: bool = False  # sequences begin where their episode begins
    random_seq_length: bool = True  # of 1 to L steps; otherwise of L, or to the end of the episode
    nominal_seq_length_probability: float = 0.5  # share of the random lengths that are L, the others are uniform
    include_first_step_in_targets: bool = True  # targets know the sequence from its first observation on, as the values do
    mask_non_terminal: bool = False  # train the last step of every sequence only
    wipe_state_every: int = 0  # forget all after so many steps of acting, as RLtools does; 0: never within an episode

    exploration_noise: float = 0.1  # standard deviation of what is added to acted actions, which are scaled to [-1, 1]
    policy_noise: float = 0.2  # and to the targets' actions
    noise_clip: float = 0.5  # which is clipped to so much
    policy_lr: tuple[float, ...] = (1e-3,)  # schedule: initial [final [power [decay-steps]]]
    q_lr: tuple[float, ...] = (2e-3,)  # of the critics
    gamma: float = 0.98  # discount
    tau: float = 0.01  # share of the critics that goes into their targets; 1: periodic copies
    policy_tau: float = 0.01  # share of the policy that goes into its target
    target_network_frequency: int = 2  # gradient steps between two updates of the targets
    max_grad_norm: float = 100.0  # gradient clipping, of the policy and of the critics

    log_every: int = 1_000  # environment steps between rows of progress.csv
    eval_every: int = 0  # environment steps between evaluations without noise; 0: none
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


class Trunk(nn.Module):
    """Encoder -> memory. To its callers a memory whose x are the leaves of observations, [T, B, ...] each."""

    def __init__(self, observation_space, args):
        super().__init__()
        self.encoder = Encoder(observation_space, args.encoder_size)
        self.memory = MEMORIES[args.memory](self.encoder.out_size, args.hidden_size, args.num_layers,
                                            **json.loads(args.memory_kwargs))
        self.initial_state = self.memory.initial_state

    def forward(self, obs, state, start):
        return self.memory(self.encoder(obs), state, start)


def mlp(in_size, args, out_size, gain):
    return nn.Sequential(init(nn.Linear(in_size, args.mlp_size), 2**0.5), nn.ReLU(),
                         init(nn.Linear(args.mlp_size, out_size), gain))


class Critics(nn.Module):
    """Trunk -> h_t, for both; then two heads Q(h_t, a_t)."""

    def __init__(self, observation_space, action_size, args):
        super().__init__()
        self.memory = Trunk(observation_space, args)
        self.q1, self.q2 = (mlp(args.hidden_size + action_size, args, 1, 1.0) for _ in range(2))

    def histories(self, obs, start):
        """h [T, B, H] of sequences that begin without a state.   obs: leaves of [T, B, ...]; start [T, B] bool"""
        return self.memory(obs, self.memory.initial_state(start.shape[1]), start)[0]

    def forward(self, h, action):
        """Both critics' values, [...] each.   h [..., H], action [..., A]"""
        x = torch.cat([h, action], dim=-1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)


class Agent(nn.Module):
    """Trunk -> a policy; two critics with a trunk of their own.   obs: flat tuple of leaves, [T, B, ...]; start [T, B] bool

    Actions are scaled to [-1, 1] everywhere but in the environment.
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        if not (isinstance(action_space, gym.spaces.Box) and action_space.is_bounded() and len(action_space.shape) == 1):
            raise ValueError(f"action space {action_space} is not supported: it must be a Box of one dimension with bounds")
        self.low, self.high, (action_size,) = action_space.low, action_space.high, action_space.shape
        self.memory = Trunk(observation_space, args)
        self.policy = mlp(args.hidden_size, args, action_size, 0.01)
        self.critics = Critics(observation_space, action_size, args)

    def pi(self, obs, state, start):
        """The policy's actions [T, B, A], and the state after them."""
        h, state = self.memory(obs, state, start)
        return self.policy(h).tanh(), state

    def act(self, obs, state, start):
        """The actions without noise, as the environment takes them, and the state after them.   obs: leaves of [B, ...]"""
        action, state = self.pi(add_time(obs), state, start[None])
        return self.to_env(action[0]), state

    def to_env(self, action):
        """[-1, 1] -> the bounds of the action space; numpy."""
        return (self.low + (action.cpu().numpy() + 1) / 2 * (self.high - self.low)).clip(self.low, self.high)


class SequenceReplay:
    """The newest steps of N environments, a ring of C positions each, from which sequences are drawn that begin anywhere.

    An episode of n steps takes n + 1 positions, o_0 ... o_n. What belongs to step t lies beside o_t; beside o_n lies nothing.
    The newest position, too, is only a successor yet. A sequence lies within one episode, which may still be running.
    """

    def __init__(self, size, step):
        """step: arrays of [N, ...], an example: leaves of observations, action, reward, terminated."""
        self.N, self.C = len(step[0]), size // len(step[0])
        self.nbytes = self.N * self.C * (sum(x[0].nbytes for x in step) + 9)
        if self.nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise MemoryError
        # zeros() of the system: pages take memory when they are first written
        self.data = tuple(np.zeros((self.N, self.C, *x.shape[1:]), x.dtype) for x in step)
        self.begin = np.zeros((self.N, self.C), np.int64)   # [N, C] where the step's episode began
        self.last = np.zeros((self.N, self.C), bool)        # [N, C] whether o_n lies here
        self.head = np.zeros(self.N, np.int64)              # [N] positions written so far; the next one is head % C
        self.first = np.zeros(self.N, np.int64)             # [N] where the running episode began

    def add(self, step, ended, last_obs):
        """One step of every environment.   step: as in __init__; ended [E]: whose episodes ended; last_obs: their o_n"""
        rows = np.arange(self.N), self.head % self.C
        for x, value in zip((*self.data, self.begin, self.last), (*step, self.first, False)):
            x[rows] = value
        self.head += 1
        for n, obs in zip(ended.tolist(), last_obs):
            for x, value in zip(self.data, obs):
                x[n, self.head[n] % self.C] = value
            self.last[n, self.head[n] % self.C] = True
            self.head[n] += 1
            self.first[n] = self.head[n]

    def sample(self, args):
        """S = --batch-size sequences, drawn uniformly, with replacement, side by side.

        Returns tensors [L + 1, S, ...]: which steps are real, which start anew (the first row), then the data. Padding
        repeats a sequence's last position, o_{t+1} of its last real step.
        """
        S, (n, first) = args.batch_size, np.zeros((2, 0), np.int64)
        while len(n) < S:
            env = torch.randint(self.N, (S,)).numpy()
            oldest, newest = (self.head[env] - self.C).clip(0), self.head[env] - 1
            step = oldest + (torch.rand(S, dtype=torch.float64).numpy() * (newest - oldest)).astype(np.int64)
            good = ~self.last[env, step % self.C]
            # PITFALL: what an episode is about is shown at its first step, and sequences begin anywhere. Symptom: one sequence
            #   in an episode's length holds the cue, the others teach to do without. Here: they begin with their episode if
            #   asked to; L must reach to its end. Test: test_continuous.py::test_sequences_from_the_initial_state_hold_the_cue.
            if args.always_sample_from_initial_state:
                step = self.begin[env, step % self.C]
                good &= step >= oldest
            n, first = np.concatenate([n, env[good]]), np.concatenate([first, step[good]])
        n, first = n[:S], first[:S]                                                         # [S] each
        # PITFALL: sequences of one length, when only the last step of each trains. Symptom: good after exactly L steps, poor at
        #   an episode's first ones, which never were a last step. Here: lengths of 1 to L, and L itself, which acting needs
        #   most, with a probability of its own. Test: test_continuous.py::test_lengths_are_those_ordered.
        length = np.full(S, args.seq_len)
        if args.random_seq_length and args.seq_len > 1:
            short = torch.rand(S).numpy() >= args.nominal_seq_length_probability
            length = np.where(short, torch.randint(1, args.seq_len, (S,)).numpy(), length)
        t = np.arange(args.seq_len + 1)[:, None]                                            # [L + 1, 1]
        ended = np.logical_or.accumulate(self.last[n, (first + t) % self.C])                # [L + 1, S]
        real = (t < length) & (first + t < self.head[n] - 1) & ~ended
        steps = real.sum(0)
        real, t = real[: steps.max() + 1], t[: steps.max() + 1]
        rows = n * self.C + (first + np.minimum(t, steps)) % self.C                         # [L + 1, S]
        data = (torch.from_numpy(x.reshape(-1, *x.shape[2:])[rows]) for x in self.data)
        return torch.from_numpy(real), torch.from_numpy(np.broadcast_to(t == 0, real.shape).copy()), *data

    def forget_running(self):
        """The running episodes will not go on: their newest positions are o_n."""
        running = np.flatnonzero(self.head > self.first)
        self.last[running, (self.head[running] - 1) % self.C] = True
        self.first = self.head.copy()

    def state_dict(self):
        return {name: torch.from_numpy(x) for name, x in self.arrays().items()}

    def load_state_dict(self, saved):
        for name, x in self.arrays().items():
            np.copyto(x, saved[name].numpy())

    def arrays(self):
        return {"begin": self.begin, "last": self.last, "head": self.head, "first": self.first,
                **{f"data{i}": x for i, x in enumerate(self.data)}}


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
        if args.wipe_state_every:
            start = start | (lengths % args.wipe_state_every == 0)
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
                            "seq_len policy_frequency target_network_frequency log_every eval_episodes checkpoint_every "
                            "episodes").split(), (1, 2**40))
    ranges |= dict.fromkeys(("seed encoder_size learning_starts policy_learning_starts wipe_state_every "
                             "eval_every").split(), (0, 2**40))
    ranges |= dict.fromkeys(("gamma", "tau", "policy_tau", "nominal_seq_length_probability"), (0, 1))
    ranges |= dict.fromkeys(("replay_ratio", "max_grad_norm", "exploration_noise", "policy_noise", "noise_clip"), (0, 1e9))
    ranges |= {"buffer_size": (2 * args.num_envs, 2**40)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            fail(f"{flag(name)} must be at least {low} and at most {high}")
    for name in ("policy_lr", "q_lr"):
        schedule = getattr(args, name)
        v0, v1, power, decay_steps = (*schedule, *(0.0, 0.0, 1.0, 1.0)[len(schedule) :])[:4]
        if not (1 <= len(schedule) <= 4 and 0 <= v0 < 1e9 and 0 <= v1 < 1e9 and 0 < power < 1e9 and decay_steps > 0):
            fail(f"{flag(name)} must be one to four numbers, initial, final, power and decay steps: the first two not "
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
    A = len(agent.low)
    actor_parameters, q_parameters = [*agent.memory.parameters(), *agent.policy.parameters()], list(agent.critics.parameters())
    optimizers = {"policy_lr": torch.optim.Adam(actor_parameters, fused=True),
                  "q_lr": torch.optim.Adam(q_parameters, fused=True)}

    global_step, gradient_steps, seconds = 0, 0, 0.0
    recent = collections.deque(maxlen=100)                  # return, length, success of the last episodes
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    episode_return, episode_length = np.zeros(N), np.zeros(N)
    example = (*next_obs, torch.zeros(N, A), torch.zeros(N), next_start)
    K = len(next_obs)                                       # leaves of an observation
    try:
        replay = SequenceReplay(args.buffer_size, tuple(x.numpy() for x in example))
    except MemoryError:
        size = args.buffer_size // N * sum(x.nbytes for x in example)
        fail(f"--buffer-size {args.buffer_size} needs {size / 2**30:,.1f} GiB of memory, more than this machine has: lower it")
    if checkpoint:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
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
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "replay": replay.state_dict(), "rng": torch.get_rng_state(),
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
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = polynomial(getattr(args, name), global_step, args.total_timesteps)

        # -------------------------------------------------------------- rollout: T steps in N environments
        for t in range(T):
            obs, start = next_obs, next_start
            if args.wipe_state_every:
                # KNOWN BUG (rl_tools gru operations_generic.h): while acting the state is wiped every L steps, within an
                #   episode. Symptom: every L steps the agent knows nothing; a perfect CountInput agent gets -230 instead of 0.
                #   Here: the state lasts as long as the episode, see --wipe-state-every. Test: test_continuous.py::test_wiping.
                start = start | torch.as_tensor(episode_length % args.wipe_state_every == 0)
            with torch.inference_mode():                    # acting is a sequence of length 1
                action, state = agent.pi(add_time(o.to(device) for o in obs), state, start[None].to(device))
                action = (action[0] + args.exploration_noise * torch.randn_like(action[0])).clamp(-1, 1)       # [N, A]
            if global_step < args.learning_starts:
                action = torch.rand(N, A) * 2 - 1
            lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
            lap("env")

            next_obs, done = tensors(next_obs), terminated | truncated
            next_start, ended = torch.as_tensor(done), np.flatnonzero(done)
            episode_return, episode_length = episode_return + reward, episode_length + 1
            replay.add((*obs, action.cpu(), reward, terminated), ended, [tensors(infos["final_obs"][n]) for n in ended])
            for n in ended:
                recent.append((float(episode_return[n]), float(episode_length[n]), success_of(infos, n)))
                episode_return[n], episode_length[n] = 0, 0
            lap("batch")
        global_step += T * N

        # -------------------------------------------------------------- update: one batch of sequences a gradient step
        if args.always_sample_from_initial_state and (replay.head - replay.first).max() > replay.C:
            fail(f"episodes do not fit: each of --num-envs {N} environments has --buffer-size / --num-envs = {replay.C} "
                 "positions; raise --buffer-size")
        while replay.head.min() > 1 and gradient_steps < args.replay_ratio * (global_step - args.learning_starts):
            real, starts, *data = (x.to(device) for x in replay.sample(args))               # [L + 1, S, ...] each
            seq_obs, (actions, rewards, terminated) = data[:K], (x[:-1] for x in data[K:])
            # PITFALL: with a_t in what the critics' memory reads, only a sequence's last action can be the policy's: an earlier
            #   one would contradict the observations after it. Symptom: RLtools trains 1 step in 30, and needs 100,000 updates.
            #   Here: a_t enters behind the memory and every step trains; see --mask-non-terminal.
            #   Test: test_continuous.py::test_which_steps_train.
            trained = (real & ~real.roll(-1, 0) if args.mask_non_terminal else real)[:-1]   # [L, S]
            policy_learns = global_step > args.policy_learning_starts and gradient_steps % args.policy_frequency == 0
            state_0 = agent.memory.initial_state(args.batch_size)
            lap("batch")

            # --- critics
            with torch.no_grad():
                # PITFALL: targets computed from o_1 ... o_L, the next observations only. Symptom: what is shown at the first
                #   step alone is unknown to the targets; values do not depend on it, and the policy ignores it. Here: see
                #   --include-first-step-in-targets. Test: test_continuous.py::test_a_cue_needs_the_first_step_in_targets.
                known_obs, known_starts, L = seq_obs, starts, len(rewards)
                if not args.include_first_step_in_targets:
                    known_obs, known_starts = tuple(o[1:] for o in seq_obs), starts[:-1]
                next_h = target.critics.histories(known_obs, known_starts)[-L:]             # [L, S, H]
                next_actions = target.pi(known_obs, state_0, known_starts)[0][-L:]          # [L, S, A]
                noise = (args.policy_noise * torch.randn_like(next_actions)).clamp(-args.noise_clip, args.noise_clip)
                values = torch.minimum(*target.critics(next_h, (next_actions + noise).clamp(-1, 1)))           # [L, S]
                # PITFALL: a time limit treated as death. Symptom: values too low near the limit. Here: only termination cuts
                #   the bootstrap. Test: test_continuous.py::test_losses_equal_their_definition.
                targets = rewards + args.gamma * ~terminated * values
            h = agent.critics.histories(seq_obs, starts)[:-1]                               # [L, S, H]
            q1, q2 = agent.critics(h, actions)
            qf_loss = F.mse_loss(q1[trained], targets[trained]) + F.mse_loss(q2[trained], targets[trained])
            optimizers["q_lr"].zero_grad()
            qf_loss.backward()
            qf_grad_norm = nn.utils.clip_grad_norm_(q_parameters, args.max_grad_norm)
            optimizers["q_lr"].step()

            # --- policy: the gradient goes through its actions only; the critics' histories are those of above, one step old.
            actor_loss = actor_grad_norm = torch.tensor(torch.nan)
            if policy_learns:
                new_actions, _ = agent.pi(seq_obs, state_0, starts)                         # [L + 1, S, A]
                actor_loss = -agent.critics(h.detach(), new_actions[:-1])[0][trained].mean()
                optimizers["policy_lr"].zero_grad()
                actor_loss.backward(inputs=actor_parameters)
                actor_grad_norm = nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm)
                optimizers["policy_lr"].step()

            gradient_steps += 1
            with torch.no_grad():
                if gradient_steps % args.target_network_frequency == 0:
                    for (name, target_parameter), parameter in zip(target.named_parameters(), agent.parameters()):
                        target_parameter.lerp_(parameter, args.tau if name.startswith("critics.") else args.policy_tau)
                stats.append(torch.stack([qf_loss / 2, q1[trained].mean(), qf_grad_norm, actor_loss, actor_grad_norm]))
            lap("update")

        # -------------------------------------------------------------- log, checkpoint
        if stats and not stats[-1][0].isfinite():
            bar.close()
            sys.exit(f"the loss is not finite at step {global_step}; the last checkpoint is {run}/checkpoint.pt: try --resume "
                     f"{run} with a smaller --q-lr, --policy-lr or --max-grad-norm")
        due = lambda every: every and global_step // every > (global_step - T * N) // every  # noqa: E731
        if due(args.log_every) or due(args.eval_every):
            row = {"charts/SPS": (global_step - logged_step) / spent.total(), "charts/gradient_steps": gradient_steps,
                   "charts/learning_rate": optimizers["policy_lr"].param_groups[0]["lr"]}
            if stats:
                row |= zip(("losses/qf_loss", "losses/qf_values", "losses/qf_grad_norm", "losses/actor_loss",
                            "losses/actor_grad_norm"), torch.stack(stats).nanmean(0).tolist())
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

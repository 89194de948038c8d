"""Recurrent SAC for continuous actions, with any memory, on sequences that begin anywhere in an episode.

    python sac_gru.py                                                 trains PendulumMasked-v1
    python sac_gru.py --env-id CountInput-v0 --gamma 0 --memory lru   counts the ones among the last ten bits
    python sac_gru.py --burn-in 10                                    from stored states (R2D2)
    python sac_gru.py --model runs/.../model.safetensors              watches the trained agent
    tensorboard --logdir runs                                         draws the curves

SAC: Haarnoja et al. 2018 (https://arxiv.org/abs/1812.05905). With memory: Heess et al. 2015
(https://arxiv.org/abs/1512.04455), Ni et al. 2022 (https://arxiv.org/abs/2110.05038), and RLtools.
Stored states: R2D2, Kapturowski et al. 2019.

The memories read (o_t, a_{t-1}), never a_t: h_t is the history at which the agent must act. a_t enters behind
them, in Q(h_t, a_t). The policy's own action can therefore take the place of the stored one at *every* step
of a sequence without touching the history of any other, and every real step trains critics and policy.

    critics   mean of (Q(h_t, a_t) - y_t)^2,
              y_t = r_t + gamma (1 - terminated_t) (min Q'(h'_{t+1}, a~_{t+1}) - alpha log pi(a~_{t+1}))
    policy    mean of alpha log pi(a~_t) - min Q(h_t, a~_t), through its memory to the sequence's first step

Symbols: N environments, T steps between two visits to the replay, C positions of an environment's ring,
S sequences, L steps of the longest, W burn-in steps, A numbers of an action, H hidden size. Time-major.
"""
import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs.vector import make_envs, make_rendered  # importing envs registers its tasks
from models import MEMORIES, SquashedGaussian, Trunk, mlp, to_tensors
from models.cpu_speed import keep_freed_memory
from models.files import refuse_more_than_memory
from models.flags import Count, Finite, Fraction, Json, Positive, Schedule, Whole, fail, number, parse
from models.heads import to_bounds
from models.play import enjoy, film, play
from models.run_folder import Run, make_agent, restore_random_generators

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "PendulumMasked-v1"  # any Gymnasium id
    env_kwargs: Json = field(default_factory=dict)  # passed to the task's constructor
    reset_options: Json = field(default_factory=dict)  # passed to every reset(options=...)
    eval_reset_options: Json = field(default_factory=dict)  # over these in evaluations and with --model
    shrink_images: Count = 1  # each square of so many pixels becomes its mean; 1: as they are
    seed: Whole = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: Count = 1  # torch threads; more than one is worth it for images
    num_envs: Count = 16  # N
    total_timesteps: Count = 100_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "gru"  # the memory model
    hidden_size: Count = 64  # H, of the memory
    num_layers: Count = 1  # of the memory
    memory_kwargs: Json = field(default_factory=dict)  # of its layers, as '{"state_size": 32}'
    encoder_size: Whole = 0  # linear layer with ReLU between observation and memory; 0: none
    whiten_images: bool = False  # whitened pixels in place of a CNN, of numbered pictures (Views)
    mlp_size: Count = 128  # hidden layer of the policy and of each critic
    prev_action: bool = True  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory

    buffer_size: Count = 200_000  # positions in the replay; an episode of n steps takes n + 1
    learning_starts: Whole = 1_000  # environment steps with random actions, before any learning
    policy_learning_starts: Whole = 1_000  # environment steps until which only the critics learn
    train_every: Count = 64  # environment steps between two visits to the replay
    replay_ratio: Positive = 0.1  # gradient steps of the critics per environment step
    policy_frequency: Count = 1  # gradient steps of the critics to one of the policy
    batch_size: Count = 64  # S, sequences of an update
    seq_len: Count = 20  # L, steps of a sequence at most
    burn_in: number(int, 0, 2**20) | None = None  # W, from stored states; none: start from zeros
    always_sample_from_initial_state: bool = False  # sequences begin where their episode begins
    random_seq_length: bool = True  # of 1 to L steps; otherwise of L, or to the end of the episode
    nominal_seq_length_probability: Fraction = 0.5  # share of the random lengths that are L
    include_first_step_in_targets: bool = True  # targets know o_0 of the sequence
    mask_non_terminal: bool = False  # train the last step of every sequence only
    wipe_state_every: Whole = 0  # forget all after so many steps of acting, as RLtools; 0: never

    entropy_bonus: bool = True  # in the critics' targets; the policy's loss has it anyway
    entropy_bonus_next_step: bool = True  # of the next action, as SAC has it; otherwise of this
    alpha: Positive = 0.2  # temperature, the price of a nat of entropy; at first, if it is tuned
    autotune: bool = True  # tune alpha to the target entropy
    target_entropy: Finite | None = None  # nats, of actions in [-1, 1]; none: -A
    policy_lr: Schedule = (1e-3,)  # schedule: initial [final [power [decay-steps]]]
    q_lr: Schedule = (2e-3,)  # schedule of the critics
    alpha_lr: Schedule = (3e-3,)  # schedule of the temperature's logarithm
    gamma: Fraction = 0.98  # discount
    tau: Fraction = 0.01  # share of the critics that goes into their targets; 1: periodic copies
    target_network_frequency: Count = 1  # gradient steps between two updates of the targets
    max_grad_norm: Positive = 100.0  # gradient clipping, of the policy and of the critics

    log_every: Count = 1_000  # environment steps between rows of progress.csv
    eval_every: Whole = 0  # environment steps between evaluations without noise; 0: none
    eval_episodes: Count = 100  # episodes per evaluation
    checkpoint_every: Count = 100_000  # environment steps between checkpoints
    runs_dir: str = "runs"  # where run folders go
    run_name: str | None = None  # folder name; default <env-id>__<script>__<seed>__<time>
    track: bool = False  # also log to Weights & Biases, which `pip install wandb` brings
    wandb_project_name: str = "recurrent-rl-baselines"  # its project
    wandb_entity: str | None = None  # its team or user; default: yours
    capture_video: bool = False  # with every checkpoint a GIF of an episode, in videos/
    flags: str | None = None  # begin with those of a run, a model, an args.json or benchmark:<entry>
    resume: str | None = None  # continue the run in this folder
    model: str | None = None  # do not train: play this model.safetensors
    export: str | None = None  # with --model: write a file for ONNX (.onnx) or torch.export (.pt2)
    episodes: Count = 10  # episodes to play with --model
    render_mode: Literal["auto", "human", "ansi", "rgb_array", "none"] = "auto"  # with --model
    show_memory: bool = False  # with --model and --render-mode rgb_array: film the memory beside the task
    forget_at: Whole = 0  # with --model: play each episode again and wipe the memory at this step; 0: never
    probe: bool = False  # with --model: draw what a linear readout of the memory knows, by delay


class Critics(nn.Module):
    """Trunk -> h_t, for both; then two heads Q(h_t, a_t)."""

    def __init__(self, observation_space, action_size, args):
        super().__init__()
        self.memory = Trunk(observation_space, args)
        self.q1 = mlp(args.hidden_size + action_size, args.mlp_size, 1, 1.0)
        self.q2 = mlp(args.hidden_size + action_size, args.mlp_size, 1, 1.0)

    def forward(self, h, action):
        """Both critics' values, [...] each.   h [..., H], action [..., A]"""
        # PITFALL: with a_t in what the memory reads, only a sequence's last action can be the policy's: an
        #   earlier one would contradict the observations after it. Symptom: RLtools trains 1 step in 30.
        #   Here: every step, see --mask-non-terminal. Test: test_sac_td3.py::test_which_steps_train.
        x = torch.cat([h, action], dim=-1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)


class Agent(nn.Module):
    """Trunk -> a policy; two critics with a trunk of their own.   obs: leaves of [T, B, ...], start [T, B]

    Actions are in [-1, 1] everywhere except in the environment.
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        box = isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1
        if not (box and action_space.is_bounded()):
            raise ValueError(f"action space {action_space} is not supported: it must be a Box of one "
                             "dimension with bounds")
        self.low, self.high = action_space.low, action_space.high
        action_size = len(self.low)
        self.memory = Trunk(observation_space, args)
        self.policy = mlp(args.hidden_size, args.mlp_size, 2 * action_size, 0.01)
        self.critics = Critics(observation_space, action_size, args)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.wipe_state_every = args.wipe_state_every

    def pi(self, obs, state, start):
        """The policy at every step [T, B], and the last state."""
        h, state = self.memory(obs, state, start)
        mean, log_std = self.policy(h).chunk(2, dim=-1)
        return SquashedGaussian(mean, log_std), state

    def initial_state(self, batch_size, of_critics):
        """Of the policy's memory, and of the critics' if they act along, for the sake of stored states."""
        critics_state = self.critics.memory.initial_state(batch_size) if of_critics else ()
        return *self.memory.initial_state(batch_size), *critics_state

    def step(self, obs, state, start):
        """pi, and the next state of all that the state holds: the policy's, and the critics' if they act."""
        n = len(self.memory.initial_state(1))
        policy, policy_state = self.pi(obs, state[:n], start)
        _, critics_state = self.critics.memory(obs, state[n:], start) if state[n:] else (None, ())
        return policy, (*policy_state, *critics_state)

    def greedy(self, obs, state, start):
        """The actions without noise, the next state, and numbers by name: tensors.   obs: of [B, ...]"""
        policy, state = self.pi(add_time(obs), state, start[None])
        numbers = {name: x[0] for name, x in policy.numbers().items()}
        return to_bounds(policy.mode()[0], self.low, self.high), state, numbers

    def act(self, obs, state, start):
        """The actions of greedy() in numpy, and the next state."""
        action, state, _ = self.greedy(obs, state, start)
        return action.detach().cpu().numpy(), state         # waits for the device

    def to_env(self, action):
        """[-1, 1] -> the bounds of the action space; numpy."""
        return to_bounds(action.detach().cpu(), self.low, self.high).numpy()        # waits for the device


def add_time(obs):
    return tuple(o[None] for o in obs)                      # leaves of [B, ...] -> [1, B, ...]


class Sequences(NamedTuple):
    """S sequences side by side, [L + 1, S, ...]; padded with the observation after their last step."""
    obs: list  # leaves
    starts: torch.Tensor  # True in row 0 at most
    actions: torch.Tensor  # [L + 1, S, A]
    rewards: torch.Tensor
    terminated: torch.Tensor
    real: torch.Tensor  # False in the rows after the last step
    before: list  # obs and starts of W steps before, [W, S, ...]; an episode's first one repeats
    state: list  # of [S, ...]: what acting left before all this; [] without --burn-in


class SequenceReplay:
    """The newest steps of N environments, a ring of C positions each. Sequences begin anywhere in it.

    An episode of n steps takes n + 1 positions, o_0 ... o_n. What belongs to step t lies beside o_t; nothing
    lies beside o_n. A sequence lies within one episode. In one that still runs it ends before the newest o_t.
    """

    def __init__(self, size, obs, action, state=(), burn_in=None):
        """obs, action, state: examples of what is added, [N, ...] each.   burn_in: None to keep no states"""
        self.N, self.C, self.W = len(action), size // len(action), burn_in or 0
        reward, flag = torch.zeros(self.N), torch.zeros(self.N, dtype=torch.bool)
        kept = () if burn_in is None else state
        step = [x.cpu().numpy() for x in (*obs, action, reward, flag, *kept)]
        self.nbytes = self.N * self.C * (sum(x[0].nbytes for x in step) + 9)       # begin, last: 9
        refuse_more_than_memory(self.nbytes, f"--buffer-size {size}")
        # The zeros are the system's: pages take memory when they are first written.
        self.data = [np.zeros((self.N, self.C, *x.shape[1:]), x.dtype) for x in step]
        self.leaves, self.states = self.data[:len(obs)], self.data[len(obs) + 3:]
        self.begin = np.zeros((self.N, self.C), np.int64)   # [N, C] where the step's episode began
        self.last = np.zeros((self.N, self.C), bool)        # [N, C] whether o_n lies here
        self.head = np.zeros(self.N, np.int64)              # [N] the next position, modulo C
        self.first = np.zeros(self.N, np.int64)             # [N] where the running episode began
        self.arrays = *self.data, self.begin, self.last, self.head, self.first

    def add(self, obs, action, reward, terminated, ended, last_obs, state=()):
        """One step of every environment.   ended [E]: whose episodes ended; last_obs: their o_n"""
        now = np.arange(self.N), self.head % self.C
        step = *obs, action, reward, terminated, *state[:len(self.states)]
        for x, value in zip(self.data, step, strict=True):
            x[now] = torch.as_tensor(value).cpu()           # waits for the device
        self.begin[now], self.last[now] = self.first, False
        self.head += 1
        for n, leaves in zip(ended, last_obs, strict=True):
            now = n, self.head[n] % self.C
            for x, value in zip(self.leaves, leaves, strict=True):
                x[now] = value
            self.last[now] = True
            self.head[n] += 1
            self.first[n] = self.head[n]

    def sample(self, args, device):
        """S = --batch-size sequences, drawn uniformly, with replacement."""
        n, first = self.draw_first_steps(args.batch_size, args.always_sample_from_initial_state)
        length = draw_lengths(args)                         # [S] where the episodes are long enough
        t = np.arange(args.seq_len + 1)[:, None]            # [L + 1, 1]
        newest = first + t == self.head[n] - 1
        no_step = self.last[n, (first + t) % self.C] | newest | (t == length)           # [L + 1, S]
        steps = no_step.argmax(0)                           # [S] rows before the first of these
        t = t[:steps.max() + 1]                             # L shrinks to the longest
        begin = self.begin[n, first % self.C]               # [S]
        burn_in = np.maximum(first - self.W, begin)         # [S] where it begins
        before = np.maximum(first + np.arange(-self.W, 0)[:, None], burn_in)            # [W, S]

        def take(arrays, positions):
            return [torch.from_numpy(x[n, positions % self.C]).to(device) for x in arrays]

        *obs, actions, rewards, terminated = take(
            self.data[:len(self.data) - len(self.states)], first + np.minimum(t, steps))    # [L + 1, S]
        real = torch.from_numpy(t < steps).to(device)
        starts = torch.zeros_like(real)
        starts[0] = torch.from_numpy(first == begin) if self.states else True
        starts_before = torch.from_numpy(before == begin).to(device)
        return Sequences(
            obs, starts, actions, rewards, terminated, real, [*take(self.leaves, before), starts_before],
            take(self.states, burn_in))

    def draw_first_steps(self, S, from_initial_state):
        """Environments and positions [S] where sequences begin, all steps that lie here equally likely."""
        if from_initial_state and (self.head - self.first).max() > self.C:
            fail(f"an episode is longer than its environment's {self.C} positions: raise --buffer-size")
        n, first = np.zeros((2, 0), np.int64)
        while len(n) < S:
            env = torch.randint(self.N, (S,)).numpy()
            oldest, newest = (self.head[env] - self.C).clip(0), self.head[env] - 1
            share = torch.rand(S, dtype=torch.float64).numpy()
            step = oldest + (share * (newest - oldest)).astype(np.int64)
            good, begin = ~self.last[env, step % self.C], self.begin[env, step % self.C]
            # PITFALL: an episode's cue is at its first step, and sequences begin anywhere. Symptom: one in an
            #   episode's length holds the cue, the others teach to do without. Here: they begin there on
            #   request. Test: test_sac_td3.py::test_sequences_from_the_initial_state_hold_the_cue.
            if from_initial_state:
                step = begin
            good &= np.maximum(step - self.W, begin) >= oldest  # nothing of its burn-in is overwritten
            n, first = np.concatenate([n, env[good]]), np.concatenate([first, step[good]])
        return n[:S], first[:S]

    def forget_running(self):
        """The running episodes will not continue: their newest positions are o_n."""
        self.last[np.arange(self.N), (self.head - 1) % self.C] |= self.head > self.first
        self.first[:] = self.head

    def state_dict(self):
        return {"arrays": [torch.from_numpy(x) for x in self.arrays]}

    def load_state_dict(self, saved):
        if [x.shape for x in saved["arrays"]] != [x.shape for x in self.arrays]:
            fail("the saved replay has other sizes: leave out a new --num-envs, --buffer-size or --burn-in")
        for x, value in zip(self.arrays, saved["arrays"]):
            x[:] = value


def draw_lengths(args):
    """[S] steps of sequences whose episodes are long enough."""
    S, L = args.batch_size, args.seq_len
    if not args.random_seq_length or L == 1:
        return np.full(S, L)
    # PITFALL: sequences of one length, when only the last step of each trains. Symptom: good after exactly L
    #   steps, poor at an episode's first ones. Here: 1 to L, and L, which acting needs most, with a
    #   probability of its own. Test: test_sac_td3.py::test_lengths_are_those_ordered.
    short = torch.rand(S).numpy() >= args.nominal_seq_length_probability
    return np.where(short, torch.randint(1, L, (S,)).numpy(), L)


def state_at_first(trunk, batch, i):
    """In what state a trunk begins sequences: zeros, or the stored one, which it makes its own by W steps."""
    n = len(batch.state) // 2                               # i: 0 for the policy's half, 1 for the critics'
    state = batch.state[i * n:(i + 1) * n] or trunk.initial_state(batch.real.shape[1])
    *obs_before, starts_before = batch.before
    if len(starts_before):
        with torch.no_grad():
            _, state = trunk(obs_before, state, starts_before)
    return state


def polynomial(schedule, step, total_steps):
    """v(t) = (v0 - v1) (1 - t/D)^power + v1, then v1.   schedule: (v0[, v1[, power[, D]]]), D in steps"""
    defaults = (schedule[0], schedule[0], 1.0, total_steps)
    v0, v1, power, decay_steps = schedule + defaults[len(schedule):]
    return (v0 - v1) * max(0.0, 1 - step / decay_steps) ** power + v1


def check(args):
    """Refuses flags that do not fit each other."""
    if args.total_timesteps < max(args.train_every, args.num_envs):
        fail(f"--total-timesteps {args.total_timesteps} must be at least --train-every and --num-envs")
    least = (3 + (args.burn_in or 0)) * args.num_envs
    if args.buffer_size < least:
        fail(f"--buffer-size {args.buffer_size} must be at least (3 + --burn-in) x --num-envs = {least}")
    if args.burn_in is not None and args.wipe_state_every:
        fail(f"--burn-in {args.burn_in} stores what --wipe-state-every {args.wipe_state_every} wipes: leave "
             "out one of them")
    if args.autotune and args.alpha < 1e-9:
        fail(f"--alpha {args.alpha} cannot be tuned: give a larger one or --no-autotune")


def train(args, saved):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    T, N = max(1, args.train_every // args.num_envs), args.num_envs
    envs = make_envs(args, N)
    N_eval = min(N, args.eval_episodes)
    eval_envs = make_envs(args, N_eval, training=False) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array") if args.capture_video else None
    agent, device = make_agent(Agent, args, envs, saved)
    if not args.autotune:               # a fixed temperature is the flag's, not the checkpoint's
        agent.log_alpha.data.copy_(torch.tensor(args.alpha).log())
    target = copy.deepcopy(agent.critics).requires_grad_(False)
    A = len(agent.low)
    target_entropy = -A if args.target_entropy is None else args.target_entropy
    actor_parameters = [*agent.memory.parameters(), *agent.policy.parameters()]
    actor_optimizer = torch.optim.Adam(actor_parameters, fused=True)
    q_optimizer = torch.optim.Adam(agent.critics.parameters(), fused=True)
    alpha_optimizer = torch.optim.Adam([agent.log_alpha])
    optimizers = actor_optimizer, q_optimizer, alpha_optimizer

    def tensors(obs):
        return to_tensors(envs.single_observation_space, obs, "cpu")  # the replay is there

    global_step, gradient_steps = 0, 0
    stats, actor_stats = [], []                             # of gradient steps since the last row
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool)
    state = agent.initial_state(N, of_critics=args.burn_in is not None)     # tuple of [N, ...]
    replay = SequenceReplay(args.buffer_size, next_obs, torch.zeros(N, A), state, args.burn_in)
    print(f"replay: {replay.N * replay.C:,} positions, {replay.nbytes / 2**20:,.1f} MiB when full")

    if saved:
        for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        target.load_state_dict(saved["target"])
        replay.load_state_dict(saved["replay"])
        global_step, gradient_steps = saved["global_step"], saved["gradient_steps"]
        stats, actor_stats = [[x.to(device) for x in xs] for xs in saved["stats"]]
        restore_random_generators(saved)
        if envs.load_state_dict(saved["envs"]):             # our own tasks continue to the bit
            next_obs, state, next_start = saved["carried"]
            state = tuple(s.to(device) for s in state)
        else:                                               # others begin new episodes
            next_obs = tensors(envs.reset(seed=args.seed + global_step)[0])
            replay.forget_running()
    run = Run(args, SCRIPT, saved)

    def save():
        run.save(
            agent, envs, global_step, gradient_steps=gradient_steps, target=target.state_dict(),
            optimizers=[x.state_dict() for x in optimizers], replay=replay.state_dict(),
            stats=(stats, actor_stats), carried=(next_obs, state, next_start))
        if args.capture_video:
            film(agent, film_envs, run.folder / "videos" / f"{global_step}.gif", args.seed + 10_000)

    save()                                                  # from now on --resume works
    while global_step + T * N <= args.total_timesteps and not run.interrupted:
        for optimizer, schedule in zip(optimizers, (args.policy_lr, args.q_lr, args.alpha_lr), strict=True):
            optimizer.param_groups[0]["lr"] = polynomial(schedule, global_step, args.total_timesteps)

        # -------------------------------------------------------------- rollout: T steps in N environments
        for t in range(T):
            obs, start, before = next_obs, next_start, state
            if args.wipe_state_every:
                # KNOWN BUG (rl_tools gru operations_generic.h): acting wipes the state every L steps.
                #   Symptom: a perfect CountInput agent gets -230 instead of 0. Here: at episodes' starts; see
                #   --wipe-state-every. Test: test_sac_td3.py::test_wiping.
                start = start | torch.as_tensor(envs.lengths % args.wipe_state_every == 0)
            with torch.inference_mode():                    # acting is a sequence of length 1
                policy, state = agent.step(add_time(o.to(device) for o in obs), state, start[None].to(device))
                action, _ = policy.rsample()                # [1, N, A]
            action = action[0] if global_step >= args.learning_starts else 2 * torch.rand(N, A) - 1
            run.lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
            run.lap("env")

            next_obs, done = tensors(next_obs), terminated | truncated
            next_start, ended = torch.as_tensor(done), np.flatnonzero(done)
            last_obs = [tensors(infos["final_obs"][n]) for n in ended]
            replay.add(obs, action, reward, terminated, ended, last_obs, before)
            run.lap("batch")
        global_step += T * N

        # -------------------------------------------------------------- update: sequences for a gradient step
        gradient_steps_due = args.replay_ratio * (global_step - args.learning_starts)
        while gradient_steps < gradient_steps_due and replay.head.min() > 1:
            batch = replay.sample(args, device)             # [L + 1, S, ...]
            trained = batch.real[:-1] & ~(batch.real[1:] & args.mask_non_terminal)          # [L, S]
            after_start = global_step > args.policy_learning_starts
            policy_learns = after_start and gradient_steps % args.policy_frequency == 0
            # PITFALL: sequences that start from zeros, as in most recurrent replays. Symptom: what lies more
            #   than L steps back does not exist, and the first steps are asked for what nobody can know.
            #   Here: see --burn-in. Test: test_sac_td3.py::test_stored_states_are_those_of_the_whole_episode.
            state_0 = state_at_first(agent.memory, batch, 0)
            critics_0 = state_at_first(agent.critics.memory, batch, 1)
            target_0 = state_at_first(target.memory, batch, 1)
            run.lap("batch")

            # --- targets: the policy's new actions are its a~_t below and, one step later, the a~_{t+1} here
            alpha = agent.log_alpha.exp()
            with torch.set_grad_enabled(policy_learns):
                policy, _ = agent.pi(batch.obs, state_0, batch.starts)
                new_actions, logprobs = policy.rsample()    # [L + 1, S, A], [L + 1, S]
            with torch.no_grad():
                # PITFALL: targets from o_1 ... o_L only. Symptom: values do not depend on what the first step
                #   alone shows, and the policy ignores it. Here: see --include-first-step-in-targets.
                #   Test: test_sac_td3.py::test_a_cue_needs_the_first_step_in_targets.
                next_starts, next_actions, next_logprobs = batch.starts.clone(), new_actions, logprobs
                if not args.include_first_step_in_targets:
                    next_starts[1] = True
                    next_policy, _ = agent.pi(batch.obs, state_0, next_starts)
                    next_actions, next_logprobs = next_policy.rsample()
                next_h, _ = target.memory(batch.obs, target_0, next_starts)             # [L + 1, S, H]
                values, next_logprobs = torch.minimum(*target(next_h, next_actions))[1:], next_logprobs[1:]
                # KNOWN BUG (rl_tools sac operations_generic.h): the value is of step t + 1, the
                #   log-probability of t. Symptom: soft values of no policy. Here: both are of t + 1.
                #   Test: test_sac_td3.py::test_losses_equal_their_definition.
                if args.entropy_bonus and args.entropy_bonus_next_step:
                    values = values - alpha * next_logprobs
                # PITFALL: a time limit treated as death. Symptom: values too low near the limit. Here: only
                #   termination cuts the bootstrap. Test: test_sac_td3.py::test_losses_equal_their_definition.
                targets = batch.rewards[:-1] + args.gamma * ~batch.terminated[:-1] * values  # [L, S]
                if args.entropy_bonus and not args.entropy_bonus_next_step:
                    targets = targets - alpha * logprobs[:-1]

            # --- critics
            h = agent.critics.memory(batch.obs, critics_0, batch.starts)[0][:-1]        # [L, S, H]
            q1, q2 = agent.critics(h, batch.actions[:-1])   # [L, S]
            qf_loss = sum(F.mse_loss(q[trained], targets[trained]) for q in (q1, q2))  # waits
            q_optimizer.zero_grad()
            qf_loss.backward()
            qf_grad_norm = nn.utils.clip_grad_norm_(agent.critics.parameters(), args.max_grad_norm)
            q_optimizer.step()
            entropy = -logprobs[:-1][trained].mean()        # waits for the device
            measured = qf_loss / 2, q1[trained].mean(), entropy, alpha, qf_grad_norm  # waits
            stats.append(torch.stack(measured).detach())
            run.stop_if_not_finite(qf_loss.item(), global_step)  # waits for the device

            # --- policy: the gradient goes through its actions only; the critics' h are those of above
            if policy_learns:
                q = torch.minimum(*agent.critics(h.detach(), new_actions[:-1]))
                # KNOWN BUG (rl_tools sac operations_generic.h): the entropy term and the temperature also
                #   count masked steps and padding. Symptom: entropy far from its target. Here: one mask for
                #   all three. Test: test_sac_td3.py::test_losses_equal_their_definition.
                actor_loss = (alpha.detach() * logprobs[:-1] - q)[trained].mean()  # waits
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)
                actor_grad_norm = nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm)
                actor_optimizer.step()
                actor_stats.append(torch.stack([actor_loss, actor_grad_norm]).detach())
                # KNOWN BUG (rl_tools sac operations_generic.h): a fixed temperature moves all the same.
                #   Symptom: alpha of .65 where 1 was ordered, after 500 updates. Here: see --no-autotune.
                #   Test: test_sac_td3.py::test_the_temperature_is_fixed_or_moves_entropy_to_its_target.
                if args.autotune:
                    alpha_optimizer.zero_grad()
                    (alpha * (entropy.detach() - target_entropy)).backward()
                    alpha_optimizer.step()

            gradient_steps += 1
            if gradient_steps % args.target_network_frequency == 0:
                for target_parameter, parameter in zip(target.parameters(), agent.critics.parameters()):
                    target_parameter.data.lerp_(parameter.data, args.tau)
            run.lap("update")

        # -------------------------------------------------------------- log, checkpoint
        evaluates = run.passed(args.eval_every, global_step, T * N)
        if evaluates or run.passed(args.log_every, global_step, T * N):
            means = torch.stack(stats).mean(0).tolist() if stats else [np.nan] * 5
            qf_loss, qf_values, entropy, alpha, qf_grad_norm = means
            means = torch.stack(actor_stats).mean(0).tolist() if actor_stats else [np.nan] * 2
            actor_loss, actor_grad_norm = means
            stats, actor_stats = [], []
            eval_returns = eval_successes = np.array([np.nan])  # not measured
            if evaluates:
                eval_returns, _, eval_successes = play(
                    agent, eval_envs, args.eval_episodes, args.seed + 10_000)
            run.log(global_step, {
                **envs.mean_of_episodes(),
                "charts/learning_rate": actor_optimizer.param_groups[0]["lr"],
                "charts/gradient_steps": gradient_steps,
                "eval/episodic_return": eval_returns.mean(),
                "eval/return_std": eval_returns.std(),
                "eval/success": eval_successes.mean(),
                "losses/qf_loss": qf_loss,
                "losses/qf_values": qf_values,
                "losses/entropy": entropy,
                "losses/alpha": alpha,
                "losses/qf_grad_norm": qf_grad_norm,
                "losses/actor_loss": actor_loss,
                "losses/actor_grad_norm": actor_grad_norm,
            })
        if run.passed(args.checkpoint_every, global_step, T * N):
            save()
        run.lap("log")

    save()
    return run.finish()


def main(argv=None):
    args, saved = parse(Args, SCRIPT, argv)
    check(args)
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    if not args.model:
        return train(args, saved)
    envs = make_rendered(args, args.render_mode)
    agent, _ = make_agent(Agent, args, envs, saved)
    enjoy(agent, envs, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

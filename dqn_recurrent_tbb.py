"""Recurrent double DQN with tape-based batching (TBB): whole episodes end to end, one forward, a plain loss.

    python dqn_recurrent_tbb.py                                       trains popgym-RepeatPreviousEasy-v0
    python dqn_recurrent_tbb.py --env-id popgym-RepeatFirstEasy-v0 --memory mingru
    python dqn_recurrent_tbb.py --model runs/.../model.safetensors    watches the trained agent
    tensorboard --logdir runs                                         draws the curves

Double DQN: van Hasselt et al. 2016 (https://arxiv.org/abs/1509.06461). Tape-based batching: Morad et al.
2024, "Revisiting recurrent reinforcement learning with memory monoids" (https://arxiv.org/abs/2402.09900).

The idea: draw whole episodes until there are enough steps and lay them end to end on one tape. The memory
runs over it once and forgets by itself where an episode starts; the loss is that of a memoryless DQN.
dqn_recurrent_sbb.py cuts and pads instead: diff the two.

Symbols: N environments, T steps between two visits to the replay, C positions of a ring, P positions of a
tape, H hidden size, K branches of an action (1 if Discrete).
"""
import collections
import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs.vector import make_envs, make_rendered  # importing envs registers its tasks
from models import MEMORIES, Encoder, QHead, init, to_tensors
from models.cpu_speed import keep_freed_memory
from models.files import refuse_more_than_memory
from models.flags import Count, Fraction, Json, Positive, Schedule, Whole, fail, number, parse
from models.play import enjoy, film, play
from models.run_folder import Run, make_agent, restore_random_generators

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "popgym-RepeatPreviousEasy-v0"  # any Gymnasium id
    env_kwargs: Json = field(default_factory=dict)  # passed to the task's constructor
    reset_options: Json = field(default_factory=dict)  # passed to every reset(options=...)
    eval_reset_options: Json = field(default_factory=dict)  # over these in evaluations and with --model
    shrink_images: Count = 1  # each square of so many pixels becomes its mean; 1: as they are
    seed: Whole = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: Count = 1  # torch threads; more than one is worth it for images
    num_envs: Count = 16  # N
    total_timesteps: Count = 50_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "lru"  # the memory model
    hidden_size: Count = 64  # H, of the memory
    num_layers: Count = 1  # of the memory
    memory_kwargs: Json = field(default_factory=dict)  # of its layers, as '{"state_size": 32}'
    encoder_size: Whole = 0  # linear layer with ReLU between observation and memory; 0: none
    whiten_images: bool = False  # whitened pixels in place of a CNN, of numbered pictures (Views)
    mlp_size: Count = 64  # hidden layer of the action values
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory
    action_mask: bool = True  # apply the masks that the task gives, if any

    buffer_size: Count = 200_000  # positions in the replay; an episode of n steps takes n + 1
    learning_starts: Whole = 5_000  # environment steps with random actions, before any learning
    train_every: Count = 64  # environment steps between two visits to the replay
    replay_ratio: Positive = 0.015  # gradient steps per environment step
    tape_len: Count = 1_000  # steps of an update: whole episodes are drawn until there are as many
    fixed_tape: bool = False  # cut the tape at exactly tape_len positions: static shapes
    omit_first_obs: bool = False  # keep a bug of memory-monoids: targets do not know o_0
    start_e: Fraction = 1.0  # epsilon, the probability of a random action, at first
    end_e: Fraction = 0.05  # and at last
    exploration_fraction: number(float, 1e-6, 1) = 0.3  # of total_timesteps, in which epsilon falls

    learning_rate: Schedule = (1e-3,)  # schedule: initial [final [power [decay-steps]]]
    gamma: Fraction = 0.99  # discount
    n_step: Count = 1  # rewards summed before the bootstrap
    loss: Literal["huber", "mse"] = "huber"  # of the temporal-difference error
    tau: Fraction = 0.01  # share of the online network that goes into the target network; 1: copies
    target_network_frequency: Count = 1  # gradient steps between two updates of the target network
    max_grad_norm: Positive = 1.0  # gradient clipping

    log_every: Count = 1_000  # environment steps between rows of progress.csv
    eval_every: Whole = 0  # environment steps between evaluations with the greedy policy; 0: none
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


class Agent(nn.Module):
    """Encoder -> memory -> action values.   obs: tuple of leaves, [T, B, ...] each; start [T, B] bool"""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.encoder = Encoder(observation_space, args.encoder_size, whiten=args.whiten_images)
        self.memory = MEMORIES[args.memory](
            self.encoder.out_size, args.hidden_size, args.num_layers, **args.memory_kwargs)
        self.hidden = init(nn.Linear(args.hidden_size, args.mlp_size), 2**0.5)
        self.q = QHead(args.mlp_size, action_space)

    def forward(self, obs, state, start):
        """ActionValues of all steps, [T, B], and the last state."""
        y, state = self.memory(self.encoder(obs), state, start)                         # [T, B, H]
        return self.q(self.hidden(y).relu(), self.encoder.mask(obs)), state

    def greedy(self, obs, state, start):
        """The greedy actions, the next state, and numbers by name: tensors.   obs: of [B, ...]"""
        q, state = self(add_time(obs), state, start[None])
        return self.q.in_env(q.greedy()[0]), state, {name: x[0] for name, x in q.numbers().items()}

    def act(self, obs, state, start):
        """The actions of greedy() in numpy, and the next state."""
        action, state, _ = self.greedy(obs, state, start)
        return action.detach().cpu().numpy(), state         # waits for the device


def add_time(obs):
    return tuple(o[None] for o in obs)                      # leaves of [B, ...] -> [1, B, ...]


class Tape(NamedTuple):
    """Episodes end to end, [P, 1, ...]. Each ends with its last observation; beside that lies nothing."""
    obs: list  # leaves
    starts: torch.Tensor  # True where an episode begins
    actions: torch.Tensor  # [P, 1, K]
    rewards: torch.Tensor
    terminated: torch.Tensor
    real: torch.Tensor  # False beside last observations


class Replay:
    """The newest steps of N environments, a ring of C positions each, and an index of the episodes there.

    An episode of n steps takes n + 1 positions, o_0 ... o_n. What belongs to step t lies beside o_t; beside
    o_n lies nothing. The index holds the ended episodes until their first step is overwritten.
    """

    def __init__(self, size, obs, action):
        """obs, action: examples of what is added, [N, ...] each"""
        self.N, self.C = len(action), size // len(action)
        reward, flag = torch.zeros(self.N), torch.zeros(self.N, dtype=torch.bool)
        step = [x.cpu().numpy() for x in (*obs, flag, action, reward, flag)]
        self.nbytes = self.N * self.C * sum(x[0].nbytes for x in step)
        refuse_more_than_memory(self.nbytes, f"--buffer-size {size}")
        # The zeros are the system's: pages take memory when they are first written.
        self.data = [np.zeros((self.N * self.C, *x.shape[1:]), x.dtype) for x in step]
        self.inputs = self.data[:len(obs) + 1]              # the memory's: observations and start
        self.head, self.first = np.zeros((2, self.N), np.int64)  # [N] next position, episode's first
        self.arrays = [*self.data, self.head, self.first]
        self.sizes = [x.shape for x in self.arrays]
        self.index = collections.deque()                    # (environment, begins, ends)

    def add(self, obs, start, action, reward, terminated, ended, last_obs):
        """One step of every environment.   ended [E]: whose episodes ended; last_obs: their o_n"""
        step = *obs, start, action, reward, terminated
        now = self.row(np.arange(self.N), self.head)        # [N]
        for x, value in zip(self.data, step, strict=True):
            x[now] = torch.as_tensor(value).cpu()           # waits for the device
        self.head += 1
        for n, leaves in zip(ended.tolist(), last_obs, strict=True):
            begin, end = int(self.first[n]), int(self.head[n])
            for x, value in zip(self.inputs, (*leaves, False), strict=True):
                x[self.row(n, end)] = value                 # o_n, which starts nothing
            self.index.append((n, begin, end))
            self.head[n] = self.first[n] = end + 1
        while self.index and not self.whole(*self.index[0][:2]):
            self.index.popleft()

    def row(self, n, position):
        """Where a position of environment n lies in the data: its ring is C rows."""
        return n * self.C + position % self.C

    def whole(self, n, first):
        """Whether position `first` of environment n is not overwritten yet; then no later one is."""
        return first >= self.head[n] - self.C

    def sample(self, tape_len, fixed, device):
        """Episodes drawn uniformly, with replacement, until there are tape_len steps.   fixed: cut there"""
        # KNOWN BUG (memory-monoids buffer.py): the two newest episodes are never drawn. Symptom: fewer than
        #   three raise an error. Here: every whole episode has the same chance.
        #   Test: test_replay.py::test_episodes_are_drawn_uniformly.
        rows, steps = [], 0
        while steps < tape_len:
            n, first, end = self.index[torch.randint(len(self.index), ()).item()]
            if self.whole(n, first):
                rows.append(self.row(n, np.arange(first, end + 1)))             # o_0 ... o_n
                steps += end - first
        rows = np.concatenate(rows)[:, None]                # [P, 1]
        if fixed:
            rows = rows[:tape_len]
        drawn = [torch.from_numpy(x[rows]).to(device) for x in self.data]
        *obs, starts, actions, rewards, terminated = drawn
        real = ~starts.roll(-1, 0)  # no step before a start; the last row's successor is row 0, a start
        return Tape(obs, starts, actions, rewards, terminated, real)

    def forget_running(self):
        """The running episodes will not continue: their positions are lost."""
        self.first[:] = self.head

    def state_dict(self):
        return {
            "sizes": self.sizes, "arrays": [torch.from_numpy(x) for x in self.arrays],
            "index": torch.tensor(self.index, dtype=torch.long)}

    def load_state_dict(self, saved):
        if saved["sizes"] != self.sizes:
            fail("the saved replay has other sizes: leave out what differs of --num-envs and --buffer-size")
        for x, value in zip(self.arrays, saved["arrays"]):
            x[:] = value
        self.index.extend(map(tuple, saved["index"].tolist()))


def td_targets(rewards, terminated, real, values, gamma, n_step):
    """y_t = r_t + gamma r_{t+1} + ... + gamma^n V(o_{t+n}), fewer rewards where a piece ends before.   [P, B]

    values[t] = V(o_t). real[t]: there is a step t, and row t + 1 is its next observation. Elsewhere y_t is
    V(o_t). Each pass looks one step further: after k passes y holds k rewards and V(o_{t+k}).
    """
    # PITFALL: a time limit treated as death. Symptom: values too low near the limit. Here: only termination
    #   cuts the bootstrap. Test: test_dqn.py::test_td_targets_equal_their_definition.
    y = values
    for _ in range(n_step):
        y = torch.where(real, rewards + gamma * ~terminated * y.roll(-1, 0), values)
    return y


def polynomial(schedule, step, total_steps):
    """v(t) = (v0 - v1) (1 - t/D)^power + v1, then v1.   schedule: (v0[, v1[, power[, D]]]), D in steps"""
    defaults = (schedule[0], schedule[0], 1.0, total_steps)
    v0, v1, power, decay_steps = schedule + defaults[len(schedule):]
    return (v0 - v1) * max(0.0, 1 - step / decay_steps) ** power + v1


def epsilon_at(step, args):
    """Probability of a random action: 1 before learning starts, then on the way from start_e to end_e."""
    if step < args.learning_starts:
        return 1.0
    decay_steps = args.exploration_fraction * args.total_timesteps
    return polynomial((args.start_e, args.end_e), step, decay_steps)


def check(args):
    """Refuses flags that do not fit each other."""
    if args.total_timesteps < max(args.train_every, args.num_envs):
        fail(f"--total-timesteps {args.total_timesteps} is less than the steps before the first visit to "
             f"the replay, --train-every {args.train_every} or --num-envs {args.num_envs}")
    if args.buffer_size < 2 * args.num_envs:
        fail(f"--buffer-size {args.buffer_size} must be at least {2 * args.num_envs}: 2 positions for each "
             f"of --num-envs {args.num_envs}")


def train(args, saved):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    T, N = max(1, args.train_every // args.num_envs), args.num_envs
    envs = make_envs(args, N)
    N_eval = min(N, args.eval_episodes)
    eval_envs = make_envs(args, N_eval, training=False) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array") if args.capture_video else None
    agent, device = make_agent(Agent, args, envs, saved)
    target = copy.deepcopy(agent).requires_grad_(False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate[0], fused=True)

    def tensors(obs):
        return to_tensors(envs.single_observation_space, obs, "cpu")        # the replay is there

    global_step, gradient_steps, stats = 0, 0, []   # stats: of gradient steps since the last row
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    action = torch.zeros(N, len(agent.q.sizes), dtype=torch.long)           # [N, K]
    replay = Replay(args.buffer_size, next_obs, action)
    print(f"replay: {replay.N * replay.C:,} positions, {replay.nbytes / 2**20:,.1f} MiB when full")

    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        target.load_state_dict(saved["target"])
        replay.load_state_dict(saved["replay"])
        global_step, gradient_steps = saved["global_step"], saved["gradient_steps"]
        stats = [x.to(device) for x in saved["stats"]]
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
            optimizer=optimizer.state_dict(), replay=replay.state_dict(), stats=stats,
            carried=(next_obs, state, next_start))
        if args.capture_video:
            film(agent, film_envs, run.folder / "videos" / f"{global_step}.gif", args.seed + 10_000)

    save()                                                  # from now on --resume works
    while global_step + T * N <= args.total_timesteps and not run.interrupted:
        learning_rate = polynomial(args.learning_rate, global_step, args.total_timesteps)
        epsilon = epsilon_at(global_step, args)
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        for t in range(T):
            obs, start = next_obs, next_start
            with torch.inference_mode():                    # acting is a sequence of length 1,
                seen = add_time(o.to(device) for o in obs)  # also when the action is random
                q, state = agent(seen, state, start[None].to(device))
                action = q.epsilon_greedy(epsilon)[0]       # [N, K]
            run.lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.q.to_env(action))
            run.lap("env")

            next_obs, done = tensors(next_obs), terminated | truncated
            next_start, ended = torch.as_tensor(done), np.flatnonzero(done)
            last_obs = [tensors(infos["final_obs"][n]) for n in ended]
            replay.add(obs, start, action, reward, terminated, ended, last_obs)
            run.lap("batch")
        global_step += T * N

        # -------------------------------------------------------------- update: one tape a gradient step
        gradient_steps_due = args.replay_ratio * (global_step - args.learning_starts)
        while gradient_steps < gradient_steps_due and replay.index:
            batch = replay.sample(args.tape_len, args.fixed_tape, device)           # [P, 1, ...]
            state_0 = agent.memory.initial_state(1)
            run.lap("batch")

            # One online forward gives q and the best next action: o_{t+1} is in the next row.
            q, _ = agent(batch.obs, state_0, batch.starts)  # [P, 1]
            with torch.no_grad():
                # KNOWN BUG (memory-monoids losses.py): target histories are o_1, o_2, ... with a fresh memory
                #   at o_1. Symptom: targets cannot know what only o_0 shows. Here: see --omit-first-obs.
                #   Test: test_dqn.py::test_target_histories_contain_the_first_observation.
                next_q, target_starts = q, batch.starts
                if args.omit_first_obs:
                    target_starts = batch.starts.roll(1, 0)
                    next_q, _ = agent(batch.obs, state_0, target_starts)
                target_q, _ = target(batch.obs, state_0, target_starts)
                values = target_q.of(next_q.greedy())       # double DQN
                targets = td_targets(
                    batch.rewards, batch.terminated, batch.real, values, args.gamma, args.n_step)
            # The memory did the rest: from here on this is the loss of a memoryless DQN on `steps` steps.
            # KNOWN BUG (memory-monoids losses.py): the segment arm takes huber(mean |error|), the tape arm
            #   mean huber(error). Symptom: L1 is compared with L2, not segments with tape. Here: mean huber.
            #   Test: test_dqn.py::test_segments_as_long_as_episodes_equal_the_tape.
            q_taken = q.of(batch.actions)
            loss_of = F.smooth_l1_loss if args.loss == "huber" else F.mse_loss
            error = loss_of(q_taken, targets, reduction="none")
            steps = batch.real.sum()
            loss = (error * batch.real).sum() / steps

            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            q_mean = (q_taken * batch.real).sum() / steps
            stats.append(torch.stack([loss, q_mean, grad_norm, steps]).detach())
            gradient_steps += 1
            if gradient_steps % args.target_network_frequency == 0:
                for target_parameter, parameter in zip(target.parameters(), agent.parameters()):
                    target_parameter.data.lerp_(parameter.data, args.tau)
            run.lap("update")

        if not replay.index and (replay.head - replay.first).max() > replay.C:
            fail(f"episodes do not fit: each of --num-envs {N} environments has --buffer-size / --num-envs = "
                 f"{replay.C} positions; raise --buffer-size")

        # -------------------------------------------------------------- log, checkpoint
        if stats:
            run.stop_if_not_finite(stats[-1].sum().item(), global_step)
        evaluates = run.passed(args.eval_every, global_step, T * N)
        if evaluates or run.passed(args.log_every, global_step, T * N):
            means = torch.stack(stats).mean(0).tolist() if stats else [np.nan] * 4
            td_loss, q_values, grad_norm, transitions = means
            stats = []
            eval_returns = eval_successes = np.array([np.nan])              # not measured
            if evaluates:
                eval_returns, _, eval_successes = play(
                    agent, eval_envs, args.eval_episodes, args.seed + 10_000)
            run.log(global_step, {
                **envs.mean_of_episodes(),
                "charts/learning_rate": learning_rate,
                "charts/epsilon": epsilon,
                "charts/gradient_steps": gradient_steps,
                "charts/transitions": transitions,
                "eval/episodic_return": eval_returns.mean(),
                "eval/return_std": eval_returns.std(),
                "eval/success": eval_successes.mean(),
                "losses/td_loss": td_loss,
                "losses/q_values": q_values,
                "losses/grad_norm": grad_norm,
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

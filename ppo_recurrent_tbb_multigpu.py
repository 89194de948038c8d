"""ppo_recurrent_tbb.py divided between several devices by torchrun, one process each: diff the two.

    torchrun --standalone --nproc_per_node=2 ppo_recurrent_tbb_multigpu.py
    python ppo_recurrent_tbb_multigpu.py --model runs/.../model.safetensors       watches the trained agent

Every process steps its share of the environments, as in CleanRL's ppo_atari_multigpu.py. Gradients are
averaged, advantages and statistics are those of all environments. Up to rounding the weights are those of one
process with the same batch: losses are means over equally many steps in each. On --device cpu they share it.

Symbols: T rollout steps, N environments of this process, P earlier steps of unfinished episodes
(--full-episodes), b columns of a minibatch, H hidden size. Sequences are time-major: [T, N, ...].
"""
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed
import torch.nn as nn

from envs.vector import make_envs, make_rendered  # importing envs registers its tasks
from models import MEMORIES, Encoder, PolicyHead, RunningMeanStd, init, linear_scan, to_tensors
from models.cpu_speed import keep_freed_memory
from models.flags import Count, Fraction, Json, Positive, Schedule, Whole, fail, parse
from models.play import enjoy, film, play
from models.run_folder import Run, make_agent, restore_random_generators

SCRIPT = Path(__file__).stem
RANK = int(os.getenv("RANK", 0))  # the number of this process, as torchrun sets it
LOCAL_RANK = int(os.getenv("LOCAL_RANK", 0))  # its number on this machine
WORLD_SIZE = int(os.getenv("WORLD_SIZE", 1))  # how many processes there are


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
    num_envs: Count = 64  # in all: the processes divide them
    num_steps: Count = 64  # T, steps per environment and rollout
    total_timesteps: Count = 400_000  # environment steps

    memory: Literal[tuple(MEMORIES)] = "lru"  # the memory model
    hidden_size: Count = 64  # H, of the memory
    num_layers: Count = 1  # of the memory
    memory_kwargs: Json = field(default_factory=dict)  # of its layers, as '{"state_size": 32}'
    encoder_size: Whole = 0  # linear layer with ReLU between observation and memory; 0: none
    whiten_images: bool = False  # whitened pixels in place of a CNN, of numbered pictures (Views)
    mlp_size: Count = 64  # hidden layer of policy and of value
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory
    action_mask: bool = True  # apply the masks that the task gives, if any
    full_episodes: bool = False  # the tape also holds the steps since the start of every episode
    max_prefix: Whole = 1024  # with --full-episodes: at most so many earlier steps in all columns
    reset_state: bool = True  # whether the memory forgets between episodes

    learning_rate: Schedule = (2e-3, 0.0)  # schedule: initial [final [power [decay-steps]]]
    ent_coef: Schedule = (1e-2, 0.0)  # schedule of the entropy bonus
    clip_coef: Schedule = (0.2,)  # schedule of PPO's clip range
    gamma: Fraction = 0.99  # discount
    gae_lambda: Fraction = 0.95  # of generalized advantage estimation
    num_minibatches: Count = 4  # minibatches of whole columns per epoch
    update_epochs: Count = 3  # passes over the rollout
    norm_adv: bool = True  # normalise advantages in each minibatch, over its steps
    clip_vloss: bool = True  # clip the value loss as PPO clips the policy's
    vf_coef: Positive = 0.5  # weight of the value loss
    max_grad_norm: Positive = 0.5  # gradient clipping
    target_kl: Positive | None = None  # stop the epochs of an update once approx_kl is beyond this
    norm_obs: bool = False  # normalise vector observations by running statistics
    norm_reward: bool = False  # divide rewards by the running std of the discounted return

    eval_every: Whole = 0  # environment steps between evaluations without sampling; 0: none
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
    """Encoder -> memory -> policy and value.   obs: tuple of leaves (models/encoder.py), [T, B, ...]

    start [T, B] bool: obs[t, b] opens an episode; the memory forgets, then reads it (models/memory.py).
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.encoder = Encoder(observation_space, args.encoder_size, args.norm_obs, args.whiten_images)
        self.memory = MEMORIES[args.memory](
            self.encoder.out_size, args.hidden_size, args.num_layers, **args.memory_kwargs)
        # DEVIATION (recurrent-ppo model.py): no shared layer between memory and the two hidden layers, policy
        #   gain 0.01 as CleanRL. Test: test_models.py::test_initial_policy_is_uniform.
        self.policy_hidden = init(nn.Linear(args.hidden_size, args.mlp_size), 2**0.5)
        self.value_hidden = init(nn.Linear(args.hidden_size, args.mlp_size), 2**0.5)
        self.policy = PolicyHead(args.mlp_size, action_space)
        self.value = init(nn.Linear(args.mlp_size, 1), 1.0)
        self.return_stats = RunningMeanStd()                # scales rewards, with --norm-reward
        self.reset_state = args.reset_state

    def forward(self, obs, state, start, prefix=0):
        """Distribution and value of the steps after the first `prefix`, [T, B] each, and the last state."""
        y, state = self.memory(self.encoder(obs), state, start & self.reset_state)  # [P + T, B, H]
        y = y[prefix:]                                      # [T, B, H]
        dist = self.policy(self.policy_hidden(y).relu(), self.encoder.mask(obs, prefix))
        value = self.value(self.value_hidden(y).relu()).squeeze(-1)
        return dist, value, state

    def greedy(self, obs, state, start):
        """The most likely actions, the next state, and numbers by name: tensors.   obs: of [B, ...]"""
        dist, value, state = self(add_time(obs), state, start[None])
        numbers = {"value": value, **dist.numbers()}
        return self.policy.in_env(dist.mode()[0]), state, {name: x[0] for name, x in numbers.items()}

    def act(self, obs, state, start):
        """The actions of greedy() in numpy, and the next state."""
        action, state, _ = self.greedy(obs, state, start)
        return action.detach().cpu().numpy(), state         # waits for the device


def add_time(obs):
    return tuple(o[None] for o in obs)                      # leaves of [B, ...] -> [1, B, ...]


def gae(rewards, values, starts, final_values, next_value, next_start, gamma, lam):
    """Generalized advantage estimation, Schulman et al. 2016. Memory changes nothing here. [T, N], next_* [N]

    A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V(o_{t+1}) - V(o_t),   cut at episodes' ends.
    final_values[t] is V(last observation) where a time limit cut the episode at t, and 0 elsewhere.
    """
    next_values = torch.cat([values[1:], next_value[None]])                         # [T, N]
    goes_on = ~torch.cat([starts[1:], next_start[None]])    # [T, N] whether the episode continues
    # KNOWN BUG (CleanRL ppo_atari_lstm.py, recurrent-ppo's wrappers): a time limit treated as death.
    #   Symptom: values too low near the limit. Here: final_values.
    #   Test: test_ppo.py::test_gae_equals_its_definition.
    deltas = rewards + gamma * (goes_on * next_values + final_values) - values
    decays = gamma * lam * goes_on                          # [T, N]
    advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages


def polynomial(schedule, step, total_steps):
    """v(t) = (v0 - v1) (1 - t/D)^power + v1, then v1.   schedule: (v0[, v1[, power[, D]]]), D in steps"""
    defaults = (schedule[0], schedule[0], 1.0, total_steps)
    v0, v1, power, decay_steps = schedule + defaults[len(schedule):]
    return (v0 - v1) * max(0.0, 1 - step / decay_steps) ** power + v1


def age_of(starts, next_start):
    """[N] steps of the running episode that a column of [T, N] ends with; 0 where a new one starts next."""
    row = torch.arange(len(starts), device=starts.device)[:, None]
    last_start = torch.where(starts, row, 0).amax(0)  # [N] 0 if it began before the tape
    return torch.where(next_start, 0, len(starts) - last_start)


@torch.no_grad()
def values_of(agent, last_obs, state):
    """[c] values of last observations of c episodes.   last_obs: c tuples of leaves, state: of [c, ...]"""
    obs = tuple(torch.stack(leaf) for leaf in zip(*last_obs))                   # leaves of [c, ...]
    no_start = torch.zeros(1, len(last_obs), dtype=torch.bool, device=obs[0].device)
    _, value, _ = agent(add_time(obs), state, no_start)     # still the same episodes
    return value[0]


def check(args):
    """Refuses flags that do not fit each other."""
    if args.num_envs * args.num_steps > args.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, "
             f"--num-envs x --num-steps = {args.num_envs * args.num_steps}")
    if args.num_envs % WORLD_SIZE:
        fail(f"--num-envs {args.num_envs} must be a multiple of the number of processes, {WORLD_SIZE}")
    if args.num_minibatches > args.num_envs // WORLD_SIZE:
        fail(f"--num-minibatches {args.num_minibatches} do not fit: minibatches are made of whole columns, "
             f"and a process has {args.num_envs // WORLD_SIZE} of --num-envs; lower the one, raise the other")
    if args.device in ("auto", "cuda") and 1 <= torch.cuda.device_count() <= LOCAL_RANK:
        fail(f"--device {args.device}: fewer GPUs than processes; lower --nproc_per_node or use --device cpu")


def join_processes(args):
    if WORLD_SIZE == 1:
        return
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(LOCAL_RANK)                   # "cuda" now means this one
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to all and may repeat them:
        signal.signal(number, signal.SIG_IGN)       # Run takes the first, of rank 0's


def seed_processes(seed):
    if RANK > 0:                                            # the same weights as rank 0, other actions
        torch.manual_seed(seed + RANK)


def leave_processes():
    """Python's end would now and then abort a process: gloo's threads live on and may free a tensor."""
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    if RANK > 0:
        os._exit(0)


def gather(x):                                          # [T, N, ...] -> [T, WORLD_SIZE * N, ...]
    """The columns of all processes side by side, as one process would have them. Waits for all to call it."""
    if WORLD_SIZE == 1:
        return x
    columns = list(x.new_empty(WORLD_SIZE, *x.shape))
    torch.distributed.all_gather(columns, x.contiguous())
    return torch.cat(columns, dim=1)


def any_process(flag):
    return gather(torch.tensor([[flag]])).any()


def average_gradients(parameters):
    """The mean over all processes, as one flat vector."""
    if WORLD_SIZE == 1:
        return
    grads = [p.grad for p in parameters]
    flat = nn.utils.parameters_to_vector(grads)
    torch.distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / WORLD_SIZE, grads)


def mean_of_processes(stats):
    return gather(torch.stack(stats).mean(0)[:, None]).mean(1).tolist()


def mean_of_episodes(recent):
    """Means over the last 100 episodes of every process, and over how many; nan, and 0, before one ended."""
    episodes = torch.full((100, 1, 3), torch.nan, dtype=torch.float64)
    if recent:
        episodes[:len(recent), 0] = torch.tensor(list(recent), dtype=torch.float64)
    episodes = gather(episodes)                             # [100, WORLD_SIZE, 3]
    episodic_return, length, success = episodes.nanmean((0, 1)).tolist()
    return {"charts/episodic_return": episodic_return, "charts/episodic_length": length,
            "charts/success": success, "charts/episodes": (~episodes[..., 0].isnan()).sum().item()}


class NoRun:
    """What the processes after the first have in place of a run folder: nothing is written."""

    interrupted = False

    def stop_if_not_finite(self, loss, global_step):
        if not math.isfinite(loss):
            sys.exit(1)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def train(args, saved):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    join_processes(args)
    T, N = args.num_steps, args.num_envs // WORLD_SIZE
    batch_size, env_seed = T * args.num_envs, args.seed + RANK * N  # of all processes; of this one
    envs = make_envs(args, N)
    N_eval = min(N, args.eval_episodes)
    eval_envs = make_envs(args, N_eval, training=False) if args.eval_every else None
    film_envs = make_rendered(args, "rgb_array") if args.capture_video else None
    agent, device = make_agent(Agent, args, envs, saved)
    parameters = list(agent.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate[0], fused=True)

    def tensors(obs):
        return to_tensors(envs.single_observation_space, obs, device)

    global_step = 0
    next_obs = tensors(envs.reset(seed=env_seed)[0])        # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool, device=device)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    discounted = torch.zeros(N, device=device)          # discounted return so far (--norm-reward)
    tape_state = state                                      # the memory before the tape
    prefix_obs = tuple(o.new_zeros(0, *o.shape) for o in next_obs)          # leaves of [P, N, ...]
    prefix_starts = next_start.new_zeros(0, N)              # [P, N]

    obs = tuple(o.new_zeros(T, *o.shape) for o in next_obs)                 # leaves of [T, N, ...]
    action_shape, action_dtype = agent.policy.action_shape, agent.policy.action_dtype
    actions = torch.zeros(T, N, *action_shape, dtype=action_dtype, device=device)
    logprobs, rewards, values, final_values = torch.zeros(4, T, N, device=device)
    starts = torch.zeros(T, N, dtype=torch.bool, device=device)

    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        global_step = saved["global_step"]
        restore_random_generators(saved)
        if WORLD_SIZE == 1 and envs.load_state_dict(saved["envs"]):     # only rank 0's are saved
            carried = [tuple(x.to(device) for x in xs) for xs in saved["carried"]]
            next_obs, state, tape_state, prefix_obs, (prefix_starts, next_start, discounted) = carried
        else:                                               # others begin new episodes
            next_obs = tensors(envs.reset(seed=env_seed + global_step)[0])
    seed_processes(args.seed + global_step)
    run = Run(args, SCRIPT, saved) if RANK == 0 else NoRun()

    def save():
        carried = next_obs, state, tape_state, prefix_obs, (prefix_starts, next_start, discounted)
        run.save(agent, envs, global_step, optimizer=optimizer.state_dict(), carried=carried)
        if args.capture_video and RANK == 0:
            film(agent, film_envs, run.folder / "videos" / f"{global_step}.gif", args.seed + 10_000)

    save()                                                  # from now on --resume works
    while global_step + batch_size <= args.total_timesteps and not any_process(run.interrupted):
        learning_rate = polynomial(args.learning_rate, global_step, args.total_timesteps)
        ent_coef = polynomial(args.ent_coef, global_step, args.total_timesteps)
        clip_coef = polynomial(args.clip_coef, global_step, args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        P = len(prefix_starts)
        if P:                                               # the state of unfinished episodes,
            with torch.no_grad():                           # recomputed with the current weights
                _, _, state = agent(prefix_obs, tape_state, prefix_starts)
            state = tuple(s.clone() for s in state)         # not a view of the whole prefix
        final_values.zero_()
        for t in range(T):
            for o, next_o in zip(obs, next_obs):
                o[t] = next_o
            starts[t] = next_start
            with torch.inference_mode():                    # acting is a sequence of length 1
                dist, value, state = agent(add_time(next_obs), state, next_start[None])
                action = dist.sample()                      # [1, N, ...]
                actions[t], logprobs[t], values[t] = action[0], dist.log_prob(action)[0], value[0]
            run.lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.policy.to_env(action[0]))
            run.lap("env")

            next_obs, rewards[t] = tensors(next_obs), torch.as_tensor(reward)
            next_start = torch.as_tensor(terminated | truncated, device=device)
            late = np.flatnonzero(truncated & ~terminated)  # ended by a time limit, not by death
            if len(late):
                last_obs = [tensors(o) for o in infos["final_obs"][late]]
                final_values[t, late] = values_of(agent, last_obs, tuple(s[late] for s in state))
        global_step += batch_size

        # -------------------------------------------------------------- targets
        if args.norm_reward:
            discounted_returns = linear_scan(args.gamma * ~starts, rewards, discounted)  # [T, N]
            discounted = discounted_returns[-1]
            agent.return_stats.update(gather(discounted_returns))
            rewards /= agent.return_stats.var.sqrt().float() + 1e-8
        with torch.no_grad():
            _, next_value, _ = agent(add_time(next_obs), state, next_start[None])
        advantages = gae(
            rewards, values, starts, final_values, next_value[0], next_start,
            gamma=args.gamma, lam=args.gae_lambda)
        returns = advantages + values                       # [T, N]

        # -------------------------------------------------------------- batch: columns of tape, as they are
        # With --full-episodes the tape begins P steps earlier. In some columns these belong to episodes that
        # have ended: no loss is taken there, and the memory forgets them at the next start.
        tape_obs = tuple(torch.cat(pair) for pair in zip(prefix_obs, obs))      # of [P + T, N, ...]
        tape_starts = torch.cat([prefix_starts, starts])    # [P + T, N]
        # PITFALL: starting columns from initial_state() or the newest state, not tape_state, trains a policy
        #   that never acted. Symptom: logratio != 0 before the first gradient step; the curve may look fine.
        #   Test: test_ppo_recurrent_tbb.py::test_pitfall_columns_from_another_state.
        run.lap("batch")

        # -------------------------------------------------------------- update: minibatches of whole columns
        first_logratio, stats = None, []
        for epoch in range(args.update_epochs):
            for mb in torch.randperm(N, device=device).tensor_split(args.num_minibatches):  # [b] columns
                mb_obs = tuple(o[:, mb] for o in tape_obs)
                mb_state = tuple(s[mb] for s in tape_state)
                dist, newvalue, _ = agent(mb_obs, mb_state, tape_starts[:, mb], P)          # [T, b]
                # The memory did the rest: from here on this is the loss of a memoryless PPO on T b steps.
                logratio = dist.log_prob(actions[:, mb]) - logprobs[:, mb]
                ratio = logratio.exp()
                if first_logratio is None:              # no gradient step yet: 0 but for rounding
                    first_logratio = logratio.abs().max().item()  # waits for the device

                mb_advantages = advantages[:, mb]
                if args.norm_adv:
                    of_all = gather(mb_advantages)          # [T, WORLD_SIZE * b]
                    mb_advantages = (mb_advantages - of_all.mean()) / (of_all.std(correction=0) + 1e-8)
                clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()

                v_loss = (newvalue - returns[:, mb]) ** 2
                if args.clip_vloss:
                    v_clipped = values[:, mb] + (newvalue - values[:, mb]).clamp(-clip_coef, clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - returns[:, mb]) ** 2)
                v_loss = 0.5 * v_loss.mean()
                entropy = dist.entropy().mean()
                loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                average_gradients(parameters)
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
                    stats.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm]))
            if args.target_kl is not None and gather(approx_kl.view(1, 1)).mean() > args.target_kl:  # waits
                break
        if args.norm_obs:                                   # only now: training saw what acting saw
            agent.encoder.update_stats(tuple(gather(o).flatten(0, 1) for o in obs))

        # -------------------------------------------------------------- next tape: it begins in this one
        P = 0
        if args.full_episodes:                          # from the first step of the oldest episode
            oldest = int(age_of(tape_starts & args.reset_state, next_start & args.reset_state).max())  # waits
            P = min(args.max_prefix, oldest)
        begin = len(tape_starts) - P
        if P == 0:
            tape_state = state
        elif P < oldest:                            # --max-prefix cuts: the state there, not stale
            with torch.no_grad():
                _, _, tape_state = agent(tuple(o[:begin] for o in tape_obs), tape_state, tape_starts[:begin])
            tape_state = tuple(s.clone() for s in tape_state)
        # Otherwise every running episode starts on the next tape and forgets tape_state, whatever it is.
        prefix_obs = tuple(o[begin:].clone() for o in tape_obs)
        prefix_starts = tape_starts[begin:].clone()
        run.lap("update")

        # -------------------------------------------------------------- log, checkpoint
        pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm = mean_of_processes(stats)
        first_logratio = gather(torch.tensor([[first_logratio]])).max().item()
        run.stop_if_not_finite(pg_loss + v_loss + grad_norm, global_step)
        run.watch_first_logratio(first_logratio)
        eval_returns = eval_successes = np.array([np.nan])  # not measured
        if run.passed(args.eval_every, global_step, batch_size):
            eval_returns, _, eval_successes = play(
                agent, eval_envs, args.eval_episodes, args.seed + 10_000)
        run.log(global_step, {
            **mean_of_episodes(envs.recent),
            "charts/learning_rate": learning_rate,
            "eval/episodic_return": eval_returns.mean(),
            "eval/return_std": eval_returns.std(),
            "eval/success": eval_successes.mean(),
            "losses/policy_loss": pg_loss,
            "losses/value_loss": v_loss,
            "losses/entropy": entropy,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/grad_norm": grad_norm,
            "losses/explained_variance": 1 - (gather(advantages).var() / gather(returns).var()).item(),
            "debug/first_logratio": first_logratio,
        })
        if run.passed(args.checkpoint_every, global_step, batch_size):
            save()
        run.lap("log")

    leave_processes()
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

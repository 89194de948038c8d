"""Recurrent PPO with segment-based batching (SBB): truncated BPTT, stored states, padding masked.

    python ppo_recurrent_sbb.py                                       trains PocMemory-v0 in seconds
    python ppo_recurrent_sbb.py --env-id CartPoleMasked-v0 --memory lstm --seq-len 8
    python ppo_recurrent_sbb.py --model runs/.../model.safetensors    watches the trained agent
    tensorboard --logdir runs                                         draws the curves

PPO: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347). The recurrent details follow Pleines et al.
2022, "Memory Gym", and its baseline recurrent-ppo-truncated-bptt.

The idea: act for T steps in N environments. Cut the rollout into segments of at most L steps of one episode,
and run the memory over each segment from the state that it had while acting. The gradient flows through at
most L steps (BPTT is backpropagation through time). ppo_recurrent_tbb.py does not cut: diff the two.

Symbols: T rollout steps, N environments, L segment length, S segments, b segments and M real (unpadded) steps
of a minibatch, H hidden size. Sequences are time-major: [T, N, ...], [L, S, ...].
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from envs.vector import make_envs, make_rendered  # importing envs registers its tasks
from models import MEMORIES, Encoder, PolicyHead, RunningMeanStd, init, linear_scan, to_tensors
from models.cpu_speed import keep_freed_memory
from models.flags import Count, Fraction, Json, Positive, Schedule, Whole, fail, parse
from models.play import enjoy, film, play
from models.run_folder import Run, make_agent, restore_random_generators

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "PocMemory-v0"  # any Gymnasium id
    env_kwargs: Json = field(default_factory=dict)  # passed to the task's constructor
    reset_options: Json = field(default_factory=dict)  # passed to every reset(options=...)
    eval_reset_options: Json = field(default_factory=dict)  # over these in evaluations and with --model
    shrink_images: Count = 1  # each square of so many pixels becomes its mean; 1: as they are
    seed: Whole = 1  # of environments, network and sampling
    device: str = "auto"  # auto (cuda if there is one), cpu, cuda, cuda:1
    num_threads: Count = 1  # torch threads; more than one is worth it for images
    num_envs: Count = 16  # N
    num_steps: Count = 128  # T, steps per environment and rollout
    total_timesteps: Count = 61_440  # environment steps

    memory: Literal[tuple(MEMORIES)] = "gru"  # the memory model
    hidden_size: Count = 32  # H, of the memory
    num_layers: Count = 1  # of the memory
    memory_kwargs: Json = field(default_factory=dict)  # of its layers, as '{"state_size": 32}'
    encoder_size: Whole = 0  # linear layer with ReLU between observation and memory; 0: none
    whiten_images: bool = False  # whitened pixels in place of a CNN, of numbered pictures (Views)
    mlp_size: Count = 64  # hidden layer of policy and of value
    prev_action: bool = False  # feed the previous action to the memory
    prev_reward: bool = False  # feed the previous reward to the memory
    action_mask: bool = True  # apply the masks that the task gives, if any
    reset_state: bool = True  # whether the memory forgets between episodes
    seq_len: int = 8  # L, the length of truncated BPTT; -1: whole episodes in the rollout
    burn_in: Whole = 0  # steps before a segment that refresh its state (R2D2); at most seq-len

    learning_rate: Schedule = (3e-4,)  # schedule: initial [final [power [decay-steps]]]
    ent_coef: Schedule = (1e-3, 1e-4)  # schedule of the entropy bonus
    clip_coef: Schedule = (0.2,)  # schedule of PPO's clip range
    gamma: Fraction = 0.99  # discount
    gae_lambda: Fraction = 0.95  # of generalized advantage estimation
    num_minibatches: Count = 8  # minibatches of whole segments per epoch
    update_epochs: Count = 4  # passes over the rollout
    norm_adv: bool = True  # normalise advantages in each minibatch, over its real steps
    clip_vloss: bool = True  # clip the value loss as PPO clips the policy's
    vf_coef: Positive = 0.1  # weight of the value loss
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

    def forward(self, obs, state, start, mask=None):
        """Distribution and value, [T, B] each, and the last state.

        With mask [L, b], obs holds the M real steps only, [M, ...], and so do the outputs: padding exists
        between the two lines that make and drop it, in the memory, and nowhere else.
        """
        x = self.encoder(obs)                               # [T, B, F] or [M, F]
        if mask is not None:
            # KNOWN BUG (recurrent-ppo readme): reshape to (L, b) what is ordered (b, L). Symptom: no better
            #   than a random agent for any L > 1. Here: steps go where the mask says.
            #   Test: test_ppo_recurrent_sbb.py::test_classic_bug_reshape.
            x = x.new_zeros(*mask.shape, x.shape[-1]).index_put_((mask,), x)  # [L, b, F], waits
        y, state = self.memory(x, state, start & self.reset_state)                  # [T, B, H]
        if mask is not None:
            y = y[mask]                                     # [M, H], waits for the device
        dist = self.policy(self.policy_hidden(y).relu(), self.encoder.mask(obs))
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


def cut_segments(starts, L):
    """Cuts a rollout into S segments, each of at most L steps of one episode.   starts [T, N] bool

    A segment begins at t = 0, at every episode start, and L steps after the last cut. Returned as indices:
    x[when, col] is [L, S, ...] for any rollout tensor x [T, N, ...]; mask [L, S] is False on padding.
    L shrinks to the longest segment.
    """
    (T, N), device = starts.shape, starts.device
    t = torch.arange(T, device=device)[:, None]             # [T, 1]
    episode_start = torch.where(starts, t, 0).cummax(dim=0).values                  # [T, N]
    is_cut = (t - episode_start) % L == 0                   # [T, N]
    col, first = is_cut.T.nonzero().unbind(1)               # [S] each: column, first step; waits
    place = col * T + first                                 # [S] with the columns end to end
    length = place.diff(append=place.new_tensor([T * N]))  # [S] up to the next cut; t = 0 is always one
    # KNOWN BUG (recurrent-ppo buffer.py:161): pads to the longest *episode*, not segment. Symptom: same loss,
    #   25 times the work (L = 8, 200-step episodes). Here: at most L rows.
    #   Test: test_ppo_recurrent_sbb.py::test_segments_partition_the_rollout.
    offset = torch.arange(int(length.max()), device=device)[:, None]        # [L, 1], waits
    when = (first + offset).clamp(max=T - 1)                # [L, S] padding may run past the end
    return when, col, offset < length


@torch.no_grad()
def refresh(seg_state, agent, obs, states, starts, first, col, burn_in):
    """Burn-in (R2D2, Kapturowski et al. 2019): stored states grow stale while the weights change.

    A segment that continues an episode of this rollout gets its state from the steps before it, run with the
    current weights.   seg_state: tuple of [b, ...], changed in place; first, col [b]: where segments begin
    """
    continues = (first > 0) & ~starts[first, col]           # [b]
    if not continues.any():                                 # waits for the device
        return
    first, col = first[continues], col[continues]           # [c] each, waits
    back = torch.arange(-burn_in, 0, device=first.device)[:, None]                  # [burn_in, 1]
    when = first + back                         # [burn_in, c] from 0 on, as first >= L >= burn_in
    before = tuple(s[when[0], col] for s in states)
    _, _, fresh = agent(tuple(o[when, col] for o in obs), before, starts[when, col])
    for s, f in zip(seg_state, fresh):
        s[continues] = f                                    # waits


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
    if args.seq_len < 1 and args.seq_len != -1:
        fail(f"--seq-len {args.seq_len} must be at least 1, or -1 for whole episodes")
    if args.burn_in > max(args.seq_len, 0):
        fail(f"--burn-in {args.burn_in} must not exceed --seq-len {args.seq_len} "
             "(whole episodes need none)")
    segments = args.num_envs * (1 if args.seq_len == -1 else -(-args.num_steps // args.seq_len))
    if args.num_minibatches > segments:
        fail(f"--num-minibatches {args.num_minibatches} do not fit: a rollout may hold no more than "
             f"{segments} segments; raise --num-envs or --num-steps, or lower --seq-len")


def train(args, saved):
    # ------------------------------------------------------------------ setup
    torch.manual_seed(args.seed)
    T, N = args.num_steps, args.num_envs
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
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool, device=device)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]
    discounted = torch.zeros(N, device=device)          # discounted return so far (--norm-reward)

    obs = tuple(o.new_zeros(T, *o.shape) for o in next_obs)                 # leaves of [T, N, ...]
    action_shape, action_dtype = agent.policy.action_shape, agent.policy.action_dtype
    actions = torch.zeros(T, N, *action_shape, dtype=action_dtype, device=device)
    logprobs, rewards, values, final_values = torch.zeros(4, T, N, device=device)
    starts = torch.zeros(T, N, dtype=torch.bool, device=device)

    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        global_step = saved["global_step"]
        restore_random_generators(saved)
        if envs.load_state_dict(saved["envs"]):             # our own tasks continue to the bit
            carried = [tuple(x.to(device) for x in xs) for xs in saved["carried"]]
            next_obs, state, (next_start, discounted) = carried
        else:                                               # others begin new episodes
            next_obs = tensors(envs.reset(seed=args.seed + global_step)[0])
    run = Run(args, SCRIPT, saved)

    def save():
        carried = next_obs, state, (next_start, discounted)
        run.save(agent, envs, global_step, optimizer=optimizer.state_dict(), carried=carried)
        if args.capture_video:
            film(agent, film_envs, run.folder / "videos" / f"{global_step}.gif", args.seed + 10_000)

    save()                                                  # from now on --resume works
    while global_step + T * N <= args.total_timesteps and not run.interrupted:
        learning_rate = polynomial(args.learning_rate, global_step, args.total_timesteps)
        ent_coef = polynomial(args.ent_coef, global_step, args.total_timesteps)
        clip_coef = polynomial(args.clip_coef, global_step, args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        states = []                                         # the memory *before* step t, T times
        final_values.zero_()
        for t in range(T):
            for o, next_o in zip(obs, next_obs):
                o[t] = next_o
            starts[t] = next_start
            # KNOWN BUG (recurrent-ppo readme): saving the state after the step or the reset. Symptom:
            #   logratio != 0 before the first gradient step, learning a little worse. Here: saved before
            #   both; `start` repeats the reset in training.
            #   Test: test_ppo_recurrent_sbb.py::test_classic_bug_state_saved_too_late.
            states.append(state)
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
        global_step += T * N

        # -------------------------------------------------------------- targets
        if args.norm_reward:
            discounted_returns = linear_scan(args.gamma * ~starts, rewards, discounted)  # [T, N]
            discounted = discounted_returns[-1]
            agent.return_stats.update(discounted_returns)
            rewards /= agent.return_stats.var.sqrt().float() + 1e-8
        with torch.no_grad():
            _, next_value, _ = agent(add_time(next_obs), state, next_start[None])
        advantages = gae(
            rewards, values, starts, final_values, next_value[0], next_start,
            gamma=args.gamma, lam=args.gae_lambda)
        returns = advantages + values                       # [T, N]

        # -------------------------------------------------------------- batch: the rollout cut into segments
        when, col, mask = cut_segments(starts, T if args.seq_len == -1 else args.seq_len)
        states = tuple(torch.stack(s) for s in zip(*states))                # tuple of [T, N, ...]
        seg_start = starts[when, col] & mask                # [L, S] True in row 0 at most
        # PITFALL: starting segments from initial_state() trains a policy that never acted. Symptom: logratio
        #   != 0 before the first gradient step; the curve may look fine.
        #   Test: test_ppo_recurrent_sbb.py::test_first_logratio_is_zero.
        seg_state = tuple(s[when[0], col] for s in states)  # tuple of [S, ...]
        run.lap("batch")

        # -------------------------------------------------------------- update: minibatches of whole segments
        first_logratio, stats = None, []
        for epoch in range(args.update_epochs):
            segments = torch.randperm(len(col), device=device)
            for mb in segments.tensor_split(args.num_minibatches):          # [b]
                mb_mask = mask[:, mb]                       # [L, b]
                mb_state = tuple(s[mb] for s in seg_state)  # tuple of [b, ...]
                if args.burn_in:
                    first = when[0, mb]
                    refresh(mb_state, agent, obs, states, starts, first, col[mb], args.burn_in)
                # Step and column of the real steps: x[real] is [M, ...] for any rollout tensor x [T, N, ...].
                real_when = when[:, mb][mb_mask]            # [M], waits for the device
                real_col = col[mb].expand_as(mb_mask)[mb_mask]                      # [M], waits
                real = real_when, real_col
                mb_obs = tuple(o[real] for o in obs)
                dist, newvalue, _ = agent(mb_obs, mb_state, seg_start[:, mb], mb_mask)      # [M]
                # Padding is behind us: from here on this is the loss of a memoryless PPO on M steps.
                logratio = dist.log_prob(actions[real]) - logprobs[real]
                ratio = logratio.exp()
                if first_logratio is None:              # no gradient step yet: 0 but for rounding
                    first_logratio = logratio.abs().max().item()  # waits for the device

                mb_advantages = advantages[real]
                if args.norm_adv:
                    std = mb_advantages.std(correction=0)
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (std + 1e-8)
                clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
                pg_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()

                v_loss = (newvalue - returns[real]) ** 2
                if args.clip_vloss:
                    v_clipped = values[real] + (newvalue - values[real]).clamp(-clip_coef, clip_coef)
                    v_loss = torch.max(v_loss, (v_clipped - returns[real]) ** 2)
                v_loss = 0.5 * v_loss.mean()
                entropy = dist.entropy().mean()
                loss = pg_loss - ent_coef * entropy + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
                    stats.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm]))
            if args.target_kl is not None and approx_kl > args.target_kl:  # waits for the device
                break
        if args.norm_obs:                                   # only now: training saw what acting saw
            agent.encoder.update_stats(tuple(o.flatten(0, 1) for o in obs))
        run.lap("update")

        # -------------------------------------------------------------- log, checkpoint
        pg_loss, v_loss, entropy, approx_kl, clipfrac, grad_norm = torch.stack(stats).mean(0).tolist()
        run.stop_if_not_finite(pg_loss + v_loss + grad_norm, global_step)
        run.watch_first_logratio(first_logratio)
        eval_returns = eval_successes = np.array([np.nan])  # not measured
        if run.passed(args.eval_every, global_step, T * N):
            eval_returns, _, eval_successes = play(
                agent, eval_envs, args.eval_episodes, args.seed + 10_000)
        run.log(global_step, {
            **envs.mean_of_episodes(),
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
            "losses/explained_variance": 1 - (advantages.var() / returns.var()).item(),
            "debug/first_logratio": first_logratio,
            "debug/padding": mask.numel() / (T * N),
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

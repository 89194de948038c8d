"""Recurrent PQN with tape-based batching (TBB): Q(lambda) without replay and without target network.

    python pqn_recurrent_tbb.py                                       trains popgym-RepeatPreviousEasy-v0
    python pqn_recurrent_tbb.py --env-id popgym-RepeatFirstEasy-v0 --memory mingru
    python pqn_recurrent_tbb.py --model runs/.../model.safetensors    watches the trained agent
    tensorboard --logdir runs                                         draws the curves

PQN: Gallici et al. 2024, "Simplifying deep temporal difference learning" (https://arxiv.org/abs/2407.04811).
Tape-based batching: Morad et al. 2024, "Revisiting recurrent reinforcement learning with memory monoids"
(https://arxiv.org/abs/2402.09900).

The idea: act for T steps in N environments, take Q(lambda) targets from the values that acting saw, train on
them for a few epochs, throw the steps away. Many environments replace the replay, LayerNorm the target
network. Every environment's rollout is a column of tape, its episodes end to end, and the memory itself
forgets where an episode starts. ppo_recurrent_tbb.py has the same tape, dqn_recurrent_tbb.py a replay.

Symbols: T rollout steps, N environments, b columns of a minibatch, H hidden size, K branches of an action
(1 if Discrete). Sequences are time-major: [T, N, ...].
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

from envs.vector import make_envs, make_rendered  # importing envs registers its tasks
from models import MEMORIES, Encoder, QHead, init, to_tensors
from models.cpu_speed import keep_freed_memory
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
    num_envs: Count = 32  # N
    num_steps: Count = 128  # T, steps per environment and rollout
    total_timesteps: Count = 200_000  # environment steps

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

    start_e: Fraction = 1.0  # epsilon, the probability of a random action, at first
    end_e: Fraction = 0.05  # and at last
    exploration_fraction: number(float, 1e-6, 1) = 1.0  # of total_timesteps, in which epsilon falls

    learning_rate: Schedule = (5e-3, 0.0)  # schedule: initial [final [power [decay-steps]]]
    gamma: Fraction = 0.9  # discount; 0.99 where rewards come late
    reward_scale: Positive = 1.0  # what is learned is rewards times this
    q_lambda: Fraction = 0.65  # of Q(lambda); 0: bootstraps after one step, 1: at the rollout's end only
    num_minibatches: Count = 8  # minibatches of whole columns per epoch
    update_epochs: Count = 3  # passes over the rollout
    max_grad_norm: Positive = 10.0  # gradient clipping
    norm_obs: bool = False  # normalise vector observations by running statistics

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
        self.encoder = Encoder(observation_space, args.encoder_size, args.norm_obs, args.whiten_images)
        self.memory = MEMORIES[args.memory](
            self.encoder.out_size, args.hidden_size, args.num_layers, **args.memory_kwargs)
        # DEVIATION (purejaxql pqn_rnn_gymnax.py, LayerNorm in the layers before the memory): in the one after
        #   it, where it bounds Q, whatever is remembered. Of two numbers observed it would leave two signs.
        #   Test: test_pqn.py::test_layer_norm_bounds_the_action_values.
        hidden = init(nn.Linear(args.hidden_size, args.mlp_size), 2**0.5)
        self.hidden = nn.Sequential(hidden, nn.LayerNorm(args.mlp_size))
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


def q_lambda_targets(rewards, values, starts, final_values, next_value, next_start, gamma, lam):
    """Q(lambda) of Peng and Williams 1996. Memory changes nothing here. [T, N], next_* [N]

    G_t = r_t + gamma ((1 - lam) V(o_{t+1}) + lam G_{t+1}),   V(o) = max_a Q(o, a),   cut at episodes' ends.
    The rollout ends with G_T = V(o_T), next_value. values[t] is V(o_t). final_values[t] is V(last
    observation) where a time limit cut the episode at t, and 0 elsewhere.
    """
    next_values = torch.cat([values[1:], next_value[None]])                         # [T, N]
    goes_on = ~torch.cat([starts[1:], next_start[None]])    # [T, N] whether the episode continues
    # KNOWN BUG (CleanRL pqn_atari_envpool_lstm.py before pull request 494): an episode's end cuts V(o_{t+1}),
    #   but not G_{t+1}. Symptom: the next episode's rewards are in the targets. Here: it cuts both.
    #   Test: test_pqn.py::test_known_bug_the_next_episodes_return_is_noticed.
    # KNOWN BUG (the same, purejaxql pqn_rnn_gymnax.py): a time limit treated as death. Symptom: values too
    #   low near the limit. Here: final_values. Test: test_pqn.py::test_targets_equal_their_definition.
    one_step = rewards + gamma * ((1 - lam) * goes_on * next_values + final_values)
    decays = gamma * lam * goes_on                          # [T, N]
    targets, target = torch.zeros_like(rewards), next_value
    for t in reversed(range(len(rewards))):
        targets[t] = target = one_step[t] + decays[t] * target
    return targets


def polynomial(schedule, step, total_steps):
    """v(t) = (v0 - v1) (1 - t/D)^power + v1, then v1.   schedule: (v0[, v1[, power[, D]]]), D in steps"""
    defaults = (schedule[0], schedule[0], 1.0, total_steps)
    v0, v1, power, decay_steps = schedule + defaults[len(schedule):]
    return (v0 - v1) * max(0.0, 1 - step / decay_steps) ** power + v1


@torch.no_grad()
def best_values_of(agent, last_obs, state):
    """[c] max_a Q of last observations of c episodes.   last_obs: c tuples of leaves, state: of [c, ...]"""
    obs = tuple(torch.stack(leaf) for leaf in zip(*last_obs))                   # leaves of [c, ...]
    no_start = torch.zeros(1, len(last_obs), dtype=torch.bool, device=obs[0].device)
    q, _ = agent(add_time(obs), state, no_start)            # still the same episodes
    return q.of(q.greedy())[0]


def check(args):
    """Refuses flags that do not fit each other."""
    if args.num_envs * args.num_steps > args.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout, "
             f"--num-envs x --num-steps = {args.num_envs * args.num_steps}")
    if args.num_minibatches > args.num_envs:
        fail(f"--num-minibatches {args.num_minibatches} do not fit: minibatches are made of whole columns, "
             f"and there are --num-envs {args.num_envs}; lower the one or raise the other")


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
    optimizer = torch.optim.RAdam(parameters, lr=args.learning_rate[0])

    def tensors(obs):
        return to_tensors(envs.single_observation_space, obs, device)

    global_step = 0
    next_obs = tensors(envs.reset(seed=args.seed)[0])       # leaves of [N, ...]
    next_start = torch.ones(N, dtype=torch.bool, device=device)
    state = agent.memory.initial_state(N)                   # tuple of [N, ...]

    obs = tuple(o.new_zeros(T, *o.shape) for o in next_obs)                 # leaves of [T, N, ...]
    actions = torch.zeros(T, N, len(agent.q.sizes), dtype=torch.long, device=device)        # [T, N, K]
    rewards, acting_q, values, final_values = torch.zeros(4, T, N, device=device)
    starts = torch.zeros(T, N, dtype=torch.bool, device=device)

    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        global_step = saved["global_step"]
        restore_random_generators(saved)
        if envs.load_state_dict(saved["envs"]):             # our own tasks continue to the bit
            next_obs, state, (next_start,) = (tuple(x.to(device) for x in xs) for xs in saved["carried"])
        else:                                               # others begin new episodes
            next_obs = tensors(envs.reset(seed=args.seed + global_step)[0])
    run = Run(args, SCRIPT, saved)

    def save():
        run.save(
            agent, envs, global_step, optimizer=optimizer.state_dict(),
            carried=(next_obs, state, (next_start,)))
        if args.capture_video:
            film(agent, film_envs, run.folder / "videos" / f"{global_step}.gif", args.seed + 10_000)

    save()                                                  # from now on --resume works
    while global_step + T * N <= args.total_timesteps and not run.interrupted:
        learning_rate = polynomial(args.learning_rate, global_step, args.total_timesteps)
        epsilon = polynomial(
            (args.start_e, args.end_e), global_step, args.exploration_fraction * args.total_timesteps)
        optimizer.param_groups[0]["lr"] = learning_rate

        # -------------------------------------------------------------- rollout: T steps in N environments
        tape_state = state                                  # the memory before the tape
        final_values.zero_()
        for t in range(T):
            for o, next_o in zip(obs, next_obs):
                o[t] = next_o
            starts[t] = next_start
            with torch.inference_mode():                    # acting is a sequence of length 1,
                # also when the action is random
                q, state = agent(add_time(next_obs), state, next_start[None])
                action = q.epsilon_greedy(epsilon)          # [1, N, K]
                actions[t], acting_q[t], values[t] = action[0], q.of(action)[0], q.of(q.greedy())[0]
            run.lap("policy")
            next_obs, reward, terminated, truncated, infos = envs.step(agent.q.to_env(action[0]))
            run.lap("env")

            next_obs, rewards[t] = tensors(next_obs), torch.as_tensor(args.reward_scale * reward)
            next_start = torch.as_tensor(terminated | truncated, device=device)
            late = np.flatnonzero(truncated & ~terminated)  # ended by a time limit, not by death
            if len(late):
                last_obs = [tensors(o) for o in infos["final_obs"][late]]
                final_values[t, late] = best_values_of(agent, last_obs, tuple(s[late] for s in state))
        global_step += T * N

        # -------------------------------------------------------------- targets
        with torch.no_grad():
            q, _ = agent(add_time(next_obs), state, next_start[None])
            next_value = q.of(q.greedy())[0]                # [N]
        targets = q_lambda_targets(
            rewards, values, starts, final_values, next_value, next_start,
            gamma=args.gamma, lam=args.q_lambda)

        # -------------------------------------------------------------- batch: columns of tape, as they are
        # obs and starts are the tape, tape_state is the memory before it: nothing is cut, nothing padded.
        # PITFALL: starting columns from initial_state() or the newest state, not tape_state, trains values of
        #   a memory that never acted. Symptom: first_q_difference is not 0; the curve may look fine.
        #   Test: test_pqn.py::test_pitfall_columns_from_another_state.
        largest_q = acting_q.abs().max().clamp(min=1)
        run.lap("batch")

        # -------------------------------------------------------------- update: minibatches of whole columns
        first_q_difference, stats = None, []
        for epoch in range(args.update_epochs):
            for mb in torch.randperm(N, device=device).tensor_split(args.num_minibatches):  # [b] columns
                mb_obs = tuple(o[:, mb] for o in obs)
                mb_state = tuple(s[mb] for s in tape_state)
                q, _ = agent(mb_obs, mb_state, starts[:, mb])                               # [T, b]
                # The memory did the rest: from here on this is the loss of a memoryless PQN on T b steps.
                q_taken = q.of(actions[:, mb])
                if first_q_difference is None:          # no gradient step yet: 0 but for rounding
                    difference = (q_taken - acting_q[:, mb]).abs().max() / largest_q
                    first_q_difference = difference.item()                      # waits for the device
                loss = ((q_taken - targets[:, mb]) ** 2).mean()

                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                stats.append(torch.stack([loss, q_taken.mean(), grad_norm]).detach())
        if args.norm_obs:                                   # only now: training saw what acting saw
            agent.encoder.update_stats(tuple(o.flatten(0, 1) for o in obs))
        run.lap("update")

        # -------------------------------------------------------------- log, checkpoint
        td_loss, q_values, grad_norm = torch.stack(stats).mean(0).tolist()
        run.stop_if_not_finite(td_loss + grad_norm, global_step)
        run.watch_first_q_difference(first_q_difference)
        eval_returns = eval_successes = np.array([np.nan])  # not measured
        if run.passed(args.eval_every, global_step, T * N):
            eval_returns, _, eval_successes = play(
                agent, eval_envs, args.eval_episodes, args.seed + 10_000)
        run.log(global_step, {
            **envs.mean_of_episodes(),
            "charts/learning_rate": learning_rate,
            "charts/epsilon": epsilon,
            "eval/episodic_return": eval_returns.mean(),
            "eval/return_std": eval_returns.std(),
            "eval/success": eval_successes.mean(),
            "losses/td_loss": td_loss,
            "losses/q_values": q_values,
            "losses/grad_norm": grad_norm,
            "debug/first_q_difference": first_q_difference,
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

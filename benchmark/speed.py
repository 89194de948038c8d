"""End-to-end training speed, side by side with what a user would take instead.   python benchmark/speed.py --help

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py --tasks poc cartpole minigrid --repeats 3
    python benchmark/speed.py --tasks repeat --ours sbb:lstm tbb:lstm tbb:lru tbb:mingru
    python benchmark/speed.py --memories                                      one layer of every memory, forward + backward
    python benchmark/speed.py --dqn tbb:lru tbb:ffm sbb:lru                   double DQN at memory-monoids' sizes
    python benchmark/speed.py --dqn sbb:lstm sbb:gpt --length 250             on 64 whole episodes at Memory-RL's sizes
    python benchmark/speed.py --off-policy sac_gru:gru sac_gru:none           against stable-baselines3, which has no memory

Runs our PPO scripts and sb3-contrib's RecurrentPPO in turn, at equal work: the same vectorised task, network (one LSTM for
policy and value, then one hidden layer each), rollout, epochs, minibatches, optimiser steps and torch threads. Prints steps
per second (first update left out: it warms up), the ratio of the medians, and where our time goes. On MinigridMemory "equal
work" includes a difference by design: our encoder convolves each distinct view of a batch once, theirs every image.
--separate-lstm gives RecurrentPPO its default instead, a second LSTM for the critic: more work, but what a user gets.

--off-policy: the floor of the algorithm, stable-baselines3's SAC, TD3 and DQN on the same task, with as many environments,
gradient steps per step and transitions per gradient step, and a hidden layer in place of the memory. From it to a memory called
none is the implementation, from there to another the price of memory. It has no SAC for discrete actions to compare with.
"""
import collections
import csv
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# name: env id, env kwargs, N, T, minibatches, LSTM size, hidden layer, encoder size (images), updates to time
TASKS = {
    "poc": ("PocMemory-v0", {}, 16, 128, 8, 32, 64, 0, 16),
    "cartpole": ("CartPoleMasked-v0", {}, 16, 256, 4, 64, 128, 0, 16),
    "minigrid": ("MinigridMemory-v0", {}, 16, 256, 8, 256, 512, 512, 1),
    "repeat": ("popgym-RepeatPreviousEasy-v0", {}, 64, 128, 4, 64, 64, 0, 4),
}
TAPES = ((2_048, 1), (128, 16))  # T, B of --memories
# memory-monoids' RepeatPrevious: episodes of 103 steps, width 256, 1,000 steps an update, an update each 103 steps
DQN = {"env-id": "popgym-RepeatPreviousEasy-v0", "env-kwargs": '{"k": 10, "num_decks": 2}', "hidden-size": 256, "mlp-size": 256,
       "num-envs": 64, "learning-starts": 10_000, "train-every": 1_024, "replay-ratio": 1 / 103, "total-timesteps": 20_480}
DQN_MEMORIES = {"lru": (2, {"state_size": 128}), "s5": (2, {}), "ffm": (1, {"contexts": 16}),  # layers, memory-kwargs
                "linear-attention": (1, {"heads": 1}), "lstm": (1, {}), "gpt": (1, {"head_size": 128})}

# script: env id, environment steps between two visits to the replay, gradient steps of a visit, visits to time, and, for
# stable-baselines3, its algorithm and the transitions of a gradient step: the mean number of real steps in one of ours
OFF_POLICY = {"sac_gru": ("PendulumMasked-v1", 160, 16, 12, "SAC", 920),
              "td3_gru": ("PendulumMasked-v1", 160, 16, 12, "TD3", 920),
              "dqn_recurrent_sbb": ("popgym-RepeatPreviousEasy-v0", 64, 1, 160, "DQN", 1_010),
              "dqn_recurrent_tbb": ("popgym-RepeatPreviousEasy-v0", 64, 1, 160, "DQN", 1_020),
              "sac_discrete_sbb": ("popgym-RepeatPreviousEasy-v0", 160, 16, 12, None, None)}
LEARNING_STARTS = 10_000  # environment steps, of --off-policy


def whole_episodes(length, script, memory):
    """Memory-RL's Passive T-Maze of this length, in place of DQN: width 128, 64 episodes an update, four updates a visit."""
    T = length + 1
    sizes = {"seq-len": -1, "batch-size": 64 * T} if script == "sbb" else {"tape-len": 64 * T}
    return sizes | {
        "env-id": "TMazePassive-v0", "env-kwargs": json.dumps({"length": length}), "hidden-size": 128, "mlp-size": 256,
        "encoder-size": 128 if memory == "gpt" else 48, "num-envs": 64, "learning-starts": 64 * T, "train-every": 64 * T,
        "replay-ratio": 4.01 / (64 * T), "buffer-size": 256 * T, "loss": "mse", "total-timesteps": 256 * T, "log-every": 64 * T}


@dataclass
class Args:
    tasks: tuple[str, ...] = ("poc", "cartpole")  # poc, cartpole, minigrid, repeat
    ours: tuple[str, ...] = ("sbb:lstm",)  # which of ours: script:memory; RecurrentPPO has the LSTM only
    num_layers: int = 1  # of every memory, RecurrentPPO's too
    repeats: int = 3  # runs of each, alternating
    threads: int = 1  # torch threads
    memories: bool = False  # time the layers of --layer-size instead
    layer_size: int = 128  # H of --memories
    dqn: tuple[str, ...] = ()  # time double DQN instead: script:memory, of lru, s5, ffm, linear-attention, lstm and gpt
    off_policy: tuple[str, ...] = ()  # time the off-policy scripts instead, against stable-baselines3: script:memory
    length: int = 0  # with --dqn: on whole episodes of T-Maze of this length; 0: RepeatPrevious
    separate_lstm: bool = False  # RecurrentPPO's default: a second LSTM for the critic
    out: str | None = None  # also append the table to this CSV file
    child: str | None = None  # internal: run stable-baselines3's part of this task or script and print its speed


def argv(flags):
    """{"memory": "gru", "no-prev-action": None} -> ["--memory", "gru", "--no-prev-action"]"""
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value) if x is not None]


def ours(args, script, flags):
    """One training: environment steps per second, ms of a gradient step (drawing its batch not included), us of acting for a
    step, each phase's share of the time. From the run's own progress.csv, without the first row that learns: it warms up."""
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {"device": "cpu", "num-threads": args.threads, "runs-dir": folder, "run-name": "speed"}
        subprocess.run([sys.executable, ROOT / f"{script}.py", *argv(flags)], check=True, capture_output=True)
        rows = list(csv.DictReader((Path(folder) / "speed" / "progress.csv").open()))
    first, *rows = [row for row in rows if int(row["global_step"]) > flags.get("learning-starts", 0)]
    spent = {name: sum(float(row[f"time/{name}"]) for row in rows) for name in ("policy", "env", "batch", "update", "log")}
    steps, updates = (float(rows[-1].get(k, "nan")) - float(first.get(k, "nan"))         # PPO does not count its gradient steps
                      for k in ("global_step", "charts/gradient_steps"))
    return {"steps_per_second": steps / sum(spent.values()), "update_ms": 1e3 * spent["update"] / updates,
            "policy_us": 1e6 * spent["policy"] / steps, **{f"share_{k}": v / sum(spent.values()) for k, v in spent.items()}}


def theirs(args, child):
    """Steps per second and ms of a gradient step of stable-baselines3, in a process of its own."""
    command = [sys.executable, __file__, "--child", child, "--threads", str(args.threads), "--num-layers", str(args.num_layers)]
    command += ["--separate-lstm"] if args.separate_lstm else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def in_turn(args, commands, child=None):
    """Medians of --repeats runs of each (script, flags) and, last, of stable-baselines3's `child` if there is one; in turn."""
    runs = [[ours(args, *command) for command in commands] + ([theirs(args, child)] if child else [])
            for _ in range(args.repeats)]
    return [{k: statistics.median(run[k] for run in same) for k in same[0]} for same in zip(*runs)]


def run_sb3(args):
    """Trains RecurrentPPO, or SAC, TD3 or DQN without memory; prints its speed as JSON."""
    import gymnasium as gym
    import numpy as np
    import stable_baselines3
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecEnv

    import envs as tasks  # noqa: F401  (registers them)

    class Adapter(VecEnv):
        """Our vectorised task as stable-baselines3 wants it: it steps the same numpy batch that our script steps."""

        def __init__(self, env_id, num_envs, **kwargs):
            if gym.spec(env_id).vector_entry_point:
                self.envs = gym.make_vec(env_id, num_envs, **kwargs)
            else:
                autoreset = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
                self.envs = gym.make_vec(env_id, num_envs, "sync", autoreset, **kwargs)
            super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

        def reset(self):
            return self.envs.reset(seed=1)[0]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            obs, reward, terminated, truncated, infos = self.envs.step(self.actions)
            done, out = terminated | truncated, [{} for _ in range(self.num_envs)]
            for n in done.nonzero()[0]:
                out[n] = {"terminal_observation": infos["final_obs"][n], "TimeLimit.truncated": not terminated[n]}
            return obs, reward, done, out

        def close(self):
            pass

        def get_attr(self, name, indices=None):
            return [None] * self.num_envs

        def set_attr(self, name, value, indices=None):
            pass

        def env_method(self, name, *args, indices=None, **kwargs):
            return []

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * self.num_envs

    def timed(owner, name):
        """From now on the method adds its seconds to spent[name]."""
        method = getattr(owner, name)

        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            spent[name] += time.perf_counter() - begin
            return result

        setattr(owner, name, wrapper)

    torch.set_num_threads(args.threads)
    spent = collections.Counter()
    if args.child in TASKS:
        env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, visits = TASKS[args.child]
        steps, gradient_steps, first = N * T, 4 * minibatches, 1
        policy_kwargs = dict(lstm_hidden_size=hidden, n_lstm_layers=args.num_layers, net_arch=[mlp],
                             shared_lstm=not args.separate_lstm, enable_critic_lstm=args.separate_lstm)
        if encoder:
            policy_kwargs["features_extractor_kwargs"] = {"features_dim": encoder}
        model = RecurrentPPO("CnnLstmPolicy" if encoder else "MlpLstmPolicy", Adapter(env_id, N, **kwargs), device="cpu",
                             seed=1, n_steps=T, n_epochs=4, batch_size=steps // minibatches, policy_kwargs=policy_kwargs)
    else:
        env_id, steps, gradient_steps, visits, algorithm, batch_size = OFF_POLICY[args.child]
        sizes, first = importlib.import_module(args.child).Args(), LEARNING_STARTS // steps + 1
        more = {"SAC": {}, "TD3": {"action_noise": NormalActionNoise(np.zeros(1), np.full(1, 0.1))},
                "DQN": {"exploration_initial_eps": 0.05, "target_update_interval": steps}}[algorithm]
        policy_kwargs = {"net_arch": [sizes.hidden_size] * args.num_layers + [sizes.mlp_size]}
        model = getattr(stable_baselines3, algorithm)(
            "MlpPolicy", Adapter(env_id, sizes.num_envs), device="cpu", seed=1, buffer_size=sizes.buffer_size, tau=sizes.tau,
            learning_starts=LEARNING_STARTS, train_freq=steps // sizes.num_envs, gradient_steps=gradient_steps,
            batch_size=batch_size, policy_kwargs=policy_kwargs, **more)
        timed(model.replay_buffer, "sample")
    timed(model, "train")
    model.learn(first * steps)                              # warms up
    spent, begin = collections.Counter(), time.perf_counter()
    model.learn(visits * steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - begin
    print(json.dumps({"steps_per_second": visits * steps / seconds,
                      "update_ms": 1e3 * (spent["train"] - spent["sample"]) / (visits * gradient_steps)}))


def time_ppo(args):
    """Our PPO against RecurrentPPO: steps per second, their ratio, where our time goes; medians."""
    for task in args.tasks:
        env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, updates = TASKS[task]
        flags = {"env-id": env_id, "env-kwargs": json.dumps(kwargs), "num-envs": N, "num-steps": T, "update-epochs": 4,
                 "num-minibatches": minibatches, "hidden-size": hidden, "mlp-size": mlp, "encoder-size": encoder,
                 "total-timesteps": (updates + 1) * N * T, "num-layers": args.num_layers}
        names = [name.split(":") for name in args.ours]
        commands = [(f"ppo_recurrent_{script}", flags | {"memory": memory}) for script, memory in names]
        *medians, sb3 = in_turn(args, commands, task)
        for (script, memory), median in zip(names, medians):
            append(args.out, {
                "task": task, "script": script, "memory": memory, "layers": args.num_layers, "threads": args.threads,
                "separate_lstm": args.separate_lstm, "n": args.repeats, "ours": round(median["steps_per_second"]),
                "sb3": round(sb3["steps_per_second"]), "ratio": round(median["steps_per_second"] / sb3["steps_per_second"], 2),
                **{k: round(v, 2) for k, v in median.items() if k.startswith("share_")}})


def off_policy_flags(args, script, memory):
    env_id, steps, gradient_steps, visits, *_ = OFF_POLICY[script]
    return {"env-id": env_id, "memory": memory, "num-layers": args.num_layers, "no-prev-action": None, "train-every": steps,
            "replay-ratio": gradient_steps / steps, "learning-starts": LEARNING_STARTS,
            "total-timesteps": (LEARNING_STARTS // steps + 1 + visits) * steps}


def time_off_policy(args):
    """SAC, TD3 and DQN with memory against stable-baselines3's without: steps per second, ms of a gradient step; medians."""
    for name in args.off_policy:
        script, memory = name.split(":")
        algorithm = OFF_POLICY[script][4]
        median, *sb3 = in_turn(args, [(script, off_policy_flags(args, script, memory))], algorithm and script)
        sb3 = sb3[0] if sb3 else dict.fromkeys(median, float("nan"))
        append(args.out, {
            "script": script, "memory": memory, "layers": args.num_layers, "threads": args.threads, "n": args.repeats,
            "algorithm": algorithm, "ours": f"{median['steps_per_second']:.0f}", "sb3": f"{sb3['steps_per_second']:.0f}",
            "ratio": f"{median['steps_per_second'] / sb3['steps_per_second']:.2f}", "ours_ms": f"{median['update_ms']:.1f}",
            "sb3_ms": f"{sb3['update_ms']:.1f}", **{k: f"{v:.2f}" for k, v in median.items() if k.startswith("share_")}})


def time_layers(args):
    """Milliseconds of one layer, forward + backward, on one long tape and on 16 columns; medians, the layers in turn."""
    import torch
    import torch.nn as nn

    from models.memory import MONOIDS

    torch.set_num_threads(args.threads)
    H = args.layer_size
    for T, B in TAPES:
        x, start = torch.randn(T, B, H, requires_grad=True), torch.rand(T, B) < 0.02
        layers = {"nn.GRU": nn.GRU(H, H), "nn.LSTM": nn.LSTM(H, H)} | {name: layer(H) for name, layer in MONOIDS.items()}
        times = {name: [] for name in layers}
        for _ in range(args.repeats + 1):                                       # the first is for warming up
            for name, layer in layers.items():
                begin = time.perf_counter()
                y = layer(x)[0] if name.startswith("nn.") else layer(x, layer.initial_state(B), start)[0]
                y.sum().backward()
                times[name].append(1000 * (time.perf_counter() - begin))
        ms = {name: statistics.median(t[1:]) for name, t in times.items()}
        for name in layers:
            append(args.out, {"T": T, "B": B, "H": H, "threads": args.threads, "layer": name, "n": args.repeats,
                              "ms": round(ms[name], 2), "times_faster_than_gru": round(ms["nn.GRU"] / ms[name], 2),
                              "times_faster_than_lstm": round(ms["nn.LSTM"] / ms[name], 2)})


def time_dqn(args):
    """Double DQN end to end, once it learns: steps per second, one update, acting for one environment step; medians."""
    names, commands = [name.split(":") for name in args.dqn], []
    for script, memory in names:
        layers, memory_kwargs = DQN_MEMORIES[memory]
        preset = whole_episodes(args.length, script, memory) if args.length else DQN | {
            "seq-len" if script == "sbb" else "tape-len": 50 if script == "sbb" else 1_000}
        memory_kwargs = memory_kwargs | ({"window": args.length + 2} if args.length and memory == "gpt" else {})
        commands.append((f"dqn_recurrent_{script}", preset | {"memory": memory, "num-layers": layers,
                                                              "memory-kwargs": json.dumps(memory_kwargs)}))
    for (script, memory), median in zip(names, in_turn(args, commands)):
        digits = {"steps_per_second": 0, "update_ms": 1, "policy_us": 1}
        append(args.out, {"script": script, "memory": memory, "layers": DQN_MEMORIES[memory][0], "length": args.length,
                          "threads": args.threads, "n": args.repeats,
                          **{k: f"{v:.{digits.get(k, 2)}f}" for k, v in median.items()}})


def append(path, row):
    """Print a row, and add it to a CSV file, if there is a path; the file gets its header with the first row."""
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if path:
        new = not Path(path).exists()
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


def main():
    args = tyro.cli(Args)
    for flag, names, scripts in (("ours", args.ours, ("sbb", "tbb")), ("dqn", args.dqn, ("sbb", "tbb")),
                                 ("off-policy", args.off_policy, tuple(OFF_POLICY))):
        if wrong := [name for name in names if name.split(":")[0] not in scripts or name.count(":") != 1]:
            print(f"speed.py: --{flag} {wrong[0]} must be script:memory, with one of {', '.join(scripts)}", file=sys.stderr)
            sys.exit(2)
    way = (run_sb3 if args.child else time_layers if args.memories else time_dqn if args.dqn
           else time_off_policy if args.off_policy else time_ppo)
    way(args)


if __name__ == "__main__":
    main()

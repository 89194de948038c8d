"""End-to-end training speed, side by side with what a user would take instead.   python benchmark/speed.py --help

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py --tasks poc cartpole minigrid --repeats 3
    python benchmark/speed.py --tasks repeat --ours sbb:lstm tbb:lstm tbb:lru tbb:mingru
    python benchmark/speed.py --memories                                      one layer of every memory, forward + backward
    python benchmark/speed.py --dqn tbb:lru tbb:ffm sbb:lru                   double DQN at memory-monoids' sizes
    python benchmark/speed.py --dqn sbb:lstm sbb:gpt --length 250             on 64 whole episodes at Memory-RL's sizes

Runs our PPO scripts and sb3-contrib's RecurrentPPO in turn, at equal work: the same vectorised task, network (one LSTM for
policy and value, then one hidden layer each), rollout, epochs, minibatches, optimiser steps and torch threads. Prints steps
per second (first update left out: it warms up), the ratio of the medians, and where our time goes. On MinigridMemory "equal
work" includes a difference by design: our encoder convolves each distinct view of a batch once, theirs every image.
--separate-lstm gives RecurrentPPO its default instead, a second LSTM for the critic: more work, but what a user gets.
"""
import csv
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
    length: int = 0  # with --dqn: on whole episodes of T-Maze of this length; 0: RepeatPrevious
    separate_lstm: bool = False  # RecurrentPPO's default: a second LSTM for the critic
    out: str | None = None  # also append the table to this CSV file
    child: str | None = None  # internal: run RecurrentPPO on this task and print its speed


def ours(args, task, script, memory):
    """Steps per second and the share of time of each phase, from the run's own progress.csv."""
    env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, updates = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"env-id": env_id, "env-kwargs": json.dumps(kwargs), "num-envs": N, "num-steps": T, "update-epochs": 4,
                 "num-minibatches": minibatches, "memory": memory, "hidden-size": hidden, "mlp-size": mlp,
                 "encoder-size": encoder, "total-timesteps": (updates + 1) * N * T, "device": "cpu",
                 "num-layers": args.num_layers, "num-threads": args.threads, "runs-dir": folder, "run-name": "speed"}
        flags = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
        command = [sys.executable, ROOT / f"ppo_recurrent_{script}.py", *flags]
        subprocess.run(command, check=True, capture_output=True)
        rows = list(csv.DictReader((Path(folder) / "speed" / "progress.csv").open()))[1:]
    spent = {name: sum(float(row[f"time/{name}"]) for row in rows) for name in ("policy", "env", "batch", "update", "log")}
    return len(rows) * N * T / sum(spent.values()), {k: v / sum(spent.values()) for k, v in spent.items()}


def theirs(args, task):
    """Steps per second of RecurrentPPO, in a process of its own."""
    command = [sys.executable, __file__, "--child", task, "--threads", str(args.threads), "--num-layers", str(args.num_layers)]
    command += ["--separate-lstm"] if args.separate_lstm else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_sb3(args):
    import gymnasium as gym
    import torch
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    import envs as tasks  # noqa: F401  (registers them)

    class Adapter(VecEnv):
        """Our vectorised task as stable-baselines3 wants it: it steps the same numpy batch that our script steps."""

        def __init__(self, envs):
            self.envs = envs
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

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

    class Clock(BaseCallback):
        times = []

        def _on_rollout_start(self):
            self.times.append(time.perf_counter())

        def _on_step(self):
            return True

    torch.set_num_threads(args.threads)
    env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, updates = TASKS[args.child]
    if gym.spec(env_id).vector_entry_point:
        envs = gym.make_vec(env_id, N, **kwargs)
    else:
        envs = gym.make_vec(env_id, N, "sync", {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}, **kwargs)
    policy_kwargs = dict(lstm_hidden_size=hidden, n_lstm_layers=args.num_layers, net_arch=[mlp],
                         shared_lstm=not args.separate_lstm, enable_critic_lstm=args.separate_lstm)
    if encoder:
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": encoder}
    model = RecurrentPPO("CnnLstmPolicy" if encoder else "MlpLstmPolicy", Adapter(envs), n_steps=T, n_epochs=4, device="cpu",
                         seed=1, batch_size=N * T // minibatches, policy_kwargs=policy_kwargs)
    clock = Clock()
    model.learn((updates + 1) * N * T, callback=clock)
    print(updates * N * T / (time.perf_counter() - clock.times[1]))


def time_layers(args):
    """Milliseconds of one layer, forward + backward, on one long tape and on 16 columns; medians, the layers in turn."""
    import torch
    import torch.nn as nn

    from models.memory import MONOIDS

    torch.set_num_threads(args.threads)
    H, rows = args.layer_size, []
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
            rows.append({"T": T, "B": B, "H": H, "threads": args.threads, "layer": name, "n": args.repeats,
                         "ms": round(ms[name], 2), "times_faster_than_gru": round(ms["nn.GRU"] / ms[name], 2),
                         "times_faster_than_lstm": round(ms["nn.LSTM"] / ms[name], 2)})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    append(args.out, rows)


def time_dqn(args):
    """Double DQN end to end, once it learns: steps per second, one update, acting for one environment step; medians."""
    runs = {name: [] for name in args.dqn}
    for _ in range(args.repeats):
        for name in args.dqn:
            script, memory = name.split(":")
            layers, memory_kwargs = DQN_MEMORIES[memory]
            preset = whole_episodes(args.length, script, memory) if args.length else DQN | {
                "seq-len" if script == "sbb" else "tape-len": 50 if script == "sbb" else 1_000}
            memory_kwargs = memory_kwargs | ({"window": args.length + 2} if args.length and memory == "gpt" else {})
            with tempfile.TemporaryDirectory() as folder:
                flags = preset | {"memory": memory, "num-layers": layers, "memory-kwargs": json.dumps(memory_kwargs),
                                  "num-threads": args.threads, "device": "cpu", "runs-dir": folder, "run-name": "speed"}
                flags = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
                subprocess.run([sys.executable, ROOT / f"dqn_recurrent_{script}.py", *flags], check=True, capture_output=True)
                rows = list(csv.DictReader((Path(folder) / "speed" / "progress.csv").open()))
            rows = [row for row in rows if int(row["global_step"]) > preset["learning-starts"] + preset["train-every"]]
            spent = {k: sum(float(row[f"time/{k}"]) for row in rows) for k in ("policy", "env", "batch", "update", "log")}
            steps, updates = (float(rows[-1][k]) - float(rows[0][k]) for k in ("global_step", "charts/gradient_steps"))
            steps, updates = (x * len(rows) / (len(rows) - 1) for x in (steps, updates))   # the first row is counted too
            runs[name].append({"steps_per_second": steps / sum(spent.values()), "update_ms": 1e3 * spent["update"] / updates,
                               "policy_us": 1e6 * spent["policy"] / steps,
                               **{f"share_{k}": v / sum(spent.values()) for k, v in spent.items()}})
    rows = []
    for name, found in runs.items():
        script, memory = name.split(":")
        median = {k: statistics.median(x[k] for x in found) for k in found[0]}
        digits = {"steps_per_second": 0, "update_ms": 1, "policy_us": 1}
        rows.append({"script": script, "memory": memory, "layers": DQN_MEMORIES[memory][0], "length": args.length,
                     "threads": args.threads, "n": args.repeats, **{k: f"{v:.{digits.get(k, 2)}f}" for k, v in median.items()}})
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    append(args.out, rows)


def main():
    args = tyro.cli(Args)
    if args.child:
        return run_sb3(args)
    if args.memories:
        return time_layers(args)
    if args.dqn:
        return time_dqn(args)
    rows = []
    for task in args.tasks:
        names = [tuple(name.split(":")) for name in args.ours]                  # (script, memory)
        runs = [([ours(args, task, *name) for name in names], theirs(args, task)) for _ in range(args.repeats)]    # alternating
        sb3_speed = statistics.median(speed for _, speed in runs)
        for i, (script, memory) in enumerate(names):
            our_speed = statistics.median(our[i][0] for our, _ in runs)
            share = {k: statistics.median(our[i][1][k] for our, _ in runs) for k in runs[0][0][i][1]}
            rows.append({"task": task, "script": script, "memory": memory, "layers": args.num_layers, "threads": args.threads,
                         "separate_lstm": args.separate_lstm, "n": args.repeats, "ours": round(our_speed),
                         "sb3": round(sb3_speed), "ratio": round(our_speed / sb3_speed, 2),
                         **{f"share_{k}": round(v, 2) for k, v in share.items()}})
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    append(args.out, rows)


def append(path, rows):
    """Add rows to a CSV file, which gets its header with the first ones."""
    if path:
        new = not Path(path).exists()
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

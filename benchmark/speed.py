"""End-to-end training speed, side by side with what a user would take instead.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py --tasks poc cartpole minigrid --repeats 3
    python benchmark/speed.py --tasks repeat --ours sbb:lstm tbb:lstm tbb:lru tbb:mingru
    python benchmark/speed.py --memories                             one layer of every memory
    python benchmark/speed.py --pqn lru mingru lstm                  PQN against our PPO on the same tape
    python benchmark/speed.py --exported --out export-speed.csv      a step of every memory, with --export
    python benchmark/speed.py --dqn tbb:lru tbb:ffm sbb:lru          double DQN at memory-monoids' sizes
    python benchmark/speed.py --dqn sbb:lstm sbb:gpt --length 250    on 64 whole episodes at Memory-RL's sizes
    python benchmark/speed.py --off-policy sac_gru:gru sac_gru:none  against stable-baselines3 without memory
    python benchmark/speed.py --devices cpu cuda                     the same trainings on a CPU and on a GPU

By default it runs our PPO scripts and sb3-contrib's RecurrentPPO in turn, at equal work: the same vectorised
task, network (one LSTM for policy and value, then one hidden layer each), rollout, epochs, minibatches,
optimiser steps and torch threads. It prints steps per second without the first update, which warms up, the
ratio of the medians, and where our time goes. On MinigridMemory "equal work" includes a difference by design:
our encoder convolves each distinct view of a batch once, theirs every image. --separate-lstm gives
RecurrentPPO its default instead, a second LSTM for the critic: more work, but what a user gets.

--pqn: both learn RepeatPrevious with one memory, from rollouts of one size, in equal epochs and minibatches.
What differs is the loss, and that PPO has two hidden layers and heads, for policy and value.

--off-policy: the floor of the algorithm is stable-baselines3's SAC, TD3 or DQN on the same task, with as many
environments, gradient steps per step and transitions per gradient step, and a hidden layer in place of the
memory. From there to our memory called none is the difference of the implementations, from none to another
memory its price. stable-baselines3 has no SAC for discrete actions to compare with.
"""
import collections
import csv
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from models import MEMORIES  # noqa: E402
from models.command_line import command_line  # noqa: E402
from models.flags import fail, pick_device  # noqa: E402
from models.loading import EMPTY  # noqa: E402

# name: env id, env kwargs, N, T, minibatches, LSTM size, hidden layer, encoder size (images), updates to time
TASKS = {
    "poc": ("PocMemory-v0", {}, 16, 128, 8, 32, 64, 0, 16),
    "cartpole": ("CartPoleMasked-v0", {}, 16, 256, 4, 64, 128, 0, 16),
    "minigrid": ("MinigridMemory-v0", {"views": False}, 16, 256, 8, 256, 512, 512, 1),
    "repeat": ("popgym-RepeatPreviousEasy-v0", {}, 64, 128, 4, 64, 64, 0, 4),
}
TAPES = ((2_048, 1), (128, 16))  # T, B of --memories
# memory-monoids' RepeatPrevious: episodes of 103 steps, width 256, 1,000 steps an update, an update each 103
DQN = {
    "env-id": "popgym-RepeatPreviousEasy-v0", "env-kwargs": '{"k": 10, "num_decks": 2}',
    "hidden-size": 256, "mlp-size": 256, "num-envs": 64, "learning-starts": 10_000, "train-every": 1_024,
    "replay-ratio": 1 / 103, "total-timesteps": 20_480}
DQN_LENGTH = {"sbb": {"seq-len": 50}, "tbb": {"tape-len": 1_000}}
DQN_MEMORIES = {  # layers, memory-kwargs
    "lru": (2, {"state_size": 128}), "s5": (2, {}), "ffm": (1, {"contexts": 16}),
    "linear-attention": (1, {"heads": 1}), "lstm": (1, {}), "gpt": (1, {"head_size": 128})}

# script: env id, environment steps between two visits to the replay, gradient steps a visit, visits to time;
# for stable-baselines3 also its algorithm and the transitions of a gradient step: ours has as many real steps
OFF_POLICY = {
    "sac_gru": ("PendulumMasked-v1", 160, 16, 12, "SAC", 920),
    "td3_gru": ("PendulumMasked-v1", 160, 16, 12, "TD3", 920),
    "dqn_recurrent_sbb": ("popgym-RepeatPreviousEasy-v0", 64, 1, 160, "DQN", 1_010),
    "dqn_recurrent_tbb": ("popgym-RepeatPreviousEasy-v0", 64, 1, 160, "DQN", 1_020),
    "sac_discrete_sbb": ("popgym-RepeatPreviousEasy-v0", 160, 16, 12, None, None)}
LEARNING_STARTS = 10_000  # environment steps, of --off-policy
# --devices: script, memory, N, H. PPO steps a task that costs next to nothing; the others as in OFF_POLICY
DEVICE_RUNS = [
    ("ppo_recurrent_sbb", "lstm", 64, 128), ("ppo_recurrent_sbb", "lstm", 1_024, 128),
    ("ppo_recurrent_tbb", "lru", 64, 128), ("ppo_recurrent_tbb", "lru", 1_024, 128),
    ("ppo_recurrent_tbb", "lru", 256, 512), ("ppo_recurrent_tbb", "deltanet", 1_024, 128),
    ("ppo_recurrent_tbb", "gpt", 256, 128),
    ("dqn_recurrent_sbb", "gru", 16, 256), ("dqn_recurrent_tbb", "lru", 16, 256),
    ("sac_discrete_sbb", "gru", 16, 256), ("sac_gru", "gru", 16, 256), ("td3_gru", "gru", 16, 256)]


@dataclass
class Args:
    tasks: tuple[str, ...] = ("poc", "cartpole")  # poc, cartpole, minigrid, repeat
    ours: tuple[str, ...] = ("sbb:lstm",)  # script:memory; RecurrentPPO has the LSTM only
    num_layers: int = 1  # of every memory, RecurrentPPO's too
    repeats: int = 3  # runs of each, alternating
    threads: int = 1  # torch threads
    memories: bool = False  # time the layers of --layer-size instead
    layer_size: int = 128  # H of --memories
    pqn: tuple[str, ...] = ()  # time PQN with these memories against our PPO instead
    exported: bool = False  # time a step of --export's ONNX file instead, for every memory, with H = 64
    dqn: tuple[str, ...] = ()  # time double DQN instead: script:memory, a memory of DQN_MEMORIES
    off_policy: tuple[str, ...] = ()  # time these against stable-baselines3: script:memory
    devices: tuple[str, ...] = ()  # time the same trainings on each of these instead
    length: int = 0  # with --dqn: on whole episodes of T-Maze of this length; 0: RepeatPrevious
    separate_lstm: bool = False  # RecurrentPPO's default: a second LSTM for the critic
    out: str | None = None  # also append the table to this CSV file
    child: str | None = None  # internal: run stable-baselines3's part of this task or script


def argv(flags):
    """{"memory": "gru", "no-prev-action": None} -> ["--memory", "gru", "--no-prev-action"]"""
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value) if x is not None]


def ours(args, script, flags):
    """One training, from its own progress.csv, without the first row that learns: it warms up.

    Returns environment steps per second, ms of a gradient step (drawing its batch not included), us of acting
    and of updates for an environment step, and each phase's share of the time.
    """
    with tempfile.TemporaryDirectory() as folder:
        more = {"num-threads": args.threads, "runs-dir": folder, "run-name": "speed"}
        command = [sys.executable, ROOT / f"{script}.py", *argv({"device": "cpu"} | flags | more)]
        subprocess.run(command, check=True, capture_output=True)
        rows = list(csv.DictReader((Path(folder) / "speed" / "progress.csv").open()))
    begin = flags.get("learning-starts", 0)
    first, *rows = [row for row in rows if int(row["global_step"]) > begin]
    phases = "policy", "env", "batch", "update", "log"
    spent = {phase: sum(float(row[f"time/{phase}"]) for row in rows) for phase in phases}
    seconds = sum(spent.values())
    steps = int(rows[-1]["global_step"]) - int(first["global_step"])
    counted = "charts/gradient_steps"                       # PPO and PQN do not count them
    updates = float(rows[-1].get(counted, "nan")) - float(first.get(counted, "nan"))
    return {
        "steps_per_second": steps / seconds, "update_ms": 1e3 * spent["update"] / updates,
        "policy_us": 1e6 * spent["policy"] / steps, "update_us": 1e6 * spent["update"] / steps,
        **{f"share_{phase}": spent[phase] / seconds for phase in phases}}


def theirs(args, child):
    """Steps per second and ms of a gradient step of stable-baselines3, in a process of its own."""
    flags = {"child": child, "threads": args.threads, "num-layers": args.num_layers}
    if args.separate_lstm:
        flags["separate-lstm"] = None
    command = [sys.executable, __file__, *argv(flags)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def in_turn(args, commands, child=None):
    """Medians of --repeats runs, in turn: of each (script, flags), last of stable-baselines3's `child`."""
    runs = []
    for _ in range(args.repeats):
        runs.append([ours(args, *command) for command in commands])
        if child:
            runs[-1].append(theirs(args, child))
    return [{k: statistics.median(run[k] for run in same) for k in same[0]} for same in zip(*runs)]


def shares(median, form):
    return {name: form(value) for name, value in median.items() if name.startswith("share_")}


# ---------------------------------------------------------------- stable-baselines3, in a process of its own

def adapter(env_id, num_envs, **kwargs):
    """Our vectorised task as stable-baselines3 wants it: the same numpy batch that our script steps."""
    import gymnasium as gym
    from stable_baselines3.common.vec_env import VecEnv

    import envs as tasks  # noqa: F401  (registers them)

    class Adapter(VecEnv):
        def __init__(self):
            if gym.spec(env_id).vector_entry_point:
                self.envs = gym.make_vec(env_id, num_envs, **kwargs)
            else:
                mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
                self.envs = gym.make_vec(env_id, num_envs, "sync", mode, **kwargs)
            spaces = self.envs.single_observation_space, self.envs.single_action_space
            super().__init__(num_envs, *spaces)

        def reset(self):
            return self.envs.reset(seed=1)[0]

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            obs, reward, terminated, truncated, infos = self.envs.step(self.actions)
            done, out = terminated | truncated, [{} for _ in range(self.num_envs)]
            for n in done.nonzero()[0]:
                out[n] = {
                    "terminal_observation": infos["final_obs"][n],
                    "TimeLimit.truncated": not terminated[n]}
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

    return Adapter()


def recurrent_ppo(args):
    """RecurrentPPO of the size of --child; the steps of a rollout, its gradient steps, rollouts to time."""
    from sb3_contrib import RecurrentPPO

    env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, updates = TASKS[args.child]
    policy_kwargs = {
        "lstm_hidden_size": hidden, "n_lstm_layers": args.num_layers, "net_arch": [mlp],
        "shared_lstm": not args.separate_lstm, "enable_critic_lstm": args.separate_lstm}
    if encoder:
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": encoder}
    model = RecurrentPPO(
        "CnnLstmPolicy" if encoder else "MlpLstmPolicy", adapter(env_id, N, **kwargs), device="cpu",
        seed=1, n_steps=T, n_epochs=4, batch_size=N * T // minibatches, policy_kwargs=policy_kwargs)
    return model, N * T, 4 * minibatches, updates


def memoryless(args):
    """SAC, TD3 or DQN of the size of --child; the steps between visits, gradient steps, visits to time."""
    import numpy as np
    import stable_baselines3
    from stable_baselines3.common.noise import NormalActionNoise

    env_id, steps, gradient_steps, visits, algorithm, batch_size = OFF_POLICY[args.child]
    sizes = importlib.import_module(args.child).Args()
    more = {
        "SAC": {},
        "TD3": {"action_noise": NormalActionNoise(np.zeros(1), np.full(1, 0.1))},
        "DQN": {"exploration_initial_eps": 0.05, "target_update_interval": steps}}[algorithm]
    policy_kwargs = {"net_arch": [sizes.hidden_size] * args.num_layers + [sizes.mlp_size]}
    model = getattr(stable_baselines3, algorithm)(
        "MlpPolicy", adapter(env_id, sizes.num_envs), device="cpu", seed=1,
        buffer_size=sizes.buffer_size, tau=sizes.tau, learning_starts=LEARNING_STARTS,
        train_freq=steps // sizes.num_envs, gradient_steps=gradient_steps, batch_size=batch_size,
        policy_kwargs=policy_kwargs, **more)
    return model, steps, gradient_steps, visits


def run_sb3(args):
    """Trains RecurrentPPO, or SAC, TD3 or DQN without memory; prints its speed as JSON."""
    import torch

    spent = collections.Counter()

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
    on_policy = args.child in TASKS
    model, steps, gradient_steps, visits = recurrent_ppo(args) if on_policy else memoryless(args)
    timed(model, "train")
    if not on_policy:
        timed(model.replay_buffer, "sample")
    model.learn(steps if on_policy else (LEARNING_STARTS // steps + 1) * steps)     # warms up
    spent.clear()
    begin = time.perf_counter()
    model.learn(visits * steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - begin
    update_ms = 1e3 * (spent["train"] - spent["sample"]) / (visits * gradient_steps)
    print(json.dumps({"steps_per_second": visits * steps / seconds, "update_ms": update_ms}))


# ---------------------------------------------------------------- what is timed

def rollout_flags(args, task):
    """Of PPO and PQN on a task of TASKS."""
    env_id, kwargs, N, T, minibatches, hidden, mlp, encoder, updates = TASKS[task]
    return {
        "env-id": env_id, "env-kwargs": json.dumps(kwargs), "num-envs": N, "num-steps": T,
        "update-epochs": 4, "num-minibatches": minibatches, "num-layers": args.num_layers,
        "hidden-size": hidden, "mlp-size": mlp, "encoder-size": encoder,
        "total-timesteps": (updates + 1) * N * T}


def time_ppo(args):
    """Our PPO against RecurrentPPO: steps per second, their ratio, where our time goes; medians."""
    for task in args.tasks:
        flags = rollout_flags(args, task)
        names = [name.split(":") for name in args.ours]
        commands = [
            (f"ppo_recurrent_{script}", flags | {"memory": memory}) for script, memory in names]
        *medians, sb3 = in_turn(args, commands, task)
        for (script, memory), median in zip(names, medians):
            ratio = median["steps_per_second"] / sb3["steps_per_second"]
            append(args.out, {
                "task": task, "script": script, "memory": memory, "layers": args.num_layers,
                "threads": args.threads, "separate_lstm": args.separate_lstm, "n": args.repeats,
                "ours": round(median["steps_per_second"]), "sb3": round(sb3["steps_per_second"]),
                "ratio": round(ratio, 2), **shares(median, lambda x: round(x, 2))})


def time_pqn(args):
    """PQN against our PPO on the tape: steps per second, us a step of acting and of updates; medians."""
    for memory in args.pqn:
        flags = rollout_flags(args, "repeat") | {"memory": memory}
        pqn, ppo = in_turn(args, [("pqn_recurrent_tbb", flags), ("ppo_recurrent_tbb", flags)])
        append(args.out, {
            "memory": memory, "layers": args.num_layers, "threads": args.threads, "n": args.repeats,
            "pqn": f"{pqn['steps_per_second']:.0f}", "ppo": f"{ppo['steps_per_second']:.0f}",
            "ratio": f"{pqn['steps_per_second'] / ppo['steps_per_second']:.2f}",
            "pqn_policy_us": f"{pqn['policy_us']:.1f}", "ppo_policy_us": f"{ppo['policy_us']:.1f}",
            "pqn_update_us": f"{pqn['update_us']:.1f}", "ppo_update_us": f"{ppo['update_us']:.1f}",
            **shares(pqn, lambda x: f"{x:.2f}")})


def off_policy_flags(args, script, memory):
    env_id, steps, gradient_steps, visits, *_ = OFF_POLICY[script]
    return {
        "env-id": env_id, "memory": memory, "num-layers": args.num_layers, "no-prev-action": None,
        "learning-starts": LEARNING_STARTS, "train-every": steps, "replay-ratio": gradient_steps / steps,
        "total-timesteps": (LEARNING_STARTS // steps + 1 + visits) * steps}


def time_off_policy(args):
    """SAC, TD3 and DQN with memory against stable-baselines3's without; medians."""
    for name in args.off_policy:
        script, memory = name.split(":")
        algorithm = OFF_POLICY[script][4]
        commands = [(script, off_policy_flags(args, script, memory))]
        median, *sb3 = in_turn(args, commands, child=script if algorithm else None)
        sb3 = sb3[0] if sb3 else {"steps_per_second": float("nan"), "update_ms": float("nan")}
        append(args.out, {
            "script": script, "memory": memory, "layers": args.num_layers, "threads": args.threads,
            "n": args.repeats, "algorithm": algorithm, "ours": f"{median['steps_per_second']:.0f}",
            "sb3": f"{sb3['steps_per_second']:.0f}",
            "ratio": f"{median['steps_per_second'] / sb3['steps_per_second']:.2f}",
            "ours_ms": f"{median['update_ms']:.1f}", "sb3_ms": f"{sb3['update_ms']:.1f}",
            **shares(median, lambda x: f"{x:.2f}")})


def time_layers(args):
    """Milliseconds of one layer, forward + backward, on one long tape and on 16 columns; medians, in turn."""
    import torch
    import torch.nn as nn

    from models.memory import MONOIDS

    torch.set_num_threads(args.threads)
    H = args.layer_size
    for T, B in TAPES:
        x, start = torch.randn(T, B, H, requires_grad=True), torch.rand(T, B) < 0.02
        layers = {"nn.GRU": nn.GRU(H, H), "nn.LSTM": nn.LSTM(H, H)}
        layers |= {name: layer(H) for name, layer in MONOIDS.items()}
        times = {name: [] for name in layers}
        for _ in range(args.repeats + 1):                   # the first is for warming up
            for name, layer in layers.items():
                begin = time.perf_counter()
                inputs = (x,) if name.startswith("nn.") else (x, layer.initial_state(B), start)
                layer(*inputs)[0].sum().backward()
                times[name].append(1000 * (time.perf_counter() - begin))
        ms = {name: statistics.median(t[1:]) for name, t in times.items()}
        for name in layers:
            append(args.out, {
                "T": T, "B": B, "H": H, "threads": args.threads, "layer": name, "n": args.repeats,
                "ms": round(ms[name], 2),
                "times_faster_than_gru": round(ms["nn.GRU"] / ms[name], 2),
                "times_faster_than_lstm": round(ms["nn.LSTM"] / ms[name], 2)})


def time_exported(args):
    """Microseconds of a step of one environment: of onnxruntime with the file, and of the agent; medians."""
    import numpy as np
    import onnxruntime
    import torch

    import ppo_recurrent_tbb as ppo
    from envs.vector import make_envs
    from models.export import export
    from models.run_folder import make_agent

    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for memory in MEMORIES:
        with tempfile.TemporaryDirectory() as folder:
            flags = ppo.Args(memory=memory, device="cpu", export=f"{folder}/policy.onnx")
            envs = make_envs(flags, 1, training=False)
            agent, _ = make_agent(ppo.Agent, flags, envs, {})
            export(agent, envs, flags)
            session = onnxruntime.InferenceSession(flags.export, options)
        state, start = agent.memory.initial_state(1), torch.zeros(1, dtype=torch.bool)
        obs = torch.zeros(1, *envs.single_observation_space.shape, dtype=torch.long)
        inputs = {x.name: np.zeros([1, *x.shape[1:]], np.float32) for x in session.get_inputs()}
        inputs |= {"obs": obs.numpy(), "start": start.numpy()}
        states = [name for name in inputs if name.startswith("state")]
        of_file, of_agent = [], []
        for _ in range(2_000):
            begin = time.perf_counter()
            _, *after = session.run(None, inputs)
            inputs |= dict(zip(states, after))
            middle = time.perf_counter()
            with torch.inference_mode():
                _, state = agent.act((obs,), state, start)
            of_file.append(middle - begin)
            of_agent.append(time.perf_counter() - middle)
        append(args.out, {
            "memory": memory, "H": flags.hidden_size,
            "onnxruntime_us": round(1e6 * statistics.median(of_file)),
            "agent_us": round(1e6 * statistics.median(of_agent))})


def dqn_flags(args, script, memory):
    layers, memory_kwargs = DQN_MEMORIES[memory]
    flags = DQN | DQN_LENGTH[script]
    if args.length:
        flags = whole_episodes(args.length, script, memory)
        if memory == "gpt":
            memory_kwargs = memory_kwargs | {"window": args.length + 2}
    memory_flags = {
        "memory": memory, "num-layers": layers, "memory-kwargs": json.dumps(memory_kwargs)}
    return flags | memory_flags


def whole_episodes(length, script, memory):
    """Memory-RL's Passive T-Maze of this length: width 128, 64 episodes an update, four updates a visit."""
    T = length + 1
    sizes = {"seq-len": -1, "batch-size": 64 * T} if script == "sbb" else {"tape-len": 64 * T}
    return sizes | {
        "env-id": "TMazePassive-v0", "env-kwargs": json.dumps({"length": length}), "num-envs": 64,
        "hidden-size": 128, "mlp-size": 256, "encoder-size": 128 if memory == "gpt" else 48,
        "learning-starts": 64 * T, "train-every": 64 * T, "replay-ratio": 4.01 / (64 * T),
        "buffer-size": 256 * T, "loss": "mse", "total-timesteps": 256 * T, "log-every": 64 * T}


def time_dqn(args):
    """Double DQN end to end, once it learns: steps per second, one update, acting for one step; medians."""
    names = [name.split(":") for name in args.dqn]
    commands = [
        (f"dqn_recurrent_{script}", dqn_flags(args, script, memory)) for script, memory in names]
    for (script, memory), median in zip(names, in_turn(args, commands)):
        append(args.out, {
            "script": script, "memory": memory, "layers": DQN_MEMORIES[memory][0],
            "length": args.length, "threads": args.threads, "n": args.repeats,
            "steps_per_second": f"{median['steps_per_second']:.0f}",
            "update_ms": f"{median['update_ms']:.1f}", "policy_us": f"{median['policy_us']:.1f}",
            **shares(median, lambda x: f"{x:.2f}")})


def device_flags(args, script, memory, num_envs, hidden_size):
    sizes = {"memory": memory, "num-envs": num_envs, "hidden-size": hidden_size, "mlp-size": hidden_size}
    if script in OFF_POLICY:
        return off_policy_flags(args, script, memory) | sizes
    return sizes | {
        "env-id": "MinigridMemory-v0", "shrink-images": 7, "whiten-images": None,
        "encoder-size": hidden_size, "num-steps": 128, "num-minibatches": 8, "update-epochs": 4,
        "total-timesteps": 2 * 128 * num_envs}  # the first warms up


def time_devices(args):
    """Every script on every device: steps per second; medians, in turn."""
    for run in DEVICE_RUNS:
        flags = device_flags(args, *run)
        medians = in_turn(args, [(run[0], flags | {"device": device}) for device in args.devices])
        for device, median in zip(args.devices, medians):
            append(args.out, {
                **dict(zip(("script", "memory", "num_envs", "hidden_size"), run)),
                "device": device, "name": device_name(device), "threads": args.threads, "n": args.repeats,
                "steps_per_second": f"{median['steps_per_second']:.0f}"})


def device_name(device):
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def append(path, row):
    """Prints a row, and adds it to a CSV file, if there is a path; a new file begins with the header."""
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if path:
        new = not Path(path).exists()
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


def check(args):
    """Refuses what cannot run."""
    known = {"ours": DQN_LENGTH, "dqn": DQN_LENGTH, "off_policy": OFF_POLICY}
    for name, scripts in known.items():
        for pair in getattr(args, name):
            memories = DQN_MEMORIES if name == "dqn" else MEMORIES
            script, _, memory = pair.partition(":")
            if script not in scripts or memory not in memories:
                fail(f"--{name.replace('_', '-')} {pair} must be script:memory, with one of "
                     f"{', '.join(scripts)} and one of {', '.join(memories)}")
    for memory in args.pqn:
        if memory not in MEMORIES:
            fail(f"--pqn {memory or EMPTY} is not one of {', '.join(MEMORIES)}")
    for task in args.tasks:
        if task not in TASKS:
            fail(f"--tasks {task} is not one of {', '.join(TASKS)}")
    for device in args.devices:
        pick_device(device)
    if args.child is not None and args.child not in TASKS | OFF_POLICY:
        fail(f"--child {args.child} is not one of {', '.join(TASKS | OFF_POLICY)}")
    most = {"num_layers": 1024, "repeats": 1000, "threads": 1024, "layer_size": 2**16, "length": 2**20}
    for name, high in most.items():
        value, low = getattr(args, name), 0 if name == "length" else 1
        if not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} must be at least {low} and at most {high}")
    if args.out is not None:
        fail_if_no_file_can_be(args.out)


def fail_if_no_file_can_be(path):
    try:
        new = not Path(path).exists()
        open(path, "a").close()                             # whether it can be, before hours of timing
        if new:
            Path(path).unlink()
    except OSError as e:
        fail(f"--out {path or EMPTY} cannot be written ({e.strerror}): choose another file")


def main(argv=None):
    args = command_line(Args, argv)
    check(args)
    if args.child:
        run_sb3(args)
    elif args.exported:
        time_exported(args)
    elif args.memories:
        time_layers(args)
    elif args.pqn:
        time_pqn(args)
    elif args.dqn:
        time_dqn(args)
    elif args.off_policy:
        time_off_policy(args)
    elif args.devices:
        time_devices(args)
    else:
        time_ppo(args)


if __name__ == "__main__":
    main()

"""Does every task run? Other people's and ours, each trained for about 1,000 steps, saved, loaded and played.

    pip install box2d mujoco ale-py mazelib     optional packages: where one is absent, its tasks are skipped
    python benchmark/every_task.py              all ids of TASKS; then python benchmark/pages.py
    python benchmark/every_task.py --ids CartPole-v1 'LunarLander-v3 {"continuous": true}'

Each id is tried in a process of its own, so that a crash costs one row. There ppo_recurrent_tbb trains on it,
then pqn_recurrent_tbb and dqn_recurrent_tbb where the actions are discrete, or sac_gru where they are a Box,
with small networks; every model that was saved is loaded and played. The replays draw ended episodes: for DQN
and SAC, and for playing, episodes are cut after 64 steps. --ids renews these rows of the table and leaves the
others.

Rows of benchmark/results/every-task.csv: the spaces, as the task itself has them; the steps per second of the
plain environment, one of it made by gym.make without its checker (of our batches 256), random actions
and resets included, in seconds of processor time (not of the clock), so that what else runs on the machine
counts little; the scripts that ran; the result: "runs", "package absent", or the sentence of its refusal.
"""
import contextlib
import csv
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dqn_recurrent_tbb  # noqa: E402
import ppo_recurrent_tbb  # noqa: E402
import pqn_recurrent_tbb  # noqa: E402
import sac_gru  # noqa: E402
from envs.memory_gym import TASKS as MEMORY_GYM  # noqa: E402
from envs.vector import has_batch, import_module_of  # noqa: E402
from models.command_line import command_line  # noqa: E402
from models.files import write  # noqa: E402
from models.flags import fail  # noqa: E402
from models.loading import EMPTY  # noqa: E402
from models.views import Views  # noqa: E402

POPGYM = """
    RepeatPrevious RepeatFirst Autoencode CountRecall PositionOnlyCartPole VelocityOnlyCartpole
    NoisyPositionOnlyCartPole PositionOnlyPendulum NoisyPositionOnlyPendulum MultiarmedBandit HigherLower
    Battleship Concentration MineSweeper""".split()
LABYRINTH = "LabyrinthEscape", "LabyrinthExplore"
LEVELS = "Easy", "Medium", "Hard"
MINIGRID = """
    Empty-8x8 MemoryS7 MemoryS13 MemoryS17Random DoorKey-8x8 KeyCorridorS3R3 LavaCrossingS9N1
    Dynamic-Obstacles-8x8 FourRooms Fetch-8x8-N3 RedBlueDoors-8x8 ObstructedMaze-1Dl""".split()
BABYAI = """
    GoToRedBall GoToLocal GoToObjMaze PickupLoc PutNextLocal UnlockLocal OpenDoorsOrderN2 BossLevel""".split()
MUJOCO = """
    Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher
    Swimmer Walker2d""".split()

OURS = [name for name, spec in gym.registry.items() if str(spec.vector_entry_point).startswith("envs.")]
SHORT = {"CountInput-v0": {"episode_length": 64}, "MinigridMemory-v0": {"max_steps": 64}}

# package: the module that shows whether it is there, and its tasks, some with env_kwargs behind the id
TASKS = {
    "ours, 256 of each": ("envs", [
        f"{name} {json.dumps(SHORT[name])}" if name in SHORT else name for name in OURS]),
    "POPGym, 256 of each": ("popgym", [f"popgym-{name}{level}-v0" for name in POPGYM for level in LEVELS]),
    "POPGym, Labyrinth": ("mazelib", [f"popgym-{name}{level}-v0" for name in LABYRINTH for level in LEVELS]),
    "Memory Gym": ("memory_gym", list(MEMORY_GYM)),
    "MiniGrid": ("minigrid", [f"MiniGrid-{name}-v0" for name in MINIGRID]),
    "BabyAI": ("minigrid", [f"BabyAI-{name}-v0" for name in BABYAI]),
    "classic control": ("gymnasium", [
        "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]),
    "toy text": ("gymnasium", [
        "FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1"]),
    "Box2D": ("Box2D", [
        "LunarLander-v3", 'LunarLander-v3 {"continuous": true}', "BipedalWalker-v3", "CarRacing-v3"]),
    "MuJoCo": ("mujoco", [f"{name}-v5" for name in MUJOCO]),
    "Atari": ("ale_py", [
        "ale_py:ALE/Pong-v5", "ale_py:ALE/Breakout-v5", 'ale_py:ALE/Pong-v5 {"obs_type": "ram"}']),
}
COLUMNS = "package", "version", "id", "observation", "actions", "steps_per_second", "scripts", "result"
LIMIT = 64  # steps of an episode, for the replays and for playing
SMALL = [
    "--memory", "mingru", "--hidden-size", "16", "--mlp-size", "16", "--num-envs", "4", "--device", "cpu"]
REPLAY = [
    "--buffer-size", "2048", "--learning-starts", "512", "--train-every", "64",
    "--replay-ratio", "0.02", "--log-every", "64"]
ROLLOUTS = ["--num-steps", "64", "--num-minibatches", "2", "--update-epochs", "1"]
DQN, SAC = [*REPLAY, "--tape-len", "64"], [*REPLAY, "--policy-learning-starts", "512", "--batch-size", "8"]


@dataclass
class Args:
    ids: tuple[str, ...] = ()  # of TASKS; none: all
    steps: int = 1_024  # environment steps of each training
    seconds: float = 1_800.0  # after so many a task has failed
    out: str = str(ROOT / "benchmark/results/every-task.csv")  # the table


def short(space):
    """A space in a few letters: what kind, of which shape. Bounds and floating types are left out."""
    if isinstance(space, gym.spaces.Dict):
        return f"Dict({', '.join(f'{name} {short(part)}' for name, part in space.spaces.items())})"
    if isinstance(space, gym.spaces.Tuple):
        return f"Tuple({', '.join(map(short, space.spaces))})"
    if isinstance(space, Views):
        return str(space)
    if isinstance(space, gym.spaces.Discrete):
        return f"Discrete({space.n})"
    if isinstance(space, gym.spaces.MultiDiscrete):
        sizes = space.nvec.flatten().tolist()
        same = len(sizes) > 3 and len(set(sizes)) == 1
        return f"MultiDiscrete([{sizes[0]}] x {len(sizes)})" if same else f"MultiDiscrete({sizes})"
    if isinstance(space, gym.spaces.Box):
        kind = "" if np.issubdtype(space.dtype, np.floating) else f" {space.dtype}"
        return f"Box({', '.join(map(str, space.shape))}){kind}"
    return "text" if isinstance(space, gym.spaces.Text) or hasattr(space, "mission_func") else str(space)


def in_words(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def split(task):
    """'LunarLander-v3 {"continuous": true}' -> its id and its env_kwargs"""
    env_id, _, kwargs = task.partition(" ")
    return env_id, json.loads(kwargs or "{}")


def plain_speed(env, seconds=0.5):
    """Steps per second of processor time with random actions: of at least 1,000 steps, or of 3 seconds."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(100)]
    env.reset(seed=0)

    def play():
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    play()                                                  # warms up
    steps, took, begin = 0, 0.0, time.process_time()
    while took < seconds or (steps < 1_000 and took < 3):
        play()
        steps += len(actions)
        took = time.process_time() - begin
    return steps / took


def batch_speed(env_id, kwargs, num_envs=256, seconds=0.5):
    """The same of one of our own tasks, which step all environments at once."""
    envs = gym.make_vec(env_id, num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(100)]
    envs.reset(seed=0)
    for action in actions:                                  # warms up, and leaves the first, equal steps
        envs.step(action)
    steps, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        for action in actions:
            envs.step(action)
        steps += len(actions) * num_envs
    return steps / (time.process_time() - begin)


def scripts_for(actions):
    """The scripts whose actions these are, with their flags."""
    if isinstance(actions, gym.spaces.Box):
        return (ppo_recurrent_tbb, ROLLOUTS), (sac_gru, SAC)
    return (ppo_recurrent_tbb, ROLLOUTS), (pqn_recurrent_tbb, ROLLOUTS), (dqn_recurrent_tbb, DQN)


def train_and_play(script, flags, task, steps, folder):
    """One script on one task. Raises what the script raises, and ValueError if it has not learned at all."""
    env_id, kwargs = split(task)
    limit = {} if env_id in OURS else {"max_episode_steps": LIMIT}              # ours are short enough
    whole, cut = json.dumps(kwargs), json.dumps(kwargs | limit)
    script.main([
        "--env-id", env_id, "--env-kwargs", whole if flags == ROLLOUTS else cut, *SMALL, *flags,
        "--total-timesteps", str(steps), "--runs-dir", folder, "--run-name", script.SCRIPT])
    run = Path(folder) / script.SCRIPT
    *_, last = csv.DictReader((run / "progress.csv").open())
    if float(last.get("charts/gradient_steps", 1)) == 0:
        raise ValueError(f"no gradient step in {steps} steps")
    script.main([
        "--model", str(run / "model.safetensors"), "--env-kwargs", cut, "--episodes", "1",
        "--render-mode", "none"])


def attempt(task, steps):
    """What a row says of a task that is installed."""
    torch.set_num_threads(1)
    env_id, kwargs = split(task)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            env = gym.make(import_module_of(env_id), disable_env_checker=True, **kwargs)
            speed = batch_speed(env_id, kwargs) if has_batch(env_id) else plain_speed(env)
            row = {
                "observation": short(env.observation_space), "actions": short(env.action_space),
                "steps_per_second": f"{speed:.0f}", "scripts": "", "result": "runs"}
            env.close()
        except Exception as e:
            return {"result": in_words(e)}
        with tempfile.TemporaryDirectory() as folder:
            for script, flags in scripts_for(env.action_space):
                try:
                    train_and_play(script, flags, task, steps, folder)
                    row["scripts"] = f"{row['scripts']} {script.SCRIPT}".strip()
                except SystemExit:                          # refused, in the sentence that it printed last
                    *_, sentence = said.getvalue().splitlines()
                    row["result"] = f"{script.SCRIPT}: {sentence.partition(': ')[2]}"
                except Exception as e:
                    row["result"] = f"{script.SCRIPT}: {in_words(e)}"
    return row


def send(task, steps, connection):
    connection.send(attempt(task, steps))


def in_a_process(task, args):
    """attempt(task) in a process of its own: whatever it does, it returns."""
    fork = "fork" in multiprocessing.get_all_start_methods()                    # saves importing torch again
    context = multiprocessing.get_context("fork" if fork else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(task, args.steps, sender))
    process.start()
    sender.close()                                          # else a dead process would be waited for
    try:
        if receiver.poll(args.seconds):
            return receiver.recv()
        process.kill()
        return {"result": f"not done after {args.seconds:g} seconds"}
    except EOFError:
        process.join()
        return {"result": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.join()


def version_of(module):
    """"popgym 1.0.7", by the name that pip knows; a package may be several to pip. Ours have no version."""
    if module == "envs":
        return ""
    names = importlib.metadata.packages_distributions().get(module, [module])
    name = module if module in names else names[0]
    return f"{name} {importlib.metadata.version(name)}"


def measure(package, task, args):
    """The row of one task."""
    module, _ = TASKS[package]
    row = dict.fromkeys(COLUMNS, "") | {"package": package, "id": task}
    if importlib.util.find_spec(module) is None:
        return row | {"result": "package absent"}
    return row | {"version": version_of(module)} | in_a_process(task, args)


def save(path, rows):
    """The table in the order of TASKS.   rows: {id: row}"""
    def table(beside):
        with beside.open("w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[task] for _, tasks in TASKS.values() for task in tasks if task in rows)

    write(path, table)


def saved_rows(path):
    """{id: row} of a table that was written before, {} if there is none."""
    if not path.exists():
        return {}
    if not path.is_file():                                  # to open a pipe would wait for ever
        fail(f"--out {path} is not a file: choose another")
    try:
        with path.open(newline="") as f:
            table = csv.DictReader(f)
            rows = list(table)
    except (OSError, ValueError, csv.Error) as e:
        fail(f"--out {path} cannot be read ({type(e).__name__}): choose another file")
    if table.fieldnames != list(COLUMNS):
        fail(f"--out {path} is not a table of {Path(__file__).name}: choose another file")
    return {row["id"]: row for row in rows}


def check(args):
    """Refuses what cannot run."""
    known = [task for _, tasks in TASKS.values() for task in tasks]
    for task in args.ids:
        if task not in known:
            fail(f"--ids {task or EMPTY} is not one of TASKS in {Path(__file__).name}, as {known[0]}")
    if not 1_000 <= args.steps <= 1_000_000:
        fail(f"--steps {args.steps} must be at least 1000 and at most 1000000")
    if not 0 < args.seconds <= 1e6:
        fail(f"--seconds {args.seconds} must be more than 0 and at most 1000000")
    if not Path(args.out).parent.is_dir() or Path(args.out).is_dir():
        fail(f"--out {args.out or EMPTY} must be a file in a folder that exists")


def main(argv=None):
    args = command_line(Args, argv)
    check(args)
    path = Path(args.out)
    rows = saved_rows(path)
    for package, (_, tasks) in TASKS.items():
        for task in tasks:
            if task in args.ids or not args.ids:
                rows[task] = row = measure(package, task, args)
                print("  ".join(cell for cell in row.values() if cell), flush=True)
                save(path, rows)


if __name__ == "__main__":
    main()

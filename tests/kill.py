"""Kills runs at random moments and shows that nothing is lost. Run on demand, not part of the tests:

python tests/kill.py [--kills 60] [--terms 20] [--seed 1] [--jobs 1] [--only WORD]

Every case is a short run of a script on a task: once to its end, then again with signals at random moments
and a --resume after each. SIGKILL must leave whole files; SIGTERM must end the run by itself, with exit code
0 and the command that continues it. On our own tasks the run that was stopped must end with the weights and
the rows of the one that was not, to the bit. Other people's tasks begin new episodes: there it must reach its
end with every row once. A signal after the end does not count: the moment is drawn again. The exit code is 1
if anything failed.
"""
import argparse
import csv
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import envs  # noqa: E402, F401  (registers the tasks)
from models.flags import read_checkpoint  # noqa: E402
from tests.helpers import column, command_line, comparable, weights_of  # noqa: E402

DEADLINE = 300  # seconds in which a run ends by itself, on a busy machine too
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
IMAGES = dict(num_envs=2, num_steps=16, num_minibatches=2, total_timesteps=32 * 12, checkpoint_every=64)
NORMALISED = dict(norm_obs=True, norm_reward=True)
SHORT = dict(explore_length=3, distractor_length=9, reward_length=3)
CASES = [  # script, what starts it, task, its arguments, memory, other flags
    ("ppo_recurrent_sbb", (), "PocMemory-v0", {}, "gru", {}),
    ("ppo_recurrent_sbb", (), "CartPoleMasked-v0", {}, "lstm", NORMALISED),
    ("ppo_recurrent_sbb", (), "MinigridMemory-v0", {"rgb": False, "size": 7}, "mingru", {}),
    ("ppo_recurrent_sbb", (), "MortarMayhem-v0", {}, "gru", IMAGES),
    ("ppo_recurrent_sbb", (), "MortarMayhem-Grid-v0", {}, "gru", IMAGES),
    ("ppo_recurrent_tbb", (), "TMazePassive-v0", {}, "lru", dict(full_episodes=True, prev_action=True)),
    ("ppo_recurrent_tbb", (), "VisualMatchPassive-v0", SHORT, "gpt", {}),
    ("ppo_recurrent_tbb", (), "MysteryPath-v0", {}, "deltanet", IMAGES),
    ("ppo_recurrent_tbb", (), "MiniGrid-MemoryS7-v0", {}, "lstm", {}),
    ("ppo_recurrent_tbb_multigpu", (), "KeyToDoor-v0", SHORT, "lru", NORMALISED),
    ("ppo_recurrent_tbb_multigpu", TORCHRUN, "PocMemory-v0", {}, "gru", dict(num_minibatches=2)),
    ("pqn_recurrent_tbb", (), "TMazePassive-v0", {}, "mingru", dict(prev_action=True)),
    ("dqn_recurrent_sbb", (), "PocMemory-v0", {"max_steps": 11}, "gru", dict(prev_reward=True)),
    ("dqn_recurrent_sbb", (), "CartPole-v1", {}, "lstm", {}),
    ("dqn_recurrent_tbb", (), "TMazeActive-v0", {}, "mingru", {}),
    ("dqn_recurrent_tbb", (), "popgym-RepeatPreviousEasy-v0", {}, "deltanet", {}),
    ("sac_gru", (), "CountInput-v0", {"episode_length": 11}, "lru", {}),
    ("sac_gru", (), "Pendulum-v1", {}, "gru", {}),
    ("td3_gru", (), "PendulumMasked-v1", {"max_steps": 30}, "gru", {}),
    ("td3_gru", (), "TwoFlags-v0", {"max_steps": 30}, "lstm", {}),
    ("sac_discrete_sbb", (), "TMazePassive-v0", {}, "gru", {}),
    ("sac_discrete_sbb", (), "MortarMayhem-v0", {}, "mingru", IMAGES | dict(batch_size=16)),
]


class Case:
    """A short run, its uninterrupted reference, and what has been seen of it."""

    def __init__(self, script, launcher, env_id, env_kwargs, memory, flags):
        self.script, self.launcher, self.env_id, self.memory = script, launcher, env_id, memory
        module = importlib.import_module(script)
        changes = dict(total_timesteps=4 * 32 * 20, checkpoint_every=3 * 128) | flags
        self.flags = command_line(module, env_id=env_id, env_kwargs=env_kwargs, memory=memory, **changes)
        ours = str(gym.spec(env_id).vector_entry_point).startswith("envs.")
        self.equal = ours and not launcher                  # of several processes only one's tasks are saved
        self.counts, self.moments, self.faults = {signal.SIGKILL: 0, signal.SIGTERM: 0}, [], []

    def start(self, folder, resume=False):
        """A process as a user starts it; what it prints goes to folder.log."""
        where = ["--resume", folder] if resume else ["--runs-dir", folder.parent, "--run-name", folder.name]
        command = [sys.executable, *self.launcher, f"{self.script}.py", *self.flags, *where]
        with folder.with_suffix(".log").open("w") as log:
            return subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log,
                stderr=subprocess.STDOUT)

    def finish(self, process, folder, says, codes=(0,)):
        """Waits until the process has ended by itself and demands what it says last."""
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"still running after {DEADLINE} s") from None
        printed = folder.with_suffix(".log").read_text()
        last = " ".join(printed.splitlines()[-2:])
        assert process.returncode in codes, f"exit code {process.returncode}: {last}"
        assert says in printed, f"does not say {says!r}: {last}"

    def make_reference(self, folder):
        self.finish(self.start(folder), folder, "done at step")
        self.reference = folder
        self.rows = rows_of(folder)
        self.row_seconds = float(self.rows[-1]["seconds"]) / len(self.rows)

    def interrupted_run(self, folder, signals, rng):
        """One run with these signals, then to its end. Returns those that came too late."""
        moments = sorted(rng.uniform(0, len(self.rows) - 2) for _ in signals)
        for i, moment in enumerate(moments):
            process = self.start(folder, resume=i > 0)
            if not self.wait_for(process, folder, moment):
                self.finish(process, folder, "done at step")
                return signals[i:]
            self.interrupt(process, folder, signals[i])
        self.finish(self.start(folder, resume=True), folder, "done at step")
        return []

    def wait_for(self, process, folder, moment):
        """Until `moment` rows are written and this process has saved once. Returns whether rows are left."""
        before, deadline = saved_when(folder), time.time() + DEADLINE
        while saved_when(folder) == before or max(len(lines_of(folder)) - 1, 0) < int(moment):
            if process.poll() is not None:
                return False
            if time.time() > deadline:
                kill(process)
                raise AssertionError(f"no row {int(moment)} after {DEADLINE} s")
            time.sleep(0.01)
        time.sleep(moment % 1 * self.row_seconds)
        return process.poll() is None and len(lines_of(folder)) - 1 < len(self.rows)

    def interrupt(self, process, folder, number):
        """Sends the signal and looks at what is left."""
        if number == signal.SIGKILL:
            kill(process)
        else:
            process.send_signal(number)
            codes = (1,) if self.launcher else (0,)         # torchrun's own after any signal
            self.finish(process, folder, "interrupted at step", codes)
            assert "continue:" in folder.with_suffix(".log").read_text()
        saved_at, rows = read_checkpoint(folder)["global_step"], rows_of(folder)
        assert weights_of(folder) and json.loads((folder / "args.json").read_text())
        steps = column(rows, "global_step")
        assert all(a < b for a, b in itertools.pairwise(steps)), f"rows at {steps}"
        assert number == signal.SIGKILL or saved_at >= max(steps, default=0), "SIGTERM lost rows"
        self.counts[number] += 1
        last = int(max(steps, default=0))
        name = {signal.SIGKILL: "KILL", signal.SIGTERM: "TERM"}[number]
        self.moments.append(f"{name} {last}" + (f" (back to {saved_at})" if saved_at < last else ""))

    def compare(self, folder):
        """The run that was stopped and the one that was not."""
        rows = rows_of(folder)
        steps = [row["global_step"] for row in rows]
        assert steps == [row["global_step"] for row in self.rows], f"rows at {steps}"
        assert not list(folder.glob("*.tmp"))
        if self.equal:
            differs = [row["global_step"] for row, other in zip(comparable(rows), comparable(self.rows))
                       if row != other]
            assert not differs, f"rows differ from step {differs[0]}"
            weights, others = weights_of(folder), weights_of(self.reference)
            assert all(torch.equal(weights[name], others[name]) for name in others), "weights differ"

    def try_signals(self, signals, rng):
        """All these signals, in as many runs as it takes until none comes too late."""
        rng.shuffle(signals)
        with tempfile.TemporaryDirectory() as work:
            try:
                self.make_reference(Path(work) / "reference")
                for attempt in range(10):
                    folder = Path(work) / f"run{attempt}"
                    signals = self.interrupted_run(folder, signals, rng)
                    self.compare(folder)
                    if not signals:
                        return
                raise AssertionError("the run is too short: every moment came after its end")
            except Exception as e:                          # damaged files raise all kinds
                self.faults.append(f"{type(e).__name__}: {e}")

    def table_row(self):
        kills, terms = self.counts.values()
        script = self.script + (", two processes" if self.launcher else "")
        demanded = "equal" if self.equal else "resumed"
        return (f"| {script} | {self.env_id} | {self.memory} | {kills} | {terms} | {demanded} | "
                f"{', '.join(self.moments)} | {' '.join(self.faults) or 'as demanded'} |")


def kill(process):
    """SIGKILL, of torchrun's processes too (where there is /proc): they would live on."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = path.read_text().split() if path.exists() else []
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}/cwd").exists() for pid in children):           # they hold the folder's lock
        time.sleep(0.01)


def saved_when(folder):
    path = folder / "checkpoint.pt"
    return path.stat().st_mtime_ns if path.exists() else None


def lines_of(folder):
    path = folder / "progress.csv"
    return path.read_text().splitlines() if path.exists() else []


def rows_of(folder):
    """The rows of progress.csv, all of them whole; none if the first was not yet written."""
    header, *rows = csv.reader(lines_of(folder) or [""])
    assert all(len(row) == len(header) for row in rows), "a torn row"
    return [dict(zip(header, row)) for row in rows]


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name, default in ("kills", 60), ("terms", 20), ("seed", 1), ("jobs", 1):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="the lines of CASES that hold this word")
    args = parser.parse_args()
    begin = time.time()
    cases = [Case(*case) for case in CASES if args.only in str(case)]
    if not cases:
        sys.exit(f"no line of CASES holds {args.only}")
    signals = [[] for _ in cases]
    for i, number in enumerate([signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms):
        signals[i % len(cases)].append(number)
    print("| script | task | memory | kills | terms | demanded | signals after step | result |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rngs = [random.Random(f"{args.seed} {i}") for i in range(len(cases))]
    with ThreadPoolExecutor(args.jobs) as pool:
        for case, _ in zip(cases, pool.map(Case.try_signals, cases, signals, rngs)):
            print(case.table_row(), flush=True)
    kills, terms = (sum(case.counts[number] for case in cases) for number in (signal.SIGKILL, signal.SIGTERM))
    equal = sum(sum(case.counts.values()) for case in cases if case.equal and not case.faults)
    failed = sum(bool(case.faults) for case in cases)
    print(f"\n{kills} SIGKILL and {terms} SIGTERM in {len(cases)} cases, {failed} of which failed; {equal} "
          f"of them in runs that ended equal to the bit; {time.time() - begin:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

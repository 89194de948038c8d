"""Run entries of tasks.toml over their seeds, several at a time, on this machine or on a Ray cluster.

    python benchmark/run.py --suite smoke --workers 2                  every script on a small task, in minutes
    python benchmark/run.py --only poc --seeds 1 2                     the entries whose name contains this
    python benchmark/run.py --suite popgym --dry-run                   their exact commands
    python benchmark/run.py --suite dqn --executor ray --workers 32    on a cluster (pip install ray)
    python benchmark/plot.py                                           then makes the curves and tables

Runs go to <runs-dir>/<entry>__<seed>, what they print to <entry>__<seed>.log beside. Start the same command again, whatever
happened: finished runs are skipped, interrupted ones resumed, failed ones named with their last lines and left until --retry.
"""
import collections
import csv
import fcntl
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SHOWN = {"SPS": "charts/SPS", "return": "charts/episodic_return", "success": "charts/success", "eval": "eval/episodic_return"}
LINE = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {postfix}"


@dataclass
class Args:
    suite: str = ""  # entries of this suite
    only: str = ""  # entries whose name contains this
    seeds: tuple[int, ...] = ()  # these instead of the entries' own
    workers: int = 2  # runs at a time
    runs_dir: str = "runs/benchmark"  # where the run folders go
    tasks: str = str(Path(__file__).parent / "tasks.toml")  # the entries
    retry: bool = False  # also what failed before
    dry_run: bool = False  # print the commands, run nothing
    executor: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a Ray cluster
    ray_address: str | None = None  # of the cluster; default: $RAY_ADDRESS, or else a Ray on this machine
    cpus_per_run: float = 1  # what Ray reserves for each
    gpus_per_run: float = 0


def entries(path=ROOT / "benchmark/tasks.toml"):
    """The entries of a file by name. One with a `grid` becomes one a combination: its values, by their short names, join the
    name and fill the {placeholders} of the command."""
    out = {}
    for name, entry in tomllib.loads(Path(path).read_text()).items():
        axes = [values.items() for values in entry.get("grid", {}).values()]
        for cell in itertools.product(*axes):
            command, short = entry["command"], [key for key, _ in cell]
            if cell:
                command = command.format(**dict(zip(entry["grid"], (value for _, value in cell))))
            out["__".join([name, *short])] = {**entry, "command": command, "group": name, "cell": short}
    return out


class LocalRun:
    """A process that trains into `folder`, or goes on there."""

    def __init__(self, argv, folder, code=ROOT):
        """Raises BlockingIOError while a process that an earlier, killed runner left behind still trains there."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log").open("a+")
        fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)                    # the process inherits it with the file
        self.log.truncate(0)
        if folder.exists() and not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder)                           # killed before the first checkpoint
        flags = ["--resume", folder] if folder.exists() else ["--runs-dir", folder.parent, "--run-name", folder.name]
        self.process = subprocess.Popen(                    # not in our terminal's group: Ctrl-C comes from us, and once
            [sys.executable, *argv[1:], *map(str, flags)], cwd=code, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | {"TQDM_DISABLE": "1"})

    def outcome(self):
        """None while it runs, then "finished", "interrupted" or "failed"."""
        if self.process.poll() is None:
            return None
        if not self.log.closed:
            self.log.seek(0)
            said = [line.split(" at step")[0] for line in self.log]
            if self.process.returncode:
                self.ended = "failed"
            else:
                self.ended = "finished" if "done" in said else "interrupted" if "interrupted" in said else "failed"
            if self.ended == "finished":
                (self.folder / "finished").touch()
            self.log.close()                                # only now may another runner have it
        return self.ended

    def interrupt(self):
        """As Ctrl-C: it saves and leaves."""
        self.process.send_signal(signal.SIGINT)


class RayRun:
    """The same somewhere in a Ray cluster, where folder and log travel to and from which they come back."""

    def __init__(self, argv, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder, self.reference = folder, self.train.remote(argv, folder.name, pack(folder.parent, folder.name))

    @classmethod
    def connect(cls, args):
        try:
            import ray
        except ImportError:
            fail("--executor ray needs Ray: pip install ray")
        code = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs", "wandb"]}
        print(f"Ray: {args.ray_address or 'the cluster of $RAY_ADDRESS, or this machine'}")
        try:
            ray.init(address=args.ray_address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as e:
            fail(f"--ray-address {args.ray_address}: {' '.join(str(e).split())}")
        cls.ray, cls.train = ray, ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run)(cls.train_there)

    @staticmethod
    def train_there(argv, name, files):
        with tempfile.TemporaryDirectory() as there:
            unpack(files, Path(there))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})         # Ray blocks it, and children inherit that
            run = LocalRun(argv, Path(there) / name, Path.cwd())
            while True:
                try:
                    while run.outcome() is None:
                        time.sleep(0.5)
                    return run.outcome(), pack(Path(there), name)
                except KeyboardInterrupt:                   # what cancel() raises here
                    run.interrupt()

    def outcome(self):
        if not self.ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            outcome, files = self.ray.get(self.reference)
        except self.ray.exceptions.RayError as e:           # its machine was lost, or it had not begun
            self.folder.with_name(f"{self.folder.name}.log").write_text(str(e))
            return "failed"
        unpack(files, self.folder.parent)
        if outcome == "finished":
            (self.folder / "finished").touch()
        return outcome

    def interrupt(self):
        self.ray.cancel(self.reference)


def pack(parent, name):
    """The run's folder and log, as far as they exist, in a tar file's bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in (parent / name, parent / f"{name}.log"):
            if path.exists():
                tar.add(path, path.name, filter=lambda info: None if info.name.endswith("/finished") else info)
    return buffer.getvalue()


def unpack(files, parent):
    """Beside, then renamed: whenever this is interrupted, no run is half there."""
    with tarfile.open(fileobj=io.BytesIO(files)) as tar, tempfile.TemporaryDirectory(dir=parent) as beside:
        tar.extractall(beside, filter="data")
        for path in Path(beside).iterdir():
            if (parent / path.name).is_dir():
                shutil.rmtree(parent / path.name)
            path.replace(parent / path.name)


def progress(bar, folder):
    """The run's line of the table: what its newest row says."""
    try:
        bar.total = json.loads((folder / "args.json").read_text())["total_timesteps"]
        *_, row = csv.DictReader((folder / "progress.csv").open())
    except (OSError, ValueError):                           # not begun, or on another machine
        return bar.refresh()
    bar.n = int(row["global_step"])
    bar.set_postfix_str("  ".join(f"{name} {row[tag]}" for name, tag in SHOWN.items() if row.get(tag)))


def last_lines(log):
    return "\n".join(log.read_text().splitlines()[-10:]) if log.exists() else ""


def fail(message):
    print(f"run.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    sys.stdout.reconfigure(line_buffering=True)             # also into a pipe
    args = tyro.cli(Args)
    everything = entries(args.tasks)
    suites = list(dict.fromkeys(entry.get("suite", "") for entry in everything.values()))
    if args.suite and args.suite not in suites:
        fail(f"--suite {args.suite} is not in {args.tasks}: {', '.join(suites)}")
    if not (args.suite or args.only or args.dry_run):
        fail(f"say what to run, everything takes weeks: --suite {', '.join(suites)}, or --only part of an entry's name")
    chosen = {name: e for name, e in everything.items() if args.only in name and args.suite in ("", e.get("suite"))}
    if not chosen:
        fail(f"--only {args.only}: no entry{f' of --suite {args.suite}' * bool(args.suite)} has this in its name")
    if args.workers < 1:
        fail(f"--workers {args.workers} must be at least 1")
    jobs = [(shlex.split(entry["command"]) + ["--seed", str(seed)], Path(args.runs_dir).resolve() / f"{name}__{seed}")
            for seed in sorted({seed for entry in chosen.values() for seed in args.seeds or entry["seeds"]})
            for name, entry in chosen.items() if seed in (args.seeds or entry["seeds"])]      # every entry's first seed first
    if args.dry_run:
        return print("\n".join(shlex.join(argv) for argv, _ in jobs))

    count, waiting, running = collections.Counter(), collections.deque(), {}
    for argv, folder in jobs:
        failed = folder.with_name(f"{folder.name}.failed")
        if (folder / "finished").exists():
            count["finished before"] += 1
        elif failed.exists() and not args.retry:
            print(f"{folder.name}: failed before, --retry runs it again: {failed.read_text()}")
            count["failed"] += 1
        else:
            failed.unlink(missing_ok=True)
            waiting.append((argv, folder))
    if args.executor == "ray" and waiting:
        RayRun.connect(args)
    run_of = RayRun if args.executor == "ray" else LocalRun
    for kill in (signal.SIGTERM, signal.SIGINT):            # kill is Ctrl-C, which shells let their background jobs ignore
        signal.signal(kill, signal.default_int_handler)
    slots, width = set(range(1, args.workers + 1)), max(len(folder.name) for _, folder in jobs)
    all_runs = tqdm(total=len(waiting), desc="runs", unit="run", disable=None)
    try:
        while waiting or running:
            for argv, folder in list(waiting) if slots else ():
                waiting.popleft()
                if (folder / "finished").exists():          # meanwhile, by another runner
                    count["finished before"] += 1
                    all_runs.update()
                    continue
                try:
                    run = run_of(argv, folder)
                except BlockingIOError:                     # wait for it, then see what is missing
                    waiting.append((argv, folder))
                    continue
                slot = slots.pop()
                bar = tqdm(desc=f"{folder.name:{width}}", position=slot, leave=False, bar_format=LINE, disable=None)
                running[folder] = run, slot, bar
                if not slots:
                    break
            time.sleep(0.5)
            for folder, (run, slot, bar) in list(running.items()):
                outcome = run.outcome()
                if outcome is None:
                    progress(bar, folder)
                    continue
                bar.close()
                del running[folder]
                slots.add(slot)
                count[outcome] += 1
                said = ""
                if outcome == "failed":
                    said = "\n" + last_lines(folder.with_name(f"{folder.name}.log"))
                    folder.with_name(f"{folder.name}.failed").write_text(said)
                tqdm.write(f"{folder.name}: {outcome}{said}")
                all_runs.update()
    except KeyboardInterrupt:
        tqdm.write("Ctrl-C: the runs save and leave; start the same command again to go on")
        for run, _, _ in running.values():
            run.interrupt()
        while any(run.outcome() is None for run, _, _ in running.values()):
            time.sleep(0.1)
        sys.exit(130)
    finally:
        all_runs.close()
    print(", ".join(f"{n} {what}" for what, n in count.items()))
    sys.exit(1 if count["failed"] else 0)


if __name__ == "__main__":
    main()

"""Run entries of benchmark/tasks/ over their seeds, several at a time, on this machine or on a Ray cluster.

    python benchmark/run.py --suite smoke --workers 2               every script on a small task, in minutes
    python benchmark/run.py --only poc --seeds 1 2                  the entries whose name contains this
    python benchmark/run.py --suite popgym --dry-run                prints their exact commands, runs nothing
    python benchmark/run.py --suite dqn --executor ray --workers 32    on a cluster (pip install ray)
    python benchmark/plot.py                                        then makes the curves and tables

An entry has a command (without --seed) and the seeds that it is published with. It counts as solved where its
measure reaches its level: the mean of the last 100 training episodes, or that of an evaluation. Its suite is
the name of its file.

A run goes to <runs-dir>/<entry>__<seed>, what it prints to <entry>__<seed>.log beside, and what it was begun
with to <entry>__<seed>.command. Start the same command again, whatever happened: finished runs are skipped,
interrupted ones are resumed, those of a killed machine from their last checkpoint. Runs that failed are named
with the last lines that they printed; --retry runs them again. A run whose entry has changed since it began
is named and left alone.
"""
import collections
import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "models"))                       # as models.command_line it would import torch

from command_line import command_line, fail  # noqa: E402
from entries import TASKS, argv_of, command_file, digest, entries, of_another_recipe  # noqa: E402

SHOWN = {  # beside a run's bar
    "SPS": "charts/SPS", "return": "charts/episodic_return", "success": "charts/success",
    "eval": "eval/episodic_return"}
LINE = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {postfix}"


@dataclass
class Args:
    suite: str = ""  # entries of this suite
    only: str = ""  # entries whose name contains this
    seeds: tuple[int, ...] | None = None  # these instead of the entries' own
    workers: int = 2  # runs at a time
    runs_dir: str = "runs/benchmark"  # where the run folders go
    tasks: str = str(TASKS)  # the entries: a folder of .toml files, or one file
    retry: bool = False  # also what failed before
    done_in: str = ""  # a table, as benchmark/results/popgym-full.csv: runs that stand there are left out
    dry_run: bool = False  # print the commands, run nothing
    executor: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a Ray cluster
    ray_address: str | None = None  # of the cluster; default: $RAY_ADDRESS, or else a Ray on this machine
    cpus_per_run: float = 1  # what Ray reserves for each
    gpus_per_run: float = 0


class LocalRun:
    """A process that trains into `folder`, or continues there."""

    def __init__(self, argv, folder, code=ROOT):
        """Raises BlockingIOError while a process that a killed runner left behind still trains there."""
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log").open("a+")
        fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the process inherits it with the file
        self.log.truncate(0)
        if folder.exists() and not (folder / "checkpoint.pt").exists():
            shutil.rmtree(folder)                           # killed before the first checkpoint
        if folder.exists():
            flags = ["--resume", str(folder)]
        else:
            command_file(folder).write_text(shlex.join(argv))
            flags = ["--runs-dir", str(folder.parent), "--run-name", folder.name]
        self.process = subprocess.Popen(
            [sys.executable, *argv[1:], *flags], cwd=code, stdout=self.log, stderr=subprocess.STDOUT,
            env=os.environ | {"TQDM_DISABLE": "1"},
            start_new_session=True)                         # Ctrl-C comes from us, not from the terminal

    def outcome(self):
        """None while it runs, then "finished", "interrupted" or "failed"."""
        if self.process.poll() is None:
            return None
        if not self.log.closed:                             # asked for the first time since it ended
            self.ended = self.read_outcome()
            if self.ended == "finished":
                (self.folder / "finished").touch()
            self.log.close()                                # only now may another runner have it
        return self.ended

    def read_outcome(self):
        """What its exit code and its last words say."""
        self.log.seek(0)
        lines = self.log.readlines()
        if self.process.returncode == 0:
            for words, outcome in (("done at step", "finished"), ("interrupted at step", "interrupted")):
                if any(line.startswith(words) for line in lines):
                    return outcome
        if self.process.returncode < 0:
            number = -self.process.returncode
            why = ": out of memory?" if number == signal.SIGKILL else ""
            self.log.write(f"ended by signal {number}, {signal.strsignal(number)}{why}\n")
            self.log.flush()
        return "failed"

    def interrupt(self):
        """As Ctrl-C: it saves and leaves."""
        self.process.send_signal(signal.SIGINT)


class RayRun:
    """The same somewhere in a Ray cluster. Folder and log travel there, and come back from there."""

    def __init__(self, argv, folder):
        self.folder = folder
        if not folder.exists():
            command_file(folder).write_text(shlex.join(argv))
        self.reference = self.train.remote(argv, folder.name, pack(folder.parent, folder.name))

    @classmethod
    def connect(cls, args):
        try:
            import ray
        except ImportError:
            fail("--executor ray needs Ray: pip install ray")
        code = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs", "wandb"]}
        print(f"Ray: {args.ray_address or 'the cluster of $RAY_ADDRESS, or this machine'}")
        try:
            ray.init(
                address=args.ray_address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as e:
            fail(f"--ray-address {args.ray_address}: {' '.join(str(e).split())}")
        cls.ray = ray
        cls.train = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run)(cls.train_there)

    @staticmethod
    def train_there(argv, name, files):
        with tempfile.TemporaryDirectory() as there:
            unpack(files, Path(there))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})     # children inherit Ray's mask
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
    def without_mark(info):
        return None if info.name.endswith("/finished") else info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in (parent / name, parent / f"{name}.log"):
            if path.exists():
                tar.add(path, path.name, filter=without_mark)
    return buffer.getvalue()


def unpack(files, parent):
    """Unpacks beside, then renames: whenever this is interrupted, no run is half there."""
    with tempfile.TemporaryDirectory(dir=parent) as beside:
        tarfile.open(fileobj=io.BytesIO(files)).extractall(beside, filter="data")
        for path in Path(beside).iterdir():
            if (parent / path.name).is_dir():
                shutil.rmtree(parent / path.name)
            path.replace(parent / path.name)


class Queue:
    """Runs that wait, runs that run, at most `workers` at a time, and a count of how the others ended."""

    def __init__(self, jobs, args):
        """jobs: (argv, folder) of each run"""
        self.start = RayRun if args.executor == "ray" else LocalRun
        self.count, self.running = collections.Counter(), {}  # running: {folder: (run, slot, bar)}
        self.elsewhere = set()                              # folders in which another process trains
        self.waiting = collections.deque(job for job in jobs if self.is_wanted(*job))
        self.slots = set(range(1, args.workers + 1))        # lines of the terminal that are free
        self.width = max((len(folder.name) for _, folder in jobs), default=0)

    def is_wanted(self, argv, folder):
        """Whether this run is still to be made; says so if it failed before, or was begun otherwise."""
        failed = failure_of(folder)
        if of_another_recipe(folder, argv):
            self.count["of another recipe"] += 1
            also = ", then --retry" if failed.exists() else ""
            tqdm.write(f"{folder.name}: its entry has changed since it began; "
                       f"move {folder} away{also} to train it again")
            return False
        if (folder / "finished").exists():
            self.count["finished before"] += 1
            return False
        if failed.exists():
            self.count["failed"] += 1
            tqdm.write(f"{folder.name}: failed before, --retry runs it again: {failed.read_text()}")
            return False
        return True

    def work(self):
        """Until nothing waits and nothing runs. Ctrl-C lets the running ones save, and is raised again."""
        self.bar = tqdm(total=len(self.waiting), desc="runs", unit="run", disable=None)
        try:
            while self.waiting or self.running:
                self.start_waiting()
                time.sleep(0.5)
                self.look_at_running()
        except KeyboardInterrupt:
            tqdm.write("Ctrl-C: the runs save and leave; start the same command again to continue")
            self.interrupt_running()
            raise
        except OSError as e:
            with contextlib.suppress(OSError):              # a full disk refuses here too
                self.interrupt_running()
            fail(f"{' '.join(str(e).split())}; the runs were told to save: mend this, then start the same "
                 "command again")
        finally:
            self.bar.close()

    def start_waiting(self):
        """Starts runs while there is a free slot."""
        for _ in range(len(self.waiting)):
            if not self.slots:
                return
            argv, folder = self.waiting.popleft()
            if not self.is_wanted(argv, folder):            # another runner was there meanwhile
                self.bar.update()
                continue
            try:
                run = self.start(argv, folder)
            except BlockingIOError:                         # wait for it, then see what is missing
                self.waiting.append((argv, folder))
                if folder not in self.elsewhere:
                    tqdm.write(f"{folder.name}: waits for another process that trains there")
                self.elsewhere.add(folder)
                continue
            slot = self.slots.pop()
            name = folder.name.ljust(self.width)
            bar = tqdm(desc=name, position=slot, leave=False, bar_format=LINE, disable=None)
            self.running[folder] = run, slot, bar

    def look_at_running(self):
        """Shows how far they are, and frees the slots of those that have ended."""
        for folder, (run, slot, bar) in list(self.running.items()):
            outcome = run.outcome()
            if outcome is None:
                show_progress(bar, folder)
                continue
            bar.close()
            del self.running[folder]
            self.slots.add(slot)
            self.count[outcome] += 1
            said = ""
            if outcome == "failed":
                said = "\n" + last_lines(folder.with_name(f"{folder.name}.log"))
                if (folder / "checkpoint.pt").exists():
                    said += f"\n--retry continues it; to begin again, move {folder} away first"
                failure_of(folder).write_text(said)
            tqdm.write(f"{folder.name}: {outcome}{said}")
            self.bar.update()

    def interrupt_running(self):
        runs = [run for run, _, _ in self.running.values()]
        for run in runs:
            run.interrupt()
        while any(run.outcome() is None for run in runs):
            time.sleep(0.1)


def failure_of(folder):
    """The file that says how a run failed."""
    return folder.with_name(f"{folder.name}.failed")


def show_progress(bar, folder):
    """The run's line of the terminal: what its newest row says."""
    try:
        bar.total = json.loads((folder / "args.json").read_text())["total_timesteps"]
        *_, row = csv.DictReader((folder / "progress.csv").open())
        bar.n = int(row["global_step"])
    except (OSError, ValueError, KeyError, TypeError):      # not begun, on another machine, or a torn row
        return bar.refresh()
    bar.set_postfix_str("  ".join(f"{name} {row[tag]}" for name, tag in SHOWN.items() if row.get(tag)))


def last_lines(log):
    return "\n".join(log.read_text().splitlines()[-10:]) if log.exists() else ""


def chosen_entries(args):
    """Those of --suite and --only."""
    everything = entries(args.tasks)
    suites = list(dict.fromkeys(entry["suite"] for entry in everything.values()))
    if args.suite and args.suite not in suites:
        fail(f"--suite {args.suite} is not in {args.tasks}: {', '.join(suites)}")
    if not (args.suite or args.only or args.dry_run):
        fail(f"say what to run, everything takes weeks: --suite {', '.join(suites)}, "
             "or --only part of an entry's name")
    chosen = {
        name: entry for name, entry in everything.items()
        if args.only in name and args.suite in ("", entry["suite"])}
    if not chosen:
        of_suite = f" of --suite {args.suite}" if args.suite else ""
        fail(f"--only {args.only}: no entry{of_suite} has this in its name")
    return chosen


def jobs_of(chosen, args):
    """(argv, folder) of every run: the first seed of every entry first."""
    seeds = {name: args.seeds or entry["seeds"] for name, entry in chosen.items()}
    for name in seeds:
        if not seeds[name]:
            fail(f"--tasks {args.tasks}: {name} names no seeds; give --seeds")
    jobs, done = [], runs_of(args.done_in) if args.done_in else set()
    for seed in sorted(set(itertools.chain(*seeds.values()))):
        for name, entry in chosen.items():
            run = f"{name}__{seed}"
            argv = argv_of(entry, seed)
            if seed in seeds[name] and (run, digest(argv)) not in done:
                jobs.append((argv, Path(args.runs_dir).resolve() / run))
    return jobs


def runs_of(table):
    """What a table has in its columns `run` and `digest`."""
    try:
        with open(table) as f:
            return {(row["run"], row["digest"]) for row in csv.DictReader(f)}
    except (OSError, ValueError, KeyError, csv.Error) as e:
        fail(f"--done-in {table} is no CSV file with columns `run` and `digest` ({type(e).__name__}); "
             "benchmark/results/popgym-full.csv is one")


def check(args):
    """Refuses what cannot run."""
    if not 1 <= args.workers <= 1024:
        fail(f"--workers {args.workers} must be at least 1 and at most 1024")
    if args.seeds == ():
        fail("--seeds names no seed: give some, or leave it out")
    for seed in args.seeds or ():
        if not 0 <= seed <= 2**40:
            fail(f"--seeds {seed} must be at least 0 and at most {2**40}")
    for name in ("cpus_per_run", "gpus_per_run"):
        if not 0 <= getattr(args, name) <= 1024:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 0 and at most 1024")
    if args.executor == "local" and (args.ray_address, args.cpus_per_run, args.gpus_per_run) != (None, 1, 0):
        fail("--ray-address, --cpus-per-run and --gpus-per-run are Ray's: give --executor ray, "
             "or leave them out")


def make_runs_dir(args):
    try:
        Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--runs-dir {args.runs_dir} is not a folder and cannot become one ({e.strerror}): "
             "choose another")


def work(queue, args):
    """Until all is done. Exit code 130 after Ctrl-C."""
    for kill in (signal.SIGTERM, signal.SIGINT):    # both are Ctrl-C, which shells let background jobs ignore
        signal.signal(kill, signal.default_int_handler)
    if args.executor == "ray" and queue.waiting:            # its processes inherit these signals
        RayRun.connect(args)
    try:
        queue.work()
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)             # also into a pipe
    args = command_line(Args, argv)
    check(args)
    jobs = jobs_of(chosen_entries(args), args)
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` has read enough
        return print("\n".join(shlex.join(argv) for argv, _ in jobs))
    make_runs_dir(args)
    for _, folder in jobs if args.retry else ():
        failure_of(folder).unlink(missing_ok=True)
    queue = Queue(jobs, args)
    work(queue, args)
    print(", ".join(f"{n} {what}" for what, n in queue.count.items()) or "nothing to run")
    if queue.count["interrupted"]:
        print("start the same command again to continue what was interrupted")
    sys.exit(0 if queue.count.keys() <= {"finished", "finished before"} else 1)


if __name__ == "__main__":
    main()

"""Search hyper-parameters of an entry with Optuna (pip install optuna): the best command, and all trials.

    python benchmark/tune.py --entry default --search learning-rate:1e-4:1e-2:log hidden-size:32,64,128
    python benchmark/tune.py --entry poc-gru --search norm-reward:true,false seq-len:4:32 --seeds 1 2

A search names a flag and where to look: low:high, low:high:log, or values with commas between them, and
`true,false` for a switch. Whole numbers stay whole. A value may be a schedule: 'learning-rate:1e-3,1e-3 0'.

A trial is the entry's command with other values, once for each seed. It is worth the mean over the seeds of
what the entry measures, where it was measured last. The median pruner stops a trial whose best so far is
below the median of the others at the same step. Runs, logs and Optuna's storage go to <runs-dir>/<name>.

Start the same command again, whatever happened: trials that have ended count, interrupted ones go on where
their runs were. More --trials continue the search.
"""
import collections
import csv
import fcntl
import importlib
import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entries import MEASURES, TASKS, close_to, entries
from run import ROOT, Queue, command_line, fail, failure_of, make_runs_dir, work
from run import check as check_runner

try:
    import optuna
    from optuna.trial import Trial, TrialState
except ImportError:                                         # main says so
    optuna = None

sys.path.insert(0, str(ROOT))
SWITCH = {"true": "--{}", "false": "--no-{}"}


@dataclass
class Args:
    entry: str = "default"  # of benchmark/tasks/, whose command is changed
    search: tuple[str, ...] = ()  # flag:low:high, flag:low:high:log or flag:value,value
    trials: int = 20  # in all, also those of earlier starts
    seeds: tuple[int, ...] = (1,)  # of each trial
    sampler: Literal["tpe", "random"] = "tpe"  # how values are chosen
    sampler_seed: int = 1
    pruner: Literal["median", "none"] = "median"  # what stops trials early
    name: str | None = None  # of the search; default: the entry's
    storage: str | None = None  # a file or URL for Optuna; default: <runs-dir>/<name>/study.db
    workers: int = 2  # runs at a time
    runs_dir: str = "runs/tune"  # where the run folders go
    tasks: str = str(TASKS)  # the entries: a folder of .toml files, or one file
    executor: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a Ray cluster
    ray_address: str | None = None  # of the cluster; default: $RAY_ADDRESS, or else a Ray on this machine
    cpus_per_run: float = 1  # what Ray reserves for each
    gpus_per_run: float = 0


@dataclass
class Axis:
    """One flag and where to look. The ends of a range are whole numbers, or floats."""

    flag: str
    values: list  # of which to choose; [low, high] of a range
    is_range: bool = False
    log: bool = False

    def suggest(self, trial):
        """What this trial has here, as words of a command line."""
        if not self.is_range:
            value = trial.suggest_categorical(self.flag, self.values)
        elif isinstance(self.values[0], int):
            value = str(trial.suggest_int(self.flag, *self.values, log=self.log))
        else:
            value = f"{trial.suggest_float(self.flag, *self.values, log=self.log):.6g}"
        return self.words(value)

    def words(self, value):
        return [SWITCH[value].format(self.flag)] if value in SWITCH else [f"--{self.flag}", *value.split()]


def axis_of(text):
    """`flag:low:high`, `flag:low:high:log` or `flag:value,value` as an Axis."""
    flag, *where = text.split(":")
    flag = flag.replace("_", "-")
    if len(where) == 1 and all(where[0].split(",")):
        return Axis(flag, where[0].split(","))
    try:
        low, high, *log = where
        whole = low.isdecimal() and high.isdecimal()
        low, high = (int(low), int(high)) if whole else (float(low), float(high))
    except ValueError:                                      # too few, or no numbers
        low, high, log = 1, 0, []
    if not (low < high and log in ([], ["log"])) or (log and low <= 0):
        fail(f"--search {text} is not a place to look: write flag:low:high, flag:low:high:log (from above 0) "
             "or flag:value,value, as learning-rate:1e-4:1e-2:log")
    return Axis(flag, [low, high], is_range=True, log=bool(log))


def with_flags(argv, axes, chosen):
    """The command with these words in place of its own.   chosen: a list of words for each axis"""
    flags = [form.format(axis.flag) for axis in axes for form in SWITCH.values()]
    kept, drops = [], False
    for word in argv:
        drops = word in flags if word.startswith("--") else drops
        kept += [] if drops else [word]
    return [*kept, *(word for words in chosen for word in words)]


def entry_of(args):
    known = entries(args.tasks)
    if args.entry not in known:
        names = ", ".join(close_to(args.entry, known))
        fail(f"--entry {args.entry} is not in {args.tasks}: name one, as {names}")
    return known[args.entry]


def check_commands(axes, argv):
    """The script itself refuses a wrong flag, and either end of a range. Returns its number of steps."""
    from models.begin_with import NOT_TAKEN_OVER
    from models.flags import parse

    path = ROOT / argv[1]
    sys.path.insert(0, str(path.parent))
    script = importlib.import_module(path.stem)
    for axis in axes:
        if axis.flag.replace("-", "_") in NOT_TAKEN_OVER | {"seed"}:
            fail(f"--search {axis.flag} is not a hyper-parameter: leave it out (and give --seeds for seeds)")
        for value in axis.values:
            words = axis.words(value if isinstance(value, str) else f"{value}")
            args, _ = parse(script.Args, path.stem, with_flags(argv, [axis], [words])[2:])
            script.check(args)
    return args.total_timesteps


def measured(folders, tag):
    """{step: mean over the runs} where all of them have measured."""
    columns = []
    for folder in folders:
        path = folder / "progress.csv"
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        columns.append({int(row["global_step"]): float(row[tag]) for row in rows if row.get(tag)})
    steps = sorted(set.intersection(*map(set, columns)))
    return {step: statistics.mean(column[step] for column in columns) for step in steps}


class Search(Queue):
    """Asks Optuna for trials, makes their runs, tells Optuna how they ended."""

    def __init__(self, study, axes, argv, tag, folder, args):
        super().__init__([], args)
        self.study, self.axes, self.argv, self.tag, self.folder = study, axes, argv, tag, folder
        self.seeds, self.wanted, self.workers = args.seeds, args.trials, args.workers
        self.trials = {}                                    # those that go on: {trial: folders}
        for running in study.get_trials(states=[TrialState.RUNNING]):           # when we were killed
            self.begin(Trial(study, running._trial_id))
        self.look_at_trials()

    def begin(self, trial):
        """Puts the trial's runs into the queue. What Optuna chose for it before a kill, it chooses again."""
        argv = with_flags(self.argv, self.axes, [axis.suggest(trial) for axis in self.axes])
        jobs = {self.folder / f"{trial.number}__{seed}": [*argv, "--seed", str(seed)] for seed in self.seeds}
        self.trials[trial] = list(jobs)
        self.waiting.extend(
            (argv, folder) for folder, argv in jobs.items()
            if not (folder / "finished").exists() and not failure_of(folder).exists())

    def look_at_running(self):
        super().look_at_running()
        self.look_at_trials()

    def look_at_trials(self):
        """Tells Optuna what is new, and asks it for as many trials as there is room for."""
        for trial, folders in list(self.trials.items()):
            state = self.state_of(trial, folders)
            if state != TrialState.RUNNING:
                values = list(measured(folders, self.tag).values())
                self.study.tell(trial, values[-1] if state == TrialState.COMPLETE else None, state)
                del self.trials[trial]
                self.stop(folders)
        while len(self.study.trials) < self.wanted and len(self.waiting) + len(self.running) < self.workers:
            self.begin(self.study.ask())

    def state_of(self, trial, folders):
        if any(failure_of(folder).exists() for folder in folders):
            return TrialState.FAIL
        values = measured(folders, self.tag)
        before = self.study.trials[trial.number].intermediate_values
        new = {step: value for step, value in values.items() if step not in before}
        for step, value in new.items():
            trial.report(value, step)
        if all((folder / "finished").exists() for folder in folders):
            return TrialState.COMPLETE if values else TrialState.FAIL
        return TrialState.PRUNED if new and trial.should_prune() else TrialState.RUNNING

    def stop(self, folders):
        """Ends what is left of a trial."""
        self.waiting = collections.deque(job for job in self.waiting if job[1] not in folders)
        for folder in self.running.keys() & set(folders):
            self.running[folder][0].interrupt()


def open_study(folder, args):
    """The search as its storage holds it, and a lock that ends with this process."""
    what = json.dumps([args.entry, args.search, args.seeds])
    storage = args.storage or str(folder / "study.db")
    folder.mkdir(parents=True, exist_ok=True)
    held = (folder / "lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        study = optuna.create_study(
            storage=storage if "://" in storage else f"sqlite:///{Path(storage).resolve()}",
            study_name=folder.name, load_if_exists=True, direction="maximize")
    except BlockingIOError:
        fail(f"--name {folder.name} is being searched by another process: wait for it, or give another name")
    except Exception as e:                                  # of Optuna, SQLAlchemy, the database
        fail(f"--storage {storage} cannot be opened ({type(e).__name__}): give another")
    if study.user_attrs.get("what", what) != what:
        fail(f"--name {folder.name} is another search, of {study.user_attrs['what']}: give another name")
    if not study.trials and any(folder.glob("*__*/")):
        fail(f"--name {folder.name} holds runs of a search whose --storage is not here: give another name")
    study.set_user_attr("what", what)
    return study, held


def check(args):
    """Refuses what cannot run."""
    check_runner(args)
    if args.trials < 1 or not args.seeds or not args.search:
        fail("--trials, --seeds and --search need at least one: --search learning-rate:1e-4:1e-2:log")
    if args.executor == "ray" and args.pruner != "none":
        fail("--executor ray needs --pruner none: what a run has measured comes back when it ends")


def report(study, argv, axes, args):
    """All trials, and the best command."""
    header = ["trial", "state", args.entry, *(axis.flag for axis in axes)]
    rows = [header]
    for trial in study.trials:
        value = "-" if trial.value is None else f"{trial.value:.4g}"
        rows.append([str(trial.number), trial.state.name.lower(), value,
                     *(str(trial.params.get(axis.flag, "-")) for axis in axes)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        sys.exit("no trial was completed; the logs beside the runs say why")
    best = study.best_trial
    chosen = [axis.suggest(optuna.trial.FixedTrial(best.params)) for axis in axes]
    print(f"best: trial {best.number}, {best.value:.4g}, mean of --seed {', '.join(map(str, args.seeds))}")
    print(shlex.join(with_flags(argv, axes, chosen)))


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)             # also into a pipe
    args = command_line(Args, argv)
    if optuna is None:
        fail("a search needs Optuna: pip install optuna")
    check(args)
    entry, axes = entry_of(args), [axis_of(text) for text in args.search]
    command, tag = shlex.split(entry["command"]), MEASURES[entry["measure"]][0]
    steps = check_commands(axes, command)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make_runs_dir(args)
    folder = Path(args.runs_dir).resolve() / (args.name or args.entry)
    study, _held = open_study(folder, args)
    # the trials that are there count, or a search that continues would draw the same values again
    seed = args.sampler_seed + len(study.trials)
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study.sampler = samplers[args.sampler](seed=seed)
    median = optuna.pruners.MedianPruner(n_warmup_steps=steps // 3)
    study.pruner = median if args.pruner == "median" else optuna.pruners.NopPruner()
    work(Search(study, axes, command, tag, folder, args), args)
    report(study, command, axes, args)


if __name__ == "__main__":
    main()

"""benchmark/tune.py: a search finds what is better, goes on after a kill, and refuses in one sentence.

On a stand-in for the scripts, which starts at once and measures what its flags say; one test on a real one.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
import types

import pytest

from tests.conftest import ROOT
from tests.helpers import wait_for

optuna = pytest.importorskip("optuna", reason="pip install optuna")
sys.path.insert(0, str(ROOT / "benchmark"))
import tune  # noqa: E402

SCRIPT = """
import os, pathlib, sys, time
from dataclasses import dataclass

@dataclass
class Args:
    rate: float = 9.0
    size: int = 1
    switch: bool = False
    total_timesteps: int = 9
    seed: int = 1
    flags: str | None = None
    resume: str | None = None
    model: str | None = None
    export: str | None = None
    probe: str | None = None
    forget_at: int | None = None
    show_memory: bool = False

def check(args):
    pass

def main():
    words = [word for word in sys.argv[1:] if "switch" not in word]
    words = dict(zip(words[::2], words[1::2]))
    run = pathlib.Path(words.get("--resume") or pathlib.Path(words["--runs-dir"]) / words["--run-name"])
    run.mkdir(parents=True, exist_ok=True)
    checkpoint, progress = run / "checkpoint.pt", run / "progress.csv"
    begin = int(checkpoint.read_text()) if checkpoint.exists() else 0
    rate, seed = float(words["--rate"]), int(words["--seed"])
    if rate < 0:
        sys.exit("a rate below 0")
    with (run.parent / "started").open("a") as f:
        f.write(f"{run.name} {begin} {os.getpid()}\\n")
    for step in range(begin + 1, 10):
        while step == 5 and (run.parent / "hold").exists():
            time.sleep(0.05)
        with progress.open("a") as f:
            f.write("global_step,eval/success\\n" * (step == 1) + f"{step},{-abs(rate - 2) - seed}\\n")
        checkpoint.with_suffix(".tmp").write_text(str(step))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
    print("done at step 9")

if __name__ == "__main__":
    main()
"""
ENTRY = """
[small]
command = "python {script} --rate 9"
seeds = [1]
measure = "eval-success"
"""


@pytest.fixture
def start(tmp_path):
    """Starts tune.py on the entry above, or on another."""
    def start(*flags, search=("rate:0:4.0",), entry=ENTRY):
        script, tasks = tmp_path / "stand_in.py", tmp_path / "tasks.toml"
        script.write_text(SCRIPT)
        tasks.write_text(entry.format(script=script))
        command = [sys.executable, "benchmark/tune.py", "--tasks", tasks, "--entry", "small",
                   "--runs-dir", tmp_path / "runs", "--search", *search, *flags]
        return subprocess.Popen(
            [str(x) for x in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def search_of(tmp_path):
    return optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/small/study.db")


def rows_of(folder):
    return [int(line.split(",")[0]) for line in (folder / "progress.csv").read_text().splitlines()[1:]]


def test_after_sigkill_every_trial_is_there_once_and_no_step_is_made_twice(start, tmp_path):
    runs, states = tmp_path / "runs/small", optuna.trial.TrialState
    runs.mkdir(parents=True)
    (runs / "hold").touch()                                 # no run goes beyond its step 4
    flags = "--trials", "4", "--workers", "2", "--pruner", "none"
    killed = start(*flags)
    both = [runs / f"{number}__1" for number in (0, 1)]
    wait_for(lambda: all((run / "checkpoint.pt").exists() and rows_of(run)[-1] == 4 for run in both), 600,
             killed)
    killed.kill()
    killed.communicate()
    chosen = [trial.params for trial in search_of(tmp_path).trials]
    pids = {name: int(pid) for name, _, pid in map(str.split, (runs / "started").read_text().splitlines())}
    os.kill(pids["0__1"], signal.SIGKILL)                   # 1__1 goes on by itself
    (runs / "hold").unlink()
    out, error = start(*flags).communicate()
    trials = search_of(tmp_path).trials
    assert [trial.state for trial in trials] == [states.COMPLETE] * 4, out + error
    assert [trial.params for trial in trials[:2]] == chosen
    for trial in trials:
        assert trial.value == pytest.approx(-abs(trial.params["rate"] - 2) - 1, abs=1e-4)
        assert trial.intermediate_values.keys() == set(range(1, 10))
        assert rows_of(runs / f"{trial.number}__1") == list(range(1, 10))
    started = [line.split() for line in (runs / "started").read_text().splitlines()]
    begun = [name for name, step, _ in started if step == "0"]
    assert sorted(begun) == ["0__1", "1__1", "2__1", "3__1"]

    best = max(trials, key=lambda trial: trial.value)
    *_, said, command = out.splitlines()
    assert said.startswith(f"best: trial {best.number}, ")
    assert shlex.split(command)[2:] == ["--rate", f"{best.params['rate']:.6g}"]         # not 9 as well
    assert "\n3      complete  -1." in out
    out, _ = start("--trials", "6").communicate()           # more of the same search, on other values
    rates = [trial.params["rate"] for trial in search_of(tmp_path).trials]
    assert len(rates) == len(set(rates)) == 6


def test_a_trial_is_worth_the_mean_over_its_seeds_and_fails_with_any_of_them(start, tmp_path):
    search = "rate:-1,2", "size:1:3", "switch:true,false"
    flags = "--seeds", "1", "2", "--trials", "6", "--sampler", "random"
    out, error = start(*flags, search=search).communicate()
    trials = search_of(tmp_path).trials
    assert {trial.params["rate"] for trial in trials} == {"-1", "2"}, out + error
    for trial in trials:
        failed = trial.params["rate"] == "-1"
        assert trial.value == (None if failed else -1.5)
        assert trial.state.name == ("FAIL" if failed else "COMPLETE")
        assert type(trial.params["size"]) is int
    assert re.search(r"--rate 2 --size [123] --(no-)?switch$", out.strip())


def test_the_median_pruner_stops_what_is_behind_at_the_same_step(tmp_path):
    args = tune.Args(search=("rate:0:4.0",), trials=1, seeds=(1, 2), workers=2)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    for value in (3.0, 5.0, 7.0):
        study.add_trial(optuna.trial.create_trial(value=9, intermediate_values={1: 0, 2: value}))
    axes, stopped = [tune.axis_of("rate:0:4.0")], []
    search = tune.Search(study, axes, ["python", "x.py"], "eval/success", tmp_path, args)
    assert not search.waiting                               # there are as many trials as wanted

    def state(*values):
        """Of a trial whose two runs have measured these at their steps 1, 2, ..."""
        trial = study.ask()
        folders = [tmp_path / f"{trial.number}__{seed}" for seed in (1, 2)]
        for folder, rows in zip(folders, values):
            folder.mkdir()
            lines = ["global_step,eval/success", *(f"{t},{value}" for t, value in enumerate(rows, 1))]
            (folder / "progress.csv").write_text("\n".join(lines))
        return search.state_of(trial, folders).name

    assert state([0, 4], [0, 5]) == "PRUNED"
    assert state([0, 4], [0, 7]) == "RUNNING"
    assert state([0, 4, 0], [0]) == "RUNNING"               # one of its runs has no second measurement yet
    search.waiting.extend([(["python"], tmp_path / "a"), (["python"], tmp_path / "b")])
    run = types.SimpleNamespace(interrupt=lambda: stopped.append(1))
    search.running[tmp_path / "c"] = run, 1, None
    search.stop([tmp_path / "a", tmp_path / "c"])
    assert [folder.name for _, folder in search.waiting] == ["b"] and stopped


@pytest.mark.quick
@pytest.mark.parametrize("flags, says", [
    ("--search rate", "--search rate is"), ("--search rate:3:1", "--search rate:3:1"),
    ("--search rate:0:1:log", "above 0"), ("--search rate:a:b", "--search rate:a:b"),
    ("--search rate:1:2:linear", "--search"), ("--search rate:1,,2", "--search"), ("", "--search"),
    ("--search spin:1:2", "--spin"), ("--search size:a,b", "--size"), ("--search seed:1,2", "--seeds"),
    ("--entry smal --search rate:1:2", "as small"), ("--search rate:1:2 --trials 0", "--trials"),
    ("--search rate:1:2 --executor ray", "--pruner none"),
    ("--search rate:1:2 --runs-dir /dev/null/runs", "--runs-dir /dev/null/runs"),
    ("--search rate:1:2 --storage nothing://there", "--storage")])
def test_bad_input(flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "stand_in.py").write_text(SCRIPT)
    (tmp_path / "tasks.toml").write_text(ENTRY.format(script=tmp_path / "stand_in.py"))
    monkeypatch.chdir(tmp_path)
    argv = ["--tasks", "tasks.toml", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        tune.main(argv if "--entry" in flags else [*argv, "--entry", "small"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


def test_another_search_of_the_same_name_and_a_second_process_are_refused(start, tmp_path, capsys):
    (tmp_path / "runs/small").mkdir(parents=True)
    hold = tmp_path / "runs/small/hold"
    hold.touch()

    first = start("--trials", "1")
    wait_for(tmp_path / "runs/small/started", 600, first)
    with pytest.raises(SystemExit) as second:
        tune.main(["--tasks", str(tmp_path / "tasks.toml"), "--entry", "small", "--trials", "1",
                   "--runs-dir", str(tmp_path / "runs"), "--search", "rate:0:4.0"])
    assert second.value.code == 2 and "another process" in capsys.readouterr().err
    hold.unlink()
    first.communicate()
    other = start("--trials", "1", search=("rate:0:9.0",))
    assert "--name small is another search" in other.communicate()[1] and other.returncode == 2
    (tmp_path / "runs/small/study.db").unlink()
    other = start("--trials", "1")
    assert "holds runs of a search" in other.communicate()[1] and other.returncode == 2


@pytest.mark.quick
def test_without_optuna_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(tune, "optuna", None)
    with pytest.raises(SystemExit) as stop:
        tune.main(["--search", "learning-rate:1e-4:1e-2"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install optuna" in error and error.count("\n") == 1


REAL = """
[small]
command = "python ppo_recurrent_sbb.py --total-timesteps 20480 --learning-rate 1e-6"
seeds = [1]
measure = "success"
"""


def test_a_search_beats_a_bad_learning_rate(start, tmp_path):
    """PocMemory: with the entry's own rate an agent guesses, and is right half of the time."""
    out, error = start("--trials", "3", search=("learning-rate:3e-4:1e-2:log",), entry=REAL).communicate()
    study = search_of(tmp_path)
    assert study.best_value > 0.75, out + error
    assert f"--learning-rate {study.best_params['learning-rate']:.6g}" in out.splitlines()[-1]

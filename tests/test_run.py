"""benchmark/run.py: entries become runs, whatever happens in between. On a stand-in for the scripts, which starts at once;
test_walk.py and the gate run it on the real ones."""
import csv
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.helpers import wait_for

SCRIPT = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for flag in ("--seed", "--steps", "--pause", "--runs-dir", "--run-name", "--resume", "--wrong"):
    parser.add_argument(flag)
args = parser.parse_args()
if args.wrong:
    sys.exit("fake.py: --wrong is wrong")
run = pathlib.Path(args.resume or pathlib.Path(args.runs_dir) / args.run_name)
run.mkdir(parents=True, exist_ok=bool(args.resume))
checkpoint, progress, stop = run / "checkpoint.pt", run / "progress.csv", []
begin = int(checkpoint.read_text()) if args.resume else 0
(run / "args.json").write_text(json.dumps({"total_timesteps": int(args.steps)}))
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
for step in range(begin + 1, int(args.steps) + 1):
    if stop:
        print(f"interrupted at step {step - 1}")
        sys.exit()
    time.sleep(float(args.pause))
    with progress.open("a") as f:
        f.write("global_step,charts/success\\n" * (step == 1) + f"{step},{int(args.seed) / step}\\n")
    checkpoint.with_suffix(".tmp").write_text(str(step))
    checkpoint.with_suffix(".tmp").replace(checkpoint)
print(f"done at step {args.steps}")
"""
TASKS = """
[quick]
command = "python {script} --steps {steps} --pause 0.05"
suite = "small"
seeds = [1, 2]

[broken]
command = "python {script} --steps 2 --pause 0 {wrong}"
suite = "others"
seeds = [3]

[grid]
command = "python {script} --steps 2 --pause 0 --task {{task}} --memory {{memory}}"
suite = "others"
seeds = [1]

[grid.grid.task]
first = "RepeatFirst"
previous = "RepeatPrevious"

[grid.grid.memory]
lru = "lru"
"""


@pytest.fixture
def start(tmp_path):
    """Starts run.py on the entries above."""
    def start(*flags, steps=3, wrong="--wrong 1"):
        script, tasks = tmp_path / "fake.py", tmp_path / f"{steps}{wrong}.toml"
        script.write_text(SCRIPT)
        tasks.write_text(TASKS.format(script=script, steps=steps, wrong=wrong))
        command = [sys.executable, "benchmark/run.py", "--tasks", tasks, "--runs-dir", tmp_path / "runs", *flags]
        return subprocess.Popen([str(x) for x in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as a script's background job

    return start


def rows_of(folder):
    return list(csv.reader((folder / "progress.csv").open()))


def test_dry_run_prints_the_exact_commands(start, tmp_path):
    out, _ = start("--dry-run", "--suite", "others", "--only", "grid").communicate()
    assert out.splitlines() == [f"python {tmp_path}/fake.py --steps 2 --pause 0 --task Repeat{task} --memory lru --seed 1"
                                for task in ("First", "Previous")]
    out, _ = start("--dry-run", "--seeds", "7", "8", "--only", "quick").communicate()
    assert [shlex.split(line)[-2:] for line in out.splitlines()] == [["--seed", "7"], ["--seed", "8"]]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, says", [
    ("--suite elephant", "small, others"), ("--suite small --only broken", "--only broken"), ("", "--suite small, others"),
    ("--suite small --workers 0", "--workers 0")])
def test_bad_input(start, tmp_path, flags, says):
    process = start(*flags.split())
    _, error = process.communicate()
    assert process.returncode == 2 and says in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_killed_suite_completes_only_what_is_missing(start, tmp_path):
    """Killed without warning, then with: finished runs are left alone, the other goes on, no row is lost and none twice."""
    runs = tmp_path / "runs"
    assert start("--suite", "small", "--seeds", "2").wait() == 0
    untouched = {path: path.stat().st_mtime_ns for path in (runs / "quick__2").iterdir()}
    runner = start("--suite", "small", steps=200)                               # more steps, but seed 2 has finished
    wait_for(runs / "quick__1" / "checkpoint.pt")
    runner.kill()                                                               # what it started goes on
    runner.communicate()
    second, third = start("--suite", "small", steps=200), start("--suite", "small", steps=200)
    time.sleep(3)                                                               # they wait for it
    assert not (runs / "quick__1" / "finished").exists()
    second.terminate()
    second.communicate()
    out, error = third.communicate()
    assert second.returncode == 130 and third.returncode == 0 and "quick__1: finished" in out, out + error
    assert "1 finished before, 1 finished" in out
    assert [row[0] for row in rows_of(runs / "quick__1")] == ["global_step", *map(str, range(1, 201))]
    assert untouched == {path: path.stat().st_mtime_ns for path in (runs / "quick__2").iterdir()}
    assert "2 finished before" in start("--suite", "small").communicate()[0]


def test_ctrl_c_lets_the_runs_save_and_the_next_start_resumes_them(start, tmp_path):
    runner = start("--suite", "small", steps=10_000)
    for seed in (1, 2):
        wait_for(tmp_path / f"runs/quick__{seed}/checkpoint.pt")
    runner.send_signal(signal.SIGINT)
    runner.communicate()
    assert runner.returncode == 130
    reached = {seed: int(rows_of(tmp_path / f"runs/quick__{seed}")[-1][0]) for seed in (1, 2)}
    for seed, step in reached.items():
        assert (tmp_path / f"runs/quick__{seed}.log").read_text() == f"interrupted at step {step}\n"
    steps = max(reached.values()) + 3
    out, _ = start("--suite", "small", steps=steps).communicate()
    assert "2 finished" in out
    for seed in reached:
        assert [int(row[0]) for row in rows_of(tmp_path / f"runs/quick__{seed}")[1:]] == list(range(1, steps + 1))


def test_what_was_killed_before_its_first_checkpoint_begins_anew(start, tmp_path):
    (tmp_path / "runs/quick__1").mkdir(parents=True)
    (tmp_path / "runs/quick__1/args.json").write_text("{}")
    assert start("--suite", "small", "--seeds", "1").wait() == 0 and (tmp_path / "runs/quick__1/finished").exists()


def test_a_failed_run_is_named_left_and_retried(start, tmp_path):
    runner = start("--only", "broken")
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "broken__3: failed" in out and "--wrong is wrong" in out
    runner = start("--only", "broken", wrong="")
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "--retry" in out and "is wrong" in out and not (tmp_path / "runs/broken__3").exists()
    assert start("--only", "broken", "--retry", wrong="").wait() == 0
    assert (tmp_path / "runs/broken__3/finished").exists()
    assert "1 finished before" in start("--only", "broken").communicate()[0]


def test_ray_gives_the_same_files_and_brings_back_what_is_interrupted(start, tmp_path):
    pytest.importorskip("ray", reason="pip install ray")
    assert start("--suite", "small").wait() == 0
    runner = start("--suite", "small", "--executor", "ray", "--runs-dir", tmp_path / "ray")
    out, error = runner.communicate()
    assert runner.returncode == 0, out + error
    for seed in (1, 2):
        local, ray = tmp_path / "runs" / f"quick__{seed}", tmp_path / "ray" / f"quick__{seed}"
        assert {p.name: p.read_text() for p in local.iterdir()} == {p.name: p.read_text() for p in ray.iterdir()}
        assert (ray / "finished").exists() and (tmp_path / "ray" / f"quick__{seed}.log").read_text() == "done at step 3\n"
    runner = start("--suite", "small", "--seeds", "5", "--executor", "ray", steps=10_000)
    while not any(process_of("fake.py")):
        time.sleep(0.1)
    time.sleep(2)
    runner.send_signal(signal.SIGINT)
    out, error = runner.communicate()
    assert runner.returncode == 130, out + error
    reached = int(rows_of(tmp_path / "runs/quick__5")[-1][0])
    assert 0 < reached < 10_000 and (tmp_path / "runs/quick__5.log").read_text() == f"interrupted at step {reached}\n"
    assert not any(process_of("fake.py"))


def process_of(name):
    return subprocess.run(["pgrep", "-f", f"python[^ ]* [^ ]*{name} --steps 10000"], capture_output=True).stdout.split()

"""benchmark/run.py: entries become runs, whatever happens in between."""
import csv
import shlex
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.helpers import comparable, wait_for

TASKS = '''
[poc]
command = """python ppo_recurrent_sbb.py --num-envs 4 --num-steps 32 --num-minibatches 2 --checkpoint-every 128 \\
--total-timesteps {steps}"""
suite = "small"
seeds = [1, 2]
measure = "success"
level = 0.9

[broken]
command = "python ppo_recurrent_sbb.py --total-timesteps 4096 --num-minibatches {minibatches}"
suite = "others"
seeds = [3]
measure = "success"
level = 0.9

[grid]
command = "python ppo_recurrent_tbb.py --env-id popgym-{{task}}-v0 --memory {{memory}} {{batching}}"
suite = "others"
seeds = [1]
measure = "return"

[grid.grid.task]
first = "RepeatFirstEasy"
previous = "RepeatPreviousEasy"

[grid.grid.memory]
lru = "lru"

[grid.grid.batching]
whole = "--full-episodes"
'''


@pytest.fixture
def start(tmp_path):
    """Starts run.py on the entries above; those who differ from them say how."""
    def start(*flags, steps=384, minibatches=10_000):
        tasks = tmp_path / f"{steps}-{minibatches}.toml"
        tasks.write_text(TASKS.format(steps=steps, minibatches=minibatches))
        command = [sys.executable, "benchmark/run.py", "--tasks", tasks, "--runs-dir", tmp_path / "runs", *flags]
        return subprocess.Popen([str(x) for x in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def rows_of(folder):
    return comparable(csv.DictReader((folder / "progress.csv").open()))


def test_dry_run_prints_the_exact_commands(start, tmp_path):
    out, _ = start("--dry-run", "--suite", "others", "--only", "grid").communicate()
    assert out.splitlines() == [
        f"python ppo_recurrent_tbb.py --env-id popgym-Repeat{task}Easy-v0 --memory lru --full-episodes --seed 1"
        for task in ("First", "Previous")]
    out, _ = start("--dry-run", "--seeds", "7", "8", "--only", "poc").communicate()
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
    """Killed without warning, then with: finished runs are left alone, the others go on, with the rows of a whole run."""
    whole = start("--suite", "small", "--seeds", "1", "--runs-dir", tmp_path / "whole", steps=7_680)
    runs = tmp_path / "runs"
    assert start("--suite", "small", "--seeds", "2").wait() == 0
    untouched = {path: path.stat().st_mtime_ns for path in (runs / "poc__2").iterdir()}
    runner = start("--suite", "small", steps=7_680)                             # more steps, but seed 2 has finished
    wait_for(runs / "poc__1" / "checkpoint.pt")
    runner.kill()                                                               # what it started goes on
    runner.communicate()
    runner = start("--suite", "small", steps=7_680)
    runner.terminate()
    out, _ = runner.communicate()
    assert runner.returncode in (130, -signal.SIGTERM), out                     # the latter: before it could listen
    runner = start("--suite", "small", steps=7_680)
    out, _ = runner.communicate()
    assert runner.returncode == 0 and "poc__1: finished" in out and "1 finished before, 1 finished" in out, out
    assert whole.wait() == 0 and rows_of(runs / "poc__1") == rows_of(tmp_path / "whole" / "poc__1")
    assert untouched == {path: path.stat().st_mtime_ns for path in (runs / "poc__2").iterdir()}
    assert "2 finished before" in start("--suite", "small").communicate()[0]


def test_a_failed_run_is_named_left_and_retried(start, tmp_path):
    runner = start("--only", "broken")
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "broken__3: failed" in out and "--num-minibatches 10000 do not fit" in out
    runner = start("--only", "broken", minibatches=8)
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "--retry" in out and "do not fit" in out and not (tmp_path / "runs/broken__3").exists()
    assert start("--only", "broken", "--retry", minibatches=8).wait() == 0
    assert (tmp_path / "runs/broken__3/finished").exists()
    assert "1 finished before" in start("--only", "broken").communicate()[0]


def test_ray_gives_the_same_files(start, tmp_path):
    pytest.importorskip("ray", reason="pip install ray")
    assert start("--suite", "small").wait() == 0
    runner = start("--suite", "small", "--executor", "ray", "--runs-dir", tmp_path / "ray")
    out, error = runner.communicate()
    assert runner.returncode == 0, out + error
    for seed in (1, 2):
        local, ray = tmp_path / "runs" / f"poc__{seed}", tmp_path / "ray" / f"poc__{seed}"
        plain = [{p.name for p in folder.iterdir() if "tfevents" not in p.name} for folder in (local, ray)]
        assert plain[0] == plain[1] >= {"progress.csv", "model.safetensors", "checkpoint.pt", "args.json", "finished"}
        assert rows_of(local) == rows_of(ray) and len(list(ray.glob("events*"))) == 1

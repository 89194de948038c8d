"""benchmark/run.py: entries become runs, whatever happens in between.

On a stand-in for the scripts, which starts at once; test_readme.py and the gate run it on the real ones.
"""
import collections
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.helpers import wait_for

sys.path.insert(0, str(ROOT / "benchmark"))
from entries import cells_of, digest, entries  # noqa: E402

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
    while step == 100 and (run.parent / "hold").exists():
        time.sleep(0.05)
    with progress.open("a") as f:
        f.write("global_step,charts/success\\n" * (step == 1) + f"{step},{int(args.seed) / step}\\n")
    checkpoint.with_suffix(".tmp").write_text(str(step))
    checkpoint.with_suffix(".tmp").replace(checkpoint)
print(f"done at step {args.steps}")
"""
SMALL = """
[quick]
command = "python {script} --steps {steps} --pause 0.05"
seeds = [1, 2]
"""
OTHERS = """
[broken]
command = "python {script} --steps 2 --pause 0 {wrong}"
seeds = [3]

[grid]
command = "python {script} --steps 2 --pause 0 --task {{task}} --memory {{memory}}"
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
    def start(*flags, steps=3, wrong="--wrong 1", out=subprocess.PIPE):
        script, tasks = tmp_path / "fake.py", tmp_path / f"tasks {steps} {wrong}"
        if not tasks.exists():                              # another runner may be reading it
            script.write_text(SCRIPT)
            tasks.mkdir()
            for suite, text in (("small", SMALL), ("others", OTHERS)):
                (tasks / f"{suite}.toml").write_text(text.format(script=script, steps=steps, wrong=wrong))
        folders = ["--tasks", tasks, "--runs-dir", tmp_path / "runs"]
        command = [sys.executable, "benchmark/run.py", *folders, *flags]
        return subprocess.Popen(
            [str(x) for x in command], cwd=ROOT, text=True, stdout=out, stderr=subprocess.PIPE,
            preexec_fn=ignore_ctrl_c)

    return start


def ignore_ctrl_c():
    """As the shell of a script does to its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def rows_of(folder):
    return list(csv.reader((folder / "progress.csv").open()))


def files_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.quick
def test_the_commands_of_benchmark_tasks_give_no_flag_twice_and_leave_no_placeholder():
    for name, entry in entries().items():
        flags = collections.Counter(word for word in shlex.split(entry["command"]) if word.startswith("--"))
        assert not [flag for flag, n in flags.items() if n > 1], name
        assert not re.findall(r"{[\w-]+}", entry["command"]), name


@pytest.mark.quick
def test_a_grid_fills_placeholders():
    grid = {"length": {"10": {"steps": "99", "seeds": [4, 5]}, "20": {"steps": "199"}},
            "memory": {"gru": "gru", "lru": """lru --memory-kwargs '{"a": {length}}'"""}}
    command = """python x.py --env-kwargs '{"n": {length}}' --memory {memory} --steps {steps}"""
    cells = cells_of("t", {"command": command, "grid": grid, "seeds": [1]})
    assert list(cells) == ["t__10__gru", "t__10__lru", "t__20__gru", "t__20__lru"]
    cell = cells["t__20__lru"]
    assert shlex.split(cell["command"]) == [
        "python", "x.py", "--env-kwargs", '{"n": 20}', "--memory", "lru", "--memory-kwargs", '{"a": 20}',
        "--steps", "199"]
    assert (cell["seeds"], cell["cell"]) == ([1], ["20", "lru"])
    assert cells["t__10__gru"]["seeds"] == [4, 5]           # a value's own


@pytest.mark.quick
def test_entries_of_a_folder_and_of_one_file(tmp_path):
    for suite in "ab":
        (tmp_path / f"{suite}.toml").write_text(f'[{suite}1]\ncommand = "python {suite}.py"\n')
    both = {name: entry["suite"] for name, entry in entries(tmp_path).items()}
    assert both == {"a1": "a", "b1": "b"} and list(entries(tmp_path / "b.toml")) == ["b1"]


def test_dry_run_prints_the_exact_commands(start, tmp_path):
    out, _ = start("--dry-run", "--suite", "others", "--only", "grid").communicate()
    begin, end = f"python {tmp_path}/fake.py --steps 2 --pause 0 --task", "--memory lru --seed 1"
    assert out.splitlines() == [f"{begin} RepeatFirst {end}", f"{begin} RepeatPrevious {end}"]
    out, _ = start("--dry-run", "--seeds", "7", "8", "--only", "quick").communicate()
    assert [shlex.split(line)[-2:] for line in out.splitlines()] == [["--seed", "7"], ["--seed", "8"]]
    assert not (tmp_path / "runs").exists()


def test_dry_run_ends_silently_where_its_reader_does():
    command = f"{sys.executable} benchmark/run.py --dry-run | head -1"          # more than a pipe holds
    done = subprocess.run(command, shell=True, cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.startswith("python ") and not done.stderr


@pytest.mark.parametrize("flags, says", [
    ("--suite elephant", "others, small"), ("--suite small --only broken", "--only broken"),
    ("--suite small --seeds", "--seeds"), ("--suite small --gpus-per-run 1", "--executor ray"),
    ("--suite small --done-in nowhere", "--done-in nowhere"),
    ("--suite small --runs-dir /dev/null/runs", "--runs-dir /dev/null/runs"),
    ("", "--suite others, small"), ("--suite small --workers 0", "--workers 0"),
    ("--suite small --tasks nowhere", "--tasks nowhere")])
def test_bad_input(start, tmp_path, flags, says):
    process = start(*flags.split())
    _, error = process.communicate()
    assert process.returncode == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_killed_suite_completes_only_what_is_missing(start, tmp_path):
    """Killed without warning, then with: finished runs are left alone, the other continues, no row is lost or
    written twice."""
    runs = tmp_path / "runs"
    assert start("--suite", "small", "--seeds", "2", steps=200).wait() == 0
    untouched = {path: path.stat().st_mtime_ns for path in (runs / "quick__2").iterdir()}
    (runs / "hold").touch()                                 # no run goes beyond its step 100
    runner = start("--suite", "small", steps=200)           # seed 2 has finished
    wait_for(runs / "quick__1" / "checkpoint.pt")
    runner.kill()                                           # what it started continues
    runner.communicate()
    said = tmp_path / "second.txt", tmp_path / "third.txt"
    second, third = (start("--suite", "small", steps=200, out=path.open("w")) for path in said)
    for path in said:
        wait_for(lambda: "quick__1: waits for another process" in path.read_text())
    assert not (runs / "quick__1" / "finished").exists()
    second.terminate()
    second.communicate()
    (runs / "hold").unlink()
    _, error = third.communicate()
    out = said[1].read_text()
    assert (second.returncode, third.returncode) == (130, 0), out + error
    assert "quick__1: finished" in out
    assert "1 finished before, 1 finished" in out
    assert [row[0] for row in rows_of(runs / "quick__1")] == ["global_step", *map(str, range(1, 201))]
    assert untouched == {path: path.stat().st_mtime_ns for path in (runs / "quick__2").iterdir()}
    assert "2 finished before" in start("--suite", "small", steps=200).communicate()[0]


def test_ctrl_c_lets_the_runs_save_and_the_next_start_resumes_them(start, tmp_path):
    runner = start("--suite", "small", steps=100)
    for seed in (1, 2):
        wait_for(tmp_path / f"runs/quick__{seed}/checkpoint.pt")
    runner.send_signal(signal.SIGINT)
    runner.communicate()
    assert runner.returncode == 130
    reached = {seed: int(rows_of(tmp_path / f"runs/quick__{seed}")[-1][0]) for seed in (1, 2)}
    for seed, step in reached.items():
        assert (tmp_path / f"runs/quick__{seed}.log").read_text() == f"interrupted at step {step}\n"
    assert max(reached.values()) < 100
    out, _ = start("--suite", "small", steps=100).communicate()
    assert "2 finished" in out
    for seed in reached:
        _, *rows = rows_of(tmp_path / f"runs/quick__{seed}")
        assert [int(row[0]) for row in rows] == list(range(1, 101))


def test_a_run_whose_entry_has_changed_since_is_named_and_left_alone(start, tmp_path):
    assert start("--only", "quick", "--seeds", "1").wait() == 0
    before = files_of(tmp_path / "runs/quick__1")
    (tmp_path / "runs/quick__1/finished").unlink()          # then it would be resumed
    runner = start("--only", "quick", steps=5)
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "1 of another recipe, 1 finished" in out
    assert f"quick__1: its entry has changed since it began; move {tmp_path / 'runs/quick__1'} away" in out
    assert files_of(tmp_path / "runs/quick__1") | {"finished": ""} == before
    (tmp_path / "runs/quick__1").rename(tmp_path / "runs/old")
    assert start("--only", "quick", steps=5).wait() == 0
    assert len(rows_of(tmp_path / "runs/quick__1")) == 6


def test_what_another_runner_finishes_meanwhile_is_not_run_again(start, tmp_path):
    first = start("--suite", "small", "--seeds", "1", steps=60)
    wait_for(tmp_path / "runs/quick__1/checkpoint.pt")
    second = start("--suite", "small", "--seeds", "1", steps=60)
    out, _ = second.communicate()
    assert first.wait() == 0 and second.returncode == 0
    assert "waits for another process" in out and out.endswith("1 finished before\n")


def test_what_stands_in_a_table_is_not_run(start, tmp_path):
    start("--suite", "small", "--dry-run").communicate()    # writes the entries
    same = digest(shlex.split(f"python {tmp_path}/fake.py --steps 3 --pause 0.05 --seed 1"))
    (tmp_path / "table.csv").write_text(f"run,digest\nquick__1,{same}\nquick__2,of-other\n")
    out, _ = start("--suite", "small", "--done-in", tmp_path / "table.csv").communicate()
    assert "1 finished" in out and (tmp_path / "runs/quick__2").exists()
    assert not (tmp_path / "runs/quick__1").exists()


def child_of(runner, name):
    """The process that trains into this folder."""
    for child in subprocess.check_output(["pgrep", "-P", str(runner.pid)], text=True).split():
        if name in open(f"/proc/{child}/cmdline").read():
            return int(child)


@pytest.mark.parametrize("how, says", [
    (signal.SIGKILL, "ended by signal 9, Killed: out of memory?\n--retry continues it"),
    (signal.SIGINT, "start the same command again to continue")])
def test_what_stops_a_run_alone_is_said(start, tmp_path, how, says):
    runner = start("--suite", "small", "--seeds", "1", steps=40)
    checkpoint = tmp_path / "runs/quick__1/checkpoint.pt"
    wait_for(checkpoint)
    os.kill(child_of(runner, "quick__1"), how)
    out, _ = runner.communicate()
    assert runner.returncode == 1 and says in out
    assert start("--suite", "small", "--seeds", "1", "--retry", steps=40).wait() == 0


def test_a_file_that_cannot_be_written_is_one_sentence_and_running_runs_save(start, tmp_path):
    runs = tmp_path / "runs"
    (runs / "quick__3.command").mkdir(parents=True)         # waits until there is a free slot
    (runs / "hold").touch()                                 # no run goes beyond its step 100
    runner = start("--suite", "small", "--seeds", "1", "2", "3", "--workers", "2", steps=101)
    for seed in (1, 2):
        wait_for(runs / f"quick__{seed}/checkpoint.pt")
    os.kill(child_of(runner, "quick__2"), signal.SIGKILL)
    _, error = runner.communicate()
    assert runner.returncode == 2 and "Traceback" not in error
    assert "quick__3.command" in error and "the runs were told to save" in error
    assert "interrupted at step" in (runs / "quick__1.log").read_text()


def test_a_failed_run_is_named_left_and_retried(start, tmp_path):
    runner = start("--only", "broken")
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "broken__3: failed" in out and "--wrong is wrong" in out
    runner = start("--only", "broken", wrong="")
    out, _ = runner.communicate()
    assert runner.returncode == 1 and "--retry" in out and "is wrong" in out
    assert not (tmp_path / "runs/broken__3").exists()
    assert start("--only", "broken", "--retry", wrong="").wait() == 0
    assert (tmp_path / "runs/broken__3/finished").exists()
    assert "1 finished before" in start("--only", "broken", wrong="").communicate()[0]


def test_ray_gives_the_same_files_and_brings_back_what_is_interrupted(start, tmp_path):
    pytest.importorskip("ray", reason="pip install ray")
    assert start("--suite", "small").wait() == 0
    runner = start("--suite", "small", "--executor", "ray", "--runs-dir", tmp_path / "ray")
    out, error = runner.communicate()
    assert runner.returncode == 0, out + error
    for seed in (1, 2):
        local, ray = tmp_path / "runs" / f"quick__{seed}", tmp_path / "ray" / f"quick__{seed}"
        assert files_of(local) == files_of(ray)
        assert (ray / "finished").exists()
        assert (tmp_path / "ray" / f"quick__{seed}.log").read_text() == "done at step 3\n"
    runner = start("--suite", "small", "--seeds", "5", "--executor", "ray", steps=10_000)
    while not processes_of("fake.py"):
        time.sleep(0.1)
    time.sleep(2)
    runner.send_signal(signal.SIGINT)
    out, error = runner.communicate()
    assert runner.returncode == 130, out + error
    reached = int(rows_of(tmp_path / "runs/quick__5")[-1][0])
    assert 0 < reached < 10_000
    assert (tmp_path / "runs/quick__5.log").read_text() == f"interrupted at step {reached}\n"
    assert not processes_of("fake.py")


def test_a_lost_machine_of_a_ray_cluster_loses_no_run_and_makes_none_twice(start, tmp_path):
    """Two machines with room for a run each; the second goes in the middle of both, as without power."""
    cluster = pytest.importorskip("ray.cluster_utils", reason="pip install ray").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        runner = start("--suite", "small", "--executor", "ray", "--ray-address", cluster.address, steps=600)
        wait_for(lambda: len(processes_of(f"{tmp_path}/fake.py", 600)) == 2, 300)
        cluster.remove_node(second, allow_graceful=False)
        out, error = runner.communicate()
        assert runner.returncode == 0, out + error
        assert "2 finished" in out
    finally:
        cluster.shutdown()
        for process in processes_of(f"{tmp_path}/fake.py", 600):     # of the lost machine
            os.kill(int(process), signal.SIGKILL)
    for seed in (1, 2):
        folder = tmp_path / f"runs/quick__{seed}"
        assert (folder / "finished").exists()
        assert [row[0] for row in rows_of(folder)] == ["global_step", *map(str, range(1, 601))]
        assert (tmp_path / f"runs/quick__{seed}.log").read_text() == "done at step 600\n"


def processes_of(name, steps=10_000):
    command = ["pgrep", "-f", f"python[^ ]* [^ ]*{name} --steps {steps} "]
    return subprocess.run(command, capture_output=True).stdout.split()

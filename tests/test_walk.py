"""A new user's walk: the README's code blocks, as written, in a fresh copy of the repository."""
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def block(name):
    """The code block that follows <!-- name -->."""
    return re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.S)[1]


def follow(clone, commands):
    """Runs them in bash as a user does; returns what they print."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def test_a_task_in_ten_lines_is_learned(clone):
    (clone / "my_task.py").write_text(block("my_task.py"))
    follow(clone, block("train-my-task"))
    progress, = clone.glob("runs/my_task-Recall-v0__*/progress.csv")
    *_, last = csv.DictReader(progress.open())
    assert float(last["charts/success"]) > 0.98


def test_a_memory_in_ten_lines_obeys_the_laws_and_trains(clone):
    (clone / "models/averages.py").write_text(block("models/averages.py"))
    memory = clone / "models/memory.py"
    text = memory.read_text().replace("import GPT\n", "import GPT\nfrom models.averages import Averages\n")
    memory.write_text(text.replace('MONOIDS = {', 'MONOIDS = {"averages": Averages, '))
    law, train = block("train-my-memory").splitlines()
    passed = int(re.search(r"(\d+) passed", follow(clone, law))[1])
    assert passed > 30
    assert "done at step 8192" in follow(clone, f"{train} --total-timesteps 8192")


def test_a_result_is_rerun_and_drawn(clone):
    assert "1 finished" in follow(clone, block("rerun"))
    row, = csv.DictReader((clone / "runs/figures/table.csv").open())
    table = csv.DictReader((clone / "benchmark/results/table.csv").open())
    published = next(published for published in table if published["entry"] == "poc-gru")
    same = ("entry", "seed", "measure", "level", "steps")
    assert [row[k] for k in same] == [published[k] for k in same] and float(row["last"]) > 0.98
    assert (clone / "runs/figures/poc-gru.png").exists() and (clone / "runs/figures/poc-gru.svg").exists()
    assert (clone / "README.md").read_text() == README

"""A new user's walk: the code blocks of README.md and docs/, as written, in a copy of the repository."""
import csv
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.flags import parse
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}


def block(name):
    """The code block that follows <!-- name -->. It stands on one page only."""
    pattern = rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```"
    (found,) = [code for text in TEXTS.values() for code in re.findall(pattern, text, re.S)]
    return found


def training_commands(text):
    """The `python <script> ...` lines of the bash blocks without a name, as (module, arguments)."""
    named = r"<!-- [^\n]* -->\n```\w+\n.*?```"
    blocks = re.findall(r"```bash\n(.*?)```", re.sub(named, "", text, flags=re.S), re.S)
    lines = [line.split(" #")[0] for code in blocks for line in code.splitlines()]
    found = [re.fullmatch(r"python (\w+)\.py ?(.*)", line) for line in lines]
    return [(importlib.import_module(match[1]), shlex.split(match[2])) for match in found if match]


def follow(clone, commands):
    """Runs them in bash as a user does. Returns what they print."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    bash = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(bash, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():                          # not deleted since the last commit
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
    for path in ("models/averages.py", "models/minimal_gated.py"):
        (clone / path).write_text(block(path))
    memory = clone / "models/memory.py"
    text = memory.read_text()
    assert text.count("\nimport torch\n") == text.count("\nMONOIDS = {") == 1
    imports = "from models.averages import Averages\nfrom models.minimal_gated import MinimalGated\n"
    text = text.replace("\nimport torch\n", f"\n{imports}import torch\n")
    both = '"averages": Averages, "minimal-gated": MinimalGated, '
    memory.write_text(text.replace("\nMONOIDS = {", f"\nMONOIDS = {{{both}"))
    law, train = block("train-my-memory").splitlines()
    laws_of_both = law.replace("averages", "'averages or minimal-gated'")       # in one process
    assert int(re.search(r"(\d+) passed", follow(clone, laws_of_both))[1]) > 60
    assert "done at step 8192" in follow(clone, f"{train} --total-timesteps 8192")


@pytest.mark.parametrize("name, says", [("load", "info['success']"), ("load-many", "start.shape")])
def test_a_trained_agent_in_a_program_of_ones_own(clone, name, says):
    (clone / "own.py").write_text(f"{block(name)}\nprint({says})\n")
    assert follow(clone, "python own.py") == {"load": "True\n", "load-many": "(16,)\n"}[name]


def test_an_exported_agent_runs_without_torch(clone):
    for package in "onnxruntime", "onnxscript":
        pytest.importorskip(package)
    follow(clone, block("export"))
    (clone / "own.py").write_text(f"{block('run-onnx')}\nimport sys\nprint(action, 'torch' in sys.modules)\n")
    assert re.fullmatch(r"\[[0-9]\] False\n", follow(clone, "python own.py"))


def test_a_result_is_rerun_and_drawn(clone):
    assert "1 finished" in follow(clone, block("rerun"))
    row, = csv.DictReader((clone / "runs/figures/table.csv").open())
    table = csv.DictReader((clone / "benchmark/results/table.csv").open())
    published = next(published for published in table if published["entry"] == "poc-gru")
    same = ("entry", "seed", "measure", "level", "steps")
    assert [row[k] for k in same] == [published[k] for k in same] and float(row["last"]) > 0.98
    assert (clone / "runs/figures/poc-gru.png").exists() and (clone / "runs/figures/poc-gru.svg").exists()
    for page, text in TEXTS.items():                        # they speak of the published runs only
        assert (clone / page).read_text() == text


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if training_commands(text)])
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """As written, in a folder of their own: two rollouts, or two visits to the replay, each."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "benchmark/models", tmp_path / "benchmark/models")
    done = set()
    for script, argv in training_commands(TEXTS[page]):
        if "MortarMayhem-Grid-v0" in argv and importlib.util.find_spec("memory_gym") is None:
            continue
        args, _ = parse(script.Args, script.SCRIPT, argv)
        if args.model:
            began = time.time()
            script.main([*argv, "--episodes", "1"])
            films = [film for film in Path(args.model).parent.glob("*.gif") if film.stat().st_mtime >= began]
            assert args.render_mode != "rgb_array" or films
        else:
            steps = args.num_envs * args.num_steps if hasattr(args, "num_steps") else args.train_every
            script.main([*argv, "--total-timesteps", str((3 if args.resume else 2) * steps)])
        done.add("model" if args.model else "resume" if args.resume else args.env_id)
    if page == "README.md":
        assert {"model", "resume", "CartPoleMasked-v0", "popgym-RepeatPreviousEasy-v0"} <= done

"""One truth: requirements, README, benchmark entries and known-bug notes agree with the code."""
import csv
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402
from run import entries  # noqa: E402

SCRIPTS = {path.name: importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))}
README = (ROOT / "README.md").read_text()
ENTRIES = entries()
NOTE = re.compile(r"^ *# (KNOWN BUG|PITFALL|DEVIATION)\b((?:.*\n)(?: *#  .*\n)*)", re.MULTILINE)


def lines(path):
    return {line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")}


def test_pip_and_uv_install_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    uv = set(project["project"]["dependencies"]) | set(project["dependency-groups"]["dev"])
    assert uv - lines("requirements.txt") == {"memory-gym==1.0.2"}              # pip takes it with --no-deps
    assert lines("requirements.txt") < uv
    assert "pip install --no-deps memory-gym==1.0.2" in README
    assert "torch==2.13.0" in uv and project["project"]["requires-python"] == ">=3.11,<3.14"


def test_freeze_holds_every_requirement_as_a_plain_version():
    frozen = lines("requirements_freeze.txt")
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+]+", line) for line in frozen)
    names = {line.split("==")[0].lower().replace("_", "-") for line in frozen}
    assert {re.split("[=<>]", line)[0] for line in lines("requirements.txt")} | {"memory-gym"} <= names


def test_nothing_committed_names_a_registry_host_or_a_path_of_this_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "uv.lock" not in files
    forbidden = ["python" + "hosted", "pypi" + ".org", "site-" + "packages/", "/op" + "t/", "/roo" + "t/"]
    for name in files:
        if not name.endswith((".png", ".gif", ".safetensors")):
            assert not [word for word in forbidden if word in (ROOT / name).read_text()], name


def commands(text):
    """Every `python <script> ...` of ours in a text, as argument lists."""
    found = re.findall(r"python (\w+\.py)((?: [^\n`#|]*)?)", text.replace("\\\n", ""))
    return [(script, shlex.split(re.split(r" {3,}", flags)[0])) for script, flags in found if script in SCRIPTS]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_benchmark_entry_is_a_valid_command(name):
    ((script, argv),) = commands(ENTRIES[name]["command"])
    args = tyro.cli(SCRIPTS[script].Args, args=argv)
    SCRIPTS[script].check(args)
    assert ENTRIES[name]["seeds"] and ENTRIES[name]["measure"] in plot.MEASURES


@pytest.mark.parametrize("source", ["README.md", *SCRIPTS])
def test_every_command_in_readme_and_docstrings_is_valid(source):
    text = README if source == "README.md" else SCRIPTS[source].__doc__
    found = commands(re.sub(r"<!-- train-my-memory -->\n```.*?```", "", text, flags=re.S))     # see test_walk.py
    assert found
    for script, argv in found:
        SCRIPTS[script].check(tyro.cli(SCRIPTS[script].Args, args=argv))


def test_the_readmes_commands_run_one_after_the_other(tmp_path, monkeypatch):
    """Train, watch, resume, other tasks: as written, in a fresh folder, two rollouts each."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"## Train, watch, continue\n+```bash\n(.*?)```", README, re.S)[1]
    done = set()
    for script, argv in commands(block):
        if "MortarMayhem-Grid-v0" in argv and importlib.util.find_spec("memory_gym") is None:
            continue
        args = tyro.cli(SCRIPTS[script].Args, args=argv)
        if args.model:
            SCRIPTS[script].main([*argv, "--episodes", "1"])
            assert (tmp_path / args.model).with_suffix(".gif").exists() == (args.render_mode == "rgb_array")
        else:
            steps = args.num_envs * args.num_steps if "ppo" in script else args.train_every
            SCRIPTS[script].main([*argv, "--total-timesteps", str((3 if args.resume else 2) * steps)])
        done.add("model" if args.model else "resume" if args.resume else args.env_id)
    assert {"model", "resume", "CartPoleMasked-v0", "popgym-RepeatPreviousEasy-v0"} <= done


def test_every_note_has_a_symptom_and_a_test_that_exists():
    sources = [*SCRIPTS, *(str(p.relative_to(ROOT)) for folder in ("models", "envs") for p in (ROOT / folder).glob("*.py"))]
    tests = {(p.name, name) for p in (ROOT / "tests").glob("*.py")
             for name in re.findall(r"^def (test_\w+)", p.read_text(), re.M)}
    notes = [(source, *m.groups()) for source in sources for m in NOTE.finditer((ROOT / source).read_text())]
    assert len(notes) >= 6
    for source, kind, note in notes:
        assert note.count("\n") <= 4, (source, note)
        note = re.sub(r"\n *# *", " ", note)
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", note)
        assert named and set(named) <= tests, (source, note)
        assert kind == "DEVIATION" or "Symptom:" in note, (source, note)


def test_readme_indexes_every_known_bug():
    for source in [*SCRIPTS, *(p.relative_to(ROOT) for folder in ("models", "envs") for p in (ROOT / folder).glob("*.py"))]:
        for m in NOTE.finditer((ROOT / source).read_text()):
            test = re.search(r"::(test_\w+)", m[0])[1]
            assert test in README, f"the README's index lacks the note of {test}"


def test_the_readmes_tables_are_those_of_the_committed_files():
    rows = list(csv.DictReader((ROOT / "benchmark/results/table.csv").open()))
    assert plot.with_tables(README, ROOT / "benchmark/results") == README
    assert {row["entry"] for row in rows} <= set(ENTRIES)
    for name in {row["entry"] for row in rows}:
        assert (ROOT / f"benchmark/results/{name}.csv").exists() and (ROOT / f"benchmark/results/{name}.png").exists()

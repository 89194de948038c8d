"""One truth: requirements, pages, benchmark entries and known-bug notes agree with the code."""
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium as gym
import pytest
import tyro

import envs  # noqa: F401  (registers the tasks)
from models import MEMORIES
from models.flags import parse
from models.words import THEIRS
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402
from entries import entries  # noqa: E402

pytestmark = pytest.mark.quick


def files(pattern):
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]


def modules(pattern):
    return {name: importlib.import_module(Path(name).stem) for name in files(pattern)}


SCRIPTS = {name: module for name, module in modules("*.py").items() if hasattr(module, "SCRIPT")}
TOOLS = modules("benchmark/*.py")
WITH_FLAGS = {name: module for name, module in (SCRIPTS | TOOLS).items() if hasattr(module, "Args")}
SOURCES = [*SCRIPTS, *files("models/*.py"), *files("envs/*.py")]
PAGES = {name: (ROOT / name).read_text() for name in ["README.md", *files("docs/*.md")]}
ENTRIES = entries()
NOTE = re.compile(r"^ *# (KNOWN BUG|PITFALL|DEVIATION)\b((?:.*\n)(?: *#  .*\n)*)", re.MULTILINE)
OTHER_PROGRAMS_FLAGS = {
    "--help", "--no-deps", "--torch-backend", "--logdir", "--standalone", "--nproc_per_node",
    "--shutdown-timeout", *(f"--{word}" for word in THEIRS)}


def lines(path):
    text = (ROOT / path).read_text()
    return {line for line in text.splitlines() if line and not line.startswith("#")}


# ---------------------------------------------------------------------- requirements

def test_pip_and_uv_install_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    uv = set(project["project"]["dependencies"]) | set(project["dependency-groups"]["dev"])
    assert uv - lines("requirements.txt") == {"memory-gym==1.0.2"}  # pip takes it with --no-deps
    assert lines("requirements.txt") < uv
    assert "pip install --no-deps memory-gym==1.0.2" in PAGES["README.md"]
    assert "torch==2.13.0" in uv and project["project"]["requires-python"] == ">=3.11,<3.14"


def test_freeze_holds_every_requirement_as_a_plain_version():
    frozen = lines("requirements_freeze.txt")
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+]+", line) for line in frozen)
    names = {line.split("==")[0].lower().replace("_", "-") for line in frozen}
    required = {re.split("[=<>]", line)[0] for line in lines("requirements.txt")}
    assert required | {"memory-gym"} <= names


def test_nothing_committed_names_a_registry_host_or_a_path_of_this_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = [name for name in listed.splitlines() if (ROOT / name).exists()]
    assert "uv.lock" not in names
    forbidden = ["python" + "hosted", "pypi" + ".org", "site-" + "packages/", "/op" + "t/", "/roo" + "t/"]
    for name in names:
        if not name.endswith((".png", ".gif", ".safetensors")):
            assert not [word for word in forbidden if word in (ROOT / name).read_text()], name


# ---------------------------------------------------------------------- commands

def commands(text):
    """Every `python <script> ...` of ours in a text, and every torchrun, as (script, arguments)."""
    pattern = r"(?:python|torchrun [\w =-]*?) ((?:benchmark/)?\w+\.py)((?: [^\n`#|]*)?)"
    found = []
    for script, rest in re.findall(pattern, text.replace("\\\n", "")):
        if script in WITH_FLAGS:
            flags = re.split(r" {3,}", rest)[0]             # then comes what it does
            found.append((script, shlex.split(flags)))
    return found


def check(script, argv):
    """Stops if the script would refuse this command."""
    module = WITH_FLAGS[script]
    args = tyro.cli(module.Args, args=argv)
    if script in SCRIPTS:
        of_a_run = (args.model or args.resume or args.flags or "").startswith("runs/")
        if not of_a_run:                                    # which is not there
            args, _ = parse(module.Args, Path(script).stem, argv)
        module.check(args)
    if script == "benchmark/run.py":
        suites = {entry["suite"] for entry in ENTRIES.values()}
        assert not args.suite or args.suite in suites, argv
        assert any(args.only in name for name in ENTRIES), argv


@pytest.mark.parametrize("group", {entry["group"]: None for entry in ENTRIES.values()})
def test_every_benchmark_entry_is_a_valid_command(group):
    for entry in ENTRIES.values():
        if entry["group"] == group:
            ((script, argv),) = commands(entry["command"])
            check(script, argv)
            assert entry["seeds"] and entry["measure"] in plot.MEASURES


@pytest.mark.parametrize("source", [*PAGES, *SCRIPTS])
def test_every_command_on_a_page_or_in_a_docstring_is_valid(source, monkeypatch):
    monkeypatch.chdir(ROOT)                                 # where benchmark/models is
    text = PAGES[source] if source in PAGES else SCRIPTS[source].__doc__
    of_test_readme = r"<!-- train-my-memory -->\n```.*?```"
    found = commands(re.sub(of_test_readme, "", text, flags=re.S))
    assert found or source in PAGES
    for script, argv in found:
        check(script, argv)


def test_commands_are_found():
    text = ("`python sac_gru.py` and\npython benchmark/run.py --only a   # says\n"
            "torchrun --standalone --nproc_per_node=2 ppo_recurrent_tbb.py --num-envs 128\n")
    assert commands(text) == [("sac_gru.py", []), ("benchmark/run.py", ["--only", "a"]),
                              ("ppo_recurrent_tbb.py", ["--num-envs", "128"])]


def test_pytest_commands_name_files_and_marks_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    marks = {mark.split(":")[0] for mark in project["tool"]["pytest"]["ini_options"]["markers"]}
    everything = "\n".join(PAGES.values())
    found = [line.split() for line in re.findall(r"python -m pytest([^\n`]*)", everything)]
    assert any("quick" in words for words in found)
    for words in found:
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
        assert "-m" not in words or words[words.index("-m") + 1] in marks, words


# ---------------------------------------------------------------------- what the pages say

def test_the_readme_is_short_and_says_what_the_first_command_prints():
    assert (ROOT / "README.md").stat().st_size <= 12_288
    args = SCRIPTS["ppo_recurrent_sbb.py"].Args()
    rollout = args.num_envs * args.num_steps
    assert f"done at step {args.total_timesteps // rollout * rollout};" in PAGES["README.md"]


def anchors(text):
    """What GitHub makes of the headings of a page."""
    code = re.compile(r"```.*?```", re.S)
    headings = re.findall(r"^#+ (.*)", code.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_image_and_path_of_a_page_exists(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    paths = re.findall(r"`((?:models|envs|tests|benchmark|docs)/[\w./-]*)`", PAGES[page])
    for path in paths:
        assert (ROOT / path).exists() or path in ("models/averages.py", "models/minimal_gated.py"), path


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w[\w.-]*)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_named_on_a_page_exists(page):
    fields = [field for module in WITH_FLAGS.values() for field in dataclasses.fields(module.Args)]
    names = {field.name.replace("_", "-") for field in fields}
    known = {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | OTHER_PROGRAMS_FLAGS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", PAGES[page])) <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_metric_named_on_a_page_is_logged(page):
    sources = "".join((ROOT / name).read_text() for name in SOURCES)
    for metric in re.findall(r"(?:charts|eval|losses|debug|time)/[A-Za-z_]+", PAGES[page]):
        folder, name = metric.split("/")
        assert f'"{metric}"' in sources or folder == "time" and f'lap("{name}")' in sources, metric


def test_the_table_of_memories_is_complete_and_names_their_arguments():
    rows = re.findall(r"^\| (`.*?) \| (`.*?) \| .* \| (.*?) ?\|$", PAGES["docs/memories.md"], re.M)
    rows = [row for row in rows if row[1].endswith(".py")]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row[0])} == set(MEMORIES)
    for _, classes, arguments in rows:
        module = importlib.import_module(f"models.{classes.split()[-1].removesuffix('.py')}")
        for name in re.findall(r"`(\w+)`", classes):
            memory = getattr(module, name)
            parameters = set(inspect.signature(memory).parameters)
            parameters -= {"size", "input_size", "hidden_size", "num_layers"}
            assert memory.__module__ == module.__name__, name
            assert set(re.findall(r"`(\w+)`", arguments)) == parameters, name


def test_the_readme_names_every_script_and_memory():
    names = set(re.findall(r"^\| (`[^|]*) \|", PAGES["README.md"], re.M))
    names = {name for row in names for name in re.findall(r"`([\w.-]+)`", row)}
    assert set(SCRIPTS) | set(MEMORIES) <= names


def test_the_table_of_tasks_is_complete():
    ours = {name for name, spec in gym.registry.items() if str(spec.vector_entry_point).startswith("envs.")}
    rows = set(re.findall(r"^\| `([\w-]+-v\d)` \| ", PAGES["docs/tasks.md"], re.M))
    assert len(ours) >= 12 and ours <= rows


# ---------------------------------------------------------------------- known-bug notes

def test_every_note_has_a_symptom_and_a_test_that_exists():
    tests = {(Path(file).name, name) for file in files("tests/*.py")
             for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)}
    notes = [(source, *match.groups())
             for source in SOURCES for match in NOTE.finditer((ROOT / source).read_text())]
    assert len(notes) >= 20
    for source, kind, note in notes:
        assert note.count("\n") <= 4, (source, note)
        note = re.sub(r"\n *# *", " ", note)
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", note)
        assert named and set(named) <= tests, (source, note)
        assert kind == "DEVIATION" or "Symptom:" in note, (source, note)

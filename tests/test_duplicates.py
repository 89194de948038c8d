"""Scripts repeat what they have in common: functions and classes of one name have one source."""
import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\nSCRIPT = " in path.read_text())
MAY_DIFFER = {
    "Args": "flags and defaults are the algorithm's own",
    "Agent": "PPO's has a policy and a value, DQN's action values, SAC's and TD3's critics; SBB pads",
    "check": "knows the script's own flags",
    "train": "the algorithm",
}
FAMILY = {"Replay": "SBB indexes segments, TBB episodes"}  # may differ between _sbb and _tbb


def definitions(script):
    """Source of every top-level function and class of a script, by name."""
    source = (ROOT / script).read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


@pytest.mark.quick
@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_same_name_same_source(one, other):
    a, b = definitions(one), definitions(other)
    shared = a.keys() & b.keys()
    assert len(shared) > len(MAY_DIFFER)
    may_differ = MAY_DIFFER if one[-6:] == other[-6:] else MAY_DIFFER | FAMILY
    assert [name for name in sorted(shared) if a[name] != b[name] and name not in may_differ] == []


@pytest.mark.quick
@pytest.mark.parametrize("name", MAY_DIFFER | FAMILY)
def test_no_exception_without_need(name):
    sources = [definitions(script).get(name) for script in SCRIPTS]
    different = {source for source in sources if source}
    assert len(different) > 1, f"{name} is the same everywhere: take it off the list"


@pytest.mark.quick
def test_the_multigpu_script_differs_by_its_processes_only():
    """Every line that it has instead of or beside ppo_recurrent_tbb's names something of processes."""
    one, several = definitions("ppo_recurrent_tbb.py"), definitions("ppo_recurrent_tbb_multigpu.py")
    assert one["Agent"] == several["Agent"]
    of_processes = re.compile(
        "process|gather|RANK|WORLD_SIZE|batch_size|env_seed|of_all|means|mean_of_episodes|average_gradients")
    for name in ("Args", "check", "train"):
        changes = list(difflib.ndiff(one[name].splitlines(), several[name].splitlines()))
        added = [line[2:] for line in changes if line.startswith("+ ")]
        removed = [line for line in changes if line.startswith("- ")]
        assert name != "train" or 15 < len(removed) <= len(added)
        strangers = [line for line in added if not of_processes.search(line)]
        assert not strangers or name == "check", strangers

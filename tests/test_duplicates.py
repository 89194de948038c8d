"""Scripts repeat what they have in common: functions and classes of one name have one source, so that copies cannot drift."""
import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
MAY_DIFFER = {
    "Args": "flags and defaults are the algorithm's own",
    "Agent": "PPO's has a policy and a value, DQN's action values, SAC's and TD3's critics; PPO's SBB pads",
    "check": "knows the script's own flags",
    "train": "the algorithm",
}
FAMILY = {                                                              # may differ between _sbb, _tbb and _gru
    "Replay": "SBB indexes segments, TBB episodes",
    "play": "with --wipe-state-every, which the others do not have",
}


def definitions(script):
    """Source of every top-level function and class of a script, by name."""
    source = (ROOT / script).read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_same_name_same_source(one, other):
    a, b = definitions(one), definitions(other)
    shared = a.keys() & b.keys()
    assert len(shared) > len(MAY_DIFFER)
    may_differ = MAY_DIFFER if one[-6:] == other[-6:] else MAY_DIFFER | FAMILY
    assert [name for name in sorted(shared) if a[name] != b[name] and name not in may_differ] == []


@pytest.mark.parametrize("name", MAY_DIFFER | FAMILY)
def test_no_exception_without_need(name):
    sources = [definitions(script).get(name) for script in SCRIPTS]
    assert len({source for source in sources if source}) > 1, f"{name} is the same everywhere: take it off the list"

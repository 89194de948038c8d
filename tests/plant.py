"""Plants one bug at a time and shows which test catches it. Run on demand, not part of the tests:

python tests/plant.py [name ...]   all plants, or those whose name contains one of these words
python tests/plant.py --list       names and what is planted

Each plant has a process of its own, a fork of this one, which has imported the program already: starting
Python anew takes longer than most tests. The fork replaces functions of the program, and then pytest imports
and runs the one test named for the plant. A test that fails by itself is no catch: it first has to pass with
nothing planted. The exit code is 1 if a bug survives. Needs os.fork: Linux or macOS.
"""
import gc
import importlib
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import pytest  # noqa: E402

from tests import plants_loop, plants_memories  # noqa: E402
from tests.conftest import SCRIPTS  # noqa: E402


def plants():
    """name -> (what is planted, where the note or the fault stands, test, function that plants it)"""
    found = {}
    for name, what, snippet in plants_memories.PLANTS:
        test = plants_memories.TESTS[name]
        found[name] = what, "the memory's docstring", test, lambda code=snippet: run_snippet(code)
    return found | plants_loop.PLANTS


def run_snippet(code):
    exec(plants_memories.HEAD + code, {})


def plant_from_environment():
    """For processes that a test starts: what is planted in the test is planted in them."""
    if os.environ["PLANT"]:
        plants()[os.environ["PLANT"]][3]()


def run_test(test, plant=""):
    """pytest's exit code (0 passed, 1 failed, others: it could not run), its output, seconds."""
    begin = time.time()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(in_child(test, plant))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read(), time.time() - begin


def import_once():
    """The program and pytest's plugins, here and not in each fork."""
    for module in (*SCRIPTS, "hypothesis", "_hypothesis_pytestplugin", "xdist.plugin"):
        importlib.import_module(module)
    gc.freeze()                                             # forks do not look for garbage in it


def can_be_planted(plant):
    """Whether the code that it changes is still there."""
    child = os.fork()
    if child == 0:
        try:
            plants()[plant][3]()
        except BaseException:                               # the parent's work is not to be done twice
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def in_child(test, plant):
    try:
        os.chdir(ROOT)
        os.environ |= {"PLANT": plant, "PYTHONPATH": str(ROOT)}
        sys.argv = ["pytest"]
        plant_from_environment()
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"]))
    except BaseException:                                   # the parent's work is not to be done twice
        traceback.print_exc()
        code = int(pytest.ExitCode.INTERNAL_ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main(words):
    chosen = {name: plant for name, plant in plants().items()
              if not words or any(word in name for word in words)}
    if not chosen:
        print("no plant has such a name: see --list", file=sys.stderr)
        return 2
    import_once()
    sound, survivors, begin = {}, 0, time.time()            # sound: does it pass with nothing planted
    print("| name | planted | where | test | seconds |\n|---|---|---|---|---|", flush=True)
    for name, (what, where, test, _) in chosen.items():
        if test not in sound:
            sound[test] = run_test(test)[0] == 0
        code, output, seconds = run_test(test, name)
        caught = sound[test] and code == 1 and bool(re.search(r"^FAILED ", output, re.M))
        survivors += not caught
        why = "SURVIVES" if sound[test] and code == 0 else "COULD NOT RUN"
        verdict = test if caught else f"{why}: {test}"
        print(f"| {name} | {what} | {where} | {verdict} | {seconds:.1f} |", flush=True)
    minutes = (time.time() - begin) / 60
    print(f"\n{len(chosen)} planted, {len(chosen) - survivors} caught, {minutes:.0f} minutes")
    return int(survivors > 0)


if __name__ == "__main__":
    if "--list" in sys.argv:
        print("\n".join(f"{name}: {plant[0]}" for name, plant in plants().items()))
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))

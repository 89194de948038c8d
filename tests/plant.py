"""Plants one bug at a time and shows which test catches it. Run on demand, not part of the tests:

python tests/plant.py [name ...]   all plants, or those whose name contains one of these words
python tests/plant.py --list       names and what is planted

Each plant has a process of its own: pytest loads this file as a plugin, which replaces functions of the
program before the test is imported. Only the test named for the plant runs. A test that fails by itself is no
catch: it first has to pass with nothing planted. The exit code is 1 if a bug survives.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests import plants_loop, plants_memories  # noqa: E402


def plants():
    """name -> (what is planted, where the note or the fault stands, test, function that plants it)"""
    found = {}
    for name, what, snippet in plants_memories.PLANTS:
        test = plants_memories.TESTS[name]
        found[name] = what, "the memory's docstring", test, lambda code=snippet: run_snippet(code)
    return found | plants_loop.PLANTS


def run_snippet(code):
    exec(plants_memories.HEAD + code, {})


def pytest_configure():
    """Called by pytest in the process of a plant."""
    if os.environ.get("PLANT"):
        plants()[os.environ["PLANT"]][3]()


def run_test(test, plant=""):
    """pytest's exit code (0 passed, 1 failed, others: it could not run), its output, seconds."""
    env = os.environ | {"PLANT": plant, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "tests.plant",
               f"tests/{test}"]
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.time() - begin


def main(words):
    chosen = {name: plant for name, plant in plants().items()
              if not words or any(word in name for word in words)}
    if not chosen:
        print("no plant has such a name: see --list", file=sys.stderr)
        return 2
    sound, survivors = {}, 0                                # sound: does it pass with nothing planted
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
    print(f"\n{len(chosen)} planted, {len(chosen) - survivors} caught")
    return int(survivors > 0)


if __name__ == "__main__":
    if "--list" in sys.argv:
        print("\n".join(f"{name}: {plant[0]}" for name, plant in plants().items()))
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))

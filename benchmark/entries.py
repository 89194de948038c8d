"""The entries of benchmark/tasks/: a command (without --seed), the seeds it is published with, a measure.

For the tools, and for --flags benchmark:ENTRY of every script: imports what every system has, and no torch.
"""
import difflib
import hashlib
import itertools
import shlex
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "models"))                       # as models.command_line it would import torch

from command_line import fail  # noqa: E402

TASKS = ROOT / "benchmark/tasks"
# what an entry's `measure` says: the column of progress.csv, and what to write at the axis
MEASURES = {"return": ("charts/episodic_return", "return, mean of 100 episodes"),
            "success": ("charts/success", "success, mean of 100 episodes"),
            "eval": ("eval/episodic_return", "return of the greedy policy"),
            "eval-success": ("eval/success", "success of the greedy policy")}


def entries(path=TASKS):
    """The entries of a folder's .toml files, or of one file, by name."""
    path, out = Path(path), {}
    for file in [path] if path.is_file() else sorted(path.glob("*.toml")):
        try:
            for name, entry in tomllib.loads(file.read_text()).items():
                out |= cells_of(name, {**entry, "suite": file.stem, "group": name})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            why = f"{type(e).__name__} {' '.join(str(e).split())}"
            fail(f"--tasks {file} cannot be read ({why}): an entry is a table with a command, seeds and "
                 "perhaps a grid, as in benchmark/tasks")
    if not out:
        fail(f"--tasks {path} holds no entries: neither a .toml file nor a folder of some")
    return out


UNLEARNED = "--checkpoint-every", "--eval-every", "--eval-episodes"  # they change nothing that is learned


def argv_of(entry, seed):
    """What a run of the entry is started with."""
    return [*shlex.split(entry["command"]), "--seed", str(seed)]


def command_file(folder):
    """The file beside a run folder that keeps what run.py began it with."""
    return folder.with_name(f"{folder.name}.command")


def of_another_recipe(folder, argv):
    """Whether the run in this folder was begun with another command: its entry has changed since then.

    A folder without a checkpoint holds nothing, and one without a command file is taken as it is.
    """
    file = command_file(folder)
    begun = (folder / "checkpoint.pt").exists() and file.exists()
    return begun and digest(shlex.split(file.read_text())) != digest(argv)


def digest(argv):
    """Eight digits for what a command makes an agent learn: a committed table keeps them."""
    kept = [
        word for before, word in zip(["", *argv], argv) if word not in UNLEARNED and before not in UNLEARNED]
    return hashlib.sha256(shlex.join(kept).encode()).hexdigest()[:8]


def close_to(name, names):
    """Up to three names for somebody who typed another: a grid's cells, or what is spelled alike."""
    cells = [each for each in names if each.startswith(f"{name}__")]
    return (cells or difflib.get_close_matches(name, names, n=3) or list(names))[:3]


def cells_of(name, entry):
    """An entry for each combination of its grid's values, whose names join its own; itself without a grid.

    A value is the text for the {placeholder} of its axis in the command. A value that is a table has texts
    for several placeholders; the one of its axis gets the value's name. Its `seeds`, if it has some, stand in
    place of the entry's.
    """
    grid, out = entry.get("grid", {}), {}
    for cell in itertools.product(*(values.items() for values in grid.values())):
        texts = {}
        for axis, (value_name, value) in zip(grid, cell):
            texts |= {axis: value_name, **value} if isinstance(value, dict) else {axis: value}
        names = [value_name for value_name, _ in cell]
        seeds = texts.pop("seeds", entry.get("seeds", ()))
        if not all(type(seed) is int for seed in seeds):
            raise ValueError(f"{name}: seeds are whole numbers")
        command = fill(entry["command"], texts)
        out["__".join([name, *names])] = {**entry, "command": command, "seeds": seeds, "cell": names}
    return out


def fill(command, texts):
    """Puts texts into the command's {placeholders}, and into those of texts, three deep. Returns one line."""
    for _ in range(3):
        for name, text in texts.items():
            command = command.replace(f"{{{name}}}", text)
    return shlex.join(shlex.split(command))

"""Run entries of tasks.toml over their seeds, some at a time.   python benchmark/run.py --only poc --workers 2

Runs go to <runs-dir>/<entry>__<seed>. Finished ones are skipped, interrupted ones resumed.
"""
import itertools
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    only: str = ""  # entries whose name contains this
    workers: int = 2  # processes at a time, one torch thread each
    runs_dir: str = "runs/benchmark"  # where the run folders go
    dry_run: bool = False  # print the commands, run nothing


def entries():
    """The entries of tasks.toml by name. One with a `grid` becomes one a combination: its values, by their short names, join
    the name and fill the {placeholders} of the command."""
    out = {}
    for name, entry in tomllib.loads((Path(__file__).parent / "tasks.toml").read_text()).items():
        axes = [values.items() for values in entry.get("grid", {}).values()]
        for cell in itertools.product(*axes):
            command, short = entry["command"], [key for key, _ in cell]
            if cell:
                command = command.format(**dict(zip(entry["grid"], (value for _, value in cell))))
            out["__".join([name, *short])] = {**entry, "command": command, "group": name, "cell": short}
    return out


def run(command, folder):
    if (folder / "finished").exists():
        return f"{folder.name}: finished before"
    new = ["--runs-dir", folder.parent, "--run-name", folder.name]
    flags = ["--resume", folder] if (folder / "checkpoint.pt").exists() else new
    done = subprocess.run([sys.executable, *command[1:], *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "done at step" not in done.stdout:                    # what was interrupted is resumed next time
        return f"{folder.name}: FAILED\n{done.stderr[-2000:]}"
    (folder / "finished").touch()
    return f"{folder.name}: finished"


def main():
    args = tyro.cli(Args)
    chosen = {name: entry for name, entry in entries().items() if args.only in name}
    jobs = [(shlex.split(entry["command"]) + ["--seed", str(seed)], Path(args.runs_dir).resolve() / f"{name}__{seed}")
            for seed in sorted({seed for entry in chosen.values() for seed in entry["seeds"]})
            for name, entry in chosen.items() if seed in entry["seeds"]]
    if args.dry_run:
        return print("\n".join(shlex.join(command) for command, _ in jobs))
    with ThreadPoolExecutor(args.workers) as pool:
        for line in pool.map(lambda job: run(*job), jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Put trained agents into benchmark/models, so that `--model` shows one a minute after cloning.

    python benchmark/ship.py poc-gru count-input-sac --runs-dir runs/benchmark --seed 1

Takes the model of <runs-dir>/<entry>__<seed>, leaves out where it was trained, plays --episodes with it and
writes its line of models.csv. tests/test_trained_agents.py plays them again.
"""
import csv
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from envs.vector import make_envs  # noqa: E402
from models.command_line import command_line  # noqa: E402
from models.files import write  # noqa: E402
from models.flags import fail, parse, read_model  # noqa: E402
from models.loading import load  # noqa: E402
from models.play import play  # noqa: E402
from models.run_folder import make_agent  # noqa: E402

# a file must not name any other module to import
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
MODELS = ROOT / "benchmark/models"
HERE = {  # flags that say where it was trained, and by whom
    "runs_dir": "runs", "run_name": None, "render_mode": "auto", "device": "auto", "capture_video": False,
    "track": False, "wandb_entity": None, "flags": None}


@dataclass
class Args:
    entries: Annotated[tuple[str, ...], tyro.conf.Positional]  # of benchmark/tasks/
    seed: int = 1  # whose model
    runs_dir: str = "runs/benchmark"  # where run.py put the runs
    episodes: int = 100  # to measure it with


def script_of(flag, path):
    """The script that trained a model, as a module."""
    try:
        name = read_model(path)["script"] if Path(path).is_file() else None
    except Exception:                                       # damaged files raise all kinds
        name = None
    if name not in SCRIPTS:
        fail(f"{flag} {path} is not a model of this project's scripts: give another, or train it with run.py")
    return importlib.import_module(name)


def measure(path, episodes, seed=10_000, flags=()):
    """What a model gets without exploring: [3, episodes] returns, lengths, successes; and its Args.

    flags: that change the task
    """
    script = script_of("model", path)
    args, saved = parse(script.Args, script.SCRIPT, ["--model", str(path), *flags])
    envs = make_envs(args, min(episodes, 20), training=False)
    agent, _ = make_agent(script.Agent, args, envs, saved)
    return play(agent, envs, episodes, seed), args


def main(argv=None):
    args = command_line(Args, argv)
    if not args.entries:
        fail("no entries are named: give some of benchmark/tasks, such as poc-gru")
    if not 1 <= args.episodes <= 2**20:
        fail(f"--episodes {args.episodes} must be at least 1 and at most {2**20}")
    folder = Path(args.runs_dir)
    found = {name: folder / f"{name}__{args.seed}" / "model.safetensors" for name in args.entries}
    for name, path in found.items():                        # all of them, before anything is written
        if not re.fullmatch(r"[\w.-]+", name):
            fail(f"{name} is not an entry's name: give one of benchmark/tasks")
        load(f"{name}: --runs-dir and --seed:", path, read_model, script_of(name, path).SCRIPT)
    MODELS.mkdir(exist_ok=True)
    table = MODELS / "models.csv"
    rows = {row["entry"]: row for row in csv.DictReader(table.open())} if table.exists() else {}
    for entry, trained in found.items():
        metadata = read_model(trained)
        weights = metadata.pop("agent")
        flags = json.loads(metadata["args"]) | HERE
        path = MODELS / f"{entry}.safetensors"
        metadata["args"] = json.dumps(flags)
        write(path, lambda path: safetensors.torch.save_file(weights, path, metadata))
        (returns, _, successes), _ = measure(path, args.episodes)
        rows[entry] = {
            "entry": entry, "seed": args.seed, "script": metadata["script"], "task": flags["env_id"],
            "memory": flags["memory"], "steps": metadata["global_step"], "episodes": args.episodes,
            "return": f"{returns.mean():.4g}", "std": f"{returns.std():.4g}",
            "success": f"{successes.mean():.4g}"}
        print("  ".join(f"{k} {v}" for k, v in rows[entry].items()), flush=True)
    with table.open("w", newline="") as f:
        writer = csv.DictWriter(f, next(iter(rows.values())))
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


if __name__ == "__main__":
    main()

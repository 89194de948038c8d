"""--flags: a new run begins with the flags of an args.json, a model, a run folder or an entry of benchmark/.

Taken over is what can change what is learned, also the seed. Not taken over is where a run is, what is
watched and what is sent to others: a file does not choose these.
"""
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from models.command_line import command_line, fail
from models.files import read_model

NOT_TAKEN_OVER = {
    "device", "runs_dir", "run_name", "track", "wandb_project_name", "wandb_entity", "capture_video", "flags",
    "resume", "model", "export", "episodes", "render_mode", "show_memory", "forget_at", "probe"}
BENCHMARK = "benchmark:"  # an entry's name follows


def flags_to_begin_with(args, script):
    """What `args.flags` names holds, as a saved model does: {"args": JSON}."""
    what = f"--flags {args.flags}"
    for other in ("resume", "model"):
        if getattr(args, other) is not None:
            fail(f"{what} begins a new run, and --{other} has flags of its own: leave one of them out")
    if args.flags.startswith(BENCHMARK):
        made_by, argv = command_of(args.flags.removeprefix(BENCHMARK))
        refuse_flags_of_another(what, made_by, script)
        found = dataclasses.asdict(command_line(type(args), argv))
    else:
        found = read_flags(what, Path(args.flags))
        refuse_flags_of_another(what, found.pop("script"), script)
    unknown = found.keys() - {field.name for field in dataclasses.fields(args)}
    if unknown:
        name = min(unknown).replace("_", "-")
        fail(f"{what} holds --{name}, which {script}.py does not have: give a copy of args.json without it")
    return {"args": json.dumps({name: found[name] for name in found.keys() - NOT_TAKEN_OVER})}


def refuse_flags_of_another(what, made_by, script):
    if made_by != script:
        fail(f"{what} holds flags of {made_by}: use python {made_by}.py")


def command_of(name):
    """The script and the arguments of an entry."""
    sys.path.append(str(Path(__file__).parent.parent / "benchmark"))
    from entries import close_to, entries

    known = entries()
    if name not in known:
        names = ", ".join(BENCHMARK + each for each in close_to(name, known))
        fail(f"--flags {BENCHMARK}{name} is not an entry of benchmark/tasks: name one, as {names}")
    _, script, *argv = shlex.split(known[name]["command"])
    return Path(script).stem, argv


def read_flags(what, path):
    """What an args.json, a run folder or a model file holds, by name: the script and its flags."""
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if path.suffix == ".safetensors":
            saved = read_model(path)
            return {**json.loads(saved["args"]), "script": saved["script"]}
        if path.exists() and not path.is_file():            # to open a pipe would wait for ever
            raise ValueError("not a file")
        found = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        fail(f"{what}: {path} does not exist; give an args.json, a run folder, a model.safetensors or "
             f"{BENCHMARK} and the name of an entry, as {BENCHMARK}poc-gru")
    except Exception as e:                                  # damaged files raise all kinds
        fail(f"{what} cannot be read ({type(e).__name__}): it is damaged or another program's")
    if "script" not in found:
        fail(f'{what} does not say whose flags it holds: add "script": "ppo_recurrent_tbb" or another to it')
    return found

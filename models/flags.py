"""What a flag may be, said where it is declared:   num_envs: Count = 64

Anything else is refused in one sentence, and so is more than MOST of what would hang or crash a run.
`parse` reads the command line and the model, checkpoint or flags that --model, --resume or --flags name.
"""
import contextlib
import dataclasses
import json
import traceback
import typing
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import torch
from tyro.constructors import PrimitiveConstructorSpec

from models.begin_with import flags_to_begin_with
from models.command_line import command_line, fail
from models.files import read_checkpoint, read_model
from models.loading import load
from models.words import refuse_words_of_others

EXPORTED = ".onnx", ".pt2"  # what --export can write
MOST = {  # no run can mean more
    "num_threads": 1024, "num_layers": 1024, "n_step": 1024, "replay_ratio": 1000, "update_epochs": 10_000,
    **dict.fromkeys(("hidden_size", "mlp_size", "encoder_size", "num_envs", "num_steps"), 2**16),
    **dict.fromkeys(("batch_size", "tape_len", "seq_len"), 2**22)}


def number(kind, low, high):
    """An int or a float from low to high."""
    def complaint(value):
        return None if low <= value <= high else f"must be at least {low} and at most {high}"

    return Annotated[kind, complaint]


Count, Whole = number(int, 1, 2**40), number(int, 0, 2**40)
Positive, Fraction = number(float, 0, 1e9), number(float, 0, 1)
Finite = number(float, -1e9, 1e9)


def schedule_complaint(schedule):
    """(initial, final, power, decay steps) as `polynomial` in the scripts; only the first is needed."""
    rates, shape = schedule[:2], schedule[2:]
    in_range = all(0 <= v < 1e9 for v in rates) and all(0 < v < 1e12 for v in shape)
    if 1 <= len(schedule) <= 4 and in_range:
        return None
    return ("must be one to four numbers, initial, final, power and decay steps: the first two not negative, "
            "the others positive")


Schedule = Annotated[tuple[float, ...], schedule_complaint]


def json_or_text(words):
    try:
        found = json.loads(words[0])
        return "null" if found is None else found           # None would be a flag that was not given
    except json.JSONDecodeError:
        return words[0]                                     # json_complaint will refuse it


def json_complaint(value):
    return None if isinstance(value, dict) else """is not a JSON object; write '{"name": value}'"""


Json = Annotated[dict, json_complaint, PrimitiveConstructorSpec(
    nargs=1, metavar="JSON", instance_from_str=json_or_text,
    is_instance=lambda x: isinstance(x, dict), str_from_instance=lambda x: [json.dumps(x)])]


@contextlib.contextmanager
def refused_in_one_sentence(what):
    """Turns whatever somebody's task or memory raises into one sentence that names the flags."""
    try:
        yield
    except Exception as e:
        message = " ".join(str(e).split())
        on_purpose = isinstance(e, (ValueError, RuntimeError, gym.error.Error))
        if not message or not on_purpose:
            place = traceback.extract_tb(e.__traceback__)[-1]
            message = f"{type(e).__name__} {message} ({Path(place.filename).name}, line {place.lineno})"
        fail(f"{what} does not work: {message}")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with refused_in_one_sentence(f"--device {name}"):
        return torch.zeros(1, device=name).cpu().new_empty(0, device=name).device  # "meta" gives nothing back


def parse(Args, script, argv=None):
    """Returns Args, and the saved model or checkpoint that they start from, {} if there is none.

    Flags given now override those of files. Saved flags that this version does not know are left out.
    """
    refuse_words_of_others(Args, argv)
    args = command_line(Args, argv)
    saved = {}
    if args.flags is not None:
        found = flags_to_begin_with(args, script)
        args = command_line(Args, argv, default=args_of(Args, found, f"--flags {args.flags}"))
    elif args.model is not None:
        saved = load("--model", args.model, read_model, script)
    elif args.resume is not None:
        saved = load("--resume", args.resume, read_checkpoint, script)
    if saved:
        path = f"--model {args.model}" if args.model is not None else f"--resume {args.resume}"
        args = command_line(Args, argv, default=args_of(Args, saved, path))
    refuse_what_is_out_of_range(args)
    refuse_to_look_into_nothing(args)
    if args.export is not None and (args.model is None or Path(args.export).suffix not in EXPORTED):
        fail(f"--export {args.export} must end in {' or '.join(EXPORTED)}, beside the --model to write there")
    return args, saved


def refuse_to_look_into_nothing(args):
    for name in ("show_memory", "forget_at", "probe"):
        if getattr(args, name) and args.model is None:
            fail(f"--{name.replace('_', '-')} looks into a trained agent: name one by --model")
    if args.show_memory and args.render_mode != "rgb_array":
        fail("--show-memory makes a film: add --render-mode rgb_array")
    if args.export is not None and (args.show_memory or args.forget_at or args.probe):
        fail("--export plays nothing: leave out --show-memory, --forget-at and --probe")
    if args.probe and args.show_memory:
        fail("--probe plays many episodes that nobody watches: leave out --show-memory")


def refuse_what_is_out_of_range(args):
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        kinds = [hint, *typing.get_args(hint)]              # `Count | None` holds Count
        rules = [rule for kind in kinds for rule in getattr(kind, "__metadata__", ())]
        for complaint in filter(callable, rules):
            if value is not None and complaint(value):
                shown = value if isinstance(value, str) else json.dumps(value)
                fail(f"--{name.replace('_', '-')} {shown} {complaint(value)}")
        if name in MOST and value > MOST[name]:
            fail(f"--{name.replace('_', '-')} {value} must be at most {MOST[name]}")


def args_of(Args, saved, path):
    """The flags that a model or checkpoint was made with."""
    known = {field.name: field.type for field in dataclasses.fields(Args)}
    flags = {name: value for name, value in json.loads(saved["args"]).items() if name in known}
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(value)
        if known[name] is Json and isinstance(value, str):  # as files of layout 1 have it
            flags[name] = json.loads(value)
    for name, hint in typing.get_type_hints(Args, include_extras=True).items():
        if name in flags and not is_a(flags[name], hint):
            flag = f"--{name.replace('_', '-')} {json.dumps(flags[name])}"
            fail(f"{path} holds {flag} of another type: it is damaged or another program's")
    return Args(**flags)


def is_a(value, hint):
    """Whether a value that a file holds is of a flag's type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return is_a(value, inner[0])
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(is_a(x, inner[0]) for x in value)
    if inner:                                               # a union
        return any(is_a(value, kind) for kind in inner)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint

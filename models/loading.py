"""What --model and --resume name: read and checked; what is damaged or of another program is one sentence."""
import json
from pathlib import Path

import torch

from models.command_line import fail

EMPTY = '""'  # a path of no letters, as somebody typed it
LAYOUT = "2"  # of model and checkpoint files; raised when what they hold changes
HELD = {  # by checkpoints
    **dict.fromkeys(("global_step", "gradient_steps"), int),
    "seconds": (int, float), "stats": (list, tuple),
    **dict.fromkeys(("optimizer", "target", "replay", "envs"), dict), "optimizers": list,
    **dict.fromkeys(("carried", "rng"), tuple)}


def load(flag, path, read, script):
    """What `read` finds at `path`, if it was made by this script."""
    try:
        file = Path(path) / "checkpoint.pt" if flag == "--resume" else Path(path)
        if not path:
            raise FileNotFoundError
        if file.exists() and not file.is_file():            # to open a pipe would wait for ever
            fail(f"{flag} {path} is not a file; give the model.safetensors in a run folder")
        saved = read(path)
        made_by = saved["script"]
        dict(json.loads(saved["args"]))
    except FileNotFoundError:
        fail(f"{flag} {path or EMPTY} does not exist; "
             "training ends by printing what to play and what to resume")
    except Exception as e:                                  # damaged files raise all kinds
        fail(f"{flag} {path} cannot be read ({type(e).__name__}): it is damaged or another program's")
    if made_by != script:
        fail(f"{flag} {path} was trained by {made_by}: use python {made_by}.py")
    if flag == "--resume" and saved.get("layout") != LAYOUT:
        fail(f"{flag} {path} was made by an older version of {script}.py and cannot be "
             "continued by this one: train again, or continue it with that version")
    for key in HELD.keys() & saved.keys() if flag == "--resume" else ():
        if not isinstance(saved[key], HELD[key]):
            fail(f"{flag} {path} holds a {key} of another type: it is damaged or another program's")
    refuse_broken_weights(f"{flag} {path}", saved.get("agent"))
    return Saved(saved, f"{flag} {path}")


class Saved(dict):
    """What a file holds; what it lacks is named."""

    def __init__(self, found, path):
        super().__init__(found)
        self.path = path

    def __missing__(self, key):
        fail(f"{self.path} holds no {key}: it is damaged or another program's")


def refuse_broken_weights(what, weights):
    if not weights or not isinstance(weights, dict):
        fail(f"{what} holds no weights: it is damaged; choose another file")
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or weight.isnan().any():
            fail(f"{what} holds weights that are not numbers ({name}): it is damaged; choose another file")

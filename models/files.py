"""Files that are whole or not there: written beside and renamed, locked, checked, never run.

Whatever fails says so in one sentence.
"""
import contextlib
import os
import zipfile
from pathlib import Path

import safetensors
import torch

from models.command_line import fail

UMASK = os.umask(0o022)
os.umask(UMASK)


def refuse_more_than_memory(nbytes, flag):
    """Refuses what the machine has no memory for."""
    if hasattr(os, "sysconf") and nbytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        fail(f"{flag} needs {nbytes / 2**30:,.1f} GiB of memory, and this machine has less: lower it")


def make_out(folder):
    """The folder that --out names."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:                      # ValueError: a null byte in its name
        fail(f"--out {folder} cannot be made ({getattr(e, 'strerror', e)}): choose another folder")


def lock(folder):
    """Refuses a folder that another process writes to. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:                                     # Windows
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--resume {folder} is being written by another process: stop that one first")
    return descriptor


def rows_until(last_step, text):
    """The lines of a progress.csv up to this step, without blank and torn ones."""
    header, *rows = text.splitlines(keepends=True) or [""]
    whole = [row for row in rows if row.endswith("\n") and row.count(",") == header.count(",") > 0]
    return [header, *(row for row in whole if int(row.split(",")[0]) <= last_step)]


def write(path, save):
    """Writes beside, then renames: whenever the process dies, `path` is the old or the new file, whole."""
    beside = path.with_name(path.name + ".tmp")
    with refused_if_the_disk_does(path):
        try:
            save(beside)
            os.chmod(beside, 0o666 & ~UMASK)                # safetensors: owner only
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def refused_if_the_disk_does(path):
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:       # of torch, of safetensors
        why = " ".join(str(e).split())[:200]
        fail(f"{path} cannot be written ({why}): what was there before is whole")


def read_model(path):
    """Weights and flags of a model file. safetensors holds numbers and text: it cannot run code."""
    if Path(path).exists() and not Path(path).is_file():   # to open a pipe would wait for ever
        raise ValueError("not a file")
    with safetensors.safe_open(path, "pt") as f:
        return {**f.metadata(), "agent": {name: f.get_tensor(name) for name in f.keys()}}


def read_checkpoint(run):
    """What Run.save wrote. The file is a zip archive, with a checksum for each tensor in it."""
    path = Path(run) / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)

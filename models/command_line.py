"""The command line, and what is said of a bad one: one sentence, exit code 2.

Imports no torch: benchmark/run.py, plot.py and pages.py, which start at once, take it too.
"""
import contextlib
import inspect
import io
import re
import sys
from pathlib import Path

import tyro

RUNNING = []  # the run of this process, if one has begun
GROUPS = {  # titles in --help, by how many blocks of flags the source of Args has
    4: ("task", "memory", "algorithm", "run"), 5: ("task", "memory", "experience", "algorithm", "run")}


class Refusal(SystemExit):
    """Exit code 2, and the sentence that was said."""

    def __init__(self, message):
        super().__init__(2)
        self.message = message


def fail(message):
    """Bad input: one sentence, exit code 2. A run in which nothing was learned yet leaves nothing."""
    while RUNNING:
        RUNNING.pop().abandon()
    message = message.replace("\0", "\\0")                  # a null byte cannot be seen
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise Refusal(message)


def command_line(Args, argv=None, **kwargs):
    """tyro's Args. Of what tyro says in a box of many lines when it refuses, the sentence."""
    said = io.StringIO()
    helped = io.TextIOWrapper(io.BytesIO(), sys.stdout.encoding)  # whose letters tyro uses
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(helped):
            return tyro.cli(Args, args=argv, **kwargs)
    except SystemExit as e:
        if e.code != 2:                                     # --help
            helped.seek(0)
            print(in_groups(helped.read(), Args), end="")
            raise
    fail(sentence_of(said.getvalue()))


def in_groups(text, Args):
    """tyro's help with a title above each block of flags: blank lines in the source of Args separate them."""
    blocks = inspect.getsource(Args).split("\n\n")
    for title, block in zip(GROUPS.get(len(blocks), ()), blocks):
        first = re.search(r"^    (\w+):", block, re.M)[1].replace("_", "-")
        for line in re.findall(rf"^. --{first}[ ,].*$", text, re.M):
            rule = f"├─ {title} ".ljust(len(line) - 1, "─") + "┤"
            if line[0] == " ":                              # no such letters here
                rule = rule.translate(str.maketrans("├─┤", " - "))
            text = text.replace(line, f"{rule}\n{line}")
    return text


def sentence_of(box):
    """The first paragraph below the title, and the flag that was meant."""
    title, *lines = [line.strip("│╭╮╰╯ ") for line in box.strip().splitlines()]
    lines = [line if line.strip("─-") else "" for line in lines]                # rules become empty
    parts = "\n".join(lines).strip("\n").split("\n\n")
    said, *more = [" ".join(part.split()) for part in parts]
    hints = [part for part in more if part.startswith("Perhaps you meant:")]
    meant = "".join(f"perhaps you meant {hint.split(':', 1)[1].split()[0]}, " for hint in hints[:1])
    return f"{said.rstrip('.')}: {meant}see --help"

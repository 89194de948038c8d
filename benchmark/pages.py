"""Fill the generated parts of README.md and docs/*.md from committed files.   python benchmark/pages.py

A generated part stands between <!-- NAME --> and <!-- /NAME -->:

    <!-- NAME -->              the table of the grid NAME, from benchmark/results/NAME-table.csv
    <!-- NAME-aggregate -->    its interquartile means, from benchmark/results/NAME-aggregate.csv
    others                     see TABLES and WRITTEN at the end

A marker in front of a code block names the block, for the tests; nothing is generated there. Run this after
plot.py --out benchmark/results, after ship.py, and after a change of a known-bug note.
"""
import csv
import importlib
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from entries import ROOT, entries
from run import command_line, fail

sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmark/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPENING = re.compile(r"^<!-- ([^/\s]\S*) -->\n(?!```)", re.MULTILINE)
NOTE = re.compile(r"^ *# (KNOWN BUG|PITFALL|DEVIATION)\b((?:.*\n)(?: *#  .*\n)*)", re.MULTILINE)
LEVEL = re.compile(r"(Easy|Medium|Hard)(?=-v\d)")           # of a task of POPGym
FAMILIES = {
    "ppo_recurrent_tbb": "PPO", "pqn_recurrent_tbb": "PQN", "dqn_recurrent_tbb": "DQN", "sac_gru": "SAC"}
NOT_AXES = "seed", "last", "steps", "seconds"  # columns of a grid's table

# what works, for somebody who decides within a minute: (entry, its task, its level if it is of a grid)
WORKS = (
    ("poc-gru", "PocMemory", None),
    ("cartpole", "CartPole without velocities", None),
    ("minigrid-rgb", "MinigridMemory as pictures", None),
    ("mortar-mayhem-grid", "Mortar Mayhem, 10 commands", None),
    ("mystery-path-grid", "Mystery Path", None),
    ("repeat-previous-medium-pqn", "RepeatPrevious, 31 steps back", None),
    ("visual-match-60-dqn", "Visual Match, 60 steps", None),
    ("key-to-door-250", "Key-to-Door, 250 steps", None),
    ("tmaze-length__250__dqn__mingru", "T-Maze, 250 steps", 1.0),
    ("tmaze-length__1500__dqn__mingru", "T-Maze, 1,500 steps", 1.0),
    ("count-input-gru-sac", "CountInput, the last 10 bits", None),
    ("pendulum-masked-sac", "Pendulum without velocity", None),
)
# entry, task, and what the predecessor's own files or figures say of it (docs/results.md names them)
BESIDE = (
    ("poc-gru", "PocMemory", "success .95: 10 of 10, 12,000 to 20,000 steps, 13 s"),
    ("cartpole", "CartPole without velocities", "195: 9 of 10, 201,000 to 393,000 steps, 57 s"),
    ("minigrid-rgb", "MiniGrid Memory S9 by sight",
     "return .9: 10 of 10, 328,000 to 1,180,000 steps of 99 fixed levels, 1,000 s of a GPU for 2,050,000"),
    ("mortar-mayhem-grid", "Mortar Mayhem (grid), 10 commands",
     "success 1.0: GRU at 65M steps, .55 at 33M; TransformerXL at 41M (read off figures)"),
    ("mystery-path-grid", "Mystery Path (grid), origin and goal hidden",
     "success 1.0: GRU at 98M steps, TransformerXL at 41M (read off figures)"),
    ("count-input-gru-sac", "CountInput, SAC", "99.5 %: 126 s, in C++, a GRU"),
    ("count-input-gru-td3", "CountInput, TD3", "99.9 %: 84 s, in C++, a GRU"),
)
# task, its entries for PQN, PPO and DQN, and the level of those that have none of their own
SIDE_BY_SIDE = (
    ("RepeatPreviousEasy", "repeat-previous-pqn", "default", "smoke-dqn-tbb", None),
    ("RepeatPreviousMedium", "repeat-previous-medium-pqn", "repeat-previous-medium", None, None),
    ("RepeatPreviousHard", "repeat-previous-hard-pqn", "repeat-previous-hard", None, None),
    ("CountRecallEasy", "count-recall-pqn", "count-recall", None, None),
    ("MinigridMemory by sight", "minigrid-rgb-pqn", "minigrid-rgb", None, None),
    ("T-Maze 50", "tmaze-50-pqn", None, "tmaze-length__50__dqn__mingru", 1.0),
)
MEASURED = {
    "return": "return", "success": "success", "eval": "greedy return", "eval-success": "greedy success"}


@dataclass
class Args:
    """Nothing to choose."""


def rows_of(path):
    with path.open() as f:
        return list(csv.DictReader(f))


def different(rows, column):
    """The values of a column, each once, in the order in which they appear."""
    return list(dict.fromkeys(row[column] for row in rows))


def markdown(header, rows):
    """A table.   header: names; rows: lists of as many cells"""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    rule = "|" + "---|" * len(header)
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def from_to(numbers, form):
    """The range of some numbers in words: "1,000 to 2,000"."""
    low, high = f"{min(numbers):{form}}", f"{max(numbers):{form}}"
    return low if low == high else f"{low} to {high}"


def entries_table(rows):
    """table.csv: a line an entry."""
    header = "entry", "solved at", "seeds that reach it", "environment steps to it", "at the end"
    cells = []
    for name in different(rows, "entry"):
        runs = [row for row in rows if row["entry"] == name]
        steps = [int(row["steps_to_level"]) for row in runs if row["steps_to_level"]]
        last = from_to([float(row["last"]) for row in runs], ".4g")
        lengths = " or ".join(f"{n:,}" for n in sorted({int(row["steps"]) for row in runs}))
        cells.append([
            f"`{name}`", f"{runs[0]['measure']} >= {runs[0]['level']}",
            f"{len(steps)} of {len(runs)}", from_to(steps, ",") if steps else "-",
            f"{last} after {lengths} steps"])
    return markdown(header, cells)


def models_table(rows):
    """models.csv: the trained agents, each with the command that plays it."""
    header = "agent", "task", "memory", "trained for", "return", "success"
    cells = []
    for row in rows:
        command = f"`python {row['script']}.py --model benchmark/models/{row['entry']}.safetensors`"
        success = "-" if row["success"] == "nan" else row["success"]
        cells.append([
            command, row["task"], row["memory"], f"{int(row['steps']):,} steps",
            f"{row['return']} ± {row['std']}", success])
    return markdown(header, cells)


def grid_table(rows):
    """A grid: a column each value of the last axis; the mean of the seeds ± half their range."""
    *axes, last = [name for name in rows[0] if name not in NOT_AXES]
    columns, scores = different(rows, last), {}
    for row in rows:
        line = scores.setdefault(tuple(row[axis] for axis in axes), {})
        line.setdefault(row[last], []).append(float(row["last"]))
    cells = []
    for names, line in scores.items():
        most = max(map(len, line.values()))                 # seeds; a cell with fewer says how many
        cells.append([*names, *(mean_cell(line.get(column), most) for column in columns)])
    return markdown([*axes, *columns], cells)


def mean_cell(scores, usual, digits=2):
    """usual: how many scores need not be said"""
    if not scores:
        return "-"
    half_range = f" ± {(max(scores) - min(scores)) / 2:.{digits}f}" if len(scores) > 1 else ""
    count = f" (n = {len(scores)})" if len(scores) != usual else ""
    return f"{statistics.mean(scores):.{digits}f}{half_range}{count}"


def aggregate_table(rows):
    """Interquartile means with their intervals: a column each value of the last axis."""
    first, last = list(rows[0])[:2]
    columns, cells = different(rows, last), []
    for name in different(rows, first):
        line = {row[last]: row for row in rows if row[first] == name}
        cells.append([name, *(interval_cell(line.get(column)) for column in columns)])
    return markdown([first, *columns], cells)


def interval_cell(row):
    if row is None:
        return "-"
    interval = f" [{float(row['low']):.2f}, {float(row['high']):.2f}]" if row["low"] else ""
    return f"{float(row['iqm']):.2f}{interval}"


def memory_of(row):
    return row["memory"] + (" x 2" if row["layers"] == "2" else "")


def shares_of(row):
    """What policy, env, batch and update took."""
    phases = "policy", "env", "batch", "update"
    return ", ".join(f"{float(row[f'share_{phase}']):.0%}" for phase in phases)


def speed_table(rows):
    """speed.csv: our PPO against RecurrentPPO."""
    header = ("task", "script, memory", "threads", "ours, steps/s", "RecurrentPPO, steps/s", "ratio",
              "policy, env, batch, update")
    cells = []
    for row in rows:
        task = row["task"] + (" (two LSTMs)" if row["separate_lstm"] == "True" else "")
        cells.append([
            task, f"{row['script']}, {memory_of(row)}", row["threads"], f"{int(row['ours']):,}",
            f"{int(row['sb3']):,}", row["ratio"], shares_of(row)])
    return markdown(header, cells)


def pqn_speed_table(rows):
    """pqn-speed.csv: PQN against our PPO."""
    header = ("memory", "PQN, steps/s", "PPO, steps/s", "ratio", "acting, us a step: PQN, PPO",
              "updates, us a step: PQN, PPO", "policy, env, batch, update of PQN")
    cells = [[memory_of(row), f"{int(row['pqn']):,}", f"{int(row['ppo']):,}", row["ratio"],
              *(f"{row[f'pqn_{part}_us']}, {row[f'ppo_{part}_us']}" for part in ("policy", "update")),
              shares_of(row)] for row in rows]
    return markdown(header, cells)


def dqn_speed_table(rows):
    """dqn-speed.csv: the DQN pair."""
    header = ("task", "script, memory", "steps/s", "an update, ms", "acting, us a step",
              "policy, env, batch, update")
    cells = []
    for row in rows:
        task = "RepeatPrevious" if row["length"] == "0" else f"T-Maze {row['length']}"
        cells.append([
            task, f"{row['script']}, {memory_of(row)}", f"{int(row['steps_per_second']):,}",
            row["update_ms"], row["policy_us"], shares_of(row)])
    return markdown(header, cells)


def off_policy_speed_table(rows):
    """off-policy-speed.csv: SAC, TD3 and DQN against stable-baselines3's, where there is one."""
    header = ("script, memory", "ours, steps/s", "SB3 without memory, steps/s", "ratio",
              "a gradient step: ours, ms", "SB3, ms", "policy, env, batch, update")
    cells = []
    for row in rows:
        sb3, ratio, sb3_ms = "-", "-", "-"
        if row["algorithm"]:
            sb3, ratio, sb3_ms = f"{row['algorithm']}, {int(row['sb3']):,}", row["ratio"], row["sb3_ms"]
        cells.append([
            f"{row['script']}, {row['memory']}", f"{int(row['ours']):,}", sb3, ratio, row["ours_ms"],
            sb3_ms, shares_of(row)])
    return markdown(header, cells)


def devices_table(rows):
    """devices.csv: a column each device, and how many times faster the last is than the first."""
    names = {row["device"]: row["name"] for row in rows}
    cells = []
    for run in dict.fromkeys(run_of(row) for row in rows):
        speeds = {row["device"]: int(row["steps_per_second"]) for row in rows if run_of(row) == run}
        script, memory, num_envs, hidden_size = run
        ratio = f"{list(speeds.values())[-1] / list(speeds.values())[0]:.1f}" if len(speeds) > 1 else "-"
        cells.append([
            f"{script}, {memory}", f"{int(num_envs):,}", hidden_size,
            *(f"{speeds[device]:,}" if device in speeds else "-" for device in names), ratio])
    columns = [f"{device} ({name}), steps/s" for device, name in names.items()]
    return markdown(["script, memory", "environments", "width", *columns, "ratio"], cells)


def run_of(row):
    return tuple(row[column] for column in ("script", "memory", "num_envs", "hidden_size"))


def layers_table(rows):
    """layers.csv: a column each shape, milliseconds."""
    shapes = list(dict.fromkeys(f"[{row['T']}, {row['B']}, {row['H']}], ms" for row in rows))
    cells = []
    for layer in different(rows, "layer"):
        cells.append([f"`{layer}`", *(row["ms"] for row in rows if row["layer"] == layer)])
    return markdown(["layer", *shapes], cells)


def export_speed_table(rows):
    """export-speed.csv: a line a memory."""
    header = "`--memory`", "a step with onnxruntime, us", "with torch, us"
    return markdown(header, [[f"`{row['memory']}`", row["onnxruntime_us"], row["agent_us"]] for row in rows])


def sizes_table(rows):
    """What horizon.py --sweep writes of several models."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def every_task_table(rows):
    """every-task.csv: a line for the levels of a task, or for a package's tasks that have equal spaces."""
    header = "package", "tasks", "observation", "actions", "trained by", "plain steps/s"
    lines, cells = {}, []
    for row in rows:
        spaces = row["observation"], row["actions"]
        same = LEVEL.sub("", row["id"]) if LEVEL.search(row["id"]) else spaces
        if all(spaces):                                     # it was tried
            lines.setdefault((row["package"], same, row["scripts"]), []).append(row)
    for (package, _, scripts), tasks in lines.items():
        speeds = [float(f"{float(row['steps_per_second']):.2g}") for row in tasks]
        few = len(speeds) <= 3
        cells.append([
            package, tasks_cell([row["id"] for row in tasks]),
            *("; ".join(different(tasks, column)) for column in ("observation", "actions")),
            ", ".join(FAMILIES[script] for script in scripts.split()) or "-",
            " / ".join(f"{speed:,.0f}" for speed in speeds) if few else from_to(speeds, ",.0f")])
    return f"{markdown(header, cells)}\n{every_task_summary(rows)}"


def tasks_cell(ids):
    """Their names; the second and third level of a task of POPGym by its level alone."""
    first, *others = ids
    levels = ", ".join(LEVEL.search(other)[1] for other in others if LEVEL.search(other))
    return f"`{first}` ({levels})" if levels else ", ".join(f"`{name}`" for name in ids)


def every_task_summary(rows):
    """How many of them ran and with which versions, and what the others said."""
    trained = ", ".join(
        f"{sum(script in row['scripts'].split() for row in rows)} by {family}"
        for script, family in FAMILIES.items())
    ran = sum(row["result"] == "runs" for row in rows)
    versions = ", ".join(different([row for row in rows if row["version"]], "version"))
    lines = [f"{ran} of {len(rows)} ids ran ({trained}), with {versions}."]
    absent = [row for row in rows if row["result"] == "package absent"]
    if absent:
        lines.append(f"Not installed, so not tried: {'; '.join(different(absent, 'package'))}.")
    refused = [row for row in rows if row["result"] not in ("runs", "package absent")]
    lines += [f"* `{row['id']}`: {escaped(row['result'])}" for row in refused]
    return "\n\n".join(lines) + "\n"


def popgym_table(rows):
    """popgym-full.csv: the best recipe of every task, beside what is published."""
    header = ("task", "script, memory", "steps", "seconds a run", "at the end, greedy", "exploring",
              "greatest mean", "published GRU", "best of 13", "with the rules")
    published = {row["task"]: row for row in rows_of(RESULTS / "popgym-published.csv")}
    limits = {row["task"]: f"{float(row['return']):.3f}" for row in rows_of(RESULTS / "popgym-limits.csv")}
    best, cells = {}, []                                    # {task: its runs}
    for row in rows:
        if row["recipe"] == "best":
            best.setdefault(row["task"], []).append(row)
    usual = statistics.mode(map(len, best.values()))
    for task, runs in best.items():
        scores = (
            mean_cell([float(row[name]) for row in runs], usual, digits=3)
            for name in ("final", "exploring", "mmer"))
        script = runs[0]["script"].split("_")[0].upper()
        theirs = published.get(task, {"gru": "-", "best": "-", "model": ""})
        cells.append([
            task, f"{script}, {runs[0]['memory']}", f"{int(runs[0]['steps']):,}",
            from_to([int(row["seconds"]) for row in runs], ","), *scores,
            theirs["gru"], f"{theirs['best']} {theirs['model']}".strip(), limits.get(task, "-")])
    return markdown(header, cells)


def popgym_memories_table(rows):
    """popgym-full.csv: a column each memory, after its million steps."""
    rows = [row for row in rows if row["recipe"] == "1M"]
    memories = sorted(different(rows, "memory"))
    return markdown(["task", *memories], popgym_cells(rows, "memory", memories))


def popgym_scripts_table(rows):
    """popgym-full.csv: the column lru beside other scripts' million steps, of the tasks that have some."""
    others = {row["task"] for row in rows if row["recipe"] not in ("best", "1M")}
    rows = [
        row for row in rows if row["task"] in others and row["memory"] == "lru" and row["recipe"] != "best"]
    header = "task", "PPO or PQN, by tape", "PPO, by segments", "DQN, by tape"
    return markdown(header, popgym_cells(rows, "recipe", ["1M", "ppo-sbb", "dqn-tbb"]))


def popgym_cells(rows, column, values):
    """A line a task: the final returns of the rows that have each of these values in the column."""
    cells = []
    for task in different(rows, "task"):
        scores = {}
        for row in rows:
            if row["task"] == task:
                scores.setdefault(row[column], []).append(float(row["final"]))
        most = max(map(len, scores.values()))
        cells.append([task, *(mean_cell(scores.get(value), most) for value in values)])
    return cells


def popgym_hours():
    """What the table of all of POPGym took."""
    rows = rows_of(RESULTS / "popgym-full.csv")
    hours = sum(int(row["seconds"]) for row in rows) / 3600
    steps = sum(int(row["steps"]) for row in rows)
    return f"{len(rows)} runs, {steps / 1e6:,.0f} million environment steps, {hours:.1f} hours of a core.\n"


def popgym_reached(rows):
    """popgym-full.csv: how many of the published figures the best recipes reach, and which not."""
    finals, below = {}, []                                  # {task: scores}
    for row in rows:
        if row["recipe"] == "best":
            finals.setdefault(row["task"], []).append(float(row["final"]))
    published = [row for row in rows_of(RESULTS / "popgym-published.csv") if row["task"] in finals]
    for row in published:
        if statistics.mean(finals[row["task"]]) < float(row["best"]) - 0.0005:      # theirs are rounded
            below.append(row["task"])
    reached = f"{len(published) - len(below)} of {len(published)}"
    return f"Ours reaches {reached} published figures. Below: {', '.join(below) or 'none'}.\n"


def works():
    """What works: the lines of WORKS."""
    header = "task", "script, memory", "solved at", "seeds that reach it", "environment steps to it"
    known, cells = entries(), []
    for name, task, level in WORKS:
        entry = known[name]
        level = entry.get("level", level)
        steps = [reached and reached[0] for reached in first_reached(name, entry, level)]
        solved = [n for n in steps if n is not None]
        script, memory = script_and_memory(entry["command"])
        cells.append([
            task, f"`{script}`, {memory}", f"{MEASURED[entry['measure']]} {level:g}",
            f"{len(solved)} of {len(steps)}", from_to(solved, ",") if solved else "-"])
    return markdown(header, cells)


def beside():
    """The lines of BESIDE: a predecessor's figures and ours."""
    header = "task", "the predecessor", "ours", "seeds that reach it", "environment steps", "seconds"
    cells, table = [], rows_of(RESULTS / "table.csv")
    for name, task, theirs in BESIDE:
        runs = [row for row in table if row["entry"] == name]
        solved = [row for row in runs if row["steps_to_level"]]
        memory = script_and_memory(entries()[name]["command"])[1]
        cells.append([
            task, theirs, f"{MEASURED[runs[0]['measure']]} {runs[0]['level']}, {memory}",
            f"{len(solved)} of {len(runs)}", from_to([int(row["steps_to_level"]) for row in solved], ","),
            from_to([float(row["seconds_to_level"]) for row in solved], ",.0f")])
    return markdown(header, cells)


def side_by_side():
    """The lines of SIDE_BY_SIDE: environment steps and seconds to the level, and how many seeds reach it."""
    known, cells = entries(), []
    for task, *names, level in SIDE_BY_SIDE:
        levels = [known[name].get("level", level) for name in names if name]
        cells.append([f"{task}, {levels[0]:g}", *(reached_cell(name, known, level) for name in names)])
    return markdown(["task, solved at", "PQN", "PPO", "DQN"], cells)


def reached_cell(name, known, level):
    if name is None:
        return "-"
    runs = first_reached(name, known[name], known[name].get("level", level))
    solved = [run for run in runs if run]
    of_seeds = f"{len(solved)} of {len(runs)}"
    if not solved:
        return of_seeds
    steps, seconds = zip(*solved)
    return f"{from_to(steps, ',')} steps, {from_to(seconds, ',.0f')} s ({of_seeds})"


def first_reached(name, entry, level):
    """For every seed the steps and seconds at which it reached the level first; None if it did not."""
    if not entry["cell"]:
        ends = [(row["steps_to_level"], row["seconds_to_level"])
                for row in rows_of(RESULTS / "table.csv") if row["entry"] == name]
        return [(int(steps), float(seconds)) if steps else None for steps, seconds in ends]
    cell, reached = dict(zip(entry["grid"], entry["cell"])), {}
    for row in rows_of(RESULTS / f"{entry['group']}.csv"):
        if cell.items() <= row.items():
            reached.setdefault(row["seed"], None)
            if reached[row["seed"]] is None and float(row["value"]) >= level:
                reached[row["seed"]] = int(row["global_step"]), float(row["seconds"])
    return list(reached.values())


def script_and_memory(command):
    _, script, *argv = shlex.split(command)
    module = importlib.import_module(Path(script).stem)
    return script, command_line(module.Args, argv).memory


class Note(NamedTuple):
    kind: str
    what: str  # its first clause, and where it was found
    symptom: str
    file: str
    tests: list


def notes():
    """The notes in scripts, models/ and envs/."""
    for folder in (".", "models", "envs"):
        for path in sorted((ROOT / folder).glob("*.py")):
            file = str(path.relative_to(ROOT))
            for kind, text in NOTE.findall(path.read_text()):
                text = re.sub(r"\n *# *", " ", text).strip()         # one line
                form = re.fullmatch(r"(\(.*?\))?: (.*)", text)
                if not form:
                    fail(f"{file}: this note has another form than `# KNOWN BUG (where): what. ...`: {text}")
                where, text = form.groups()
                what = re.split(r"; |(?<!\.)\. ", text)[0]  # "..." does not end a clause
                symptom = re.search(r"Symptom: (.*?)\.? (?:Here|Test):", text)
                yield Note(
                    kind, f"{what} {where}" if where else what, symptom[1] if symptom else "-", file,
                    re.findall(r"test_\w+\.py::test_\w+", text))


def known_bugs():
    """The index of all notes: a table a kind. A note that stands in several files is one line."""
    found, out = list(notes()), []
    for kind in ("KNOWN BUG", "PITFALL", "DEVIATION"):
        cells = []
        for what in dict.fromkeys(note.what for note in found if note.kind == kind):
            same = [note for note in found if (note.kind, note.what) == (kind, what)]
            files = dict.fromkeys(f"`{note.file}`" for note in same)
            tests = dict.fromkeys(f"`{test}`" for note in same for test in note.tests)
            symptom = escaped(same[0].symptom)
            cells.append([escaped(what), symptom, ", ".join(files), ", ".join(tests)])
        table = markdown(["what", "symptom", "where", "test"], cells)
        out.append(f"## {kind.capitalize()}s\n\n{table}")
    return "\n".join(out)


def words():
    """What flags of other programs are here."""
    from models.words import OURS  # brings torch

    cells = []
    for theirs, ours in OURS.items():
        names = [f"`-{name}`" if len(name) == 1 else f"`--{name}`" for name in theirs.split()]
        ours = re.sub(r"--[a-z-]+[a-z](?: [\d.e-]+)*", r"`\g<0>`", "; or ".join(ours))
        cells.append([", ".join(names), ours])
    return markdown(["theirs", "here"], cells)


def escaped(text):
    return text.replace("|", r"\|")


TABLES = {                                                  # {name: (file, function of its rows)}
    "results": (RESULTS / "table.csv", entries_table),
    "models": (ROOT / "benchmark/models/models.csv", models_table),
    "speed": (RESULTS / "speed.csv", speed_table),
    "pqn-speed": (RESULTS / "pqn-speed.csv", pqn_speed_table),
    "dqn-speed": (RESULTS / "dqn-speed.csv", dqn_speed_table),
    "devices": (RESULTS / "devices.csv", devices_table),
    "off-policy-speed": (RESULTS / "off-policy-speed.csv", off_policy_speed_table),
    "layers": (RESULTS / "layers.csv", layers_table),
    "export-speed": (RESULTS / "export-speed.csv", export_speed_table),
    "minigrid-sizes": (RESULTS / "minigrid-sizes.csv", sizes_table),
    "tmaze-extrapolation": (RESULTS / "tmaze-extrapolation.csv", sizes_table),
    "minigrid-s17-random": (RESULTS / "minigrid-s17-random.csv", sizes_table),
    "every-task": (RESULTS / "every-task.csv", every_task_table),
    "popgym-full": (RESULTS / "popgym-full.csv", popgym_table),
    "popgym-reached": (RESULTS / "popgym-full.csv", popgym_reached),
    "popgym-full-memories": (RESULTS / "popgym-full.csv", popgym_memories_table),
    "popgym-full-scripts": (RESULTS / "popgym-full.csv", popgym_scripts_table),
}
WRITTEN = {  # made of more than one file, or of code
    "works": works, "beside": beside, "side-by-side": side_by_side, "known-bugs": known_bugs, "words": words,
    "popgym-hours": popgym_hours}


def part(name):
    """The text between <!-- name --> and <!-- /name -->."""
    if name in WRITTEN:
        return WRITTEN[name]()
    if name in TABLES:
        path, table = TABLES[name]
    elif name.endswith("-aggregate"):
        path, table = RESULTS / f"{name}.csv", aggregate_table
    else:
        path, table = RESULTS / f"{name}-table.csv", grid_table
    if not path.exists():
        fail(f"<!-- {name} --> names nothing that can be generated: there is no {path.relative_to(ROOT)}")
    return table(rows_of(path))


def filled(text):
    """The text with its generated parts made again."""
    pieces = []
    while opening := OPENING.search(text):
        name, closing = opening[1], f"<!-- /{opening[1]} -->\n"
        before, after = text[: opening.end()], text[opening.end() :]
        if closing not in after:
            fail(f"<!-- {name} --> has no <!-- /{name} --> after it, and no code block")
        pieces += [before, part(name), closing]
        text = after.split(closing, 1)[1]
    return "".join([*pieces, text])


def main(argv=None):
    command_line(Args, argv)
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

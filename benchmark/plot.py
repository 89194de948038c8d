"""From run folders to compact CSV files, and from those to figures.   python benchmark/plot.py

    python benchmark/plot.py                            what run.py made in runs/benchmark, into runs/figures
    python benchmark/plot.py --runs-dir DIR --out DIR   anybody's: with progress.csv, or TensorBoard events
    python benchmark/plot.py --out benchmark/results    the published ones; then benchmark/pages.py

Writes, for every entry of benchmark/tasks/ and for every other group of runs,
    <group>.csv                    its curves: the grid's axes, seed, global_step, seconds, value;
                                   about 100 rows a seed, 25 in a grid
    table.csv, <grid>-table.csv    a line a seed: when the level was first reached, the best, the last

Everything else is made from the CSV files in --out, also those that were there before. So no figure and no
table can say anything else:
    <group>.png and .svg      mean and range over the seeds, against environment steps and against seconds
    <grid>-seconds            the same for a grid, against seconds
    <grid>-final              the end against the length of the task
    <grid>-aggregate          interquartile means over tasks and seeds, also as .csv
"""
import csv
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from entries import MEASURES, TASKS, entries
from matplotlib.ticker import EngFormatter, MaxNLocator
from run import command_line, fail

plt.switch_backend("Agg")
matplotlib.rcParams |= {
    "svg.hashsalt": "", "legend.frameon": False, "legend.fontsize": 7, "axes.titlesize": 9}


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"  # run folders named <entry>__<seed>, or as they may be named
    out: str = "runs/figures"  # where CSV files and figures go
    tasks: str = str(TASKS)  # the entries
    unfinished: bool = False  # also entries' runs that were stopped, or still run


def runs_in(folder, known, unfinished):
    """The run folders in `folder`: {group: {(cell, seed): path}}. Runs of no entry are grouped by name."""
    groups = {}
    for path in sorted(Path(folder).glob("*/")):
        name, _, seed = path.name.rpartition("__")
        if name in known:
            group, cell = known[name]["group"], tuple(known[name]["cell"])
            if unfinished or (path / "finished").exists():
                groups.setdefault(group, {})[cell, seed] = path
        elif any(path.glob("progress.csv")) or any(path.glob("events.out.tfevents*")):
            # <env-id>__<script>__<seed>__<time>
            name, numbers = re.fullmatch(r"(.+?)((?:__\d+)*)", path.name).groups()
            group = f"{name} (not an entry)" if name in known else name
            groups.setdefault(group, {})[(), numbers.strip("_") or "1"] = path
    return groups


def read(run):
    """The rows of progress.csv, or of TensorBoard's events: dicts by tag, with global_step and seconds."""
    if (run / "progress.csv").exists():
        return read_csv(run / "progress.csv")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, rows = EventAccumulator(str(run), {"scalars": 0}).Reload(), {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            row = rows.setdefault(event.step, {"global_step": event.step, "time": event.wall_time})
            row[tag] = str(event.value)
    begin = min((row["time"] for row in rows.values()), default=0.0)
    return [row | {"seconds": row["time"] - begin} for _, row in sorted(rows.items())]


@dataclass
class Curve:
    """What a run measured, where it did."""
    measure: str
    steps: np.ndarray  # [K]
    seconds: np.ndarray  # [K]
    values: np.ndarray  # [K]
    differences: list  # [K] between acting and training, nan where it is not measured

    @classmethod
    def of(cls, run, measure):
        """None if the run has no value of the measure (by default, of any measure) yet."""
        rows = read(run)
        has = [name for name, (tag, _) in MEASURES.items() if any(row.get(tag) for row in rows)]
        measure = measure or next(iter(has), None)
        if measure not in has:
            return None
        tag = MEASURES[measure][0]
        rows = [row for row in rows if row.get(tag)]
        columns = (np.array([float(row[name]) for row in rows]) for name in ("global_step", "seconds", tag))
        differences = [
            float(row.get("debug/first_logratio") or row.get("debug/first_q_difference") or "nan")
            for row in rows]
        return cls(measure, *columns, differences)

    def points(self, count):
        """About so many rows of the curve file, the last one among them."""
        every = math.ceil(len(self.values) / count)
        kept = sorted({*range(0, len(self.values), every), len(self.values) - 1})
        return [{"global_step": int(self.steps[i]), "seconds": f"{self.seconds[i]:.1f}",
                 "value": f"{self.values[i]:.4g}"} for i in kept]

    def end(self):
        """The columns of a table that say how the run ended."""
        return {"last": f"{self.values[-1]:.4g}", "steps": int(self.steps[-1]),
                "seconds": round(self.seconds[-1])}

    def against_level(self, level):
        """The columns of table.csv.   level: None if the entry has none"""
        reached = np.flatnonzero(self.values >= level) if level is not None else []
        steps = seconds = ""
        if len(reached):
            steps, seconds = int(self.steps[reached[0]]), round(self.seconds[reached[0]], 1)
        return {"measure": self.measure, "level": "" if level is None else level,
                "steps_to_level": steps, "seconds_to_level": seconds, "best": f"{max(self.values):.4g}",
                **self.end(), "max_first_difference": f"{max(self.differences):.1e}"}


def collect(group, runs, entry, out):
    """Puts the runs into <group>.csv and into the table, in place of those of the same cell and seed."""
    axes = list(entry.get("grid", {}))
    curve_file = out / f"{group}.csv"
    table_file = out / (f"{group}-table.csv" if axes else "table.csv")

    def key_of(row):                                        # cell and seed, or entry and seed
        return tuple(row[name] for name in [*(axes or ["entry"]), "seed"])

    table = {key_of(row): row for row in read_csv(table_file)}
    curves = {}
    for row in read_csv(curve_file):
        curves.setdefault(key_of({"entry": group} | row), []).append(row)
    for (cell, seed), path in runs.items():
        try:
            curve = Curve.of(path, entry.get("measure"))
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
            fail(f"{path} cannot be read ({type(e).__name__}): its progress.csv is damaged or another "
                 "program's; take it out of --runs-dir")
        if curve is None:
            what = entry.get("measure", "return and no success")
            print(f"plot.py: {path} has no {what} yet: left out", file=sys.stderr)
            continue
        run = dict(zip(axes, cell)) | {"seed": seed}
        key = key_of({"entry": group} | run)
        curves[key] = [run | point for point in curve.points(25 if axes else 100)]
        if axes:
            table[key] = run | curve.end()
        else:
            table[key] = {"entry": group, "seed": seed} | curve.against_level(entry.get("level"))

    # cells as in the task file, what is not there last; entries where they are in the table, new ones last
    orders = [list(entry["grid"][axis]) for axis in axes] or [list(dict.fromkeys(name for name, _ in table))]

    def place(key):
        *names, seed = key
        numbers = [x.index(name) if name in x else len(x) for x, name in zip(orders, names)]
        return numbers, len(seed), seed

    if curves:
        write_csv(curve_file, [row for key in sorted(curves, key=place) for row in curves[key]])
        write_csv(table_file, [table[key] for key in sorted(table, key=place)])


def read_csv(path):
    if not path.exists():
        return []
    with path.open() as f:
        return list(csv.DictReader(f))


def write_csv(path, rows):
    """Beside, then renamed: whenever this is interrupted, the file is the old or the new one, whole."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def iqm(scores):
    """Interquartile mean: of the middle half.   scores [..., K] -> [...]"""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def aggregate(rows, draws=10_000):
    """Rows of a grid's table -> interquartile means over tasks and seeds, with a 95 % interval: a row an arm.

    Stratified bootstrap: seeds are drawn again within each task (Agarwal et al. 2021,
    https://arxiv.org/abs/2108.13264). Scores are taken as they are. A task with fewer seeds weighs as much as
    the others. Arms that lack a task are left out. Where a task has one seed there is no interval.
    """
    first, *others = [name for name in rows[0] if name not in ("seed", "last", "steps", "seconds")]
    tasks, out, rng = {row[first] for row in rows}, [], np.random.default_rng(0)
    arms = {}                                               # {arm: {task: scores}}
    for row in rows:
        scores = arms.setdefault(tuple(row[axis] for axis in others), {})
        scores.setdefault(row[first], []).append(float(row["last"]))
    for arm, scores in arms.items():
        if scores.keys() != tasks:
            continue
        seeds = math.lcm(*map(len, scores.values()))        # repeat scores: every task has equally many
        again = [np.repeat(rng.choice(x, (draws, len(x))), seeds // len(x), axis=1) for x in scores.values()]
        bounds = np.quantile(iqm(np.concatenate(again, axis=1)), (0.025, 0.975))        # of [draws, runs]
        all_again = min(map(len, scores.values())) > 1
        low, high = (f"{bound:.3f}" if all_again else "" for bound in bounds)
        runs = np.concatenate([np.repeat(x, seeds // len(x)) for x in scores.values()])
        out.append(dict(zip(others, arm)) | {
            "iqm": f"{iqm(runs):.3f}", "low": low, "high": high, "tasks": len(tasks),
            "runs": sum(map(len, scores.values()))})
    return out


def save(figure, path):
    figure.savefig(f"{path}.png", dpi=120)
    figure.savefig(f"{path}.svg", dpi=120, metadata={"Date": None})
    plt.close(figure)


def draw_curves(axis, rows, x, **style):
    """The mean over the seeds and their range, each at the x that all have reached. Returns the mean's line.

    rows: of one cell, from a curve file
    """
    runs = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append((float(row[x]), float(row["value"])))
    runs = [np.array(run) for run in runs.values()]         # [points, 2] each
    begin, end = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    xs = np.unique(np.concatenate([run[:, 0] for run in runs]))
    xs = xs[(xs >= begin) & (xs <= end)]
    ys = np.array([np.interp(xs, *run.T) for run in runs])  # [seeds, points]
    line, = axis.plot(xs, ys.mean(0), linewidth=1.2, **style)
    axis.fill_between(xs, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    if len(runs) > 1 and "label" not in style:
        for run in runs:
            axis.plot(*run.T, color=line.get_color(), linewidth=0.5, alpha=0.5)
    axis.tick_params(labelsize=7)
    return line


def draw(group, rows, entry, out):
    """Sample efficiency at the left, wall clock at the right."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", sharey=True)
    for axis, x, label in zip(axes, ("global_step", "seconds"), ("environment steps", "seconds")):
        draw_curves(axis, rows, x)
        if "level" in entry:
            axis.axhline(entry["level"], color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
    ylabel = MEASURES[entry["measure"]][1] if "measure" in entry else "return or success"
    axes[0].set_ylabel(ylabel, fontsize=8)
    figure.suptitle(f"{group} (n = {len({row['seed'] for row in rows})})", fontsize=9)
    save(figure, out / group)


def draw_grid(group, rows, entry, out, x="global_step", name=""):
    """Panels: a column for each value of the first axis, a row for each of the second.

    In them is a curve for each value of the third.
    """
    keys = list(entry["grid"])
    columns, lines, curves = (list(dict.fromkeys(row[key] for row in rows)) for key in keys)
    figure, axes = plt.subplots(
        len(lines), len(columns), figsize=(2.6 * len(columns), 2.2 * len(lines) + 0.3), layout="constrained",
        sharex=x == "global_step", sharey="col", squeeze=False)
    counts, drawn = set(), {}                               # drawn: {curve: its line}; a panel may lack some
    for i, line in enumerate(lines):
        for j, column in enumerate(columns):
            for k, curve in enumerate(curves):
                cell = [row for row in rows if [row[key] for key in keys] == [column, line, curve]]
                if cell:
                    counts.add(len({row["seed"] for row in cell}))
                    drawn[curve] = draw_curves(axes[i][j], cell, x, label=curve, color=f"C{k}")
            axes[i][j].xaxis.set_major_locator(MaxNLocator(4))          # of more the last may be cut off
            if x == "global_step":                          # 100k beside 125k: zeros would collide
                axes[i][j].xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[i][j].set_title(f"{column}, {line}", fontsize=8)
    axes[0][0].legend([drawn[curve] for curve in curves], curves)
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    figure.supxlabel(x.replace("global_step", "environment steps"), fontsize=8)
    figure.supylabel(f"{MEASURES[entry['measure']][1]}\n(n = {seeds}: mean, range)", fontsize=8)
    save(figure, out / (group + name))


def draw_lengths(group, table, entry, out):
    """The score at the end against the first axis, the length of the task; a curve each other cell."""
    curves = {}                                             # {name: {length: scores}}
    for row in table:
        curve = " ".join(row[axis] for axis in list(entry["grid"])[1:])
        curves.setdefault(curve, {}).setdefault(int(row["length"]), []).append(float(row["last"]))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for curve, scores in curves.items():
        means = [statistics.mean(v) for v in scores.values()]
        axis.plot(list(scores), means, marker="o", markersize=3, linewidth=1, label=curve)
    axis.axhline(entry["reference"], color="gray", linestyle=":", linewidth=1)
    ylabel = f"{MEASURES[entry['measure']][1]}, at the end"
    axis.set(title=group, xlabel="length of the task", ylabel=ylabel)
    axis.legend()
    save(figure, out / f"{group}-final")


def draw_aggregate(group, rows, out):
    """Interquartile means and their intervals, one line an arm."""
    figure, axis = plt.subplots(figsize=(5, 0.25 * len(rows) + 0.8), layout="constrained")
    first, last = list(rows[0])[:2]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row[last] for row in rows))}
    for y, row in enumerate(rows):
        if row["low"]:
            interval = float(row["low"]), float(row["high"])
            axis.plot(interval, [y, y], color=colours[row[last]], linewidth=4, alpha=0.4)
        axis.plot(float(row["iqm"]), y, "|", color=colours[row[last]], markersize=9)
    axis.set_yticks(range(len(rows)), [f"{row[first]}, {row[last]}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    interval = ", 95 % interval" if any(row["low"] for row in rows) else ""
    tasks = " or ".join(dict.fromkeys(str(row["tasks"]) for row in rows))
    figure.supxlabel(f"interquartile mean over {tasks} tasks and their seeds{interval}", fontsize=8)
    save(figure, out / f"{group}-aggregate")


def draw_all(group, rows, entry, out):
    """The figures of a group, from its curves and its table."""
    if "grid" not in entry:
        return draw(group, rows, entry, out)
    draw_grid(group, rows, entry, out)
    draw_grid(group, rows, entry, out, "seconds", "-seconds")
    table = read_csv(out / f"{group}-table.csv")
    if "reference" in entry:
        draw_lengths(group, table, entry, out)
    if list(entry["grid"])[0] == "task" and len({row["task"] for row in table}) > 1:
        arms = aggregate(table)
        if arms:                                            # none as long as every arm lacks a task
            write_csv(out / f"{group}-aggregate.csv", arms)
            draw_aggregate(group, arms, out)


def main(argv=None):
    args = command_line(Args, argv)
    out, known = Path(args.out), entries(args.tasks)
    found = runs_in(args.runs_dir, known, args.unfinished)
    mistyped = args.runs_dir != Args.runs_dir and not Path(args.runs_dir).is_dir()
    if mistyped or not (found or any(out.glob("*.csv"))):
        fail(f"--runs-dir {args.runs_dir} holds no finished runs; benchmark/run.py makes them")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"--out {args.out} cannot be made ({e.strerror}): choose another folder")
    entry_of = {entry["group"]: entry for entry in known.values()}
    for group in [*entry_of, *(found.keys() - entry_of)]:   # in the order of the task files
        if group in found and "table" not in entry_of.get(group, {}):           # else it has its own script
            collect(group, found[group], entry_of.get(group, {}), out)
    for path in sorted(out.glob("*.csv")):
        try:
            rows = read_csv(path)
            if rows and "value" in rows[0]:                 # curves, not a table
                draw_all(path.stem, rows, entry_of.get(path.stem, {}), out)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
            fail(f"--out holds {path}, which is not what plot.py writes ({type(e).__name__}): take it out")


if __name__ == "__main__":
    main()

"""From run folders to compact CSV files, and from those to figures and tables.   python benchmark/plot.py

    python benchmark/plot.py                                   what run.py made in runs/benchmark, into runs/figures
    python benchmark/plot.py --runs-dir DIR --out DIR          anybody's runs: with progress.csv, or TensorBoard events only
    python benchmark/plot.py --out benchmark/results           the published ones, and the README's tables

Writes, for every entry of tasks.toml or other group of runs, a curve file <group>.csv (the grid's axes, seed, global_step,
seconds, value; about 100 rows a seed, 25 in a grid) and a line a seed in table.csv or <grid>-table.csv (when the level was
first reached, the best, the last). All else is made from the CSV files in --out, committed ones too, so that no figure and no
table can say anything else: <group>.png and .svg (mean and range over the seeds, against environment steps and against
seconds), <grid>-seconds, <grid>-final (the end against the length of the task), <grid>-aggregate (interquartile means over
tasks and seeds), and, in benchmark/results, the README's tables.
"""
import csv
import math
import re
import statistics
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from run import ROOT, entries

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "", "legend.frameon": False, "legend.fontsize": 7, "axes.titlesize": 9}
import matplotlib.pyplot as plt  # noqa: E402

RESULTS, README = ROOT / "benchmark/results", ROOT / "README.md"


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"  # run folders named <entry>__<seed>, or as they may be named
    out: str = "runs/figures"  # where CSV files, figures and tables go
    tasks: str = str(ROOT / "benchmark/tasks.toml")  # the entries
    unfinished: bool = False  # also entries' runs that were stopped, or still run


# what an entry's `measure` says: the column of progress.csv, and what to write at the axis
MEASURES = {"return": ("charts/episodic_return", "return, mean of 100 episodes"),
            "success": ("charts/success", "success, mean of 100 episodes"),
            "eval": ("eval/episodic_return", "return of the greedy policy"),
            "eval-success": ("eval/success", "success of the greedy policy")}


def runs_in(folder, known, unfinished):
    """The run folders in `folder`, {group: {(cell, seed): path}}: of the known entries, or of one name but for the seed."""
    groups = {}
    for path in sorted(Path(folder).glob("*/")):
        name, _, seed = path.name.rpartition("__")
        if name in known:
            if unfinished or (path / "finished").exists():
                groups.setdefault(known[name]["group"], {})[tuple(known[name]["cell"]), seed] = path
        elif any(path.glob("progress.csv")) or any(path.glob("events.out.tfevents*")):
            name, seed = re.fullmatch(r"(.+?)((?:__\d+)*)", path.name).groups()             # <env-id>__<script>__<seed>__<time>
            name += " (not an entry)" if name in known else ""
            groups.setdefault(name, {})[(), seed.strip("_") or "1"] = path
    return groups


def read(run):
    """The rows of progress.csv, or of TensorBoard's events: dicts by tag, with global_step and seconds."""
    if (run / "progress.csv").exists():
        return list(csv.DictReader((run / "progress.csv").open()))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, rows = EventAccumulator(str(run), {"scalars": 0}).Reload(), {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"global_step": event.step, "time": event.wall_time})[tag] = str(event.value)
    begin = min((row["time"] for row in rows.values()), default=0.0)
    return [row | {"seconds": row["time"] - begin} for _, row in sorted(rows.items())]


def collect(group, runs, entry, order, out):
    """Puts the runs into <group>.csv and into the table, in place of earlier ones of the same cell and seed."""
    axes = list(entry.get("grid", {}))
    curve_file, table_file = out / f"{group}.csv", out / (f"{group}-table.csv" if axes else "table.csv")
    identity = itemgetter(*axes, "seed") if axes else itemgetter("entry", "seed")
    curves, table = {}, {identity(row): row for row in read_csv(table_file)}
    for row in read_csv(curve_file):
        curves.setdefault(identity({"entry": group} | row), []).append(row)
    for (cell, seed), path in runs.items():
        rows = read(path)
        measured = [m for m, (tag, _) in MEASURES.items() if any(row.get(tag) for row in rows)]
        measure = entry.get("measure") or next(iter(measured), None)
        if measure not in measured:
            print(f"plot.py: {path} has no {measure or 'return and no success'} yet: left out", file=sys.stderr)
            continue
        rows = [row for row in rows if row.get(MEASURES[measure][0])]
        steps, seconds, values = (np.array([float(row[tag]) for row in rows]) for tag in
                                  ("global_step", "seconds", MEASURES[measure][0]))
        kept = sorted({*range(0, len(rows), math.ceil(len(rows) / (25 if axes else 100))), len(rows) - 1})
        run = dict(zip(axes, cell)) | {"seed": seed}
        key = identity({"entry": group} | run)
        curves[key] = [run | {"global_step": int(steps[i]), "seconds": f"{seconds[i]:.1f}", "value": f"{values[i]:.4g}"}
                       for i in kept]
        end = {"last": f"{values[-1]:.4g}", "steps": int(steps[-1]), "seconds": round(seconds[-1])}
        if axes:
            table[key] = run | end
            continue
        level, logratios = entry.get("level", math.inf), [float(row.get("debug/first_logratio") or "nan") for row in rows]
        first = next((i for i, y in enumerate(values) if y >= level), None)
        table[key] = {"entry": group, "seed": seed, "measure": measure, "level": entry.get("level", ""),
                      "steps_to_level": "" if first is None else int(steps[first]),
                      "seconds_to_level": "" if first is None else round(seconds[first], 1),
                      "best": f"{max(values):.4g}", **end, "max_first_logratio": f"{max(logratios):.1e}"}
    values = [list(entry["grid"][axis]) for axis in axes]

    def place(key):                                         # as in tasks.toml; what is not there, last
        cell, seed = key[:-1] if axes else (), key[-1]
        name = [x.index(v) if v in x else len(x) for x, v in zip(values, cell)] or [order.get(key[0], len(order)), key[0]]
        return name, len(seed), seed

    if curves:
        write_csv(curve_file, [row for key in sorted(curves, key=place) for row in curves[key]])
        write_csv(table_file, [table[key] for key in sorted(table, key=place)])


def read_csv(path):
    if not path.exists():
        return []
    with path.open() as f:
        return list(csv.DictReader(f))


def write_csv(path, rows):
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)                                    # whenever this is interrupted, the old file or the new one, whole


def iqm(scores):
    """Interquartile mean: of the middle half.   scores [..., K] -> [...]"""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def aggregate(rows, draws=10_000):
    """Rows of a grid's table -> rows of the interquartile mean over tasks and seeds, with a 95 % interval, an arm each.

    Stratified bootstrap: seeds are drawn again within each task (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).
    Scores are taken as they are. Arms that lack a task are left out.
    """
    axes = [name for name in rows[0] if name not in ("seed", "last", "steps", "seconds")]
    tasks, out, rng = {row[axes[0]] for row in rows}, [], np.random.default_rng(0)
    for arm in dict.fromkeys(tuple(row[axis] for axis in axes[1:]) for row in rows):
        scores = {}
        for row in rows:
            if tuple(row[axis] for axis in axes[1:]) == arm:
                scores.setdefault(row[axes[0]], []).append(float(row["last"]))
        if scores.keys() == tasks:
            again = np.concatenate([rng.choice(x, (draws, len(x))) for x in scores.values()], axis=1)      # [draws, runs]
            low, high = np.quantile(iqm(again), (0.025, 0.975))
            runs = np.concatenate(list(scores.values()))
            out.append(dict(zip(axes[1:], arm)) | {"iqm": f"{iqm(runs):.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
                                                   "tasks": len(tasks), "runs": len(runs)})
    return out


def readme_table(rows):
    """The README's table of results, from the rows of table.csv."""
    out = ["| entry | solved at | seeds that reach it | environment steps to it | at the end |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["entry"] for row in rows):
        runs = [row for row in rows if row["entry"] == name]
        steps = sorted(int(row["steps_to_level"]) for row in runs if row["steps_to_level"])
        last = sorted(float(row["last"]) for row in runs)
        reached = f"{steps[0]:,} to {steps[-1]:,}" if steps else "-"
        lengths = " or ".join(f"{n:,}" for n in sorted({int(row["steps"]) for row in runs}))
        out.append(f"| `{name}` | {runs[0]['measure']} >= {runs[0]['level']} | {len(steps)} of {len(runs)} | {reached} | "
                   f"{last[0]:.4g} to {last[-1]:.4g} after {lengths} steps |")
    return "\n".join(out) + "\n"


def shares(row):
    """A row's last column: what policy, env, batch and update took."""
    return ", ".join(f"{float(row[f'share_{part}']):.0%}" for part in ("policy", "env", "batch", "update"))


def speed_table(rows):
    """The README's table of speeds, from the rows of speed.csv."""
    out = ["| task | script, memory | threads | ours, steps/s | RecurrentPPO, steps/s | ratio | policy, env, batch, update |",
           "|---|---|---|---|---|---|---|"]
    for row in rows:
        out.append(f"| {row['task']}{' (two LSTMs)' if row['separate_lstm'] == 'True' else ''} | "
                   f"{row['script']}, {row['memory']}{' x 2' if row['layers'] == '2' else ''} | {row['threads']} | "
                   f"{int(row['ours']):,} | {int(row['sb3']):,} | {row['ratio']} | {shares(row)} |")
    return "\n".join(out) + "\n"


def dqn_speed_table(rows):
    """The README's table of the DQN pair's speeds, from the rows of dqn-speed.csv."""
    out = ["| task | script, memory | steps/s | an update, ms | acting, us a step | policy, env, batch, update |",
           "|---|---|---|---|---|---|"]
    for row in rows:
        task = f"T-Maze {row['length']}" if row["length"] != "0" else "RepeatPrevious"
        out.append(f"| {task} | {row['script']}, {row['memory']}{' x 2' if row['layers'] == '2' else ''} | "
                   f"{int(row['steps_per_second']):,} | {row['update_ms']} | {row['policy_us']} | {shares(row)} |")
    return "\n".join(out) + "\n"


def off_policy_speed_table(rows):
    """The README's table of the off-policy scripts' speeds, from the rows of off-policy-speed.csv."""
    out = ["| script, memory | ours, steps/s | SB3 without memory, steps/s | ratio | a gradient step: ours, ms | SB3, ms | "
           "policy, env, batch, update |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        sb3 = f"{row['algorithm']}, {int(row['sb3']):,} | {row['ratio']}" if row["algorithm"] else "- | -"
        ms = f"{row['ours_ms']} | {row['sb3_ms'] if row['algorithm'] else '-'}"
        out.append(f"| {row['script']}, {row['memory']} | {int(row['ours']):,} | {sb3} | {ms} | {shares(row)} |")
    return "\n".join(out) + "\n"


def grid_table(rows):
    """The README's table of a grid, from the rows of its table: a column each value of the last axis, the mean of the seeds."""
    *axes, last = [name for name in rows[0] if name not in ("seed", "last", "steps", "seconds")]
    columns = list(dict.fromkeys(row[last] for row in rows))
    out = [f"| {' | '.join([*axes, *columns])} |", "|---" * (len(axes) + len(columns)) + "|"]
    for cell in dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows):
        values = {column: [float(row["last"]) for row in rows if (*(row[axis] for axis in axes), row[last]) == (*cell, column)]
                  for column in columns}
        most = max(map(len, values.values()))
        texts = [f"{statistics.mean(v):.2f}" + f" ± {(max(v) - min(v)) / 2:.2f}" * (len(v) > 1)
                 + f" (n = {len(v)})" * (len(v) < most)
                 if v else "-" for v in values.values()]
        out.append(f"| {' | '.join([*cell, *texts])} |")
    return "\n".join(out) + "\n"


def layer_table(rows):
    """The README's table of layer speeds, from the rows of layers.csv: a column each shape, milliseconds."""
    shapes = list(dict.fromkeys(f"[{row['T']}, {row['B']}, {row['H']}], ms" for row in rows))
    out = [f"| layer | {' | '.join(shapes)} |", "|---" * (1 + len(shapes)) + "|"]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        out.append(f"| `{layer}` | " + " | ".join(row["ms"] for row in rows if row["layer"] == layer) + " |")
    return "\n".join(out) + "\n"


def models_table(rows):
    """The README's table of trained agents, from the rows of models.csv."""
    out = ["| agent | task | memory | trained for | return | success |", "|---|---|---|---|---|---|"]
    for row in rows:
        success = "-" if row["success"] == "nan" else row["success"]
        out.append(f"| `python {row['script']}.py --model benchmark/models/{row['entry']}.safetensors` | {row['task']} | "
                   f"{row['memory']} | {int(row['steps']):,} steps | {row['return']} ± {row['std']} | {success} |")
    return "\n".join(out) + "\n"


def aggregate_table(rows):
    """The README's table of an aggregate: a column each value of the last axis."""
    first, last = list(rows[0])[:2]
    columns = list(dict.fromkeys(row[last] for row in rows))
    out = [f"| {first} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(row[first] for row in rows):
        cells = {row[last]: f"{float(row['iqm']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}]"
                 for row in rows if row[first] == name}
        out.append(f"| {name} | {' | '.join(cells.get(column, '-') for column in columns)} |")
    return "\n".join(out) + "\n"


def with_tables(readme, results):
    """The README with its tables made anew from the CSV files in `results`."""
    for name, file, table in (("models", "../models/models.csv", models_table), ("results", "table.csv", readme_table),
                              ("popgym", "popgym-table.csv", grid_table),
                              ("dqn", "dqn-table.csv", grid_table), ("dqn-variants", "dqn-variants-table.csv", grid_table),
                              ("tmaze-length", "tmaze-length-table.csv", grid_table),
                              ("tmaze-actor-critic", "tmaze-actor-critic-table.csv", grid_table),
                              ("off-policy-60", "off-policy-60-table.csv", grid_table),
                              ("popgym-aggregate", "popgym-aggregate.csv", aggregate_table),
                              ("dqn-aggregate", "dqn-aggregate.csv", aggregate_table),
                              ("dqn-speed", "dqn-speed.csv", dqn_speed_table),
                              ("off-policy-speed", "off-policy-speed.csv", off_policy_speed_table),
                              ("speed", "speed.csv", speed_table), ("layers", "layers.csv", layer_table)):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, rest = readme.split(begin)
        readme = before + begin + table(read_csv(results / file)) + end + rest.split(end)[1]
    return readme


def save(figure, path):
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_name(path.name + suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def draw_curves(axis, rows, x, **style):
    """The mean over the seeds and their range, each at the x that all have reached.   rows: of one cell, from a curve file"""
    runs = {}
    for row in rows:
        runs.setdefault(row["seed"], []).append((float(row[x]), float(row["value"])))
    runs = [np.array(run) for run in runs.values()]                             # [points, 2] each
    grid = np.unique(np.concatenate([run[:, 0] for run in runs]))
    grid = grid[(grid >= max(run[0, 0] for run in runs)) & (grid <= min(run[-1, 0] for run in runs))]
    ys = np.array([np.interp(grid, *run.T) for run in runs])                    # [seeds, points]
    line, = axis.plot(grid, ys.mean(0), linewidth=1.2, **style)
    axis.fill_between(grid, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    if len(runs) > 1 and "label" not in style:
        for run in runs:
            axis.plot(*run.T, color=line.get_color(), linewidth=0.5, alpha=0.5)
    axis.tick_params(labelsize=7)


def draw(group, rows, entry, out):
    """Sample efficiency at the left, wall clock at the right."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained", sharey=True)
    for axis, x, label in zip(axes, ("global_step", "seconds"), ("environment steps", "seconds")):
        draw_curves(axis, rows, x)
        if "level" in entry:
            axis.axhline(entry["level"], color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
    axes[0].set_ylabel(MEASURES[entry["measure"]][1] if "measure" in entry else "return or success", fontsize=8)
    figure.suptitle(f"{group} (n = {len({row['seed'] for row in rows})})", fontsize=9)
    save(figure, out / group)


def draw_grid(group, rows, entry, out, x="global_step", name=""):
    """Panels: a column each value of the first axis, a row each of the second; in them a curve each of the third."""
    keys = list(entry["grid"])
    columns, lines, curves = (list(dict.fromkeys(row[key] for row in rows)) for key in keys)
    figure, axes = plt.subplots(len(lines), len(columns), figsize=(2.6 * len(columns), 2.2 * len(lines) + 0.3),
                                layout="constrained", sharex=x == "global_step", sharey="col", squeeze=False)
    counts = set()
    for i, line in enumerate(lines):
        for j, column in enumerate(columns):
            for k, curve in enumerate(curves):
                cell = [row for row in rows if [row[key] for key in keys] == [column, line, curve]]
                if cell:
                    counts.add(len({row["seed"] for row in cell}))
                    draw_curves(axes[i][j], cell, x, label=curve, color=f"C{k}")
            axes[i][j].set_title(f"{column}, {line}", fontsize=8)
    axes[0][0].legend()
    figure.supxlabel(x.replace("global_step", "environment steps"), fontsize=8)
    figure.supylabel(f"{MEASURES[entry['measure']][1]} (n = {' to '.join(map(str, sorted(counts)))}: mean, range)", fontsize=8)
    save(figure, out / (group + name))


def draw_lengths(group, table, entry, out):
    """The score at the end against the first axis, the length of the task; a curve each other cell."""
    curves = {}                                                                 # name: length: scores
    for row in table:
        curve = " ".join(row[axis] for axis in list(entry["grid"])[1:])
        curves.setdefault(curve, {}).setdefault(int(row["length"]), []).append(float(row["last"]))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for curve, scores in curves.items():
        means = [statistics.mean(v) for v in scores.values()]
        axis.plot(list(scores), means, marker="o", markersize=3, linewidth=1, label=curve)
    axis.axhline(entry["reference"], color="gray", linestyle=":", linewidth=1)
    axis.set(title=group, xlabel="length of the task", ylabel=f"{MEASURES[entry['measure']][1]}, at the end")
    axis.legend()
    save(figure, out / f"{group}-final")


def draw_aggregate(group, rows, out):
    """Interquartile means and their intervals, one line an arm."""
    figure, axis = plt.subplots(figsize=(5, 0.25 * len(rows) + 0.8), layout="constrained")
    first, last = list(rows[0])[:2]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row[last] for row in rows))}
    for y, row in enumerate(rows):
        low, mid, high = (float(row[k]) for k in ("low", "iqm", "high"))
        axis.plot([low, high], [y, y], color=colours[row[last]], linewidth=4, alpha=0.4)
        axis.plot(mid, y, "|", color=colours[row[last]], markersize=9)
    axis.set_yticks(range(len(rows)), [f"{row[first]}, {row[last]}" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(f"interquartile mean over {rows[0]['tasks']} tasks and their seeds, 95 % interval", fontsize=8)
    save(figure, out / f"{group}-aggregate")


def main(argv=None):
    args = tyro.cli(Args, args=argv)
    out, known = Path(args.out), entries(args.tasks)
    groups = runs_in(args.runs_dir, known, args.unfinished)
    mistyped = args.runs_dir != Args.runs_dir and not Path(args.runs_dir).is_dir()
    if mistyped or not (groups or any(out.glob("*.csv"))):
        print(f"plot.py: --runs-dir {args.runs_dir} holds no finished runs; benchmark/run.py makes them", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    of_group = {entry["group"]: entry for entry in known.values()}
    order = {name: i for i, name in enumerate(known)}
    for group, runs in groups.items():
        collect(group, runs, of_group.get(group, {}), order, out)

    for path in sorted(out.glob("*.csv")):
        if "value" not in path.open().readline().strip().split(","):            # a table, not curves
            continue
        group, rows, entry = path.stem, read_csv(path), of_group.get(path.stem, {})
        if "grid" not in entry:
            draw(group, rows, entry, out)
            continue
        draw_grid(group, rows, entry, out)
        draw_grid(group, rows, entry, out, "seconds", "-seconds")
        table = read_csv(out / f"{group}-table.csv")
        if "reference" in entry:
            draw_lengths(group, table, entry, out)
        of_tasks = list(entry["grid"])[0] == "task" and len({row["task"] for row in table}) > 1
        if of_tasks and (rows := aggregate(table)):         # none as long as every arm lacks a task
            write_csv(out / f"{group}-aggregate.csv", rows)
            draw_aggregate(group, rows, out)
    if out.resolve() == RESULTS:
        README.write_text(with_tables(README.read_text(), out))


if __name__ == "__main__":
    main()

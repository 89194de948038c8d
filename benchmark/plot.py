"""Collect the runs of tasks.toml into compact CSV files, a table of seeds and a figure each.   python benchmark/plot.py

Writes to benchmark/results: <entry>.csv (seed, step, seconds, return, success; about 100 rows a seed), <entry>.png, and
table.csv (one row a seed: when the level was first reached, what was reached at best and at the end). A grid of entries gets
one <grid>.csv (also: the grid's cell; about 25 rows a seed), <grid>-table.csv and figure, and, if an axis is the length of the
task, <grid>-final.png, the score at the end against it. From the tables and the speeds (speed.csv, dqn-speed.csv, layers.csv),
the README's. Entries without finished runs keep what is committed.
"""
import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from run import entries

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"  # run folders named <entry>__<seed>
    out: str = str(HERE / "results")  # where the CSV files and figures go
    unfinished: bool = False  # also runs that were stopped, or still run


# what an entry's `measure` says: the column of progress.csv, and what to write at the axis
MEASURES = {"return": ("charts/episodic_return", "return, mean of 100 episodes"),
            "success": ("charts/success", "success, mean of 100 episodes"),
            "eval": ("eval/episodic_return", "return of the greedy policy"),
            "eval-success": ("eval/success", "success of the greedy policy")}


def read(path, measure):
    """progress.csv as columns of floats; rows without the measure are left out."""
    rows = [row for row in csv.DictReader(path.open()) if row[MEASURES[measure][0]]]
    tags = {"global_step": "global_step", "seconds": "seconds", "logratio": "debug/first_logratio"}
    tags |= {k: tag for k, (tag, _) in MEASURES.items()}
    return {k: [float(row.get(tag) or "nan") for row in rows] for k, tag in tags.items()}


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


def speed_table(rows):
    """The README's table of speeds, from the rows of speed.csv."""
    out = ["| task | script, memory | threads | ours, steps/s | RecurrentPPO, steps/s | ratio | policy, env, batch, update |",
           "|---|---|---|---|---|---|---|"]
    for row in rows:
        shares = ", ".join(f"{float(row[f'share_{part}']):.0%}" for part in ("policy", "env", "batch", "update"))
        out.append(f"| {row['task']}{' (two LSTMs)' if row['separate_lstm'] == 'True' else ''} | "
                   f"{row['script']}, {row['memory']}{' x 2' if row['layers'] == '2' else ''} | {row['threads']} | "
                   f"{int(row['ours']):,} | {int(row['sb3']):,} | {row['ratio']} | {shares} |")
    return "\n".join(out) + "\n"


def dqn_speed_table(rows):
    """The README's table of the DQN pair's speeds, from the rows of dqn-speed.csv."""
    out = ["| task | script, memory | steps/s | an update, ms | acting, us a step | policy, env, batch, update |",
           "|---|---|---|---|---|---|"]
    for row in rows:
        shares = ", ".join(f"{float(row[f'share_{part}']):.0%}" for part in ("policy", "env", "batch", "update"))
        task = f"T-Maze {row['length']}" if row["length"] != "0" else "RepeatPrevious"
        out.append(f"| {task} | {row['script']}, {row['memory']}{' x 2' if row['layers'] == '2' else ''} | "
                   f"{int(row['steps_per_second']):,} | {row['update_ms']} | {row['policy_us']} | {shares} |")
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


def with_tables(readme, results):
    """The README with its tables made anew from the CSV files in `results`."""
    for name, file, table in (("results", "table.csv", readme_table), ("popgym", "popgym-table.csv", grid_table),
                              ("dqn", "dqn-table.csv", grid_table), ("dqn-variants", "dqn-variants-table.csv", grid_table),
                              ("tmaze-length", "tmaze-length-table.csv", grid_table),
                              ("off-policy-60", "off-policy-60-table.csv", grid_table),
                              ("dqn-speed", "dqn-speed.csv", dqn_speed_table),
                              ("speed", "speed.csv", speed_table), ("layers", "layers.csv", layer_table)):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        with (results / file).open() as f:
            rows = list(csv.DictReader(f))
        before, rest = readme.split(begin)
        readme = before + begin + table(rows) + end + rest.split(end)[1]
    return readme


def draw(name, entry, runs, out):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for seed, run in runs.items():
        axis.plot(run["global_step"], run[entry["measure"]], label=f"seed {seed}", linewidth=1)
    axis.axhline(entry["level"], color="gray", linestyle=":", linewidth=1)
    axis.set(title=f"{name} (n = {len(runs)})", xlabel="environment steps", ylabel=MEASURES[entry["measure"]][1])
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out / f"{name}.png", dpi=120)
    plt.close(figure)


def draw_grid(name, cells, out):
    """Panels: a column each value of the first axis, a row each of the second; in them a curve each of the third."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    columns, rows, _ = (list(dict.fromkeys(cell[i] for cell in cells)) for i in range(3))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(2.6 * len(columns), 2.2 * len(rows)), layout="constrained",
                                sharex=True, sharey="col", squeeze=False)
    for (column, row, curve), (entry, runs) in cells.items():
        axis, n = axes[rows.index(row)][columns.index(column)], min(len(run["global_step"]) for run in runs.values())
        ys = np.array([run[entry["measure"]][-n:] for run in runs.values()])                # [seeds, n]
        x = next(iter(runs.values()))["global_step"][-n:]
        line, = axis.plot(x, ys.mean(0), label=curve, linewidth=1)
        axis.fill_between(x, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(f"{column}, {row}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("environment steps", fontsize=8)
    seeds = sorted({len(runs) for _, runs in cells.values()})
    figure.supylabel(f"{MEASURES[entry['measure']][1]} (n = {' to '.join(map(str, seeds))}: mean, range)", fontsize=8)
    figure.savefig(out / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_lengths(name, entry, out):
    """The score at the end against the first axis, the length of the task, from <grid>-table.csv; a curve each other cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with (out / f"{name}-table.csv").open() as f:
        rows = list(csv.DictReader(f))
    curves = {}                                             # name: length: scores
    for row in rows:
        curve = " ".join(row[axis] for axis in list(entry["grid"])[1:])
        curves.setdefault(curve, {}).setdefault(int(row["length"]), []).append(float(row["last"]))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for curve, scores in curves.items():
        means = [statistics.mean(v) for v in scores.values()]
        axis.plot(list(scores), means, marker="o", markersize=3, linewidth=1, label=curve)
    axis.axhline(entry["reference"], color="gray", linestyle=":", linewidth=1)
    axis.set(title=name, xlabel="length of the task", ylabel=f"{MEASURES[entry['measure']][1]}, at the end")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out / f"{name}-final.png", dpi=120)
    plt.close(figure)


def collect_grid(name, cells, out):
    """<grid>.csv and <grid>-table.csv."""
    axes = list(next(iter(cells.values()))[0]["grid"])
    with (out / f"{name}.csv").open("w", newline="") as curves, (out / f"{name}-table.csv").open("w", newline="") as table:
        curves, table = csv.writer(curves), csv.writer(table)
        curves.writerow((*axes, "seed", "global_step", "seconds", "value"))
        table.writerow((*axes, "seed", "last", "steps", "seconds"))
        for cell, (entry, runs) in cells.items():
            for seed, run in runs.items():
                steps, seconds, values = run["global_step"], run["seconds"], run[entry["measure"]]
                for i in sorted({*range(0, len(steps), -(-len(steps) // 25)), len(steps) - 1}):
                    curves.writerow((*cell, seed, int(steps[i]), f"{seconds[i]:.1f}", f"{values[i]:.4g}"))
                table.writerow((*cell, seed, f"{values[-1]:.4g}", int(steps[-1]), round(seconds[-1])))


def main():
    args = tyro.cli(Args)
    out, rows, grids = Path(args.out), [], {}
    out.mkdir(parents=True, exist_ok=True)
    committed = list(csv.DictReader((out / "table.csv").open())) if (out / "table.csv").exists() else []
    for name, entry in entries().items():
        runs = {seed: read(path, entry["measure"]) for seed in entry["seeds"]
                if (path := Path(args.runs_dir) / f"{name}__{seed}" / "progress.csv").exists()
                and (args.unfinished or (path.parent / "finished").exists())}
        if entry["cell"]:
            if runs:
                grids.setdefault(entry["group"], {})[tuple(entry["cell"])] = entry, runs
            continue
        if not runs:
            rows += [row for row in committed if row["entry"] == name]
            continue
        draw(name, entry, runs, out)
        with (out / f"{name}.csv").open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("seed", "global_step", "seconds", "return", "success"))
            for seed, run in runs.items():
                steps, values = run["global_step"], run[entry["measure"]]
                kept = sorted({*range(0, len(steps), max(1, len(steps) // 100)), len(steps) - 1})
                writer.writerows((seed, int(steps[i]), f"{run['seconds'][i]:.1f}", f"{run['return'][i]:.4g}",
                                  f"{run['success'][i]:.4g}") for i in kept)
                first = next((i for i, y in enumerate(values) if y >= entry["level"]), None)
                rows.append({"entry": name, "seed": seed, "measure": entry["measure"], "level": entry["level"],
                             "steps_to_level": "" if first is None else int(steps[first]),
                             "seconds_to_level": "" if first is None else round(run["seconds"][first], 1),
                             "best": f"{max(values):.4g}", "last": f"{values[-1]:.4g}", "steps": int(steps[-1]),
                             "seconds": round(run["seconds"][-1]), "max_first_logratio": f"{max(run['logratio']):.1e}"})
    with (out / "table.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name, cells in grids.items():
        collect_grid(name, cells, out)
        draw_grid(name, cells, out)
        entry, _ = next(iter(cells.values()))
        if "reference" in entry:
            draw_lengths(name, entry, out)
    README.write_text(with_tables(README.read_text(), out))


if __name__ == "__main__":
    main()

"""The table of all of POPGym, from finished runs.   python benchmark/popgym_full.py

    python benchmark/run.py --suite popgym-full                trains; again: goes on where it was stopped
    python benchmark/popgym_full.py --out benchmark/results    then puts the runs into the table

Writes
    popgym-full.csv           a row a run: mmer is the greatest mean return of 100 training episodes, close to
                              POPGym's measure, exploring the last of them, both of the policy that explores;
                              final is the last evaluation, of the one that does not; recipe is "best", or
                              "1M": a million steps with this memory, or "ppo-sbb", "dqn-tbb": of an LRU by
                              another script; run is its folder, and digest tells its command from others
    popgym-full-curves.csv    the evaluations of the best recipes

Rows that were there before stay, if the suite still has their recipe. To join the runs of two machines call
it twice, with the --runs-dir of either. The rest is made from these two files and popgym-published.csv:
    popgym-full.png, .svg               every task: ours beside the best of 13 published memories
    popgym-full-curves.png, .svg        the best recipes while they train, a panel a family
    popgym-full-aggregate.csv, .png     interquartile means over tasks and seeds, a line a memory that has all
"""
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from entries import ROOT, argv_of, digest, entries, fail, of_another_recipe
from matplotlib.ticker import EngFormatter
from plot import aggregate, draw_aggregate, draw_curves, read_csv, save, write_csv
from run import command_line

SUITE = "popgym-full"
PUBLISHED = ROOT / "benchmark/results/popgym-published.csv"
LEVELS = {"Easy": "C0", "Medium": "C1", "Hard": "C3"}  # and their colours


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"  # run folders named <entry>__<seed>
    out: str = "runs/figures"  # where CSV files and figures go


def collect(folder, out):
    """Puts the finished runs into the two files, in place of their older rows. Returns all rows of both."""
    table_file, curves_file = out / f"{SUITE}.csv", out / f"{SUITE}-curves.csv"
    suite = {name: entry for name, entry in entries().items() if entry["suite"] == SUITE}
    rows = read_csv(table_file)
    if rows and "digest" not in rows[0]:
        fail(f"{table_file} is an older version's: move it away, or give another --out")
    before = {row["run"]: row for row in rows}
    table = {run: row for run, row in before.items() if is_of(suite, row)}
    curves, new = {}, {}
    for row in read_csv(curves_file):
        curves.setdefault((row["task"], row["seed"]), []).append(row)
    for finished in sorted(folder.glob(f"{SUITE}*__*/finished")):
        try:
            row, evaluations = read_run(finished.parent, suite)
        except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as e:
            print(f"{finished.parent}: {type(e).__name__}, {e}: left out", file=sys.stderr)
            continue
        new[row["run"]] = row
        if row["recipe"] == "best":
            curves[row["task"], row["seed"]] = evaluations
    for run in sorted(before.keys() - table.keys() - new.keys()):
        print(f"{run}: its row is of a recipe that the suite no longer has, left out", file=sys.stderr)
    print(f"{len(new)} runs of {folder}, {len(table.keys() - new.keys())} earlier rows")
    table = sorted((table | new).values(), key=place)
    best = {(row["task"], row["seed"]) for row in table if row["recipe"] == "best"}
    curves = sorted((row for run, curve in curves.items() if run in best for row in curve), key=place)
    for file, rows in ((table_file, table), (curves_file, curves)):
        if rows:
            out.mkdir(parents=True, exist_ok=True)
            write_csv(file, rows)
    return table, curves


def is_of(suite, row):
    """Whether the suite still makes this run by the same recipe."""
    name, _, seed = row["run"].rpartition("__")
    return name in suite and row["digest"] == digest(argv_of(suite[name], seed))


def read_run(folder, suite):
    """A run's row, and a row for each of its evaluations. ValueError if it is not the suite's."""
    name, _, seed = folder.name.rpartition("__")
    if name not in suite or not seed.isdecimal():
        raise ValueError("it is not named <entry>__<seed>")
    family, level, *memory = suite[name]["cell"]
    args, rows = json.loads((folder / "args.json").read_text()), read_csv(folder / "progress.csv")
    task, argv = family + level, argv_of(suite[name], seed)
    if memory:
        recipe = "best" if memory == ["best"] else "1M"
    else:                                                   # a group of one memory and another script
        recipe = suite[name]["group"].removeprefix(f"{SUITE}-")
    returns = [  # means of 100 episodes; older runs do not say of how many
        float(row["charts/episodic_return"]) for row in rows
        if row["charts/episodic_return"] and int(row.get("charts/episodes", 100)) >= 100]
    if not returns:
        raise ValueError("it has no mean of 100 episodes")
    evaluations = [
        {"task": task, "seed": seed, "global_step": row["global_step"],
         "return": f"{float(row['eval/episodic_return']):.4f}"}
        for row in rows if row["eval/episodic_return"]]
    if not evaluations:
        raise ValueError("it has no evaluation")
    run = {
        "task": task, "memory": args["memory"], "script": f"{args['script']}.py", "seed": seed,
        "steps": rows[-1]["global_step"], "seconds": f"{float(rows[-1]['seconds']):.0f}",
        "mmer": f"{max(returns):.4f}", "exploring": f"{returns[-1]:.4f}", "final": evaluations[-1]["return"],
        "recipe": recipe, "run": folder.name, "digest": digest(argv)}
    if of_another_recipe(folder, argv):
        raise ValueError("its entry has changed since it began")
    if run["steps"] != argv[argv.index("--total-timesteps") + 1]:
        raise ValueError("it has not made all of its steps")
    if evaluations[-1]["global_step"] != run["steps"]:
        raise ValueError("it has no evaluation after its last step")
    return run, evaluations


def interquartile_means(rows):
    """Of the columns of memories, the best first: over all tasks, and over those that have three seeds."""
    runs = [
        ("".join(entry["cell"][:2]), str(seed), len(entry["seeds"])) for entry in entries().values()
        if entry["group"] == SUITE and entry["cell"][2] != "best" for seed in entry["seeds"]]
    wanted = {
        "all tasks, one seed": {(task, seed) for task, seed, _ in runs if seed == "1"},
        "five families, three seeds": {(task, seed) for task, seed, seeds in runs if seeds == 3}}
    arms = []
    for over, of in wanted.items():
        scores = [
            {"task": row["task"], "memory": row["memory"], "over": over,
             "seed": row["seed"], "last": row["final"]} for row in complete(rows, of)]
        if scores:
            arms += sorted(aggregate(scores), key=lambda arm: -float(arm["iqm"]))
    return arms


def complete(rows, wanted):
    """The wanted (task, seed) of the memories that have all of them: a mean over some would say little."""
    rows = [row for row in rows if (row["task"], row["seed"]) in wanted]
    made = {}
    for row in rows:
        made.setdefault(row["memory"], set()).add((row["task"], row["seed"]))
    return [row for row in rows if made[row["memory"]] == wanted]


def family_and_level(task):
    level = next(level for level in LEVELS if task.endswith(level))
    return task.removesuffix(level), level


def place(row):
    """Families by name, then levels, recipes, memories, seeds; a curve as it was."""
    family, level = family_and_level(row["task"])
    return family, list(LEVELS).index(level), row.get("recipe", ""), row.get("memory", ""), int(row["seed"])


def draw_tasks(table, published, out):
    """A line a task: our seeds, and what is published."""
    scores = {}
    for row in table:
        if row["recipe"] == "best":
            scores.setdefault(row["task"], []).append(float(row["final"]))
    figure, axis = plt.subplots(figsize=(6, 0.16 * len(scores) + 0.9), layout="constrained")
    for y, (task, finals) in enumerate(scores.items()):
        axis.plot(finals, [y] * len(finals), "o", color="C0", markersize=4, alpha=0.6)
        if task in published:
            axis.plot(float(published[task]["best"]), y, "|", color="C3", markersize=9, markeredgewidth=2)
    axis.plot([], [], "o", color="C0", label="ours at the end, without exploring, a point a seed")
    axis.plot([], [], "|", color="C3", markersize=9, label="published: best of 13 memories, by greatest mean")
    axis.set_yticks(range(len(scores)), list(scores), fontsize=6)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("return", fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    figure.legend(loc="outside upper center")
    save(figure, out / SUITE)


def draw_families(curves, out, columns=4):
    """The best recipes while they train: a panel a family, a curve a level."""
    families = {}                                           # {family: {level: rows}}
    for row in curves:
        family, level = family_and_level(row["task"])
        families.setdefault(family, {}).setdefault(level, []).append(row | {"value": row["return"]})
    lines, drawn = -(-len(families) // columns), {}         # drawn: {level: its line}; a panel may lack some
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 1.7 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(families):]:
        axis.axis("off")
    for axis, (family, levels) in zip(axes.flat, families.items()):
        for level, rows in levels.items():
            drawn[level] = draw_curves(axis, rows, "global_step", label=level, color=LEVELS[level])
        axis.set_title(family, fontsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0][0].legend(drawn.values(), drawn)
    figure.supxlabel("environment steps", fontsize=8)
    figure.supylabel("return without exploring,\nmean and range of the seeds", fontsize=8)
    save(figure, out / f"{SUITE}-curves")


def main(argv=None):
    args = command_line(Args, argv)
    folder, out = Path(args.runs_dir), Path(args.out)
    table, curves = collect(folder, out)
    if not table:
        fail(f"--runs-dir {folder} holds no finished runs; benchmark/run.py --suite {SUITE} makes them")
    if any(row["recipe"] == "best" for row in table):
        draw_tasks(table, {row["task"]: row for row in read_csv(PUBLISHED)}, out)
        draw_families(curves, out)
    arms = interquartile_means([row for row in table if row["recipe"] == "1M"])
    if arms:                                                # none as long as every memory lacks a task
        write_csv(out / f"{SUITE}-aggregate.csv", arms)
        draw_aggregate(SUITE, arms, out)


if __name__ == "__main__":
    main()

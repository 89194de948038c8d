"""benchmark/plot.py: from run folders to CSV files, from CSV files to figures and tables."""
import csv
import shutil
import sys

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.conftest import ROOT
from tests.helpers import cut

sys.path.insert(0, str(ROOT / "benchmark"))
import plot  # noqa: E402

TASKS = """
[one]
command = "-"
seeds = [1, 2]
measure = "eval"
level = 0.5

[many]
command = "{task} {memory} {batching}"
seeds = [1, 2]
measure = "return"

[many.grid.task]
easy = "easy"
hard = "hard"

[many.grid.memory]
lru = "lru"

[many.grid.batching]
sbb = "sbb"
tbb = "tbb"
"""


def write_run(folder, tag, values):
    folder.mkdir(parents=True)
    with (folder / "progress.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("global_step", "seconds", tag))
        writer.writerows((100 * (i + 1), i / 2, value) for i, value in enumerate(values))
    (folder / "finished").touch()


def rows_of(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture
def draw(tmp_path):
    def draw():
        runs, out, tasks = (tmp_path / name for name in ("runs", "out", "tasks.toml"))
        tasks.write_text(TASKS)
        plot.main(["--runs-dir", str(runs), "--out", str(out), "--tasks", str(tasks)])
        return out

    return draw


def test_an_entry_gives_curves_a_line_a_seed_and_figures(tmp_path, draw):
    write_run(tmp_path / "runs/one__1", "eval/episodic_return", [0, "", 0.25, 0.5, 0.25])
    write_run(tmp_path / "runs/one__2", "eval/episodic_return", range(-1000, 0))
    write_run(tmp_path / "runs/one__3", "eval/episodic_return", [1, 1])
    (tmp_path / "runs/one__3/finished").unlink()            # still running, or stopped
    out = draw()
    first, second = rows_of(out / "table.csv")
    of_level = "steps_to_level", "seconds_to_level", "best", "last", "steps"
    assert [first[name] for name in of_level] == ["400", "1.5", "0.5", "0.25", "500"]
    assert [second[name] for name in of_level] == ["", "", "-1", "-1", "100000"]
    rows = rows_of(out / "one.csv")
    assert [row["value"] for row in rows if row["seed"] == "1"] == ["0", "0.25", "0.5", "0.25"]
    assert 100 <= len([row for row in rows if row["seed"] == "2"]) <= 101
    assert rows[-1]["global_step"] == "100000"
    assert (out / "one.png").stat().st_size and (out / "one.svg").stat().st_size


def test_a_partial_rerun_replaces_its_seeds_and_runs_without_values_are_named(tmp_path, draw, capsys):
    write_run(tmp_path / "runs/one__1", "eval/episodic_return", [0, 1])
    write_run(tmp_path / "runs/one__2", "eval/episodic_return", [0, 2])
    before = draw()
    kept = [row for row in rows_of(before / "one.csv") if row["seed"] == "1"]
    shutil.rmtree(tmp_path / "runs")
    write_run(tmp_path / "runs/one__2", "eval/episodic_return", [0, 3, 4])
    write_run(tmp_path / "runs/one__3", "eval/episodic_return", ["", ""])
    write_run(tmp_path / "runs/begun", "charts/episodic_return", [])
    write_run(tmp_path / "runs/one", "charts/success", [1])     # somebody's run, not the entry's
    out = draw()
    assert {(row["entry"], row["seed"], row["last"]) for row in rows_of(out / "table.csv")} == {
        ("one", "1", "1"), ("one", "2", "4"), ("one (not an entry)", "1", "1")}
    values = [row["value"] for row in rows_of(out / "one.csv")]
    assert values == [row["value"] for row in kept] + ["0", "3", "4"]
    error = capsys.readouterr().err
    assert "one__3" in error and "begun" in error and error.count("left out") == 2
    assert not (out / "begun.csv").exists()


def test_entries_keep_their_place_in_the_table_and_new_ones_come_last(tmp_path, draw):
    """So the order of the published table does not depend on the names of the task files."""
    write_run(tmp_path / "runs/theirs__1", "charts/success", [1])
    draw()
    for name in ("one__10", "one__2", "also__1"):
        write_run(tmp_path / "runs" / name, "eval/episodic_return", [1])
    order = [(row["entry"], row["seed"]) for row in rows_of(draw() / "table.csv")]
    assert order == [("theirs", "1"), ("one", "2"), ("one", "10"), ("also", "1")]
def test_a_grid_is_drawn_from_its_csv_files_alone(tmp_path, draw):
    for task, score in (("easy", 1), ("hard", 0.5)):
        for batching, gain in (("sbb", 0), ("tbb", 0.2)):
            for seed in (1, 2):
                run = tmp_path / f"runs/many__{task}__lru__{batching}__{seed}"
                write_run(run, "charts/episodic_return", [0, score + gain + seed / 100])
    out = draw()
    for suffix in ("png", "svg"):
        assert {path.stem for path in out.glob(f"*.{suffix}")} == {"many", "many-seconds", "many-aggregate"}
    means = [float(row["iqm"]) for row in rows_of(out / "many-aggregate.csv")]
    assert means == pytest.approx([0.765, 0.965])
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(tmp_path / "runs")
    for path in [*out.glob("*.png"), *out.glob("*.svg"), out / "many-aggregate.csv"]:
        path.unlink()
    (tmp_path / "runs").mkdir()
    assert {path.name: path.read_bytes() for path in draw().iterdir()} == kept


def test_no_label_is_cut_off(tmp_path, draw):
    for task in ("easy", "hard"):
        for batching in ("sbb", "tbb"):
            write_run(tmp_path / f"runs/many__{task}__lru__{batching}__1", "charts/episodic_return", [0, 1])
    long = {"memory": "linear-attention", "over": "five families, three seeds"}
    arm = long | {"iqm": "0.1", "low": "0", "high": "0.2"}
    plot.draw_aggregate("wide", [arm | {"tasks": 42}, arm | {"tasks": 15}], draw())
    figures = [*draw().glob("*.png"), *(ROOT / "benchmark/results").glob("*.png")]
    figures = [png for png in figures if not png.name.startswith("lesson")]     # with small margins
    assert len(figures) > 50
    assert not [png.name for png in figures if cut(png)]


def test_the_legend_has_every_curve_of_a_grid(tmp_path, draw, monkeypatch):
    """Its panel, the first, may lack some. And n is the fewest to the most seeds of a panel's curves."""
    legends, labels = [], []
    for cell in ("easy__lru__sbb__1", "hard__lru__tbb__1", "hard__lru__tbb__2"):
        write_run(tmp_path / f"runs/many__{cell}", "charts/episodic_return", [0, 1])

    def look(figure, path):
        legends.append([text.get_text() for text in figure.axes[0].get_legend().get_texts()])
        labels.append(figure.get_supylabel())

    monkeypatch.setattr(plot, "save", look)
    draw()
    assert legends == [["sbb", "tbb"]] * 2
    assert labels == ["return, mean of 100 episodes\n(n = 1 to 2: mean, range)"] * 2


def test_a_grid_of_which_every_arm_lacks_a_task_has_no_aggregate_yet(tmp_path, draw):
    for cell in ("easy__lru__sbb", "hard__lru__tbb"):
        write_run(tmp_path / f"runs/many__{cell}__1", "charts/episodic_return", [0, 1])
    assert {path.name for path in draw().glob("*.png")} == {"many.png", "many-seconds.png"}


@pytest.mark.parametrize("group", ["popgym", "dqn"])
def test_a_committed_aggregate_is_that_of_its_table(group):
    results = ROOT / "benchmark/results"
    arms = plot.aggregate(rows_of(results / f"{group}-table.csv"))
    assert [{name: str(value) for name, value in arm.items()} for arm in arms] == rows_of(
        results / f"{group}-aggregate.csv")


def test_runs_of_others_by_their_tensorboard_events(tmp_path, draw):
    for seed, scale in ((1, 1.0), (2, 3.0)):
        with SummaryWriter(tmp_path / f"runs/CartPole-v1__ppo__{seed}__170000000{seed}") as writer:
            for step in range(0, 50, 10):
                writer.add_scalar("charts/episodic_return", scale * step, step)
    SummaryWriter(tmp_path / "runs/without-scalars__1").close()
    (tmp_path / "runs/not-a-run").mkdir()
    out = draw()
    rows = rows_of(out / "CartPole-v1__ppo.csv")
    values = [float(row["value"]) for row in rows if row["seed"].startswith("2")]
    assert values == [0, 30, 60, 90, 120]
    assert {path.name for path in out.glob("*.png")} == {"CartPole-v1__ppo.png"}


def test_no_runs_is_one_sentence(tmp_path, draw, capsys):
    with pytest.raises(SystemExit) as stop:
        draw()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--runs-dir" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interquartile_mean_and_its_interval():
    assert plot.iqm(np.array([100.0, 1, 2, 3, 4, 5, 6, -100])) == 3.5
    rows = [
        {"task": task, "memory": "lru", "batching": arm, "seed": str(seed), "last": str(centre + seed)}
        for arm, centre in (("sbb", 0.0), ("tbb", 10.0)) for task in "abcd" for seed in range(3)]
    sbb, tbb = ([float(arm[name]) for name in ("low", "iqm", "high")] for arm in plot.aggregate(rows))
    assert sbb == sorted(sbb) and tbb == sorted(tbb)
    assert sbb[1] == 1.0 and sbb[2] < 3 < tbb[0] and tbb[1] == 11.0
    assert len(plot.aggregate(rows[1:-3])) == 1             # the second arm lacks a task
    same = [row | {"last": {"a": "1", "b": "2", "c": "3", "d": "4"}[row["task"]]} for row in rows]
    for arm in plot.aggregate(same):                        # tasks differ, seeds do not: nothing to draw
        assert arm["low"] == arm["iqm"] == arm["high"] == "2.500"
    more = same + [{**row, "seed": "3"} for row in same if row["task"] in "ab"]     # weigh no more for it
    assert [arm["iqm"] for arm in plot.aggregate(more)] == ["2.500", "2.500"]
    fewer = [row for row in same if row["task"] != "a" or row["seed"] == "0"]       # one seed: no interval
    assert {(arm["iqm"], arm["low"], arm["high"]) for arm in plot.aggregate(fewer)} == {("2.500", "", "")}

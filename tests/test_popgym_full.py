"""benchmark/popgym_full.py: from run folders to the table of all of POPGym."""
import collections
import csv
import importlib
import json
import re
import sys
import tomllib

import pytest

import ppo_recurrent_sbb
import ppo_recurrent_tbb
from models.flags import parse
from tests.conftest import ROOT
from tests.helpers import cut

sys.path.insert(0, str(ROOT / "benchmark"))
import pages  # noqa: E402
import plot  # noqa: E402
import popgym_full  # noqa: E402
import popgym_limits  # noqa: E402
from entries import argv_of, digest, entries  # noqa: E402

SUITE = {name: entry for name, entry in entries().items() if entry["suite"] == "popgym-full"}
ROWS = (                                                    # of progress.csv
    {"global_step": 100, "seconds": 0.9, "charts/episodic_return": 0.9, "charts/episodes": 99},
    {"global_step": 200, "seconds": 2.4, "charts/episodic_return": 0.7, "charts/episodes": 100,
     "eval/episodic_return": 0.5},
    {"global_step": 300, "seconds": 3.6, "charts/episodic_return": 0.4, "charts/episodes": 100},
    {"seconds": 4.6, "charts/episodic_return": 0.3, "charts/episodes": 100, "eval/episodic_return": 0.6})


def write_run(folder, rows=ROWS, **other):
    """A finished run of the entry that the folder is named after.   other: what differs in its last row"""
    entry = SUITE[folder.name.rpartition("__")[0]]
    argv = entry["command"].split()
    memory, steps = (argv[argv.index(flag) + 1] for flag in ("--memory", "--total-timesteps"))
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"memory": memory, "script": argv[1].removesuffix(".py")}))
    with (folder / "progress.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, ROWS[1])
        writer.writeheader()
        writer.writerows([*rows[:-1], rows[-1] | {"global_step": steps} | other])
    (folder / "finished").touch()


def rows_of(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture
def make(tmp_path):
    """Makes the table of the runs in runs/."""
    def make():
        popgym_full.main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
        return tmp_path / "out"

    return make


def test_a_row_has_the_greatest_mean_of_training_and_the_last_evaluation(tmp_path, make):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__3")
    out = make()
    assert rows_of(out / "popgym-full.csv") == [{
        "task": "RepeatFirstHard", "memory": "mingru", "script": "pqn_recurrent_tbb.py", "seed": "3",
        "steps": "3014656", "seconds": "5", "mmer": "0.7000", "exploring": "0.3000", "final": "0.6000",
        "recipe": "best", "run": "popgym-full__RepeatFirst__Hard__best__3",
        "digest": digest(argv_of(SUITE["popgym-full__RepeatFirst__Hard__best"], 3))}]
    assert [(row["global_step"], row["return"]) for row in rows_of(out / "popgym-full-curves.csv")] == [
        ("200", "0.5000"), ("3014656", "0.6000")]


def test_the_legend_has_every_level_and_no_label_is_cut_off(tmp_path, make, monkeypatch):
    """The first panel, which has the legend, is of a family with one level here."""
    for task in ("Autoencode__Hard", "RepeatFirst__Easy"):
        write_run(tmp_path / f"runs/popgym-full__{task}__best__1")
    assert not [png.name for png in make().glob("*.png") if cut(png)]
    legends = {}

    def look(figure, path):
        legend = figure.axes[0].get_legend()
        legends[path.name] = legend and [text.get_text() for text in legend.get_texts()]

    monkeypatch.setattr(popgym_full, "save", look)
    make()
    assert legends["popgym-full-curves"] == ["Hard", "Easy"]


def test_the_million_of_a_memory_is_not_the_best_recipe_and_has_no_curve(tmp_path, make):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1")
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__mingru__1")
    out = make()
    assert [row["recipe"] for row in rows_of(out / "popgym-full.csv")] == ["1M", "best"]
    assert len(rows_of(out / "popgym-full-curves.csv")) == 2


def test_earlier_rows_stay_and_the_same_run_is_replaced(tmp_path, make):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1")
    write_run(tmp_path / "runs/popgym-full__Battleship__Easy__best__1")
    make()
    (tmp_path / "runs/popgym-full__Battleship__Easy__best__1/finished").unlink()
    out = make()
    assert [row["task"] for row in rows_of(out / "popgym-full.csv")] == ["BattleshipEasy", "RepeatFirstHard"]


def test_rows_of_a_recipe_that_has_changed_go_and_are_named(tmp_path, make, capsys):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1")
    write_run(tmp_path / "runs/popgym-full__Battleship__Easy__best__1")
    table = make() / "popgym-full.csv"
    (now,) = (row["digest"] for row in rows_of(table) if row["task"] == "RepeatFirstHard")
    table.write_text(table.read_text().replace(now, "of-other"))
    (tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1/finished").unlink()
    out = make()
    assert [row["task"] for row in rows_of(table)] == ["BattleshipEasy"]
    assert {row["task"] for row in rows_of(out / "popgym-full-curves.csv")} == {"BattleshipEasy"}
    assert "RepeatFirst__Hard__best__1: its row is of a recipe" in capsys.readouterr().err


def test_runs_that_are_not_the_suites_are_named_and_left_out(tmp_path, make, capsys):
    hard = tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1"
    write_run(hard)
    hard.rename(hard.with_name(f"{hard.name}_old"))
    write_run(hard)
    write_run(hard.with_name("popgym-full__RepeatFirst__Hard__best__2"), global_step=500)  # stopped early
    write_run(hard.with_name("popgym-full__RepeatFirst__Hard__best__3"), **{"eval/episodic_return": ""})
    other = hard.with_name("popgym-full__Autoencode__Hard__best__1")
    write_run(other)
    (other / "checkpoint.pt").touch()
    other.with_name(f"{other.name}.command").write_text("python another.py")
    write_run(hard.with_name("popgym-full__Autoencode__Easy__best__1"), rows=ROWS[:1])     # no 100 episodes
    damaged = hard.with_name("popgym-full__Battleship__Easy__best__1")
    write_run(damaged)
    (damaged / "args.json").write_text("{")
    assert [row["run"] for row in rows_of(make() / "popgym-full.csv")] == [hard.name]
    said = capsys.readouterr()
    assert said.out == f"1 runs of {hard.parent}, 0 earlier rows\n" and said.err.count("\n") == 6
    for why in ("it is not named <entry>__<seed>", "it has not made all of its steps",
                "it has no evaluation after its last step", "its entry has changed since it began",
                "it has no mean of 100 episodes", "JSONDecodeError"):
        assert said.err.count(why) == 1, why


def test_a_digest_tells_what_is_learned_apart():
    command = "python script.py --gamma 0.9 --eval-every 100 --seed 1".split()
    assert digest(command) == digest([word.replace("100", "200") for word in command])
    assert digest(command) != digest([word.replace("0.9", "0.99") for word in command])


def test_a_table_of_an_older_version_is_refused(tmp_path, make, capsys):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1")
    table = make() / "popgym-full.csv"
    table.write_text("task,seed\nRepeatFirstHard,1\n")
    with pytest.raises(SystemExit):
        make()
    assert "older version's: move it away" in capsys.readouterr().err


def test_what_is_committed_is_of_todays_recipes():
    rows = rows_of(pages.RESULTS / "popgym-full.csv")
    assert not [row["run"] for row in rows if not popgym_full.is_of(SUITE, row)]


def test_the_committed_aggregate_is_that_of_the_committed_table():
    rows = rows_of(pages.RESULTS / "popgym-full.csv")
    arms = popgym_full.interquartile_means([row for row in rows if row["recipe"] == "1M"])
    assert [{name: str(value) for name, value in arm.items()} for arm in arms] == rows_of(
        pages.RESULTS / "popgym-full-aggregate.csv")


def test_interquartile_means_are_of_the_memories_that_have_every_task(tmp_path, make):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__lru__1")
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__lru__2")
    assert not (make() / "popgym-full-aggregate.csv").exists()
    for name, entry in SUITE.items():
        if entry["cell"][2:] in (["gru"], ["none"]) or entry["group"] != "popgym-full":
            of_none = {"eval/episodic_return": 0.8} if entry["cell"][2:] == ["none"] else {}
            write_run(tmp_path / f"runs/{name}__1", **of_none)
    best, other = rows_of(make() / "popgym-full-aggregate.csv")                     # the best first
    assert (best["memory"], other["memory"], best["over"]) == ("none", "gru", "all tasks, one seed")
    assert other["tasks"] == "42" and float(other["iqm"]) == 0.6
    assert other["low"] == "" and pages.interval_cell(other) == "0.60"              # of one seed
    assert collections.Counter(row["recipe"] for row in rows_of(tmp_path / "out/popgym-full.csv")) == {
        "1M": 86, "ppo-sbb": 42, "dqn-tbb": 36}


def test_three_seeds_of_five_families_have_an_interval(tmp_path, make):
    """Each task's seeds have 0.2, 0.4 and 0.6: whatever is drawn again, every mean lies between."""
    for name, entry in SUITE.items():
        if entry["cell"][2:] == ["gru"] and entry["seeds"] == [1, 2, 3]:
            for seed in entry["seeds"]:
                write_run(tmp_path / f"runs/{name}__{seed}", **{"eval/episodic_return": 0.2 * seed})
    (row,) = rows_of(make() / "popgym-full-aggregate.csv")
    assert (row["over"], row["tasks"], row["runs"]) == ("five families, three seeds", "15", "45")
    assert float(row["iqm"]) == pytest.approx(0.4)
    assert 0.2 < float(row["low"]) < 0.4 < float(row["high"]) < 0.6


def test_without_runs_it_says_what_makes_them(tmp_path, make, capsys):
    with pytest.raises(SystemExit) as stopped:
        make()
    assert stopped.value.code == 2 and "--suite popgym-full" in capsys.readouterr().err


def test_plot_leaves_the_suite_to_it(tmp_path):
    write_run(tmp_path / "runs/popgym-full__RepeatFirst__Hard__best__1")
    plot.main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


def test_the_suite_has_every_task_with_every_memory():
    from models import MEMORIES  # brings torch

    cells = [entry["cell"] for entry in SUITE.values() if entry["group"] == "popgym-full"]
    assert len(cells) == 42 * (1 + len(MEMORIES))
    assert {memory for _, _, memory in cells} == {"best", *MEMORIES}


def test_dqn_by_tape_has_the_discount_of_its_family():
    for name, entry in SUITE.items():
        if entry["group"] == "popgym-full-dqn-tbb":
            family, level = entry["cell"]
            tape = SUITE[f"popgym-full__{family}__{level}__lru"]["command"]
            assert re.findall(r"--gamma \S+", entry["command"]) == re.findall(r"--gamma \S+", tape), name


def test_ppo_by_segments_has_the_recipe_of_ppo_by_tape():
    """But for what only one of them has. PQN's families have the bandit's recipe, with gamma 0."""
    same = set(vars(ppo_recurrent_sbb.Args())) & set(vars(ppo_recurrent_tbb.Args()))
    for name, entry in SUITE.items():
        if entry["group"] == "popgym-full-ppo-sbb":
            family, level = entry["cell"]
            args = args_of(entry)
            tape = SUITE[f"popgym-full__{family}__{level}__lru"]
            if "pqn" in tape["command"]:
                expected = vars(args_of(SUITE["popgym-full__MultiarmedBandit__Easy__lru"]))
                expected |= {"env_id": f"popgym-{family}{level}-v0", "gamma": 0.0}
            else:
                expected = vars(args_of(tape))
            assert {key: vars(args)[key] for key in same} == {key: expected[key] for key in same}, name


def args_of(entry):
    _, script, *flags = entry["command"].split()
    module = importlib.import_module(script.removesuffix(".py"))
    return parse(module.Args, module.SCRIPT, flags)[0]


def test_every_run_ends_with_a_whole_rollout_and_an_evaluation():
    commands = {}                                           # the same steps and flags need no second look
    for entry in SUITE.values():
        words = entry["command"].split()
        flags = "--num-envs", "--num-steps", "--train-every", "--total-timesteps", "--eval-every"
        key = words[1], *(words[words.index(flag) + 1] for flag in flags if flag in words)
        commands[key] = entry
    for entry in commands.values():
        args = args_of(entry)
        rollout = args.train_every if "dqn" in entry["command"] else args.num_envs * args.num_steps
        end, every = args.total_timesteps, args.eval_every
        assert end % rollout == 0 and end // every > (end - rollout) // every, entry["command"]


def test_every_placeholder_of_every_entry_is_filled():
    assert not [name for name, entry in entries().items() if re.search(r"{[\w-]+[}{]", entry["command"])]


def test_the_pages_line_for_a_memory_of_your_own_is_like_the_others():
    line = re.search("`(mine = .*?)`", (ROOT / "docs/popgym.md").read_text())[1]
    suite = tomllib.loads((ROOT / "benchmark/tasks/popgym-full.toml").read_text())
    lru = suite["popgym-full"]["grid"]["memory"]["lru"]
    assert tomllib.loads(line) == {"mine": lru | {"memory": "mine"}}


def test_a_cell_says_how_many_seeds_it_has_where_others_have_another_number():
    row = {"script": "pqn_recurrent_tbb.py", "memory": "lru", "steps": "9", "seconds": "9", "mmer": "0",
           "exploring": "0", "final": "0.5", "recipe": "best"}
    seeds = {"AutoencodeEasy": 2, "AutoencodeMedium": 3, "AutoencodeHard": 1, "CountRecallEasy": 2}
    table = pages.popgym_table([row | {"task": task} for task, n in seeds.items() for _ in range(n)])
    finals = [line.split(" | ")[4] for line in table.splitlines()[2:]]
    assert finals == ["0.500 ± 0.000", "0.500 ± 0.000 (n = 3)", "0.500 (n = 1)", "0.500 ± 0.000"]


def test_the_table_beside_the_published_one():
    rows = [{"task": "AutoencodeHard", "memory": "lru", "script": "pqn_recurrent_tbb.py", "seed": seed,
             "steps": "3000", "seconds": "60", "mmer": "-0.1", "exploring": "-0.15", "final": final,
             "recipe": "best"}
            for seed, final in (("1", "-0.2"), ("2", "-0.3"))]
    *_, line = pages.popgym_table(rows).splitlines()
    assert line == (
        "| AutoencodeHard | PQN, lru | 3,000 | 60 | -0.250 ± 0.050 | -0.150 ± 0.000 | -0.100 ± 0.000 | "
        "-0.456 | -0.448 IndRNN | - |")


def test_the_table_of_memories():
    row = {"task": "AutoencodeHard", "script": "-", "seed": "1", "recipe": "1M"}
    rows = [row | {"memory": "lru", "final": "-0.2"}, row | {"memory": "gru", "final": "-0.3"},
            row | {"memory": "lru", "final": "0.9", "recipe": "best"}]
    assert pages.popgym_memories_table(rows).splitlines() == [
        "| task | gru | lru |", "|---|---|---|", "| AutoencodeHard | -0.30 | -0.20 |"]


def test_what_is_below_the_published_figures_by_more_than_their_rounding():
    finals = (("RepeatPreviousMedium", "0.70"), ("RepeatPreviousMedium", "0.8772"),      # published: 0.789
              ("RepeatPreviousHard", "0.1904"), ("BattleshipEasy", "0"))                 # 0.191, nothing
    rows = [{"recipe": "best", "task": task, "final": final} for task, final in finals]
    assert pages.popgym_reached(rows) == (
        "Ours reaches 1 of 2 published figures. Below: RepeatPreviousHard.\n")


def test_the_table_of_scripts():
    row = {"task": "AutoencodeHard", "memory": "lru", "recipe": "1M"}
    rows = [row | {"final": "-0.2"}, row | {"final": "-0.3", "recipe": "ppo-sbb"},
            row | {"final": "-0.4", "recipe": "dqn-tbb"},
            row | {"final": "0.9", "recipe": "best"}, row | {"final": "0.8", "memory": "gru"},
            row | {"final": "0.7", "task": "AutoencodeEasy"}]
    assert pages.popgym_scripts_table(rows).splitlines() == [
        "| task | PPO or PQN, by tape | PPO, by segments | DQN, by tape |", "|---|---|---|---|",
        "| AutoencodeHard | -0.20 | -0.30 | -0.40 |"]


def test_players_who_know_the_rules_have_what_is_committed():
    committed = {row["task"]: row for row in rows_of(pages.RESULTS / "popgym-limits.csv")}
    found = popgym_limits.limits(512)
    assert found.keys() == committed.keys()
    for task, returns in found.items():
        error = returns.std() / 512**0.5
        assert abs(returns.mean() - float(committed[task]["return"])) < 4 * error, task

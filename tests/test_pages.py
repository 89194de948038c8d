"""benchmark/pages.py: the generated parts of README.md and docs/ are those of the committed files."""
import csv
import os
import re
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import pages  # noqa: E402
from entries import entries  # noqa: E402

from tests.plant import can_be_planted, import_once, plants  # noqa: E402

pytestmark = pytest.mark.quick
TEXTS = {page.name: page.read_text() for page in pages.PAGES}


@pytest.mark.parametrize("name", TEXTS)
def test_generated_parts_are_those_of_the_committed_files(name):
    assert pages.filled(TEXTS[name]) == TEXTS[name], "run python benchmark/pages.py"


def test_every_committed_table_is_on_a_page():
    shown = {name for text in TEXTS.values() for name in pages.OPENING.findall(text)}
    grids = {path.stem.removesuffix("-table") for path in pages.RESULTS.glob("*-table.csv")}
    aggregates = {path.stem for path in pages.RESULTS.glob("*-aggregate.csv")}
    assert grids | aggregates | pages.TABLES.keys() | pages.WRITTEN.keys() == shown


def test_every_result_is_of_an_entry_and_has_its_curve():
    names = {row["entry"] for row in pages.rows_of(pages.RESULTS / "table.csv")}
    assert names <= set(entries())
    for name in names:
        assert (pages.RESULTS / f"{name}.csv").exists() and (pages.RESULTS / f"{name}.png").exists()


def test_what_works_was_solved_by_more_than_half_of_the_seeds():
    for line in pages.works().splitlines()[2:]:
        solved, seeds = re.search(r"(\d+) of (\d+)", line).groups()
        assert int(solved) > int(seeds) / 2, line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="plant.py forks")
def test_what_plants_change_is_still_there():
    import_once()
    assert not [name for name in plants() if not can_be_planted(name)]


def test_the_page_of_known_bugs_says_how_many_are_planted():
    """Whoever adds one plants it, and writes down that it was caught: the number is by hand."""
    said, = re.findall(r"all (\d+) were caught", TEXTS["known-bugs.md"].replace("\n", " "))
    assert int(said) == len(plants()), "run python tests/plant.py"


def test_a_marker_that_names_nothing_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        pages.filled("before\n<!-- elephant -->\n<!-- /elephant -->\n")
    assert re.search("<!-- elephant -->.*elephant-table.csv", capsys.readouterr().err)


def test_a_part_that_is_not_closed_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        pages.filled("<!-- results -->\n| a table |\n")
    assert "<!-- results -->" in capsys.readouterr().err


def test_a_part_is_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setitem(pages.WRITTEN, "hello", lambda: "new\n")
    text = ("a\n<!-- hello -->\nold\n<!-- /hello -->\n<!-- block -->\n```bash\nls\n```\n"
            "<!-- hello -->\n<!-- /hello -->\nb\n")
    new = text.replace("old\n", "").replace("<!-- hello -->\n", "<!-- hello -->\nnew\n")
    assert pages.filled(text) == new == pages.filled(new)


def test_the_table_of_a_grid():
    names = "task", "memory", "seed", "last", "steps", "seconds"
    rows = [dict(zip(names, row)) for row in (
        ("easy", "lru", "1", "0.5", "9", "9"), ("easy", "lru", "2", "1", "9", "9"),
        ("easy", "gru", "1", "0", "9", "9"), ("hard", "lru", "1", "-1", "9", "9"))]
    assert pages.grid_table(rows).splitlines() == [
        "| task | lru | gru |", "|---|---|---|",
        "| easy | 0.75 ± 0.25 | 0.00 (n = 1) |", "| hard | -1.00 | - |"]


def test_the_table_of_entries():
    row = {"entry": "poc", "seed": "1", "measure": "success", "level": "0.9", "steps_to_level": "1024",
           "last": "1", "steps": "4096"}
    slower = row | {"seed": "2", "steps_to_level": "2048", "last": "0.95", "steps": "8192"}
    never = row | {"seed": "3", "steps_to_level": "", "last": "0.5"}
    *_, one = pages.entries_table([row]).splitlines()
    assert one == "| `poc` | success >= 0.9 | 1 of 1 | 1,024 | 1 after 4,096 steps |"
    *_, three = pages.entries_table([row, slower, never]).splitlines()
    assert three == ("| `poc` | success >= 0.9 | 2 of 3 | 1,024 to 2,048 | 0.5 to 1 "
                     "after 4,096 or 8,192 steps |")


def test_off_policy_speeds_have_no_ratio_where_there_is_nothing_to_compare_with():
    row = {"script": "sac_gru", "memory": "gru", "algorithm": "SAC", "ours": "1000", "sb3": "2000",
           "ratio": "0.50", "ours_ms": "8.1", "sb3_ms": "4.0", "share_policy": "0.1", "share_env": "0.2",
           "share_batch": "0.3", "share_update": "0.4"}
    alone = row | {"script": "sac_discrete_sbb", "algorithm": ""}
    *_, first, second = pages.off_policy_speed_table([row, alone]).splitlines()
    assert first == "| sac_gru, gru | 1,000 | SAC, 2,000 | 0.50 | 8.1 | 4.0 | 10%, 20%, 30%, 40% |"
    assert second == "| sac_discrete_sbb, gru | 1,000 | - | - | 8.1 | - | 10%, 20%, 30%, 40% |"


def test_devices_side_by_side():
    run = {"script": "sac_gru", "memory": "gru", "num_envs": "1024", "hidden_size": "64"}
    cpu = run | {"device": "cpu", "name": "x86_64", "steps_per_second": "200"}
    gpu = run | {"device": "cuda", "name": "G", "steps_per_second": "3000"}
    header, _, both, alone = pages.devices_table([cpu, gpu, gpu | {"memory": "lru"}]).splitlines()
    assert header == ("| script, memory | environments | width | cpu (x86_64), steps/s | cuda (G), steps/s "
                      "| ratio |")
    assert both == "| sac_gru, gru | 1,024 | 64 | 200 | 3,000 | 15.0 |"
    assert alone == "| sac_gru, lru | 1,024 | 64 | - | 3,000 | - |"


def test_where_an_entry_and_a_grids_cell_reach_a_level_first(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "table.csv").write_text(
        "entry,steps_to_level,seconds_to_level\nother,1,0.5\nmine,20,3.5\nmine,,\n")
    assert pages.first_reached("mine", {"cell": []}, 0.5) == [(20, 3.5), None]
    with (tmp_path / "grid.csv").open("w", newline="") as f:
        csv.writer(f).writerows([
            ("length", "memory", "seed", "global_step", "seconds", "value"),
            ("10", "gru", "1", "100", "1", "0.1"), ("10", "gru", "1", "200", "2", "0.9"),
            ("10", "gru", "1", "300", "3", "0.2"), ("10", "lru", "1", "50", "1", "1"),
            ("10", "gru", "2", "300", "3", "0.4")])
    cell = {"group": "grid", "cell": ["10", "gru"], "grid": {"length": {}, "memory": {}}}
    assert pages.first_reached("grid__10__gru", cell, 0.5) == [(200, 2.0), None]
    cell["level"] = 0.5
    assert pages.reached_cell("grid__10__gru", {"grid__10__gru": cell}, None) == "200 steps, 2 s (1 of 2)"
    cell["level"] = 2
    assert pages.reached_cell("grid__10__gru", {"grid__10__gru": cell}, None) == "0 of 2"


def test_notes_become_an_index(tmp_path, monkeypatch, capsys):
    """A note in two files is one line; | in a note does not end a cell."""
    note = ("    # KNOWN BUG (their.py): |a| is added, a ... b; and more. Symptom: nan. Here: fixed.\n"
            "    #   Test: test_x.py::test_a.\n    x = 1\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "one.py").write_text(note)
    pitfall = "# PITFALL: too late. Symptom: slow; wrong. Test: test_y.py::test_b.\n"
    (tmp_path / "models" / "two.py").write_text(note + pitfall)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    lines = pages.known_bugs().splitlines()
    where = "`one.py`, `models/two.py`"
    assert rf"| \|a\| is added, a ... b (their.py) | nan | {where} | `test_x.py::test_a` |" in lines
    assert "| too late | slow; wrong | `models/two.py` | `test_y.py::test_b` |" in lines
    (tmp_path / "one.py").write_text("# PITFALL without a colon. Test: test_y.py::test_b.\n")
    with pytest.raises(SystemExit):
        pages.known_bugs()
    assert "one.py" in capsys.readouterr().err

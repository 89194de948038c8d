"""benchmark/every_task.py: other people's tasks are tried apart, and the table says what became of each."""
import csv
import os
import sys

import gymnasium as gym
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.test_door import Stranger

sys.path.insert(0, str(ROOT / "benchmark"))
import every_task  # noqa: E402
import pages  # noqa: E402


class Crashing(Stranger):
    def step(self, action):
        os._exit(3)


class Broken(Stranger):
    observation_space = gym.spaces.MultiDiscrete([6, 2])
    observation = np.array([4, 2])


def row_of(path):
    return {row["id"]: row for row in csv.DictReader(path.open())}


def test_a_few_ids_run_and_an_absent_package_is_said_to_be(tmp_path, monkeypatch, capsys):
    """The ids that are not tried now keep their rows, and the rows have the order of TASKS."""
    out = tmp_path / "table.csv"
    absent = "no_such_module", ["Absent-v0"]
    monkeypatch.setattr(every_task, "TASKS", every_task.TASKS | {"nobody's": absent})
    ids = "Absent-v0", "CartPole-v1", "Pendulum-v1"
    every_task.main(["--ids", *ids, "--out", str(out)])
    every_task.main(["--ids", "MiniGrid-Empty-8x8-v0", "--out", str(out)])
    rows = row_of(out)
    assert list(rows) == ["MiniGrid-Empty-8x8-v0", "CartPole-v1", "Pendulum-v1", "Absent-v0"]
    assert rows["Absent-v0"]["result"] == "package absent" and not rows["Absent-v0"]["version"]
    assert {rows[name]["result"] for name in list(rows)[:3]} == {"runs"}
    assert rows["CartPole-v1"]["scripts"] == "ppo_recurrent_tbb pqn_recurrent_tbb dqn_recurrent_tbb"
    assert rows["Pendulum-v1"]["scripts"] == "ppo_recurrent_tbb sac_gru"
    assert (rows["CartPole-v1"]["observation"], rows["CartPole-v1"]["actions"]) == ("Box(4)", "Discrete(2)")
    assert float(rows["CartPole-v1"]["steps_per_second"]) > 1_000
    assert "gymnasium" in rows["CartPole-v1"]["version"] and "package absent" in capsys.readouterr().out
    table = pages.every_task_table(list(rows.values()))
    assert "3 of 4 ids ran (3 by PPO, 2 by PQN, 2 by DQN, 1 by SAC), with " in table
    assert "so not tried: nobody's.\n" in table


def test_a_crash_or_a_refusal_costs_one_row(tmp_path, monkeypatch):
    out, tasks = tmp_path / "table.csv", ["Crashing-v0", "Broken-v0", "Unknown-v0", "Slow-v0"]
    for task, base in ("Crashing-v0", Crashing), ("Broken-v0", Broken), ("Slow-v0", Stranger):
        gym.registry.pop(task, None)
        gym.register(task, base)
    monkeypatch.setattr(every_task, "TASKS", {"theirs": ("gymnasium", tasks)})
    every_task.main(["--ids", *tasks[:3], "--out", str(out)])
    every_task.main(["--ids", "Slow-v0", "--seconds", "0.01", "--out", str(out)])
    results = {name: row["result"] for name, row in row_of(out).items()}
    assert results["Crashing-v0"] == "its process ended with exit code 3"
    sentence = "dqn_recurrent_tbb: --env-id Broken-v0 left its space MultiDiscrete([6 2]) with [4 2] in "
    assert results["Broken-v0"].startswith(sentence)
    assert results["Unknown-v0"].startswith("NameNotFound: ")
    assert results["Slow-v0"] == "not done after 0.01 seconds"
    table = pages.every_task_table(list(row_of(out).values()))
    assert f"\n* `Broken-v0`: {sentence}" in table and "| theirs | `Broken-v0` |" in table


@pytest.mark.quick
@pytest.mark.parametrize("space, says", [
    (gym.spaces.Box(0, 255, (84, 84, 3), np.uint8), "Box(84, 84, 3) uint8"),
    (gym.spaces.Tuple([gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (3,))]), "Tuple(Discrete(2), Box(3))"),
    (gym.spaces.Dict(a=gym.spaces.MultiDiscrete([3, 3]), b=gym.spaces.Text(4)),
     "Dict(a MultiDiscrete([3, 3]), b text)"),
    (gym.spaces.MultiDiscrete([14] * 52), "MultiDiscrete([14] x 52)")])
def test_spaces_in_a_few_letters(space, says):
    assert every_task.short(space) == says


@pytest.mark.quick
def test_every_committed_row_is_of_a_task_and_every_task_has_one():
    rows = row_of(pages.RESULTS / "every-task.csv")
    assert list(rows) == [task for _, tasks in every_task.TASKS.values() for task in tasks]
    assert {package: len(tasks) for package, (_, tasks) in every_task.TASKS.items()} == {
        "ours, 256 of each": 15,
        "POPGym, 256 of each": 42, "POPGym, Labyrinth": 6, "Memory Gym": 10, "MiniGrid": 12, "BabyAI": 8,
        "classic control": 5, "toy text": 5, "Box2D": 4, "MuJoCo": 11, "Atari": 3}
    for row in rows.values():
        others = "sac_gru" if row["actions"].startswith("Box") else "pqn_recurrent_tbb dqn_recurrent_tbb"
        assert row["scripts"] == f"ppo_recurrent_tbb {others}" or row["result"] != "runs", row


@pytest.mark.quick
def test_the_levels_of_a_task_and_tasks_with_equal_spaces_are_a_line():
    row = {"package": "P", "version": "p 1", "observation": "Box(1)", "actions": "Discrete(2)",
           "steps_per_second": "1234", "scripts": "ppo_recurrent_tbb dqn_recurrent_tbb", "result": "runs"}
    rows = [row | {"id": f"popgym-A{level}-v0"} for level in ("Easy", "Medium")]
    rows += [row | {"id": f"B-v{n}", "steps_per_second": f"{10**n}"} for n in range(4)]
    rows[1] |= {"observation": "Box(2)", "steps_per_second": "21"}
    assert pages.every_task_table(rows).splitlines()[2:4] == [
        "| P | `popgym-AEasy-v0` (Medium) | Box(1); Box(2) | Discrete(2) | PPO, DQN | 1,200 / 21 |",
        "| P | `B-v0`, `B-v1`, `B-v2`, `B-v3` | Box(1) | Discrete(2) | PPO, DQN | 1 to 1,000 |"]

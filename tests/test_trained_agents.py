"""The trained agents in benchmark/models do what models.csv says of them."""
import csv
import json
import sys

import numpy as np
import pytest

import ppo_recurrent_sbb
from envs.memory_gym import TASKS as MEMORY_GYM
from models.flags import read_model
from tests.conftest import ROOT, needs_memory_gym
from tests.helpers import run

sys.path.insert(0, str(ROOT / "benchmark"))
import ship  # noqa: E402
from entries import entries  # noqa: E402

ROWS = list(csv.DictReader((ship.MODELS / "models.csv").open()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["entry"])
def test_an_agent_gets_the_return_that_is_said_of_it(row):
    (returns, _, successes), args = ship.measure(ship.MODELS / f"{row['entry']}.safetensors", 10)
    # the standard error of the difference of the two means
    error = float(row["std"]) * (1 / 10 + 1 / int(row["episodes"])) ** 0.5
    assert abs(returns.mean() - float(row["return"])) <= 4 * error + 0.01
    if not np.isnan(float(row["success"])):
        assert successes.mean() >= float(row["success"]) - 0.11
    assert f"{row['script']}.py" in entries()[row["entry"]]["command"]
    assert args.env_id == row["task"]


@needs_memory_gym
@pytest.mark.parametrize(
    "row", [row for row in ROWS if f"memory_gym/{row['task']}" in MEMORY_GYM], ids=lambda row: row["entry"])
def test_an_agent_of_our_batch_is_as_good_in_memory_gyms_own_task(row):
    path = ship.MODELS / f"{row['entry']}.safetensors"
    (returns, _, successes), _ = ship.measure(path, 100, flags=["--env-id", f"memory_gym/{row['task']}"])
    error = float(row["std"]) * (1 / 100 + 1 / int(row["episodes"])) ** 0.5
    assert abs(returns.mean() - float(row["return"])) <= 4 * error + 0.01
    assert successes.mean() >= float(row["success"]) - 0.06


def test_they_are_all_there_small_and_tell_nothing_of_where_they_were_made():
    files = list(ship.MODELS.glob("*.safetensors"))
    assert sorted(path.stem for path in files) == sorted(row["entry"] for row in ROWS)
    assert sum(path.stat().st_size for path in files) < 20e6
    for path in files:
        args = json.loads(read_model(path)["args"])
        assert (args["runs_dir"], args["run_name"], args["resume"]) == ("runs", None, None)


def test_shipping_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "MODELS", tmp_path / "models")
    run(tmp_path, ppo_recurrent_sbb, run_name="poc-gru__7")
    for _ in range(2):                                      # twice is once
        ship.main(["poc-gru", "--seed", "7", "--runs-dir", str(tmp_path), "--episodes", "4"])
    row, = csv.DictReader((tmp_path / "models" / "models.csv").open())
    said = row["entry"], row["seed"], row["episodes"], row["steps"]
    assert said == ("poc-gru", "7", "4", "384")
    args = json.loads(read_model(tmp_path / "models" / "poc-gru.safetensors")["args"])
    assert {name: args[name] for name in ship.HERE} == ship.HERE
    assert args["device"] == "auto"                         # it was trained on "cpu"

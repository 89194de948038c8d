"""The programs in benchmark/ that compute something: the return as a monoid, the horizon report, truncation, equal work."""
import csv
import dataclasses
import importlib
import statistics
import sys

import gymnasium as gym
import pytest
import safetensors.torch
import torch
import tyro

import ppo_recurrent_tbb as tbb
from models.scan import associative_scan
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
discounted_return, horizon, plot, speed, truncation = (
    importlib.import_module(x) for x in ("discounted_return", "horizon", "plot", "speed", "truncation"))


def test_the_four_ways_agree_and_a_wrong_one_is_named(monkeypatch):
    discounted_return.check()
    monkeypatch.setattr(discounted_return, "resettable", lambda op: lambda left, right: (right[0], op(left[1], right[1])))
    with pytest.raises(SystemExit, match="associative scan differs .* ending an episode"):
        discounted_return.check()


def test_discounted_return_writes_its_table_and_plot(tmp_path, capsys):
    args = discounted_return.Args(lengths=(10, 40), repeats=1, max_seconds=0.0, out=str(tmp_path))
    rows = discounted_return.measure(args)
    assert rows[0]["linear scan"] > 0 and rows[1]["linear scan"] is None       # too slow for max_seconds: not tried again
    discounted_return.write(rows, tmp_path)
    assert (tmp_path / "discounted_return.png").exists() and "40" in capsys.readouterr().out
    table = list(csv.DictReader((tmp_path / "discounted_return.csv").open()))
    assert [row["length"] for row in table] == ["10", "40"] and set(discounted_return.WAYS) < set(table[0])
    assert associative_scan                                                     # the general scan is what was timed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    args = tbb.Args(env_id="popgym-RepeatPreviousEasy-v0", num_envs=4, num_steps=16, total_timesteps=64,
                    hidden_size=8, mlp_size=8, runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="run", device="cpu")
    return tbb.train(args) / "model.safetensors"


def test_horizon_of_a_known_memory_and_none_across_a_start():
    """A memory that halves its state every step: the value's gradient halves with every step back, and stops at a start."""
    class Halving(torch.nn.Module):
        def initial_state(self, batch_size):
            return (torch.zeros(batch_size, 3),)

        def forward(self, x, state, start):
            (h,), ys = state, []
            for x_t, start_t in zip(x, start):
                h = 0.5 * h.masked_fill(start_t[:, None], 0) + x_t
                ys.append(h)
            return torch.stack(ys), (h,)

    agent = torch.nn.Module()
    agent.memory, agent.hidden = Halving(), torch.nn.Linear(3, 4)
    agent.value, agent.policy = torch.nn.Linear(2, 1), torch.nn.Module()
    agent.policy.linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for layer in (agent.hidden, agent.value, agent.policy.linear):
            layer.weight.fill_(1.0), layer.bias.zero_()
    x, start = torch.rand(20, 1, 3), torch.zeros(20, 1, dtype=torch.bool)
    start[[0, 8]] = True
    value, policy = horizon.sensitivity(agent, x, start, [7, 15])
    expected = 2 * 3**0.5 * 0.5 ** torch.arange(8.0)                             # both episodes have 8 steps up to the target
    torch.testing.assert_close(value[:8], expected)
    torch.testing.assert_close(policy[:8], expected)
    assert value[8:].isnan().all() and policy[8:].isnan().all()


@pytest.mark.parametrize("memory", ["lru", "lstm", "mingru"])
def test_horizons_gradients_are_finite_differences_and_zero_across_a_start(memory):
    torch.manual_seed(0)
    agent = tbb.Agent(gym.spaces.Discrete(3), gym.spaces.Discrete(2),
                      tbb.Args(memory=memory, hidden_size=4, mlp_size=8, num_layers=1)).double()
    x, start = torch.rand(10, 1, 3, dtype=torch.float64), torch.zeros(10, 1, dtype=torch.bool)
    start[[0, 4]] = True
    (norms,) = horizon.gradients(agent, x, start, [8])                          # [2, T]
    assert (norms[:, :4] == 0).all() and (norms[:, 9:] == 0).all() and (norms[:, 4:9] > 0).all()
    epsilon, numeric = 1e-6, torch.zeros(2, 10, 3, dtype=torch.float64)
    for s in range(10):
        for i in range(3):
            dx = torch.zeros_like(x)
            dx[s, 0, i] = epsilon
            with torch.no_grad():
                high, low = (torch.stack(horizon.outputs(agent, x + sign * dx, start))[:, 8] for sign in (1, -1))
            numeric[:, s, i] = (high - low) / (2 * epsilon)
    torch.testing.assert_close(norms, numeric.norm(dim=-1), rtol=1e-5, atol=1e-8)


def test_horizon_of_a_wrong_file_or_flag_is_one_sentence(tmp_path, model, capsys):
    """A file may name none but our scripts: whatever else it names is not imported."""
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other", {"script": "antigravity", "args": "{}"})
    for argv in (["--model", str(tmp_path / "none")], ["--model", str(tmp_path / "other")],
                 ["--model", str(model), "--steps", "0"], ["--model", str(model), "--out", str(model / "folder")],
                 ["--model", str(model), "--sweep", "k"], ["--model", str(model), "--sweep", "k", "two"],
                 ["--model", str(model), "--sweep", "wrong", "2"],
                 ["--model", str(model), "--sweep", "env-id", "PocMemory-v0"]):
        with pytest.raises(SystemExit) as stop:
            horizon.main(argv)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "--" in said, (argv, said)
    assert "antigravity" not in sys.modules


def test_horizon_report_and_sweep(tmp_path, model):
    horizon.main(["--model", str(model), "--steps", "60", "--targets", "4", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "horizon.csv").open()))
    assert [int(row["k"]) for row in rows] == list(range(len(rows))) and 10 < len(rows) <= 51       # episodes of 51 steps
    assert all(float(row["value"]) > 0 and float(row["policy"]) > 0 for row in rows)
    for sweep in (["env-id", "popgym-RepeatFirstEasy-v0", "popgym-RepeatPreviousEasy-v0"], ["k", "2", "4"]):
        horizon.main(["--model", str(model), "--sweep", *sweep, "--episodes", "16", "--out", str(tmp_path)])
        rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
        assert [row[sweep[0]] for row in rows] == sweep[1:] and all(-1 <= float(row["return"]) <= 1 for row in rows)
    assert (tmp_path / "horizon.png").exists() and (tmp_path / "sweep.png").exists()


@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_truncation_cuts_gradients_and_nothing_else(memory):
    T = 24
    tape, values = truncation.gradients(memory, None, T)
    whole, values_whole = truncation.gradients(memory, -1, T)
    torch.testing.assert_close(whole, tape)
    t, s = torch.arange(T)[:, None], torch.arange(T)
    assert (tape[s <= t] > 0).all() and (tape[s > t] == 0).all()
    cut, values_cut = truncation.gradients(memory, 8, T)
    torch.testing.assert_close((values_whole, values_cut), (values, values))
    same_segment = t // 8 == s // 8
    torch.testing.assert_close(cut, torch.where(same_segment, tape, 0.0))


def test_truncation_by_distance(tmp_path):
    truncation.main(["--memories", "lru", "--lengths", "4", "--steps", "24", "--distance", "10", "--out", str(tmp_path)])
    rows = {row[1]: [float(x) for x in row[2:]] for row in csv.reader((tmp_path / "truncation.csv").open()) if row[1] != "arm"}
    assert rows["TBB"] == rows["SBB, whole"] and min(rows["TBB"]) > 0
    assert min(rows["SBB, L = 4"][:4]) > 0 and max(rows["SBB, L = 4"][4:]) == 0


def test_truncation_by_default_gives_all_places_in_a_segment_the_same_weight():
    """If every gradient that exists is 1, the mean at distance d is the share of a segment's places with d before."""
    args = truncation.Args()
    t, s = torch.arange(args.steps)[:, None], torch.arange(args.steps)
    for L in args.lengths:
        pairs = ((t // L == s // L) & (s <= t)).double()
        expected = [max(0.0, 1 - d / L) for d in range(args.distance + 1)]
        assert truncation.by_distance(pairs, args.distance) == pytest.approx(expected)


@pytest.mark.parametrize("script", speed.OFF_POLICY)
def test_speeds_off_policy_runs_train_as_often_and_on_as_many_steps_as_they_say(script, tmp_path, monkeypatch):
    """stable-baselines3's side takes these numbers from the table; ours must come to them by its own flags."""
    _, steps, gradient_steps, _, algorithm, transitions = speed.OFF_POLICY[script]
    module = importlib.import_module(script)
    args = tyro.cli(module.Args, args=speed.argv(speed.off_policy_flags(speed.Args(), script, "none")))
    module.check(args)
    counted = []
    if hasattr(module, "SequenceReplay"):
        sample = module.SequenceReplay.sample
        monkeypatch.setattr(module.SequenceReplay, "sample", lambda *a: (x := sample(*a), counted.append(x[0].sum()))[0])
    run = module.train(dataclasses.replace(args, total_timesteps=speed.LEARNING_STARTS + 9 * steps, hidden_size=8, mlp_size=8,
                                           log_every=steps, runs_dir=str(tmp_path), device="cpu"))
    rows = [row for row in csv.DictReader((run / "progress.csv").open()) if int(row["global_step"]) > speed.LEARNING_STARTS]
    first, *_, last = (float(row["charts/gradient_steps"]) for row in rows)
    assert last - first == pytest.approx(gradient_steps * (len(rows) - 1), abs=1)
    if algorithm:
        counted = [float(n) for n in counted or (row["charts/transitions"] for row in rows)]
        assert statistics.mean(counted) == pytest.approx(transitions, rel=0.02)


def test_speeds_off_policy_table():
    row = {"script": "sac_gru", "memory": "gru", "algorithm": "SAC", "ours": "1000", "sb3": "2000", "ratio": "0.50",
           "ours_ms": "8.1", "sb3_ms": "4.0", "share_policy": "0.1", "share_env": "0.2", "share_batch": "0.3",
           "share_update": "0.4"}
    *_, first, second = plot.off_policy_speed_table([row, row | {"script": "sac_discrete_sbb", "algorithm": ""}]).splitlines()
    assert first == "| sac_gru, gru | 1,000 | SAC, 2,000 | 0.50 | 8.1 | 4.0 | 10%, 20%, 30%, 40% |"
    assert second == "| sac_discrete_sbb, gru | 1,000 | - | - | 8.1 | - | 10%, 20%, 30%, 40% |"

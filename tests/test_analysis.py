"""The programs in benchmark/ that compute something: the return as a monoid, horizon, truncation, speed."""
import csv
import dataclasses
import functools
import importlib
import json
import statistics
import sys

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch

import ppo_recurrent_tbb as tbb
import tests.test_masks  # noqa: F401  (registers Masked-v0)
from envs.vector import make_envs
from models import PolicyHead, QHead
from models.flags import parse
from tests.conftest import CONTINUOUS, DQN, PQN, ROOT
from tests.helpers import run, spy

sys.path.insert(0, str(ROOT / "benchmark"))
import discounted_return  # noqa: E402
import horizon  # noqa: E402
import speed  # noqa: E402
import truncation  # noqa: E402


def test_the_four_ways_agree_and_a_wrong_one_is_named(monkeypatch):
    def never_reset(op):
        return lambda left, right: (right[0], op(left[1], right[1]))

    discounted_return.check()
    monkeypatch.setattr(discounted_return, "resettable", never_reset)
    with pytest.raises(SystemExit, match="associative scan differs .* ending an episode"):
        discounted_return.check()


def test_discounted_return_writes_its_table_and_plot(tmp_path, capsys):
    args = discounted_return.Args(lengths=(10, 40), repeats=1, max_seconds=0.0, out=str(tmp_path))
    rows = discounted_return.measure(args)
    assert rows[0]["linear scan"] > 0 and rows[1]["linear scan"] is None  # slower than max_seconds: given up
    discounted_return.write(rows, tmp_path)
    assert (tmp_path / "discounted_return.png").exists() and "40" in capsys.readouterr().out
    table = list(csv.DictReader((tmp_path / "discounted_return.csv").open()))
    assert [row["length"] for row in table] == ["10", "40"]
    assert set(discounted_return.WAYS) < set(table[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    args = tbb.Args(
        env_id="popgym-RepeatPreviousEasy-v0", num_envs=4, num_steps=16, total_timesteps=64, hidden_size=8,
        mlp_size=8, runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="run", device="cpu")
    return tbb.train(args, {}) / "model.safetensors"


def test_horizon_of_a_known_memory_and_none_across_a_start():
    """A memory that halves its state: gradients halve with every step back, and stop at a start."""
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
    agent.encoder, agent.memory, agent.policy = torch.nn.Identity(), Halving(), torch.nn.Module()
    agent.policy_hidden, agent.policy.linear = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    agent.value_hidden, agent.value = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    for layer in (agent.policy_hidden, agent.policy.linear, agent.value_hidden, agent.value):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x, start = torch.rand(20, 1, 3), torch.zeros(20, 1, dtype=torch.bool)
    start[[0, 8]] = True
    value, policy = horizon.sensitivity(horizon.of_ppo, agent, [x], start, [7, 15])
    expected = 2 * 3**0.5 * 0.5 ** torch.arange(8.0)        # both episodes have 8 steps up to the target
    torch.testing.assert_close(value[:8], expected)
    torch.testing.assert_close(policy[:8], expected)
    assert value[8:].isnan().all() and policy[8:].isnan().all()


def agent_of(name, memory, **flags):
    """A new agent of this script in double precision, on three symbols."""
    torch.manual_seed(0)
    script = importlib.import_module(name)
    args = script.Args(memory=memory, hidden_size=4, mlp_size=8, num_layers=1, **flags)
    box, discrete = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Discrete(2)
    actions = box if name in CONTINUOUS else discrete
    return script.Agent(gym.spaces.Discrete(3), actions, args).double()


OF_EACH_FAMILY = (  # and the number of its encoders
    *(("ppo_recurrent_tbb", memory, {}, 1) for memory in ("lru", "lstm", "mingru")),
    ("pqn_recurrent_tbb", "lru", {}, 1), ("dqn_recurrent_sbb", "gru", {}, 1),
    ("sac_discrete_sbb", "gru", {"shared_encoder": False}, 2),
    ("sac_discrete_sbb", "lru", {"shared_encoder": True}, 1), ("sac_gru", "gru", {}, 2),
    ("td3_gru", "lru", {}, 2))


@pytest.mark.parametrize("name, memory, flags, encoders", OF_EACH_FAMILY)
def test_horizons_gradients_are_finite_differences_and_zero_across_a_start(name, memory, flags, encoders):
    agent, of = agent_of(name, memory, **flags), horizon.OUTPUTS[name]
    start = torch.zeros(10, 1, dtype=torch.bool)
    start[[0, 4]] = True
    xs = [torch.rand(10, 1, 3, dtype=torch.float64) for _ in horizon.trunks_of(agent)]
    assert len(xs) == encoders
    (norms,) = horizon.gradients(of, agent, xs, start, [8])             # [outputs, T]
    assert (norms[:, :4] == 0).all() and (norms[:, 9:] == 0).all() and (norms[:, 4:9] > 0).all()
    epsilon, numeric = 1e-6, torch.zeros(len(norms), 10, 3, dtype=torch.float64)
    for row, x in ((0, -1), (1, 0))[: len(norms)]:          # the value by the critics' features, the policy
        for s in range(10):
            for i in range(3):
                at = []
                for step in (epsilon, -epsilon):
                    moved = [y.clone() for y in xs]
                    moved[x][s, 0, i] += step
                    with torch.no_grad():
                        at.append(list(horizon.outputs(of, agent, moved, start).values())[row][8])
                numeric[row, s, i] = (at[0] - at[1]) / (2 * epsilon)
    torch.testing.assert_close(norms, numeric.norm(dim=-1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", horizon.OUTPUTS)
def test_horizon_of_no_memory_is_one_step(name):
    agent = agent_of(name, "none")
    start = torch.zeros(6, 1, dtype=torch.bool)
    xs = [torch.rand(6, 1, 3, dtype=torch.float64) for _ in horizon.trunks_of(agent)]
    curves = horizon.sensitivity(horizon.OUTPUTS[name], agent, xs, start, [3, 5])
    assert len(curves) == (1 if name in (*PQN, *DQN) else 2)
    assert (curves[:, 0] > 0).all() and (curves[:, 1:] == 0).all()


@pytest.mark.parametrize("name", horizon.OUTPUTS)
def test_horizons_outputs_are_what_the_agent_acts_by(name):
    """What the script's own forward says of the value, and of the action that acts."""
    agent, start = agent_of(name, "gru").float(), torch.zeros(5, 1, dtype=torch.bool)
    start[0], obs = True, (torch.arange(5)[:, None] % 3,)
    with torch.no_grad():
        xs = [trunk.encoder(obs) for trunk in horizon.trunks_of(agent)]
        out = horizon.outputs(horizon.OUTPUTS[name], agent, xs, start)
        state = agent.memory.initial_state(1)
        if name in CONTINUOUS:
            policy, _ = agent.pi(obs, state, start)
            action = policy if name == "td3_gru" else policy.mode()
            critics = agent.critics
            h, _ = critics.memory(obs, critics.memory.initial_state(1), start)
            value = torch.minimum(*critics(h, action))
            torch.testing.assert_close(out["policy"].tanh(), action[:, 0, 0])
        elif name in (*PQN, *DQN):
            q, _ = agent(obs, state, start)
            value = q.branches[0].amax(-1)
        elif name == "sac_discrete_sbb":
            policy, q1, q2, _ = agent(obs, state, start)
            value = torch.minimum(q1.branches[0], q2.branches[0]).amax(-1)
        else:
            _, value, _ = agent(obs, state, start)
    torch.testing.assert_close(out["value"], value[:, 0])


@pytest.mark.parametrize(
    "script", ["ppo_recurrent_tbb", *PQN, "dqn_recurrent_sbb", "sac_discrete_sbb"], indirect=True)
def test_horizon_draws_nothing_of_a_forbidden_action(script):
    """Action 0 of this task is never allowed. Its logit and its Q are huge, and nothing that is drawn is."""
    args = script.Args(env_id="Masked-v0", memory="gru", hidden_size=4, mlp_size=8, device="cpu")
    envs = make_envs(args, 1, training=False)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    for head in agent.modules():
        if isinstance(head, (PolicyHead, QHead)):
            head.linear.bias.data[0] = 1e6
    xs, start, mask = horizon.record(agent, envs, seed=0, steps=20)             # the task takes no other
    of = functools.partial(horizon.OUTPUTS[script.SCRIPT], mask=mask)
    for drawn in horizon.outputs(of, agent, xs, start).values():
        assert drawn.abs().max() < 100


def test_horizon_of_a_wrong_file_or_flag_is_one_sentence(tmp_path, model, capsys):
    """A file may name our scripts only: any other name is not imported."""
    metadata = {"script": "antigravity", "args": "{}"}
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other", metadata)
    wrong_files = ["--model", str(tmp_path / "none")], ["--model", str(tmp_path / "other")]
    wrong_flags = (
        ["--steps", "0"], ["--out", str(model / "folder")], ["--sweep", "k"], ["--sweep", "k", "two"],
        ["--sweep", "wrong", "2"], ["--sweep", "env-kwargs", "2"], ["--model", str(model), str(model)],
        ["--sweep", "env-id", "PocMemory-v0"])
    for argv in (*wrong_files, *(["--model", str(model), *flags] for flags in wrong_flags)):
        with pytest.raises(SystemExit) as stop:
            horizon.main(argv)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "--" in said, (argv, said)
    assert "antigravity" not in sys.modules


def test_horizon_report_and_sweep(tmp_path, model):
    horizon.main(["--model", str(model), "--steps", "60", "--targets", "4", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "horizon.csv").open()))
    assert [int(row["k"]) for row in rows] == list(range(len(rows)))
    assert 10 < len(rows) <= 51                             # episodes of 51 steps
    assert all(float(row["value"]) > 0 and float(row["policy"]) > 0 for row in rows)
    tasks = "popgym-RepeatFirstEasy-v0", "popgym-RepeatPreviousEasy-v0"
    for sweep in (["env-id", *tasks], ["k", "2", "4"]):
        flags = ["--episodes", "16", "--out", str(tmp_path)]
        horizon.main(["--model", str(model), "--sweep", *sweep, *flags])
        rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
        assert [row[sweep[0]] for row in rows] == sweep[1:]
        assert all(-1 <= float(row["return"]) <= 1 for row in rows)
    assert (tmp_path / "horizon.png").exists() and (tmp_path / "sweep.png").exists()


def test_a_sweep_sees_the_pictures_of_the_swept_task(tmp_path, monkeypatch):
    """A level of random length has other numbered pictures: their numbers are not those of the training."""
    flags = dict(env_id="MinigridMemory-v0", env_kwargs={"max_steps": 9}, whiten_images=True, shrink_images=7,
                 encoder_size=8)
    _, folder = run(tmp_path, tbb, **flags)
    played = spy(monkeypatch, horizon, "play")
    horizon.main(["--model", str(folder / "model.safetensors"), "--episodes", "2", "--sweep", "env-kwargs",
                  '{"size": 17, "random_length": true}'])
    agent, envs, *_ = played[0].args
    images = envs.single_observation_space.images
    numbered = next(m for m in agent.modules() if hasattr(m, "numbered"))
    assert torch.equal(numbered.images, torch.as_tensor(images)) and len(images) > 64


def test_a_sweep_of_several_models_has_a_curve_for_each_memory(tmp_path, monkeypatch):
    """Of two models with one memory the mean. Arguments are swept together."""
    import ppo_recurrent_sbb

    paths = [str(run(tmp_path, ppo_recurrent_sbb, run_name=f"{seed}{memory}", env_id="PocMemory-v0",
                     env_kwargs={}, memory=memory, seed=seed)[1] / "model.safetensors")
             for memory, seed in (("gru", 1), ("gru", 2), ("none", 1))]
    played = spy(monkeypatch, horizon, "play")                # of 2 values by each model
    horizon.main(["--model", *paths, "--sweep", "env-kwargs", '{"freeze": false}',
                  '{"freeze": true, "max_steps": 20}', "--episodes", "16", "--out", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out/sweep.csv").open()))
    assert [json.loads(row.pop("env-kwargs")) for row in rows] == [
        {"freeze": False}, {"freeze": True, "max_steps": 20}]
    successes = np.array([call.result[2].mean() for call in played]).reshape(3, 2).T    # [values, models]
    for row, (first, second, third) in zip(rows, successes):
        assert row == {"gru": f"{(first + second) / 2:.4g}", "none": f"{third:.4g}"}


@pytest.mark.parametrize(
    "script", ["dqn_recurrent_tbb", "sac_discrete_sbb", "sac_gru", "td3_gru"], indirect=True)
def test_horizon_report_and_sweep_of_off_policy_models(tmp_path, script):
    wipe = {"wipe_state_every": 4} if script.SCRIPT == "td3_gru" else {}
    _, folder = run(tmp_path, script, **wipe)
    name = "episode_length" if script.SCRIPT in CONTINUOUS else "max_steps"
    flags = ["--model", str(folder / "model.safetensors"), "--out", str(tmp_path / "out")]
    horizon.main([*flags, "--steps", "40", "--targets", "4"])
    rows = list(csv.DictReader((tmp_path / "out/horizon.csv").open()))
    assert list(rows[0]) == ["k", "value"] + ["policy"] * (script.SCRIPT not in DQN)
    assert 1 < len(rows) <= (4 if wipe else 11)             # of the episode, or since the memory was wiped
    assert all(float(value) > 0 for row in rows for column, value in row.items() if column != "k")
    horizon.main([*flags, "--sweep", name, "6", "11", "--episodes", "8"])
    rows = list(csv.DictReader((tmp_path / "out/sweep.csv").open()))
    assert [row[name] for row in rows] == ["6", "11"]
    assert (tmp_path / "out/horizon.png").exists() and (tmp_path / "out/sweep.png").exists()


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
    sizes = ["--lengths", "4", "--steps", "24", "--distance", "10"]
    truncation.main(["--memories", "lru", *sizes, "--out", str(tmp_path)])
    _, *lines = csv.reader((tmp_path / "truncation.csv").open())
    rows = {arm: [float(x) for x in curve] for _, arm, *curve in lines}
    assert rows["TBB"] == rows["SBB, whole"] and min(rows["TBB"]) > 0
    assert min(rows["SBB, L = 4"][:4]) > 0 and max(rows["SBB, L = 4"][4:]) == 0


def test_truncation_by_default_gives_all_places_in_a_segment_the_same_weight():
    """If all gradients are 1, the mean at d is the share of a segment's places with d steps before."""
    args = truncation.Args()
    t, s = torch.arange(args.steps)[:, None], torch.arange(args.steps)
    for L in args.lengths:
        pairs = ((t // L == s // L) & (s <= t)).double()
        expected = [max(0.0, 1 - d / L) for d in range(args.distance + 1)]
        assert truncation.by_distance(pairs, args.distance) == pytest.approx(expected)


def test_what_is_compared_on_images_shows_images():
    """RecurrentPPO would take numbered pictures (Views) for a Discrete."""
    for env_id, kwargs, *_, encoder, _ in speed.TASKS.values():
        if encoder:
            space = gym.make(env_id, **kwargs).observation_space
            assert isinstance(space, gym.spaces.Box) and len(space.shape) == 3


@pytest.mark.parametrize("run", speed.DEVICE_RUNS, ids=lambda run: "-".join(map(str, run)))
def test_devices_are_timed_on_what_the_table_says(run):
    """PPO: a rollout to warm up and one to time."""
    script = importlib.import_module(run[0])
    args, _ = parse(script.Args, run[0], speed.argv(speed.device_flags(speed.Args(), *run)))
    script.check(args)
    assert (args.memory, args.num_envs, args.hidden_size, args.mlp_size) == (*run[1:], run[3])
    if run[0].startswith("ppo"):
        assert args.total_timesteps == 2 * args.num_envs * args.num_steps


def test_pqn_is_timed_beside_ppo_at_equal_work(tmp_path):
    """Both take the flags, with as many steps in a rollout, epochs and minibatches."""
    flags = speed.argv(speed.rollout_flags(speed.Args(), "repeat") | {"memory": "lru"})
    both = [importlib.import_module(name) for name in ("pqn_recurrent_tbb", "ppo_recurrent_tbb")]
    pqn, ppo = (parse(script.Args, script.SCRIPT, flags)[0] for script in both)
    for flag in flags[::2]:
        name = flag.removeprefix("--").replace("-", "_")
        assert getattr(pqn, name) == getattr(ppo, name)
    assert pqn.total_timesteps == 5 * pqn.num_envs * pqn.num_steps              # the first warms up
    both[0].check(pqn)


@pytest.mark.parametrize("name", speed.OFF_POLICY)
def test_off_policy_runs_of_speed_train_as_often_and_on_as_many_steps_as_it_says(
        name, tmp_path, monkeypatch):
    """stable-baselines3 is given these numbers; ours must come to them by its own flags."""
    _, steps, gradient_steps, _, algorithm, transitions = speed.OFF_POLICY[name]
    script = importlib.import_module(name)
    flags = speed.off_policy_flags(speed.Args(), name, "none")
    args, _ = parse(script.Args, name, speed.argv(flags))
    script.check(args)
    samples = []
    if hasattr(script, "SequenceReplay"):                   # which has no charts/transitions
        samples = spy(monkeypatch, script.SequenceReplay, "sample")
    args = dataclasses.replace(
        args, total_timesteps=speed.LEARNING_STARTS + 9 * steps, log_every=steps, hidden_size=8, mlp_size=8,
        runs_dir=str(tmp_path), device="cpu")
    folder = script.train(args, {})
    rows = list(csv.DictReader((folder / "progress.csv").open()))
    rows = [row for row in rows if int(row["global_step"]) > speed.LEARNING_STARTS]
    first, *_, last = (float(row["charts/gradient_steps"]) for row in rows)
    assert last - first == pytest.approx(gradient_steps * (len(rows) - 1), abs=1)
    if algorithm:
        counted = [call.result.real.sum().item() for call in samples]
        counted = counted or [float(row["charts/transitions"]) for row in rows]
        assert statistics.mean(counted) == pytest.approx(transitions, rel=0.02)


def test_more_curves_than_can_be_told_apart_are_a_picture(tmp_path):
    columns = {f"memory-{i}": [1, i / 10, 0] for i in range(9)}
    marks = [("training", 10)]
    horizon.draw(tmp_path / "sweep", columns, [5, 10, 20], "length", "success", log=False, marks=marks)
    assert (tmp_path / "sweep.csv").read_text().splitlines()[2] == "10,0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"
    assert (tmp_path / "sweep.png").stat().st_size > 1000

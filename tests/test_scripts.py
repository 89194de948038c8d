"""What all scripts do alike: schedules, run folder, resume, signals, enjoy, bad input."""
import csv
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import types

import gymnasium as gym
import imageio
import pytest
import safetensors
import torch
from torch.utils.tensorboard import SummaryWriter

import dqn_recurrent_sbb
import dqn_recurrent_tbb
import ppo_recurrent_sbb
import ppo_recurrent_tbb
import ppo_recurrent_tbb_multigpu
import sac_discrete_sbb
import sac_gru
import td3_gru
from envs import vector
from models import run_folder
from models.flags import read_checkpoint
from models.rnn import GRU
from tests.helpers import column, comparable, copies, run, small, wait_for, weights_of

PPO = ppo_recurrent_sbb, ppo_recurrent_tbb
DQN = dqn_recurrent_sbb, dqn_recurrent_tbb
CONTINUOUS = sac_gru, td3_gru
OFF_POLICY = *DQN, sac_discrete_sbb, *CONTINUOUS


@pytest.fixture(params=[*PPO, *OFF_POLICY], ids=lambda module: module.__name__)
def script(request):
    return request.param


@pytest.fixture(params=[*PPO, ppo_recurrent_tbb_multigpu, *OFF_POLICY], ids=lambda module: module.__name__)
def any_script(request):
    return request.param


@pytest.fixture(params=[*PPO, *DQN, sac_discrete_sbb], ids=lambda module: module.__name__)
def of_discrete_actions(request):
    return request.param


@pytest.mark.parametrize("schedule, at_0, at_50, at_100, at_150", [
    ((3.0,), 3, 3, 3, 3),
    ((3.0, 1.0), 3, 2, 1, 1),
    ((3.0, 1.0, 2.0), 3, 1.5, 1, 1),
    ((3.0, 1.0, 1.0, 50), 3, 1, 1, 1),
])
def test_polynomial_schedules(script, schedule, at_0, at_50, at_100, at_150):
    values = [script.polynomial(schedule, step, 100) for step in (0, 50, 100, 150)]
    assert values == pytest.approx([at_0, at_50, at_100, at_150])


# ---------------------------------------------------------------------- run folder, resume, signals

@pytest.mark.parametrize("changes", [
    {"memory": "lstm", "learning_rate": (1e-2, 1e-3, 2.0, 300)},
    {"memory": "gru", "norm_obs": True, "norm_reward": True, "prev_action": True, "eval_every": 128, "eval_episodes": 3},
])
def test_resume_equals_never_having_stopped(script, tmp_path, changes):
    whole, folder = run(tmp_path, script, run_name="whole", **changes)
    _, half = run(tmp_path, script, run_name="half", total_timesteps=4 * 32 * 2, **changes)
    rows, half = run(tmp_path, script, resume=str(half), **changes)
    assert comparable(rows) == comparable(whole)
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, weights_of(half)[name]), name


def test_same_seed_same_numbers_another_seed_others(script, tmp_path):
    a, b, c = (comparable(run(tmp_path, script, run_name=name, seed=seed)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b != c


def test_resume_drops_rows_after_the_checkpoint(script, tmp_path):
    rows, folder = run(tmp_path, script)
    with (folder / "progress.csv").open("a") as f:
        f.write("99999999" + "," * (len(rows[0]) - 1) + "\n")
    resumed, _ = run(tmp_path, script, resume=str(folder), total_timesteps=4 * 32 * 4)
    assert column(resumed, "global_step") == [128, 256, 384, 512]


def test_other_peoples_tasks_and_another_number_of_environments_resume_with_new_episodes(script, tmp_path, capsys):
    task = "PositionOnlyPendulum" if script in CONTINUOUS else "RepeatPrevious"
    changes = dict(env_id=f"popgym-{task}Easy-v0", env_kwargs={}, prev_action=True)
    _, folder = run(tmp_path, script, **changes)
    rows, folder = run(tmp_path, script, resume=str(folder), total_timesteps=4 * 32 * 4, **changes)
    assert column(rows, "global_step") == [128, 256, 384, 512]
    assert max(column(rows, "debug/first_logratio") if script in PPO else [0]) < 1e-5
    _, folder = run(tmp_path / "ours", script)
    if script in OFF_POLICY:                                                      # the replay has a ring for each of them
        with pytest.raises(SystemExit):
            run(tmp_path / "ours", script, resume=str(folder), num_envs=5, total_timesteps=384 + 5 * 32)
        assert "the saved replay has other sizes" in capsys.readouterr().err
        return
    rows, _ = run(tmp_path / "ours", script, resume=str(folder), num_envs=5, total_timesteps=384 + 5 * 32)
    assert column(rows, "global_step")[-1] == 384 + 5 * 32


def test_run_folder_holds_what_design_says(script, tmp_path):
    rows, folder = run(tmp_path, script, eval_every=256, eval_episodes=5)
    assert {"args.json", "progress.csv", "model.safetensors", "checkpoint.pt"} <= {p.name for p in folder.iterdir()}
    assert any(p.name.startswith("events.out.tfevents") for p in folder.iterdir())
    header = list(rows[0])
    assert header[:2] == ["global_step", "seconds"] and {"charts/SPS", "charts/success", "time/env"} < set(header)
    assert all(re.fullmatch("(charts|losses|eval|debug|time)/[A-Za-z_]+", tag) for tag in header[2:])
    assert [bool(row["eval/episodic_return"]) for row in rows] == [False, True, False]
    assert json.loads((folder / "args.json").read_text())["num_envs"] == 4
    with safetensors.safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata()["script"] == script.__name__ and f.metadata()["global_step"] == "384"


def test_ctrl_c_saves_and_exits_0_and_sigkill_leaves_only_whole_files(script, tmp_path, run_script):
    def start(*more):
        flags = small(script, learning_rate="1e-2", policy_lr="1e-2", q_lr="1e-2", ent_coef="1e-3", total_timesteps=10**8,
                      checkpoint_every=128)
        flags["env_kwargs"] = json.dumps(flags["env_kwargs"])
        flags = [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v)]
        return run_script(f"{script.__name__}.py", *flags, *more)

    process = start("--runs-dir", tmp_path, "--run-name", "run")
    checkpoint, killed_at = tmp_path / "run" / "checkpoint.pt", 0
    wait_for(checkpoint)
    time.sleep(random.uniform(0.5, 2.0))
    if script in (ppo_recurrent_tbb, sac_gru):              # files are written alike in all of them
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at = read_checkpoint(tmp_path / "run")["global_step"]     # whole, whenever the kill came
        assert weights_of(tmp_path / "run")
        rows = list(csv.reader((tmp_path / "run" / "progress.csv").open()))
        assert all(len(row) == len(rows[0]) for row in rows)
        before = checkpoint.stat().st_mtime_ns
        process = start("--resume", tmp_path / "run")
        while checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "interrupted at step" in stdout and f"--resume {tmp_path / 'run'}" in stdout
    step = read_checkpoint(tmp_path / "run")["global_step"]
    assert killed_at < step
    column_of_steps = [int(r["global_step"]) for r in csv.DictReader((tmp_path / "run" / "progress.csv").open())]
    assert column_of_steps == list(range(128, step + 1, 128))               # no row lost, none twice


def test_enjoy(script, tmp_path, capsys):
    _, folder = run(tmp_path, script, prev_action=True)
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "2"])
    out = capsys.readouterr().out
    assert ("hits" if script in CONTINUOUS else "A") in out and "episode 2: return" in out and "success" in out   # text frames
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "1", "--render-mode", "rgb_array"])
    assert (folder / "model.gif").stat().st_size > 0
    with pytest.raises(SystemExit):
        other = "Pendulum-v1" if script in CONTINUOUS else "CartPole-v1"
        script.main(["--model", str(folder / "model.safetensors"), "--render-mode", "ansi", "--env-id", other,
                     "--env-kwargs", "{}"])
    assert f"--render-mode ansi is not one of {other}'s: human, rgb_array" in capsys.readouterr().err


def test_capture_video_films_every_checkpoint_and_changes_nothing(script, tmp_path):
    rows, _ = run(tmp_path, script, run_name="unseen", checkpoint_every=256)
    filmed, folder = run(tmp_path, script, capture_video=True, checkpoint_every=256)
    assert comparable(filmed) == comparable(rows)
    assert {path.name for path in (folder / "videos").iterdir()} == {"0.gif", "256.gif", "384.gif"}
    frames = [len(imageio.mimread(path)) for path in (folder / "videos").iterdir()]            # equal neighbours are one frame
    assert 2 <= min(frames) <= max(frames) <= 12                                # 11 steps, and how it ended


def test_capture_video_needs_a_task_that_draws(of_discrete_actions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, of_discrete_actions, capture_video=True, env_kwargs={}, env_id="popgym-RepeatPreviousEasy-v0")
    assert "--capture-video" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_track_copies_tensorboard_to_wandb(script, tmp_path, monkeypatch, capsys):
    """A stand-in for wandb, which is optional: called once, before the writer it listens to, with what a resume finds again."""
    calls = []
    writer = lambda *args, **kwargs: calls.append("writer") or SummaryWriter(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(run_folder, "SummaryWriter", writer)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    _, folder = run(tmp_path, script, track=True, wandb_project_name="mine")
    run(tmp_path, script, track=True, resume=str(folder), total_timesteps=4 * 32 * 4)
    first, writer, second, _ = calls
    assert writer == "writer" and first["sync_tensorboard"] and first["project"] == "mine" and first["config"]["num_envs"] == 4
    assert first["id"] == second["id"] == "run" and (first["resume"], second["resume"]) == ("never", "allow")
    monkeypatch.setitem(sys.modules, "wandb", None)                             # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, script, run_name="untracked", track=True)
    assert stop.value.code == 2 and "pip install wandb" in capsys.readouterr().err and not (tmp_path / "untracked").exists()


@pytest.mark.parametrize("env_id", ["popgym-RepeatPreviousEasy-v0", "popgym-AutoencodeEasy-v0", "popgym-CountRecallEasy-v0",
                                    "popgym-BattleshipEasy-v0", "popgym-PositionOnlyPendulumEasy-v0", "CartPole-v1",
                                    "CartPoleMasked-v0"])
def test_every_kind_of_task_trains_and_plays(script, tmp_path, env_id, capsys):
    task = dict(env_id=env_id, env_kwargs={}, prev_action=True, prev_reward=True, eval_every=128, eval_episodes=2)
    if script in OFF_POLICY and ("Pendulum" in env_id) != (script in CONTINUOUS):
        with pytest.raises(SystemExit):
            run(tmp_path, script, **task)
        assert "action space" in capsys.readouterr().err
        return
    rows, folder = run(tmp_path, script, **task)
    assert column(rows, "eval/episodic_return") and max(column(rows, "debug/first_logratio") if script in PPO else [0]) < 1e-4
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "1", "--render-mode", "none"])
    assert "mean of 1: return" in capsys.readouterr().out


@pytest.mark.parametrize("kwargs", [{"max_steps": 30}, {"max_steps": 30, "rgb": False}])
def test_images_and_symbols_train(of_discrete_actions, tmp_path, kwargs):
    script, name, most = of_discrete_actions, "losses/grad_norm", 10
    if script in PPO:
        name, most = "debug/first_logratio", 1e-4
    rows, _ = run(tmp_path, script, env_id="MinigridMemory-v0", env_kwargs=kwargs, encoder_size=16)
    assert max(column(rows, name)) < most


def test_mortar_mayhem_grid_runs_with_reset_options(of_discrete_actions, tmp_path):
    script = of_discrete_actions
    pytest.importorskip("memory_gym", reason="pip install --no-deps memory-gym==1.0.2")
    rows, _ = run(tmp_path, script, env_id="MortarMayhem-Grid-v0", env_kwargs={}, num_envs=2, num_minibatches=2,
                  total_timesteps=128, num_steps=64, reset_options={"command_count": [2], "explosion_delay": [2]})
    assert max(column(rows, "charts/episodic_length")) < 30                     # two commands, not ten


# ---------------------------------------------------------------------- bad input

BAD = {
    "--env-id PocMemry-v0": "PocMemory",
    "--env-id MiniGrid-MemoryS9-v0": "not supported",
    '--env-kwargs {"colour":1}': "colour",
    "--env-kwargs [1": "--env-kwargs",
    "--reset-options 3": "--reset-options",
    '--reset-options {"size":1}': "no reset options",
    "--num-envs -1": "--num-envs",
    "--hidden-size 0": "--hidden-size",
    "--total-timesteps 10": "--total-timesteps",
    "--seed -1": "--seed",
    "--device warp": "--device",
    "--memory elephant": "memory",
    '--memory gru --memory-kwargs {"state_size":3}': "--memory-kwargs",
    '--memory lru --memory-kwargs {"state_size":-3}': "--memory-kwargs",
    "--memory-kwargs 3": "--memory-kwargs",
    "--model nowhere.safetensors": "does not exist",
    "--model README.md": "cannot be read",
    "--resume nowhere": "does not exist",
    "--gamma nan": "--gamma",
    "--gamma 1.5": "--gamma",
    "--seed 99999999999999999999": "--seed",
    "--device meta": "--device",
    '--env-id MinigridMemory-v0 --env-kwargs {"size":8}': "--env-kwargs",
    '--env-kwargs {"max_steps":"ten"}': "--env-kwargs",
    "--run-name taken": "--run-name",
}
BAD_DISCRETE = {
    "--learning-rate 1 1 1 1 1": "--learning-rate",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate nan": "--learning-rate",
    "--env-id popgym-PositionOnlyPendulumEasy-v0": "action space",
}
BAD_PPO = {
    "--num-minibatches 1000": "do not fit",
    "--ent-coef 1e-3 1e-4 1 0": "--ent-coef",
    "--ent-coef 1e-3 1e-4 -1": "--ent-coef",
    "--clip-coef -0.2": "--clip-coef",
}
BAD_OFF_POLICY = {
    "--buffer-size 3": "--buffer-size",
    "--buffer-size 1000000000000": "GiB of memory",
    "--replay-ratio -1": "--replay-ratio",
    "--tau 2": "--tau",
}
BAD_DQN = {
    "--start-e 2": "--start-e",
    "--exploration-fraction 0": "--exploration-fraction",
    "--loss elephant": "loss",
    "--n-step 0": "--n-step",
}
BAD_SBB = {
    "--seq-len 0": "--seq-len",
    "--burn-in -1": "--burn-in",
}
BAD_SAC = {
    "--alpha -1": "--alpha",
    "--target-entropy 2": "--target-entropy",
    "--target-entropy 0.5 --alpha 0": "--alpha",
    "--no-freeze-critic": "--shared-encoder",
}
BAD_CONTINUOUS = {
    "--env-id PocMemory-v0": "action space",
    "--policy-lr 1 1 1 1 1": "--policy-lr",
    "--q-lr -1": "--q-lr",
    "--q-lr nan": "--q-lr",
    "--seq-len 0": "--seq-len",
    "--nominal-seq-length-probability 2": "--nominal-seq-length-probability",
    "--wipe-state-every -1": "--wipe-state-every",
    "--policy-frequency 0": "--policy-frequency",
    '--env-id CountInput-v0 --env-kwargs {"mode":"count"}': "count_input",
}
BAD_OWN = {
    (dqn_recurrent_tbb, "--tape-len 0"): "--tape-len",
    (sac_gru, "--alpha 0"): "--alpha",
    (sac_gru, "--alpha-lr -1"): "--alpha-lr",
    (sac_gru, "--target-entropy nan"): "--target-entropy",
    (td3_gru, "--policy-noise -1"): "--policy-noise",
    (td3_gru, "--noise-clip nan"): "--noise-clip",
    (td3_gru, "--policy-tau 2"): "--policy-tau",
}
EVERY_BAD = (BAD | BAD_DISCRETE | BAD_PPO | BAD_OFF_POLICY | BAD_DQN | BAD_SBB | BAD_SAC | BAD_CONTINUOUS
             | {flags: says for (_, flags), says in BAD_OWN.items()})


@pytest.mark.parametrize("script, flags", [
    *itertools.product((*PPO, *OFF_POLICY), BAD), *itertools.product(PPO, BAD_PPO), *itertools.product(DQN, BAD_DQN),
    *itertools.product(OFF_POLICY, BAD_OFF_POLICY), *itertools.product((dqn_recurrent_sbb, sac_discrete_sbb), BAD_SBB),
    *itertools.product((sac_discrete_sbb,), BAD_SAC), *itertools.product((*DQN, sac_discrete_sbb), BAD_DISCRETE),
    *itertools.product(PPO, [flags for flags in BAD_DISCRETE if "lr" not in flags and "env-id" not in flags]),
    *itertools.product(CONTINUOUS, BAD_CONTINUOUS), *BAD_OWN,
], ids=lambda x: getattr(x, "__name__", x))
def test_bad_input_is_one_sentence_and_leaves_nothing(script, tmp_path, capsys, flags):
    says = EVERY_BAD[flags]
    (tmp_path / "taken").mkdir()
    with pytest.raises(SystemExit) as stop:
        task = [] if "--env-id" in flags else ["--env-id", "PendulumMasked-v1" if script in CONTINUOUS else "PocMemory-v0"]
        script.main(["--runs-dir", str(tmp_path), *task, *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1 or "elephant" in flags          # those are tyro's own box
    assert [p.name for p in tmp_path.iterdir()] == ["taken"] and not list((tmp_path / "taken").iterdir())


def test_files_of_others_are_refused(script, tmp_path, capsys):
    _, folder = run(tmp_path, script)
    model, checkpoint = folder / "model.safetensors", folder / "checkpoint.pt"
    capsys.readouterr()

    def refused(*argv):
        with pytest.raises(SystemExit) as stop:
            script.main(list(argv))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.strip().splitlines()) == 1
        return error

    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])                                   # torn in transfer
    assert "cannot be read" in refused("--model", str(model))
    for metadata in ({"script": script.__name__}, {"script": script.__name__, "args": "{"}, {}):
        safetensors.torch.save_file({"w": torch.zeros(2)}, model, metadata)
        assert "cannot be read" in refused("--model", str(model))
    safetensors.torch.save_file({"w": torch.zeros(2)}, model, {"script": "ppo_gtrxl", "args": "{}"})
    assert "ppo_gtrxl" in refused("--model", str(model))
    model.write_bytes(data)
    assert "other sizes" in refused("--model", str(model), "--hidden-size", "9")
    assert "other sizes" in refused("--resume", str(folder), "--hidden-size", "9", "--total-timesteps", "1000")
    class Program:
        def __reduce__(self):                                                   # what unpickling would call
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"script": script.__name__, "args": "{}", "program": Program()}, checkpoint)
    assert "cannot be read" in refused("--resume", str(folder)) and not (tmp_path / "it ran").exists()
    torch.save([1, 2], checkpoint)
    assert "cannot be read" in refused("--resume", str(folder))


def test_a_loss_that_is_not_finite_is_named(script, tmp_path, monkeypatch):
    """The memory's output becomes nan in training, so that every loss does."""
    forward = GRU.forward

    def spoilt(self, x, state, start):
        y, state = forward(self, x, state, start)
        return (y * torch.nan if torch.is_grad_enabled() and y.requires_grad else y), state

    monkeypatch.setattr(GRU, "forward", spoilt)
    with pytest.raises(SystemExit, match="not finite at step (96|128); the last checkpoint is"):
        run(tmp_path, script)
    assert all(w.isfinite().all() for w in weights_of(tmp_path / "run").values())


# ---------------------------------------------------------------------- what is shared cannot change what is learned

class NoFolder:
    """In place of models.run_folder.Run: writes nothing, logs nothing, is never interrupted."""

    interrupted, kept = False, {}

    def __init__(self, *args):
        pass

    def save(self, agent, *args, **kwargs):
        self.kept.update(copies(agent.state_dict()))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class NoEpisodes(gym.vector.VectorWrapper):
    """In place of envs.vector.Episodes: counts nothing."""

    recent = ()

    def __init__(self, envs, task):
        super().__init__(envs)

    def mean(self):
        return [math.nan] * 3

    def state_dict(self):
        return {}


@pytest.mark.parametrize("changes", [{}, {"norm_obs": True, "norm_reward": True, "prev_action": True}], ids=str)
def test_what_is_shared_cannot_change_what_is_learned(any_script, tmp_path, monkeypatch, changes):
    """Without run folder, log, checkpoints, evaluations, films and counted episodes: the same weights to the bit."""
    script, films = any_script, dict(checkpoint_every=128, capture_video=True)
    _, folder = run(tmp_path, script, eval_every=128, eval_episodes=3, **films, **changes)
    monkeypatch.setattr(script, "Run", NoFolder)
    monkeypatch.setattr(vector, "Episodes", NoEpisodes)
    monkeypatch.setattr(NoFolder, "kept", {})
    script.train(script.Args(**small(script, runs_dir=str(tmp_path / "none"), **changes)), {})
    weights = weights_of(folder)
    assert weights.keys() == NoFolder.kept.keys() and not (tmp_path / "none").exists()
    for name, weight in weights.items():
        assert torch.equal(weight, NoFolder.kept[name]), name

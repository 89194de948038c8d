"""What all scripts do alike: schedules, resume, run folder, signals, playing. Refusals: test_bad_input.py."""
import csv
import itertools
import json
import os
import random
import re
import signal
import sys
import time
import types

import gymnasium as gym
import imageio
import numpy as np
import pytest
import safetensors
import torch
from torch.utils.tensorboard import SummaryWriter

import ppo_recurrent_sbb
from envs import vector
from models import run_folder
from models.flags import read_checkpoint
from models.play import play
from models.rnn import GRU
from tests.conftest import CONTINUOUS, DISCRETE, OFF_POLICY, PPO, PQN, SCRIPTS, needs_memory_gym
from tests.helpers import column, command_line, comparable, copies, run, small, wait_for, weights_of
from tests.probes import NUMBERS

ROW = 4 * 32  # steps between two rows of progress.csv in a small run, which has three
NORMALISED = {"norm_obs": True, "norm_reward": True, "prev_action": True}
of_discrete_actions = pytest.mark.parametrize("script", [*PPO, *DISCRETE], indirect=True)


def cases(scripts, runs, quick):
    """Every script with every one of `runs`, {name: changes}.   quick: ids of those that -m quick takes"""
    found = []
    for script, (name, changes) in itertools.product(scripts, runs.items()):
        case = f"{script}-{name}"
        marks = [pytest.mark.quick] if case in quick else []
        found.append(pytest.param(script, changes, id=case, marks=marks))
    return found


def first_difference(script, rows):
    """The largest one of the run, of log-probabilities or action values; a replay has none."""
    tags = dict.fromkeys(PPO, "debug/first_logratio") | dict.fromkeys(PQN, "debug/first_q_difference")
    return max(column(rows, tags[script.SCRIPT])) if script.SCRIPT in tags else 0


@pytest.mark.quick
@pytest.mark.parametrize("schedule, at_0, at_50, at_100, at_150", [
    ((3.0,), 3, 3, 3, 3),
    ((3.0, 1.0), 3, 2, 1, 1),
    ((3.0, 1.0, 2.0), 3, 1.5, 1, 1),
    ((3.0, 1.0, 1.0, 50), 3, 1, 1, 1),
])
def test_polynomial_schedules(script, schedule, at_0, at_50, at_100, at_150):
    values = [script.polynomial(schedule, step, 100) for step in (0, 50, 100, 150)]
    assert values == pytest.approx([at_0, at_50, at_100, at_150])


# ---------------------------------------------------------------------- resume

RESUMED = {
    "schedule": {"memory": "lstm", "learning_rate": (1e-2, 1e-3, 2.0, 300)},
    "normalised": {"memory": "gru", "eval_every": ROW, "eval_episodes": 3, **NORMALISED},
}
QUICK_RESUMED = [
    "ppo_recurrent_tbb-schedule", "ppo_recurrent_tbb-normalised",
    "dqn_recurrent_tbb-schedule", "dqn_recurrent_tbb-normalised"]


@pytest.mark.parametrize(
    "script, changes", cases(SCRIPTS, RESUMED, QUICK_RESUMED), indirect=["script"])
def test_resume_equals_never_having_stopped(script, tmp_path, changes):
    rows_of_whole, whole = run(tmp_path, script, run_name="whole", **changes)
    _, half = run(tmp_path, script, run_name="half", total_timesteps=2 * ROW, **changes)
    rows, half = run(tmp_path, script, resume=str(half), **changes)
    assert comparable(rows) == comparable(rows_of_whole)
    weights = weights_of(half)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights[name]), name


def test_same_seed_same_numbers_another_seed_others(script, tmp_path):
    def numbers(name, seed):
        rows, _ = run(tmp_path, script, run_name=name, seed=seed, total_timesteps=2 * ROW)
        return comparable(rows)

    first = numbers("first", seed=1)
    assert numbers("again", seed=1) == first
    assert numbers("other", seed=2) != first


def test_resume_drops_rows_after_the_checkpoint(script, tmp_path):
    rows, folder = run(tmp_path, script)
    with (folder / "progress.csv").open("a") as f:
        f.write("99999999" + "," * (len(rows[0]) - 1) + "\n")
    resumed, _ = run(tmp_path, script, resume=str(folder), total_timesteps=4 * ROW)
    assert column(resumed, "global_step") == [ROW, 2 * ROW, 3 * ROW, 4 * ROW]


def test_other_peoples_tasks_and_another_number_of_environments_resume_with_new_episodes(
        script, tmp_path, capsys):
    env_id = "Pendulum-v1" if script.SCRIPT in CONTINUOUS else "CartPole-v1"
    changes = dict(env_id=env_id, env_kwargs={}, prev_action=True)
    _, folder = run(tmp_path, script, **changes)
    rows, _ = run(tmp_path, script, resume=str(folder), total_timesteps=4 * ROW, **changes)
    assert column(rows, "global_step") == [ROW, 2 * ROW, 3 * ROW, 4 * ROW]
    assert first_difference(script, rows) < 1e-5

    _, folder = run(tmp_path / "ours", script)
    one_more_row = 3 * ROW + 5 * 32
    changes = dict(resume=str(folder), num_envs=5, total_timesteps=one_more_row)
    if script.SCRIPT in OFF_POLICY:                     # the replay has a ring for each environment
        with pytest.raises(SystemExit):
            run(tmp_path / "ours", script, **changes)
        assert "the saved replay has other sizes" in capsys.readouterr().err
    else:
        rows, _ = run(tmp_path / "ours", script, **changes)
        assert column(rows, "global_step")[-1] == one_more_row


# ---------------------------------------------------------------------- run folder, signals

def test_run_folder_holds_what_design_says(script, tmp_path):
    rows, folder = run(tmp_path, script, eval_every=2 * ROW, eval_episodes=5)
    files = {path.name for path in folder.iterdir()}
    assert {"args.json", "progress.csv", "model.safetensors", "checkpoint.pt"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)

    step, seconds, *tags = rows[0].keys()
    assert (step, seconds) == ("global_step", "seconds")
    assert {"charts/SPS", "charts/success", "time/env"} <= set(tags)
    assert all(re.fullmatch("(charts|losses|eval|debug|time)/[A-Za-z_]+", tag) for tag in tags)
    assert [bool(row["eval/episodic_return"]) for row in rows] == [False, True, False]

    assert json.loads((folder / "args.json").read_text())["num_envs"] == 4
    with safetensors.safe_open(folder / "model.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["script"] == script.SCRIPT
    assert metadata["global_step"] == str(3 * ROW)


@pytest.mark.parametrize("script", ["ppo_recurrent_tbb", "sac_gru"], indirect=True)
def test_sigkill_leaves_whole_files_and_the_resumed_process_saves_at_ctrl_c(script, tmp_path, run_script):
    """All scripts write their files alike: two of them show it, as processes of their own."""
    folder = tmp_path / "run"
    progress = folder / "progress.csv"
    flags = command_line(script, total_timesteps=10**8, checkpoint_every=ROW)

    def start(*more):
        return run_script(f"{script.SCRIPT}.py", *flags, *more)

    process = start("--runs-dir", tmp_path, "--run-name", "run")
    wait_for(lambda: progress.exists() and progress.stat().st_size)
    time.sleep(random.uniform(0.2, 1.0))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = read_checkpoint(folder)["global_step"]      # whole, whenever the kill came
    assert weights_of(folder)
    header, *rows = csv.reader(progress.open())
    assert all(len(row) == len(header) for row in rows)
    process = start("--resume", folder)
    while read_checkpoint(folder)["global_step"] == killed_at:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "interrupted at step" in stdout
    assert f"--resume {folder}" in stdout
    saved_at = read_checkpoint(folder)["global_step"]
    steps = [int(row["global_step"]) for row in csv.DictReader(progress.open())]
    assert steps == list(range(ROW, saved_at + 1, ROW))     # no row lost, none twice


def test_ctrl_c_finishes_the_update_and_saves(script, tmp_path, monkeypatch, capsys):
    """Whenever it comes: at one of the moments at which a run looks at the clock. No checkpoint is due.

    Only laps after the first row count: the rows are what is compared.
    """
    lap, laps, moment = script.Run.lap, itertools.count(), random.randrange(120)

    def interrupted_lap(run, name):
        lap(run, name)
        if (run.folder / "progress.csv").exists() and next(laps) == moment:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(script.Run, "lap", interrupted_lap)
    rows, folder = run(tmp_path, script, total_timesteps=1_000 * ROW, checkpoint_every=10**8)
    out = capsys.readouterr().out
    saved_at = read_checkpoint(folder)["global_step"]
    assert f"interrupted at step {saved_at}" in out and f"--resume {folder}" in out
    assert column(rows, "global_step") == list(range(ROW, saved_at + 1, ROW))
    assert ROW <= saved_at < 10 * ROW


def test_track_copies_tensorboard_to_wandb(script, tmp_path, monkeypatch, capsys):
    """wandb is optional: here a stand-in. It starts before the writer that it listens to.

    A resumed run continues as the same run of wandb.
    """
    calls = []

    def writer(*args, **kwargs):
        calls.append("writer")
        return SummaryWriter(*args, **kwargs)

    wandb = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(run_folder, "SummaryWriter", writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, folder = run(tmp_path, script, track=True, wandb_project_name="mine")
    run(tmp_path, script, track=True, resume=str(folder), total_timesteps=4 * ROW)
    first, then, second, _ = calls
    assert then == "writer"
    assert first["sync_tensorboard"]
    assert first["project"] == "mine"
    assert first["config"]["num_envs"] == 4
    assert (first["id"], first["resume"]) == ("run", "never")
    assert (second["id"], second["resume"]) == ("run", "allow")

    monkeypatch.setitem(sys.modules, "wandb", None)         # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, script, run_name="untracked", track=True)
    assert stop.value.code == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "untracked").exists()


def test_a_loss_that_is_not_finite_is_named(script, tmp_path, monkeypatch):
    """The memory's output becomes nan in training, so that every loss does."""
    forward = GRU.forward

    def spoilt(self, x, state, start):
        y, state = forward(self, x, state, start)
        in_training = torch.is_grad_enabled() and y.requires_grad
        return y * torch.nan if in_training else y, state

    monkeypatch.setattr(GRU, "forward", spoilt)
    with pytest.raises(SystemExit, match="not finite at step (96|128); the last checkpoint is"):
        run(tmp_path, script)
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())


# ---------------------------------------------------------------------- playing, films

def test_enjoy(script, tmp_path, capsys):
    _, folder = run(tmp_path, script, prev_action=True)
    model = ["--model", str(folder / "model.safetensors")]
    script.main([*model, "--episodes", "2"])
    out = capsys.readouterr().out
    assert ("hits" if script.SCRIPT in CONTINUOUS else "A") in out              # text frames
    assert "episode 2: return" in out
    assert "success" in out

    script.main([*model, "--episodes", "1", "--render-mode", "rgb_array"])
    assert (folder / "model.gif").stat().st_size > 0

    other = "Pendulum-v1" if script.SCRIPT in CONTINUOUS else "CartPole-v1"
    with pytest.raises(SystemExit):
        script.main([*model, "--render-mode", "ansi", "--env-id", other, "--env-kwargs", "{}"])
    error = capsys.readouterr().err
    assert f"--render-mode ansi is not one of {other}'s: human, rgb_array" in error


def test_capture_video_films_every_checkpoint_and_changes_nothing(script, tmp_path):
    rows, _ = run(tmp_path, script, run_name="unseen", checkpoint_every=256)
    filmed, folder = run(tmp_path, script, capture_video=True, checkpoint_every=256)
    assert comparable(filmed) == comparable(rows)
    films = list((folder / "videos").iterdir())
    assert {path.name for path in films} == {"0.gif", "256.gif", "384.gif"}
    frames = [len(imageio.mimread(path)) for path in films]
    assert min(frames) >= 2                                 # equal neighbours are one frame
    assert max(frames) <= 12                                # 11 steps, and how it ended


@of_discrete_actions
def test_capture_video_needs_a_task_that_draws(script, tmp_path, capsys):
    draws_nothing = dict(env_id="popgym-MultiarmedBanditEasy-v0", env_kwargs={})
    with pytest.raises(SystemExit):
        run(tmp_path, script, capture_video=True, **draws_nothing)
    assert "--capture-video" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- kinds of tasks

@pytest.mark.parametrize("env_id", [
    "popgym-RepeatPreviousEasy-v0",
    "popgym-AutoencodeEasy-v0",
    "popgym-CountRecallEasy-v0",
    "popgym-BattleshipEasy-v0",
    "popgym-PositionOnlyPendulumEasy-v0",
    "CartPole-v1",
    "CartPoleMasked-v0",
])
def test_every_kind_of_task_trains_and_plays(script, tmp_path, env_id, capsys):
    changes = dict(
        env_id=env_id, env_kwargs={}, prev_action=True, prev_reward=True,
        total_timesteps=2 * ROW, eval_every=ROW, eval_episodes=2)
    fits = ("Pendulum" in env_id) == (script.SCRIPT in CONTINUOUS)
    if script.SCRIPT not in PPO and not fits:
        with pytest.raises(SystemExit):
            run(tmp_path, script, **changes)
        assert "action space" in capsys.readouterr().err
        return
    rows, folder = run(tmp_path, script, **changes)
    assert column(rows, "eval/episodic_return")
    assert first_difference(script, rows) < 1e-4
    model = str(folder / "model.safetensors")
    script.main(["--model", model, "--episodes", "1", "--render-mode", "none"])
    assert "mean of 1: return" in capsys.readouterr().out


@of_discrete_actions
@pytest.mark.parametrize("kwargs", [{}, {"views": False}, {"rgb": False}], ids=str)
def test_views_images_and_symbols_train(script, tmp_path, kwargs):
    kwargs = {"max_steps": 30, **kwargs}
    rows, _ = run(
        tmp_path, script, env_id="MinigridMemory-v0", env_kwargs=kwargs, encoder_size=16,
        total_timesteps=2 * ROW)
    assert first_difference(script, rows) < 1e-4
    if script.SCRIPT in OFF_POLICY:
        assert max(column(rows, "losses/grad_norm")) < 10


@needs_memory_gym
@of_discrete_actions
@pytest.mark.parametrize("env_id", ["MortarMayhem-Grid-v0", "MortarMayhemB-Grid-v0"])
def test_mortar_mayhem_grid_runs_with_reset_options(script, env_id, tmp_path):
    two_commands = {"command_count": [2], "explosion_delay": [2]}
    rows, _ = run(
        tmp_path, script, env_id=env_id, env_kwargs={}, reset_options=two_commands,
        num_envs=2, num_minibatches=2, num_steps=64, total_timesteps=128)
    assert max(column(rows, "charts/episodic_length")) < 30                     # not ten commands


@needs_memory_gym
@of_discrete_actions
def test_evaluation_and_playing_have_reset_options_of_their_own(script, tmp_path, capsys):
    """One command each time, but in training it pays, and afterwards it costs."""
    costs = {"reward_command_success": -3.0, "reward_command_failure": -3.0}
    rows, folder = run(
        tmp_path, script, env_id="MortarMayhem-Grid-v0", env_kwargs={}, num_envs=2, num_minibatches=2,
        num_steps=64, total_timesteps=128, reset_options={"command_count": [1]}, eval_reset_options=costs,
        eval_every=1, eval_episodes=2)
    assert min(column(rows, "charts/episodic_return")) >= 0
    assert set(column(rows, "eval/episodic_return")) == {-3.0}
    capsys.readouterr()
    script.main(["--model", f"{folder}/model.safetensors", "--render-mode", "none", "--episodes", "2"])
    assert "-3" in capsys.readouterr().out
    args = script.Args(env_id="MortarMayhem-Grid-v0", eval_reset_options={"command_count": [0]})
    with pytest.raises(SystemExit):                         # before it has learned anything
        vector.make_envs(args, 2)
    assert '"command_count": [0]' in capsys.readouterr().err


# ---------------------------------------------------------------------- what is shared, what is learned

LEARNED = {"plain": {}, "normalised": NORMALISED}
QUICK_LEARNED = ["ppo_recurrent_tbb-plain", "dqn_recurrent_tbb-plain", "sac_gru-plain"]
WITH_MULTIGPU = [*SCRIPTS, "ppo_recurrent_tbb_multigpu"]


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

    def mean_of_episodes(self):
        return {}

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    "script, changes", cases(WITH_MULTIGPU, LEARNED, QUICK_LEARNED), indirect=["script"])
def test_what_is_shared_cannot_change_what_is_learned(script, tmp_path, monkeypatch, changes):
    """The same weights to the bit without run folder, log, checkpoints, evaluations, films and episodes."""
    changes = {"total_timesteps": 2 * ROW, **changes}
    _, folder = run(
        tmp_path, script, eval_every=ROW, eval_episodes=3, checkpoint_every=ROW, capture_video=True,
        **changes)
    weights = weights_of(folder)

    kept, nowhere = {}, tmp_path / "nowhere"
    monkeypatch.setattr(script, "Run", NoFolder)
    monkeypatch.setattr(vector, "Episodes", NoEpisodes)
    monkeypatch.setattr(NoFolder, "kept", kept)
    script.train(script.Args(**small(script, runs_dir=str(nowhere), **changes)), {})
    assert not nowhere.exists()
    assert kept.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, kept[name]), name


def test_playing_forgets_between_episodes():
    """play() says `start` at an episode's first step and nowhere else."""
    seen = []

    class Player(torch.nn.Linear):
        memory = types.SimpleNamespace(initial_state=lambda batch_size: ())

        def act(self, obs, state, start):
            seen.append((obs[0][:, 1].tolist(), start.tolist()))                # step in the episode
            return np.zeros(len(start), int), state

    args = small(ppo_recurrent_sbb, **NUMBERS | {"env_kwargs": {"discrete": True}})
    tasks = vector.make_envs(ppo_recurrent_sbb.Args(**args), 2, training=False)
    play(Player(1, 1), tasks, 8, seed=0)
    assert len(seen) > 12
    for steps, start in seen:
        assert start == [step == 0 for step in steps]

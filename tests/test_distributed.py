"""ppo_recurrent_tbb_multigpu.py: two processes do what one does, and one does what tbb does."""
import csv
import os
import signal
import time

import pytest
import torch

import ppo_recurrent_tbb
import ppo_recurrent_tbb_multigpu as ppo
from models.flags import read_checkpoint
from tests import planted_multigpu
from tests.conftest import ROOT
from tests.helpers import column, command_line, comparable, run, weights_of

CARTPOLE = dict(env_id="CartPole-v1", env_kwargs={}, num_minibatches=1)


@pytest.fixture
def torchrun(run_script, tmp_path, monkeypatch):
    """Starts two processes of the planted script as a user does. Returns torchrun's process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(plant, **changes):
        changes = {"runs_dir": tmp_path, "run_name": "two", "num_minibatches": 2, **changes}
        flags = command_line(ppo, **changes)
        return run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                          planted_multigpu.__file__, plant, *flags, start_new_session=True)
    return start


def finished(process):
    """What it printed, once it has ended by itself."""
    try:
        return process.communicate(timeout=300)
    except Exception:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def rows_of(folder):
    return list(csv.DictReader((folder / "progress.csv").open()))


@pytest.mark.quick
@pytest.mark.parametrize("full_episodes", [True, False])
def test_one_process_is_ppo_recurrent_tbb(tmp_path, full_episodes):
    changes = CARTPOLE | dict(
        norm_reward=True, norm_obs=True, full_episodes=full_episodes, target_kl=2e-3,
        learning_rate=(1e-2, 1e-3), ent_coef=(1e-3, 0.0), clip_coef=(0.2, 0.1))
    rows, folder = run(tmp_path, ppo_recurrent_tbb, run_name="tbb", **changes)
    rows_of_one, folder_of_one = run(tmp_path, ppo, run_name="multigpu", **changes)
    assert comparable(rows_of_one) == comparable(rows)
    torch.testing.assert_close(weights_of(folder_of_one), weights_of(folder), rtol=0, atol=0)


def test_two_processes_equal_one(tmp_path, torchrun, monkeypatch):
    """Everything in which a share of the batch differs from the whole.

    Gradients and their norm, advantages, statistics of rewards and observations, --target-kl's stop, the log.
    """
    changes = CARTPOLE | dict(
        norm_reward=True, norm_obs=True, update_epochs=6, target_kl=3.6e-3, total_timesteps=4 * 32 * 6)
    process = torchrun("coin", **changes)
    planted_multigpu.coin(monkeypatch.setattr)
    one, folder = run(tmp_path, ppo, run_name="one", **changes)
    stdout, stderr = finished(process)
    assert process.returncode == 0 and stdout.count("done at step 768") == 1, stderr
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(folder), rtol=1e-5, atol=1e-5)
    optimizers = [read_checkpoint(tmp_path / name)["optimizer"]["state"] for name in ("one", "two")]
    steps = [int(state[0]["step"]) for state in optimizers]
    assert steps[0] == steps[1] and 6 < steps[0] < 6 * 6    # --target-kl stopped some updates
    for row, row_of_two in zip(comparable(one), comparable(rows_of(tmp_path / "two")), strict=True):
        del row["debug/first_logratio"], row_of_two["debug/first_logratio"]     # rounding itself
        measured = {tag: float(value) for tag, value in row.items() if value}
        measured_by_two = {tag: float(value) for tag, value in row_of_two.items() if value}
        assert measured_by_two == pytest.approx(measured, rel=1e-3, abs=1e-5)


def test_processes_play_different_episodes_and_a_resume_begins_new_ones(tmp_path, torchrun):
    """A task of our own, whose state one process saves; two do not. They act differently from one policy."""
    changes = dict(num_minibatches=1, update_epochs=1)
    process = torchrun("report", total_timesteps=4 * 32, eval_every=128, eval_episodes=3, **changes)
    _, stderr = finished(process)
    row, = rows_of(tmp_path / "two")
    assert row["charts/episodic_return"] and row["eval/success"], stderr
    for path in tmp_path.glob("1-*.pt"):
        path.rename(tmp_path / f"first-{path.name}")
    process = torchrun("report", resume=tmp_path / "two", total_timesteps=4 * 32 * 2, **changes)
    stdout, stderr = finished(process)
    assert process.returncode == 0 and "done at step 256" in stdout, stderr
    rollouts = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert [actions.shape for actions in rollouts] == [(32, 2)] * 4
    for i, actions in enumerate(rollouts):
        for other in rollouts[:i]:                          # one random stream: 99 % are the same
            assert (actions == other).float().mean() < 0.8
    rows, _ = run(tmp_path, ppo, resume=str(tmp_path / "two"))                  # one process continues
    assert column(rows, "global_step") == [128, 256, 384]
    assert max(column(rows, "debug/first_logratio")) < 1e-5
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1     # rank 0's


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_all_processes(tmp_path, torchrun, number):
    """As the terminal sends it: to torchrun, which passes it on, and to its processes: they get it twice."""
    process = torchrun("nothing", total_timesteps=10**8, checkpoint_every=10**8)
    progress, deadline = tmp_path / "two" / "progress.csv", time.time() + 300
    while not (progress.exists() and rows_of(tmp_path / "two")):
        assert process.poll() is None and time.time() < deadline, finished(process)
        time.sleep(0.05)
    os.killpg(process.pid, number)
    stdout, stderr = finished(process)                      # ends when the last process has closed it
    assert stdout.count("interrupted at step") == 1, stderr
    assert process.returncode == 1                          # torchrun's own, after any signal
    steps = read_checkpoint(tmp_path / "two")["global_step"]
    assert steps == column(rows_of(tmp_path / "two"), "global_step")[-1] > 0


def test_a_loss_that_is_not_finite_on_one_process_ends_both(tmp_path, torchrun):
    process = torchrun("nan_on_the_second")
    _, stderr = finished(process)
    assert process.returncode == 1 and stderr.count("the loss is not finite at step 128") == 1
    assert "Error" not in stderr.replace("ChildFailedError", "")                # no process was left alone


@pytest.mark.quick
@pytest.mark.parametrize("flags, says", [
    ("--num-envs 5", "--num-envs 5 must be a multiple of the number of processes, 2"),
    ("--num-envs 4 --num-minibatches 3", "a process has 2 of --num-envs; lower the one"),
    ("--device cuda", "fewer GPUs than processes"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppo, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--device", "cpu", "--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())

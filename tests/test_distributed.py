"""ppo_recurrent_tbb.py started by torchrun: two processes do what one does with all the environments."""
import csv
import os
import signal
import time

import pytest
import torch

import ppo_recurrent_tbb as ppo
from tests.conftest import ROOT
from tests.helpers import column, comparable, planted, run, small, weights_of

CARTPOLE = dict(env_id="popgym-PositionOnlyCartPoleEasy-v0", env_kwargs="{}", num_minibatches=1)
# Actions that rounding cannot change: a coin tossed by the observation.
COIN = "action = dist.sample()", "action = (1000 * next_obs[0][None, :, 0]).long() % 2"


@pytest.fixture
def torchrun(run_script, tmp_path, monkeypatch):
    """Start two processes of a script as a user does. Returns torchrun's process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))             # for scripts with something planted, which lie elsewhere

    def start(script, **changes):
        flags = []
        for name, value in small(ppo, **{"runs_dir": tmp_path, "run_name": "two", "num_minibatches": 2, **changes}).items():
            flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value] * (value is not True))]
        return run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__, *flags,
                          start_new_session=True)
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


def test_two_processes_equal_one(tmp_path, torchrun):
    """Everything in which a share of the batch differs from the whole: gradients and their norm, advantages, statistics of
    rewards and observations, the stop at --target-kl, and what is logged."""
    script = planted(tmp_path, ppo, COIN)
    changes = CARTPOLE | dict(norm_reward=True, norm_obs=True, update_epochs=4, target_kl=2e-3, total_timesteps=4 * 32 * 6)
    process = torchrun(script, **changes)
    one, folder = run(tmp_path, script, run_name="one", **changes)
    stdout, stderr = finished(process)
    assert process.returncode == 0 and stdout.count("done at step 768") == 1, stderr
    weights, weights_of_two = weights_of(ppo, folder), weights_of(ppo, tmp_path / "two")
    torch.testing.assert_close(weights_of_two, weights, rtol=1e-5, atol=1e-5)
    steps = [int(ppo.read_checkpoint(tmp_path / name)["optimizer"]["state"][0]["step"]) for name in ("one", "two")]
    assert steps[0] == steps[1] and 6 < steps[0] < 6 * 4    # --target-kl stopped some updates before their fourth epoch
    for row, row_of_two in zip(comparable(one), comparable(rows_of(tmp_path / "two")), strict=True):
        row.pop("debug/first_logratio"), row_of_two.pop("debug/first_logratio")            # is rounding itself
        assert {k: float(v) for k, v in row_of_two.items() if v} == pytest.approx(
            {k: float(v) for k, v in row.items() if v}, rel=1e-3, abs=1e-5)


def test_processes_play_different_episodes_and_a_resume_begins_new_ones(tmp_path, torchrun):
    """A task of our own, whose state one process saves; two do not. They act differently from the same policy."""
    script = planted(tmp_path, ppo, ("        global_step += batch_size\n",
                                     "        torch.save([*obs, actions], f'{args.runs_dir}/{global_step}-{RANK}.pt')\n"
                                     "        global_step += batch_size\n"))
    _, stderr = finished(torchrun(script, total_timesteps=4 * 32, eval_every=128, eval_episodes=3))
    assert rows_of(tmp_path / "two")[0]["charts/episodic_return"] and rows_of(tmp_path / "two")[0]["eval/success"], stderr
    process = torchrun(script, resume=tmp_path / "two", total_timesteps=4 * 32 * 2)
    stdout, stderr = finished(process)
    assert process.returncode == 0 and "done at step 256" in stdout, stderr
    rollouts = [torch.load(tmp_path / f"{step}-{rank}.pt") for step in (0, 128) for rank in (0, 1)]
    for i, (obs, actions) in enumerate(rollouts):
        assert obs.shape[:2] == actions.shape == (32, 2)
        for other_obs, other_actions in rollouts[:i]:
            assert not torch.equal(obs[0], other_obs[0]) and not torch.equal(actions, other_actions)
    rows, _ = run(tmp_path, ppo, resume=str(tmp_path / "two"))                  # one process goes on with what two began
    assert column(rows, "global_step") == [128, 256, 384] and max(column(rows, "debug/first_logratio")) < 1e-5
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1     # rank 0 alone has a run folder


def test_ctrl_c_saves_and_ends_all_processes(tmp_path, torchrun):
    """As the terminal sends it: to torchrun, which passes it on, and to its processes, which so get it twice."""
    process = torchrun(ppo, total_timesteps=10**8, checkpoint_every=10**8)
    progress, deadline = tmp_path / "two" / "progress.csv", time.time() + 300
    while not (progress.exists() and rows_of(tmp_path / "two")):
        assert process.poll() is None and time.time() < deadline, finished(process)
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = finished(process)                      # ends when the last process has closed it
    assert stdout.count("interrupted at step") == 1, stderr
    steps = ppo.read_checkpoint(tmp_path / "two")["global_step"]
    assert steps == column(rows_of(tmp_path / "two"), "global_step")[-1] > 0


def test_a_loss_that_is_not_finite_on_one_process_ends_both(tmp_path, torchrun):
    script = planted(tmp_path, ppo, ("loss = pg_loss -", "loss = (float('nan') if RANK == 1 else 1) * pg_loss -"))
    process = torchrun(script)
    _, stderr = finished(process)
    assert process.returncode == 1 and stderr.count("the loss is not finite at step 128") == 1
    assert "Error" not in stderr.replace("ChildFailedError", "")                # no process was left alone with the other's end


@pytest.mark.parametrize("flags, says", [
    ("--num-envs 5", "--num-envs 5 cannot be divided among 2 processes"),
    ("--num-envs 4 --num-minibatches 3", "a process has 2 of --num-envs 4"),
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

"""Signals, locks, full disks and damaged files: one sentence, nothing lost."""
import csv
import errno
import os
import signal
import stat
import threading

import pytest
import torch

import ppo_recurrent_tbb as ppo
from models import files
from models.flags import read_checkpoint
from models.run_folder import Run
from tests.conftest import OFF_POLICY, needs_memory_gym
from tests.helpers import column, run, wait_for, weights_of


def refused(capsys, call, *args, **kwargs):
    """The one sentence that a refusal prints."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert stop.value.code == 2 and "Traceback" not in error
    return error


@pytest.mark.parametrize("env_id", [
    "PocMemory-v0", pytest.param("memory_gym/MortarMayhem-Grid-v0", marks=needs_memory_gym)])
def test_sigterm_saves_and_leaves_as_ctrl_c_does(tmp_path, run_script, env_id):
    """With Memory Gym too: pygame takes the signal for itself unless it is told not to."""
    process = run_script(
        "ppo_recurrent_tbb.py", "--env-id", env_id, "--num-envs", 2, "--num-minibatches", 2,
        "--num-steps", 16, "--total-timesteps", 10**8, "--runs-dir", tmp_path, "--run-name", "run")
    wait_for(tmp_path / "run" / "progress.csv")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and "interrupted at step" in stdout, stderr
    assert read_checkpoint(tmp_path / "run")["global_step"] > 0


@pytest.mark.quick
def test_a_second_signal_of_another_kind_does_not_leave_at_once():
    """A shutdown stops a run, and benchmark/run.py, which then tells the run to save."""
    begun = Run.__new__(Run)
    begun.handlers_before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in begun.handlers_before:
            signal.signal(number, begun.on_signal)
        begun.on_signal(signal.SIGTERM, None)
        assert begun.interrupted and signal.getsignal(signal.SIGINT) == begun.on_signal
        assert signal.getsignal(signal.SIGTERM) == begun.handlers_before[signal.SIGTERM]
    finally:
        begun.restore_handlers()


@pytest.mark.quick
def test_a_progress_csv_of_an_older_version_keeps_its_columns(tmp_path):
    before, folder = run(tmp_path, ppo)
    path = folder / "progress.csv"
    with path.open("w", newline="") as f:
        columns = [name for name in before[0] if name != "charts/episodes"]
        table = csv.DictWriter(f, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(before)
    after, _ = run(tmp_path, ppo, resume=str(folder), total_timesteps=2 * int(before[-1]["global_step"]))
    assert len(after) == 2 * len(before) and "charts/episodes" not in after[0]
    for row in after:
        assert None not in row and None not in row.values()
        assert 0 <= float(row["charts/learning_rate"]) < 0.1 and not row["eval/episodic_return"]


@pytest.mark.quick
def test_a_script_runs_in_a_thread(tmp_path):
    """Signals belong to the main thread: others get none, and do without."""
    flags = ["--runs-dir", str(tmp_path), "--run-name", "run", "--num-envs", "4", "--total-timesteps", "512"]
    thread = threading.Thread(target=ppo.main, args=([*flags, "--device", "cpu"],))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert read_checkpoint(tmp_path / "run")["global_step"] == 512
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.quick
def test_a_run_folder_has_one_writer(tmp_path, capsys):
    _, folder = run(tmp_path, ppo)
    descriptor = files.lock(folder)
    assert "is being written by another process" in refused(capsys, run, tmp_path, ppo, resume=str(folder))
    os.close(descriptor)
    rows, _ = run(tmp_path, ppo, resume=str(folder), total_timesteps=512)       # the lock ends with its owner
    assert len(rows) == 4


@pytest.mark.quick
def test_a_full_disk_is_named_and_the_old_files_are_whole(tmp_path, capsys, monkeypatch):
    _, folder = run(tmp_path, ppo)
    before, save = weights_of(folder), torch.save

    def fills_the_disk(checkpoint, path):
        save(checkpoint, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fills_the_disk)
    error = refused(capsys, run, tmp_path, ppo, resume=str(folder), total_timesteps=512)
    assert "checkpoint.pt cannot be written" in error and "No space left on device" in error
    assert read_checkpoint(folder)["global_step"] == 384 and weights_of(folder).keys() == before.keys()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.quick
def test_torn_and_blank_rows_are_dropped():
    text = "global_step,seconds,a\n128,1,2\n\n256,2,3\n384,3,\n51"
    assert files.rows_until(256, text) == ["global_step,seconds,a\n", "128,1,2\n", "256,2,3\n"]
    assert files.rows_until(999, text)[-1] == "384,3,\n"
    assert files.rows_until(999, "") == [""]


def test_a_resume_over_a_torn_row_continues(tmp_path):
    _, folder = run(tmp_path, ppo, total_timesteps=256)
    with (folder / "progress.csv").open("a") as f:
        f.write("\n384,0.1,")
    rows, _ = run(tmp_path, ppo, resume=str(folder), total_timesteps=512)
    assert column(rows, "global_step") == [128, 256, 384, 512]


@pytest.mark.quick
def test_overwritten_numbers_in_a_checkpoint_are_noticed(tmp_path, capsys):
    _, folder = run(tmp_path, ppo)
    path = folder / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    weights = weights_of(folder)["policy_hidden.weight"].numpy().tobytes()
    place = bytes(data).index(weights[:64])
    data[place + 5] ^= 0x40
    path.write_bytes(data)
    assert "cannot be read" in refused(capsys, ppo.main, ["--resume", str(folder)])


@pytest.mark.quick
def test_everybody_may_read_a_models_file(tmp_path):
    _, folder = run(tmp_path, ppo)
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("model.safetensors", "progress.csv")}
    assert modes == {0o666 & ~files.UMASK}


@pytest.mark.quick
@pytest.mark.parametrize("flag", ["--model", "--resume"])
def test_an_empty_name_is_no_new_training(tmp_path, capsys, flag):
    assert f'{flag} "" does not exist' in refused(capsys, ppo.main, [flag, "", "--runs-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_windows_has_no_sysconf(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    files.refuse_more_than_memory(2**80, "--buffer-size 1")


@pytest.mark.quick
@pytest.mark.parametrize("runs_dir", ["file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, runs_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert f"--runs-dir {runs_dir}" in refused(capsys, ppo.main, ["--runs-dir", runs_dir])


@pytest.mark.quick
@pytest.mark.parametrize("script", OFF_POLICY, indirect=True)
def test_a_run_shorter_than_log_every_has_a_row(script, tmp_path):
    rows, folder = run(tmp_path, script, log_every=1_000, total_timesteps=250)
    assert column(rows, "global_step") == [224]
    rows, _ = run(tmp_path, script, resume=str(folder), log_every=1_000, total_timesteps=1_100)
    assert column(rows, "global_step") == [224, 1024]

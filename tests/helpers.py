"""What the tests of the scripts share: a small run, its results, and bugs planted into a script's source."""
import csv
import importlib.util
import sys
import time
from pathlib import Path

SMALL = dict(env_id="PocMemory-v0", env_kwargs='{"max_steps": 11}', num_envs=4, total_timesteps=4 * 32 * 3, memory="gru",
             hidden_size=8, mlp_size=8, learning_rate=(1e-2,), device="cpu")
SMALL_PPO = dict(num_steps=32, num_minibatches=3, update_epochs=2, ent_coef=(1e-3,), vf_coef=0.1)
SMALL_DQN = dict(train_every=32, learning_starts=64, replay_ratio=0.1, log_every=128, buffer_size=400, start_e=0.3, end_e=0.3)
LENGTHS = dict(seq_len=5, batch_size=64, tape_len=64)
SMALL_CONTINUOUS = dict(env_id="CountInput-v0", env_kwargs='{"episode_length": 11}', batch_size=8, policy_lr=(1e-2,),
                        q_lr=(1e-2,), policy_learning_starts=64)


def small(script, **changes):
    """Flags of a run of 384 steps, a row of progress.csv every 128, whose episodes end inside rollouts and inside segments.
    Changes to flags that the script does not have are left out."""
    flags = SMALL | SMALL_PPO | SMALL_DQN | LENGTHS | (SMALL_CONTINUOUS if hasattr(script, "SequenceReplay") else {}) | changes
    return {name: value for name, value in flags.items() if hasattr(script.Args, name)}


def run(tmp_path, script, **changes):
    """Train in this process; returns the rows of progress.csv and the run folder."""
    args = script.Args(**small(script, **{"runs_dir": str(tmp_path), "run_name": "run", **changes}))
    script.check(args)
    folder = script.train(args, script.load("--resume", args.resume, script.read_checkpoint) if args.resume else None)
    return list(csv.DictReader((folder / "progress.csv").open())), folder


def weights_of(script, folder):
    return script.load("--model", folder / "model.safetensors", script.read_model)["agent"]


def column(rows, name):
    return [float(row[name]) for row in rows if row[name]]


def comparable(rows):
    """The rows without what differs between two runs that are the same: times and speeds."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "charts/SPS") and not k.startswith("time/")} for row in rows]


def planted(tmp_path, script, *replacements):
    """The script with a bug (or a probe) planted in its source, as a module."""
    source = Path(script.__file__).read_text()
    for old, new in replacements:
        assert source.count(old) == 1, f"the script no longer contains {old!r}"
        source = source.replace(old, new)
    path = tmp_path / Path(script.__file__).name
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    sys.modules["planted"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(path, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert time.time() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def assert_caught(tmp_path, capsys, script, *replacements, **changes):
    """With these bugs planted, the run warns that the policy in training is not the one that acted."""
    rows, _ = run(tmp_path, planted(tmp_path, script, *replacements), **changes)
    assert max(column(rows, "debug/first_logratio")) > 1e-3
    assert "the policy in training is not the one that acted" in "".join(capsys.readouterr())

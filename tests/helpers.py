"""What the tests of the scripts share: a small run and its results."""
import csv
import dataclasses
import json
import time
from types import SimpleNamespace

import safetensors.torch
import torch
from matplotlib.image import imread
from torch.utils import _pytree as pytree

from envs.vector import make_envs
from models.flags import read_checkpoint, read_model, refuse_what_is_out_of_range
from models.loading import LAYOUT, load
from models.run_folder import make_agent

SMALL = dict(
    env_id="PocMemory-v0", env_kwargs={"max_steps": 11}, num_envs=4, total_timesteps=4 * 32 * 3,
    memory="gru", hidden_size=8, mlp_size=8, learning_rate=(1e-2,), device="cpu")
SMALL_PPO = dict(num_steps=32, num_minibatches=3, update_epochs=2, ent_coef=(1e-3,), vf_coef=0.1)
SMALL_DQN = dict(
    train_every=32, learning_starts=64, replay_ratio=0.1, log_every=128, buffer_size=400, start_e=0.3,
    end_e=0.3)
LENGTHS = dict(seq_len=5, batch_size=64, tape_len=64)
SMALL_CONTINUOUS = dict(
    env_id="CountInput-v0", env_kwargs={"episode_length": 11}, batch_size=8, policy_lr=(1e-2,),
    q_lr=(1e-2,), policy_learning_starts=64)


class AsItIs(torch.nn.Identity):
    """In an encoder's place: vectors are features, and there is no action mask."""

    def mask(self, obs, first=0):
        return None


def small(script, **changes):
    """Flags of a run of 384 steps, a row of progress.csv every 128; episodes end inside rollouts, segments.

    Changes to flags that the script does not have are left out.
    """
    continuous = SMALL_CONTINUOUS if hasattr(script, "SequenceReplay") else {}
    flags = SMALL | SMALL_PPO | SMALL_DQN | LENGTHS | continuous | changes
    return {name: value for name, value in flags.items() if hasattr(script.Args(), name)}


def command_line(script, **changes):
    """The flags of a small run as a user writes them."""
    flags = []
    for name, value in small(script, **changes).items():
        words = json.dumps(value) if isinstance(value, dict) else value
        words = words if isinstance(words, tuple) else (words,) * (value is not True)
        flags += [f"--{name.replace('_', '-')}", *words]
    return flags


def run(tmp_path, script, **changes):
    """Trains in this process; returns the rows of progress.csv and the run folder."""
    args = script.Args(**small(script, **{"runs_dir": str(tmp_path), "run_name": "run", **changes}))
    refuse_what_is_out_of_range(args)
    script.check(args)
    saved = load("--resume", args.resume, read_checkpoint, script.SCRIPT) if args.resume else {}
    folder = script.train(args, saved)
    return list(csv.DictReader((folder / "progress.csv").open())), folder


@torch.no_grad()
def model_of_new_agent(path, script, spread=0.3, **changes):
    """A model file as Run.save writes it, of an agent whose actions differ from step to step; its args."""
    torch.manual_seed(1)
    args = script.Args(**small(script, **changes))
    agent, _ = make_agent(script.Agent, args, make_envs(args, 1, training=False), {})
    for p in agent.parameters():
        p.add_(spread * torch.randn_like(p))
    flags = json.dumps(dataclasses.asdict(args))
    metadata = {"script": script.SCRIPT, "layout": LAYOUT, "args": flags, "global_step": "0"}
    safetensors.torch.save_file(agent.state_dict(), path, metadata)
    return args


def weights_of(folder):
    return read_model(folder / "model.safetensors")["agent"]


def column(rows, name):
    return [float(row[name]) for row in rows if row[name]]


def comparable(rows):
    """The rows without what differs between two runs that are the same: times and speeds."""
    timed = ("seconds", "charts/SPS", "time/")
    return [{tag: value for tag, value in row.items() if not tag.startswith(timed)} for row in rows]


def wait_for(what, seconds=120, process=None):
    """Until a path exists, or until a function says yes; `process` is to bring it about."""
    happened, deadline = what if callable(what) else what.exists, time.time() + seconds
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.time() < deadline, f"{what}: nothing in {seconds} s"
        time.sleep(0.05)


def spy(monkeypatch, owner, name):
    """owner.name works as before. Returns the list of its calls: args (before the call), result, training.

    training: whether gradients are on, as they are in a script's update and nowhere else.
    """
    calls, original = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        before = copies(args)
        result = original(*args, **kwargs)
        calls.append(SimpleNamespace(args=before, result=copies(result), training=torch.is_grad_enabled()))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def copies(tree):
    """Tensors are detached copies: what is overwritten later stays as it was."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, tree)


def assert_caught(tmp_path, capsys, script, tag="debug/first_logratio", **changes):
    """With what has been planted, the run warns that the policy in training is not the one that acted."""
    rows, _ = run(tmp_path, script, **changes)
    assert max(column(rows, tag)) > 1e-3
    assert "the policy in training is not the one that acted" in "".join(capsys.readouterr())


def cut(png):
    """Whether something is drawn up to the edge of a figure, as a label is that is longer than its side."""
    dark = (imread(png)[..., :3] < 0.9).any(-1)             # [height, width]
    edge = 3                                                # pixels: one or two may fall between letters
    return any(side.any() for side in (dark[:edge], dark[-edge:], dark[:, :edge], dark[:, -edge:]))

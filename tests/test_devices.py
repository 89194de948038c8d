"""Every script and every memory on an accelerator: the GPU if there is one, else a stand-in for it.

Two devices that meet in one operation are an error, on both. On the stand-in a run is also watched for the
places where Python waits for the device: in rollouts and updates a comment, `# waits`, names each of them.
"""
import linecache
import re
import types

import numpy as np
import pytest
import torch

from models import MEMORIES, Encoder, PolicyHead, QHead
from tests.conftest import CONTINUOUS, DISCRETE, DISCRETE_OFF_POLICY, DQN, PPO, PQN, SCRIPTS
from tests.helpers import column, comparable, run
from tests.probes import NUMBERS
from tests.standin import StandIn

PPO = *PPO, "ppo_recurrent_tbb_multigpu"
ALL = *SCRIPTS, "ppo_recurrent_tbb_multigpu"
every_script = pytest.mark.parametrize("script", ALL, indirect=True)
# PPO, PQN: one rollout of 16 steps, 2 gradient steps. Others: 16 steps in 4 environments, 2 gradient steps.
SHORT = dict(
    total_timesteps=64, num_steps=16, num_minibatches=2, update_epochs=1, train_every=32, learning_starts=32,
    policy_learning_starts=32, replay_ratio=0.04, tape_len=16, batch_size=16, log_every=32)


@pytest.fixture
def device():
    """type: what --device is; waits: see tests/standin.py"""
    if torch.cuda.is_available():
        yield types.SimpleNamespace(type="cuda", waits={})
    else:
        with StandIn() as stand_in:
            yield stand_in


def short_run(tmp_path, script, device, **changes):
    """A rollout and an update on this device. Returns the rows of progress.csv."""
    continuous = hasattr(script, "SequenceReplay")
    task = {**NUMBERS, "env_kwargs": {} if continuous else {"discrete": True}}     # ends of both kinds
    rows, _ = run(tmp_path, script, **{**task, **SHORT, "device": device.type, **changes})
    losses = [value for tag in rows[-1] if tag.startswith("losses/") for value in column(rows, tag)]
    assert losses and np.isfinite(losses).all()
    assert not hidden_waits(device)
    return rows


def hidden_waits(device):
    """Lines at which a rollout or an update waits for the device, and no comment says so."""
    hidden = set()
    for (file, _, line), *callers in device.waits:
        if in_rollout_or_update([(file, _, line), *callers]):
            text = linecache.getline(file, line)
            if not re.search(r"# .*\bwaits\b", text):
                hidden.add(f"{file}:{line} waits: {text.strip()}")
    return hidden


def in_rollout_or_update(callers):
    for file, function, line in callers:
        if function == "train":
            lines = linecache.getlines(file)
            begin, end = (next(i for i, x in enumerate(lines, 1) if re.search(f"# -{{60,}} {name}", x))
                          for name in ("rollout", "log"))
            return begin < line < end
    return False


# ------------------------------------------------------------------- scripts

# The stand-in takes its time: there every memory has three scripts, and every script three memories, of two
# states, of one that is a ring, and of none. On a GPU all have all.
PAIRS = [(script, memory) for script in ALL for memory in MEMORIES
         if torch.cuda.is_available() or memory in ("lstm", "gpt", "none")
         or script in ("ppo_recurrent_tbb", "dqn_recurrent_sbb", "sac_gru")]


@pytest.mark.parametrize("script, memory", PAIRS, indirect=["script"])
def test_acting_and_an_update(tmp_path, device, script, memory):
    rows = short_run(tmp_path, script, device, memory=memory)
    assert rows[-1].get("charts/gradient_steps", "2") == "2"


NORMALISED = {"norm_obs": True, "norm_reward": True, "clip_vloss": True, "target_kl": 1.0}
LONG = {"env_id": "PocMemory-v0", "env_kwargs": {"max_steps": 11}}
OPTIONS = {
    "inputs": (ALL, {"prev_action": True, "prev_reward": True, "encoder_size": 8, "num_layers": 2}),
    "evaluation": (ALL, {"eval_every": 32, "eval_episodes": 3}),
    "normalised": ([*PPO, *PQN], NORMALISED),
    "burn-in": (["ppo_recurrent_sbb"], {**LONG, "burn_in": 3, "seq_len": 3}),
    "full-episodes": (PPO[1:], {"full_episodes": True, "total_timesteps": 192}),
    "max-prefix": (PPO[1:], {**LONG, "full_episodes": True, "max_prefix": 2, "total_timesteps": 192}),
    "box": (PPO, {"env_id": "CountInput-v0", "env_kwargs": {}}),
    "multi-discrete": ([*PPO, *DISCRETE], {
        "env_id": "popgym-MineSweeperEasy-v0", "env_kwargs": {}, "prev_action": True}),
    "masks": ([*PPO, *DISCRETE], {"env_id": "Taxi-v4", "env_kwargs": {"max_episode_steps": 9}}),
    "pictures": (["ppo_recurrent_tbb", "dqn_recurrent_sbb"], {
        "env_id": "MinigridMemory-v0", "env_kwargs": {"views": False}, "total_timesteps": 640,
        "learning_starts": 608, "buffer_size": 4000}),
    "views": (["ppo_recurrent_tbb", "pqn_recurrent_tbb", "dqn_recurrent_sbb"], {
        "env_id": "MinigridMemory-v0", "env_kwargs": {"max_steps": 9}, "encoder_size": 16,
        "prev_action": True}),
    "stored-states": ([*DISCRETE_OFF_POLICY, *CONTINUOUS], {"burn_in": 3, "seq_len": 2}),
    "n-step": (DQN, {"n_step": 3, "omit_first_obs": True, "fixed_tape": True, "loss": "mse", "seq_len": -1}),
    "temperature": (["sac_discrete_sbb"], {
        "target_entropy": 0.5, "shared_encoder": True, "freeze_critic": False}),
    "random-actions": (CONTINUOUS, {"learning_starts": 48, "policy_learning_starts": 0}),
    "wiping": (CONTINUOUS, {"wipe_state_every": 3, "mask_non_terminal": True}),
    "first-steps": (CONTINUOUS, {
        "always_sample_from_initial_state": True, "include_first_step_in_targets": False}),
    "bonus": (["sac_gru"], {"autotune": False, "entropy_bonus_next_step": False}),
}
CASES = [pytest.param(script, changes, id=f"{script}-{name}")
         for name, (scripts, changes) in OPTIONS.items() for script in scripts]


@pytest.mark.parametrize("script, changes", CASES, indirect=["script"])
def test_options(tmp_path, device, script, changes):
    short_run(tmp_path, script, device, **{"memory": "lru", **changes})


@every_script
def test_resuming_and_playing(tmp_path, capsys, device, script):
    rare = {"log_every": 64}                                # so at 96 there are numbers for the next row
    short_run(tmp_path, script, device, total_timesteps=96, **rare)
    folder = tmp_path / "run"
    rows = short_run(tmp_path, script, device, resume=str(folder), total_timesteps=160, **rare)
    assert rows[-1]["global_step"] == "128"
    model, where = str(folder / "model.safetensors"), device.type
    script.main(["--model", model, "--device", where, "--episodes", "2", "--render-mode", "none"])
    assert "mean of 2: return" in capsys.readouterr().out


@pytest.mark.quick
@every_script
def test_a_cpu_tensor_in_an_update_is_caught(tmp_path, monkeypatch, device, script):
    forward = Encoder.forward

    def planted(encoder, obs):
        features = forward(encoder, obs)
        return features + torch.zeros(features.shape[-1]) if torch.is_grad_enabled() else features

    monkeypatch.setattr(Encoder, "forward", planted)
    with pytest.raises(RuntimeError, match="same device"):
        short_run(tmp_path, script, device)


@every_script
def test_numpy_without_cpu_is_caught(tmp_path, monkeypatch, device, script):
    for owner in (PolicyHead, QHead, script.Agent):
        if hasattr(owner, "to_env"):
            monkeypatch.setattr(owner, "to_env", lambda self, action: action.numpy())
    with pytest.raises(TypeError, match="to numpy"):
        short_run(tmp_path, script, device)


@every_script
def test_a_hidden_wait_is_caught(tmp_path, monkeypatch, script):
    forward = Encoder.forward

    def planted(encoder, obs):
        return forward(encoder, obs) * (obs[0].sum().item() > -1)

    monkeypatch.setattr(Encoder, "forward", planted)
    with StandIn() as device, pytest.raises(AssertionError, match=r"waits: .*encoder"):
        short_run(tmp_path, script, device)


# ----------------------------------------------------------------- the stand-in

@every_script
def test_the_stand_in_computes_what_the_cpu_does(tmp_path, script):
    def numbers(name, device):
        rows = short_run(tmp_path, script, device, run_name=name)
        return [float(value or "nan") for row in comparable(rows) for value in row.values()]

    on_cpu = numbers("cpu", types.SimpleNamespace(type="cpu", waits={}))
    with StandIn() as device:
        assert numbers("stand-in", device) == pytest.approx(on_cpu, rel=1e-3, abs=1e-6, nan_ok=True)


REFUSED = {
    "sum": lambda x: x + torch.zeros(3),
    "in place": lambda x: x.mul_(torch.ones(3)),
    "into the CPU": lambda x: torch.zeros(3).add_(x),
    "into a number": lambda x: torch.tensor(0.0).add_(x.sum()),
    "product": lambda x: x[None] @ torch.zeros(3, 3),
    "layer": lambda x: torch.nn.Linear(3, 3)(x),
    "cat": lambda x: torch.cat([x, torch.zeros(3)]),
    "numbers stacked": lambda x: torch.stack([x.sum(), torch.tensor(0.0)]),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(3)),
    "mask": lambda x: x.masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "gather": lambda x: x.gather(0, torch.zeros(3, dtype=torch.long)),
    "CPU indexed": lambda x: torch.zeros(3)[x.long()],
    "into places": lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "gradient": lambda x: x.requires_grad_().exp().backward(torch.ones(3)),
}
ALLOWED = {
    "number": lambda x: x + 1.5 * torch.tensor(2.0),
    "NumPy's number": lambda x: x * np.float64(2),
    "constants": lambda x: torch.where(x > 0, 0, x),
    "indices": lambda x: x[torch.tensor([0, 2])] + x[np.array([1, 2])] + x[[0, 1]],
    "copy": lambda x: x.copy_(torch.ones(3)),
    "row": lambda x: x[None].clone().__setitem__(0, torch.ones(3, dtype=torch.float64)),
    "number into a place": lambda x: x.__setitem__(np.array([0, 1]), torch.tensor(2.0)),
    "back": lambda x: x.cpu().numpy() + np.ones(3),
}


@pytest.mark.quick
@pytest.mark.parametrize("mix", REFUSED)
def test_mixes_that_a_gpu_refuses(device, mix):
    with pytest.raises(RuntimeError, match="device"):
        REFUSED[mix](torch.zeros(3, device=device.type))


@pytest.mark.quick
@pytest.mark.parametrize("mix", ALLOWED)
def test_mixes_that_a_gpu_allows(device, mix):
    ALLOWED[mix](torch.zeros(3, device=device.type))


@pytest.mark.quick
@pytest.mark.parametrize("to_numpy", [lambda x: x.numpy(), np.asarray])
def test_numpy_of_an_accelerator(device, to_numpy):
    with pytest.raises(TypeError, match="to numpy"):
        to_numpy(torch.zeros(3, device=device.type))


WAITING = {
    "item": lambda x: x[0].item(),
    "if": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy": lambda x: torch.zeros(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "into a mask": lambda x: x.__setitem__(x > 0, x[:0]),
    "int": lambda x: int(x.sum()),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_the_device(name):
    with StandIn() as device:
        x = torch.zeros(3, device=device.type)
        _ = torch.where(x > 0, x.exp(), 2 * x).to(torch.float64)[:2].sum()
        x.requires_grad_().square().sum().backward()
        assert not device.waits
        WAITING[name](x.detach())
        assert sum(device.waits.values()) == 1

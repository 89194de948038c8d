"""--export: what the files compute is what the agent does; otherwise there is no file."""
import importlib
import importlib.util
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import models.export
import models.real
import ppo_recurrent_tbb
from models import MEMORIES
from models.play import load
from models.policy import SCRIPTS
from tests.helpers import model_of_new_agent
from tests.test_bad_input import refusal
from tests.test_policy import EVERYTHING, MASKS, PICTURES

MISSING = [name for name in ("onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason="pip install onnx onnxruntime onnxscript")
BOX = EVERYTHING | {"env_kwargs": {"box": True}}


@pytest.fixture(scope="module", autouse=True)
def one_registry():
    """torch.onnx reads its list of functions once, not for every file, which takes as long as the rest."""
    if MISSING:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry, from_torchlib = ONNXRegistry.from_torchlib(), ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = lambda *args, **kwargs: registry
    yield
    ONNXRegistry.from_torchlib = from_torchlib


def export(tmp_path, script, suffix, **changes):
    """Exports a new agent, which the script checks. Returns the path of its model and of the file."""
    model, path = tmp_path / "model.safetensors", tmp_path / f"policy{suffix}"
    model_of_new_agent(model, script, spread=0.1, **changes)    # CNNs would enlarge rounding with more
    script.main(["--model", str(model), "--device", "cpu", "--export", str(path)])
    assert path.exists() and not list(tmp_path.glob("*.tmp"))
    return model, path


@pytest.mark.parametrize("layers, suffix", [pytest.param(1, ".onnx", marks=needs_onnx), (2, ".pt2")])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory(tmp_path, capsys, memory, layers, suffix):
    export(tmp_path, ppo_recurrent_tbb, suffix, memory=memory, num_layers=layers)
    assert "differs from the agent by at most" in capsys.readouterr().out


@needs_onnx
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_in_both_formats(tmp_path, monkeypatch, name):
    script, programs, program_of = importlib.import_module(name), [], models.export.program_of

    def once(*args):                                        # tracing takes most of the time
        programs[:] = programs or [program_of(*args)]
        return programs[0]

    monkeypatch.setattr(models.export, "program_of", once)
    for suffix in ".onnx", ".pt2":
        export(tmp_path, script, suffix, memory="gru", prev_action=True, prev_reward=True)


@needs_onnx
@pytest.mark.parametrize("name, changes", [
    ("ppo_recurrent_sbb", EVERYTHING | {"norm_obs": True}), ("td3_gru", BOX),
    ("dqn_recurrent_sbb", MASKS["info"]), ("pqn_recurrent_tbb", PICTURES | {"encoder_size": 8}),
    ("sac_discrete_sbb", PICTURES | {"whiten_images": True})])
def test_every_kind_of_observation_and_action(tmp_path, name, changes):
    export(tmp_path, importlib.import_module(name), ".onnx", memory="none", **changes)


@needs_onnx
def test_numpy_and_onnxruntime_play_as_the_policy_does(tmp_path):
    """One environment, though the file was made with more; complex numbers are pairs."""
    import onnxruntime

    model, path = export(tmp_path, ppo_recurrent_tbb, ".onnx", memory="lru")
    session, policy = onnxruntime.InferenceSession(path), load(model)
    sizes = {x.name: [1, *x.shape[1:]] for x in session.get_inputs()}
    assert sizes == {"obs": [1, 3], "start": [1], "state_0": [1, 1], "state_1": [1, 8, 2]}
    names = [x.name for x in session.get_outputs()]
    assert names == ["action", "next_state_0", "next_state_1", "value", "probabilities"]
    env = gym.make("PocMemory-v0")
    obs, _ = env.reset(seed=1)
    state, start = [np.zeros(sizes[name], np.float32) for name in ("state_0", "state_1")], True
    for _ in range(10):
        inputs = {"obs": obs[None], "start": np.array([start]), "state_0": state[0], "state_1": state[1]}
        action, *state, value, probabilities = session.run(None, inputs)
        assert action[0] == policy(obs)
        assert value[0] == pytest.approx(policy.value, abs=1e-5)
        assert probabilities[0] == pytest.approx(policy.distribution["probabilities"], abs=1e-5)
        obs, start = env.step(action[0])[0], False


# ---------------------------------------------------------------------- what is refused

def test_a_file_that_acts_otherwise_is_not_written(tmp_path, monkeypatch, capsys):
    model, path = export(tmp_path, ppo_recurrent_tbb, ".pt2")
    before = path.read_bytes()
    forward = models.real.Step.forward
    monkeypatch.setattr(
        models.real.Step, "forward",
        lambda self, obs, start, state: forward(self, obs, torch.zeros_like(start), state))
    error = refusal(capsys, ppo_recurrent_tbb, ["--model", str(model), "--export", str(path)])
    assert "was not written" in error and len(error.splitlines()) == 1
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.quick
@pytest.mark.parametrize("name, argv", [
    ("policy.onnx", []), ("policy.txt", ["--model"]), ("policy", ["--model"]), ("", ["--model"])])
def test_a_name_that_cannot_be_exported(script, tmp_path, capsys, name, argv):
    model = tmp_path / "model.safetensors"
    model_of_new_agent(model, script)
    error = refusal(capsys, script, [*argv, *[str(model)] * len(argv), "--export", name])
    assert f"--export {name} must end in .onnx or .pt2" in error and len(error.splitlines()) == 1


@pytest.mark.quick
@pytest.mark.parametrize("flags", [["--probe"], ["--forget-at", "3"]])
def test_flags_that_an_export_would_ignore(tmp_path, capsys, flags):
    model, path = tmp_path / "model.safetensors", tmp_path / "policy.pt2"
    model_of_new_agent(model, ppo_recurrent_tbb)
    error = refusal(capsys, ppo_recurrent_tbb, ["--model", str(model), "--export", str(path), *flags])
    assert "--export plays nothing" in error and len(error.splitlines()) == 1
    assert not path.exists()


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_packages_that_are_not_installed(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    model, path = tmp_path / "model.safetensors", tmp_path / "policy.onnx"
    model_of_new_agent(model, ppo_recurrent_tbb)
    error = refusal(capsys, ppo_recurrent_tbb, ["--model", str(model), "--export", str(path)])
    assert "pip install onnx onnxruntime onnxscript" in error and len(error.splitlines()) == 1
    assert not path.exists()

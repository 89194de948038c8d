"""--export: what the files compute is what the agent does; otherwise there is no file."""
import importlib
import importlib.util

import pytest

import models.export
from models import MEMORIES
from models.policy import SCRIPTS
from tests.helpers import model_of_new_agent
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
    model_of_new_agent(model, script, **changes)
    script.main(["--model", str(model), "--device", "cpu", "--export", str(path)])
    assert path.exists() and not list(tmp_path.glob("*.tmp"))
    return model, path


@pytest.mark.parametrize("layers, suffix", [pytest.param(1, ".onnx", marks=needs_onnx), (2, ".pt2")])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory(tmp_path, capsys, memory, layers, suffix):
    import ppo_recurrent_tbb

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

"""Cut into whole episodes or left on the tape: the same loss and the same gradients, for every memory.

Both scripts train as they are, in float64, from one seed, on one minibatch: with segments as long as the episodes, their
stored states and the mean over real steps, SBB computes what TBB computes. A line planted before the optimizer's step reports.
"""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from models import MEMORIES

ROOT = Path(__file__).parent.parent
ARGS = dict(env_id="popgym-RepeatPreviousEasy-v0", num_envs=3, num_steps=70, total_timesteps=3 * 70 * 3, num_minibatches=1,
            update_epochs=1, hidden_size=8, mlp_size=8, learning_rate=(1e-2,), ent_coef=(1e-2,), vf_coef=0.5, device="cpu")


def losses_and_gradients(tmp_path, name, **changes):
    """(loss, gradients) of the first gradient step of each update; the same random numbers in every rollout."""
    source = (ROOT / f"{name}.py").read_text()
    step = "                optimizer.step()\n"
    assert source.count(step) == 1
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(step, "                seen.append((loss.detach(), [p.grad.clone() for p in parameters]))\n"
                                   + step + "                torch.manual_seed(global_step)\n"))
    spec = importlib.util.spec_from_file_location("planted_" + name, path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.seen = []
    module.train(module.Args(**ARGS, runs_dir=str(tmp_path), run_name=name, **changes))
    return module.seen


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_whole_segments_equal_the_tape(tmp_path, float64, memory, layers):
    """Episodes of 51 steps: the rollout of 70 holds ends of some and beginnings of others."""
    sbb = losses_and_gradients(tmp_path, "ppo_recurrent_sbb", memory=memory, num_layers=layers, seq_len=-1)
    tbb = losses_and_gradients(tmp_path, "ppo_recurrent_tbb", memory=memory, num_layers=layers)
    assert len(sbb) == len(tbb) == 3
    for (loss, gradients), (tape_loss, tape_gradients) in zip(sbb, tbb):
        torch.testing.assert_close(tape_loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tape_gradients, gradients, rtol=1e-9, atol=1e-11)
        assert sum(g.abs().sum() for g in gradients) > 1e-3


def test_short_segments_do_not(tmp_path, float64):
    """The loss is still that of the acting policy, but the gradient is truncated: the test above can fail."""
    sbb = losses_and_gradients(tmp_path, "ppo_recurrent_sbb", memory="lru", seq_len=8)
    tbb = losses_and_gradients(tmp_path, "ppo_recurrent_tbb", memory="lru")
    torch.testing.assert_close(tbb[0][0], sbb[0][0], rtol=1e-9, atol=1e-12)
    difference = max((a - b).abs().max() for a, b in zip(sbb[0][1], tbb[0][1]))
    assert difference > 1e-6

"""Cut into whole episodes or left on the tape: the same loss and the same gradients, for every memory.

Both scripts train as they are, in float64, from one seed, on one minibatch: with segments as long as the
episodes, their stored states and the mean over real steps, SBB computes what TBB computes.
"""
import pytest
import torch

import ppo_recurrent_sbb
import ppo_recurrent_tbb
from models import MEMORIES
from tests.helpers import copies

ARGS = dict(
    env_id="popgym-RepeatPreviousEasy-v0", num_envs=3, num_steps=70, total_timesteps=3 * 70 * 3,
    num_minibatches=1, update_epochs=1, hidden_size=8, mlp_size=8, learning_rate=(1e-2,), ent_coef=(1e-2,),
    vf_coef=0.5, device="cpu")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses_and_gradients(tmp_path, monkeypatch, script, **changes):
    """[(loss, gradients)] of the gradient step of each update; the same random numbers in every rollout."""
    losses, gradients = [], []
    backward, step = torch.Tensor.backward, torch.optim.AdamW.step

    def watched_backward(loss):
        losses.append(loss.detach())
        backward(loss)

    def watched_step(optimizer):
        gradients.append(copies([p.grad for p in optimizer.param_groups[0]["params"]]))
        step(optimizer)
        torch.manual_seed(len(gradients))                   # SBB and TBB draw other permutations

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", watched_backward)
        patch.setattr(torch.optim.AdamW, "step", watched_step)
        script.train(script.Args(**ARGS, runs_dir=str(tmp_path), run_name=script.SCRIPT, **changes), {})
    return list(zip(losses, gradients, strict=True))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_whole_segments_equal_the_tape(tmp_path, monkeypatch, memory, layers):
    """Episodes of 51 steps: the rollout of 70 holds ends of some and beginnings of others."""
    changes = dict(memory=memory, num_layers=layers)
    sbb = losses_and_gradients(tmp_path, monkeypatch, ppo_recurrent_sbb, seq_len=-1, **changes)
    tbb = losses_and_gradients(tmp_path, monkeypatch, ppo_recurrent_tbb, **changes)
    assert len(sbb) == len(tbb) == 3
    for (loss, gradients), (tape_loss, tape_gradients) in zip(sbb, tbb):
        torch.testing.assert_close(tape_loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tape_gradients, gradients, rtol=1e-9, atol=1e-11)
        assert sum(g.abs().sum() for g in gradients) > 1e-3


@pytest.mark.quick
def test_short_segments_do_not(tmp_path, monkeypatch):
    """The loss is still that of the acting policy, but the gradient is truncated: the test above can fail."""
    sbb = losses_and_gradients(tmp_path, monkeypatch, ppo_recurrent_sbb, memory="lru", seq_len=8)
    tbb = losses_and_gradients(tmp_path, monkeypatch, ppo_recurrent_tbb, memory="lru")
    torch.testing.assert_close(tbb[0][0], sbb[0][0], rtol=1e-9, atol=1e-12)
    difference = max((a - b).abs().max() for a, b in zip(sbb[0][1], tbb[0][1]))
    assert difference > 1e-6

"""ppo_recurrent_sbb.py: segments, padding, truncated gradients, burn-in. Common to all: test_scripts.py."""
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_recurrent_sbb as ppo
from models import MEMORIES
from tests.helpers import AsItIs, assert_caught, column, copies, run, small, weights_of

# ---------------------------------------------------------------------- pure functions


@pytest.mark.quick
@pytest.mark.parametrize("L", [1, 3, 8, 40])
def test_segments_partition_the_rollout(L):
    torch.manual_seed(L)
    T, N = 32, 4
    starts = torch.rand(T, N) < 0.2
    when, col, mask = ppo.cut_segments(starts, L)
    assert when.shape == mask.shape == (int(mask.sum(0).max()), len(col)) and len(when) <= L
    seen = torch.zeros(T, N, dtype=torch.long)
    seen.index_put_((when[mask], col.expand(len(when), -1)[mask]), torch.tensor(1), accumulate=True)
    assert (seen == 1).all()                                # every step exactly once
    assert not (starts[when, col] & mask)[1:].any()         # a segment holds steps of one episode
    assert (mask.long().diff(dim=0) <= 0).all() and mask[0].all()               # padding only at the end
    assert (when.diff(dim=0)[mask[1:]] == 1).all()          # consecutive in time
    for first, n in zip(when[0].tolist(), col.tolist()):    # no cut without a reason
        episode_start = max([0] + [t for t in range(first + 1) if starts[t, n]])
        assert (first - episode_start) % L == 0


# ---------------------------------------------------------------------- what is trained is what acted

CHANGES = [{"seq_len": -1}, {"seq_len": 1}, {"burn_in": 3}, {"reset_state": False},
           {"prev_action": True, "prev_reward": True}, {"norm_obs": True, "norm_reward": True}]
CASES = [(memory, layers, {}) for memory in MEMORIES for layers in (1, 2)]
CASES += [(memory, 1, changes) for memory in ("lstm", "lru") for changes in CHANGES]


@pytest.mark.parametrize("memory, layers, changes", CASES, ids=str)
def test_first_logratio_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed log-probabilities agree.

    Episodes of at most 11 steps end inside rollouts and segments of 5.
    """
    rows, _ = run(tmp_path, ppo, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, "debug/first_logratio")) < 1e-5
    assert max(column(rows, "debug/padding")) > 1 or changes.get("seq_len") == 1
    assert max(column(rows, "losses/approx_kl")) > 1e-6        # and then the policy moved


@pytest.mark.quick
def test_classic_bug_state_saved_too_late(tmp_path, capsys, monkeypatch):
    """The state is saved after the step has moved it: what was kept of step t is that of t + 1."""
    forward = ppo.Agent.forward

    def moves_what_was_kept(self, obs, state, start, mask=None):
        dist, value, after = forward(self, obs, state, start, mask)
        if torch.is_inference_mode_enabled():
            for kept, new in zip(state, after):
                kept.copy_(new)
        return dist, value, after

    monkeypatch.setattr(ppo.Agent, "forward", moves_what_was_kept)
    assert_caught(tmp_path, capsys, ppo)


@pytest.mark.quick
def test_classic_bug_reshape(tmp_path, capsys, monkeypatch):
    """Steps ordered (segment, time) are reshaped to (time, segment)."""
    index_put_ = torch.Tensor.index_put_

    def reshape(padded, index, real):
        mask, = index
        by_segment = padded.new_zeros(*mask.T.shape, padded.shape[-1])
        return index_put_(by_segment, (mask.T,), real).view(padded.shape)

    monkeypatch.setattr(torch.Tensor, "index_put_", reshape)
    assert_caught(tmp_path, capsys, ppo)


@pytest.mark.quick
def test_pitfall_segments_from_zero_state(tmp_path, capsys, monkeypatch):
    forward = ppo.Agent.forward

    def from_zeros(self, obs, state, start, mask=None):
        if mask is not None:
            state = tuple(torch.zeros_like(s) for s in state)
        return forward(self, obs, state, start, mask)

    monkeypatch.setattr(ppo.Agent, "forward", from_zeros)
    assert_caught(tmp_path, capsys, ppo)


# ---------------------------------------------------------------------- padding, gradients, burn-in

def agent_and_batch(memory="lstm", **changes):
    """An agent and one batch of segments of a random rollout: the real steps, states, starts, mask."""
    torch.manual_seed(0)
    args = ppo.Args(**{**small(ppo), "memory": memory, **changes})
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args).double()
    agent.encoder = AsItIs()
    T, N = 20, 3
    obs, starts = torch.randn(T, N, 3, dtype=torch.float64), torch.rand(T, N) < 0.2
    when, col, mask = ppo.cut_segments(starts, 6)
    shapes = [s.shape[1:] for s in agent.memory.initial_state(1)]
    state = tuple(torch.randn(len(col), *shape, dtype=torch.float64) for shape in shapes)
    return agent, obs[when, col][mask], state, starts[when, col] & mask, mask


@pytest.mark.quick
@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_can_hold_anything(memory):
    """Garbage in the padding changes no output and no gradient: the mask, not its content, decides."""
    agent, real, state, start, mask = agent_and_batch(memory)

    def outputs(garbage):
        agent.zero_grad()
        x = torch.full((*mask.shape, 3), garbage, dtype=torch.float64).index_put_((mask,), real)
        y, _ = agent.memory(x, state, start)
        y[mask].square().sum().backward()
        return y[mask].detach(), [p.grad.clone() for p in agent.memory.parameters()]

    torch.testing.assert_close(outputs(0.0), outputs(1e9), rtol=0, atol=0)
    dist, value, _ = agent(real, state, start, mask)        # the agent itself pads with zeros
    assert value.shape == dist.entropy().shape == (int(mask.sum()),)
    y, _ = outputs(0.0)
    torch.testing.assert_close(value, agent.value(agent.value_hidden(y).relu()).squeeze(-1))


def test_gradient_stops_at_the_segments_edge():
    """Truncated BPTT: an output depends on the inputs of its segment up to its step, on nothing else."""
    agent, real, state, start, mask = agent_and_batch("gru", mlp_size=64)
    real = real.requires_grad_()
    _, value, _ = agent(real, state, start, mask)
    rows, segment = mask.nonzero(as_tuple=True)             # of the M real steps
    for m in range(0, len(value), 5):
        (grad,) = torch.autograd.grad(value[m], real, retain_graph=True)
        reaches = grad.abs().sum(-1) > 0
        assert (reaches == ((segment == segment[m]) & (rows <= rows[m]))).all()


def test_burn_in_refreshes_stored_states(tmp_path, monkeypatch):
    """A segment gets the state that the current weights make of the steps before it."""
    refresh, drift = ppo.refresh, []

    def watched(seg_state, agent, obs, states, starts, first, col, burn_in):
        stored = copies(seg_state)
        refresh(seg_state, agent, obs, states, starts, first, col, burn_in)
        moved = torch.zeros(len(col))
        for b, (t, n) in enumerate(zip(first.tolist(), col.tolist())):
            fresh = tuple(s[[b]] for s in stored)
            if t > 0 and not starts[t, n]:                  # it continues an episode of this rollout
                begin = max(t - burn_in, 0)
                assert not starts[begin + 1 : t, n].any()   # all of its episode
                before = tuple(s[begin, [n]] for s in states)
                steps = tuple(o[begin:t, [n]] for o in obs)
                with torch.no_grad():
                    _, _, fresh = agent(steps, before, starts[begin:t, [n]])
                moved[b] = (seg_state[0][b] - stored[0][b]).abs().max()
            torch.testing.assert_close(tuple(s[[b]] for s in seg_state), fresh)
        drift.append(moved.max())

    monkeypatch.setattr(ppo, "refresh", watched)
    run(tmp_path, ppo, memory="gru", burn_in=5, learning_rate=(0.05,))
    assert drift[0] < 1e-5 < 1e-3 < drift[5]                # after 5 gradient steps: stale


def test_a_minibatch_of_one_step_trains(tmp_path):
    rows, folder = run(
        tmp_path, ppo, num_envs=1, num_steps=8, seq_len=1, num_minibatches=8, total_timesteps=32)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(folder).values())


def test_burn_in_with_images_and_nothing_to_burn(tmp_path):
    rows, _ = run(
        tmp_path, ppo, env_id="MinigridMemory-v0", env_kwargs={}, num_steps=16, seq_len=16, burn_in=4)
    assert len(rows) == 6


@pytest.mark.quick
@pytest.mark.parametrize("flags", [
    "--seq-len 0", "--seq-len 4 --burn-in 5", "--burn-in -1", "--seq-len -1 --burn-in 1"])
def test_bad_input(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[-2] in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- learning

def test_poc_memory_is_not_learned_without_memory(tmp_path):
    """With it: entry smoke-ppo-sbb, which the gate runs."""
    own = vars(ppo.Args()) | {"runs_dir": str(tmp_path), "run_name": "run"}
    rows, _ = run(tmp_path, ppo, **{**own, "memory": "none", "total_timesteps": 32_768, "device": "cpu"})
    assert max(column(rows, "charts/success")[5:]) <= 0.85

"""ppo_recurrent_sbb.py: segments, padding, truncated gradients, burn-in. What it shares with others: test_scripts.py."""
import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

import ppo_recurrent_sbb as ppo
from models import MEMORIES
from tests.helpers import assert_caught, column, planted, run, small, weights_of

# ---------------------------------------------------------------------- pure functions

@pytest.mark.parametrize("L", [1, 3, 8, 40])
def test_segments_partition_the_rollout(L):
    torch.manual_seed(L)
    T, N = 32, 4
    starts = torch.rand(T, N) < 0.2
    when, env, mask = ppo.cut_segments(starts, L)
    assert when.shape == mask.shape == (int(mask.sum(0).max()), len(env)) and len(when) <= L    # as long as the longest
    seen = torch.zeros(T, N, dtype=torch.long)
    seen.index_put_((when[mask], env.expand(len(when), -1)[mask]), torch.tensor(1), accumulate=True)
    assert (seen == 1).all()                                                    # every step exactly once
    assert not (starts[when, env] & mask)[1:].any()                             # a segment holds steps of one episode
    assert (mask.long().diff(dim=0) <= 0).all() and mask[0].all()               # padding only at the end
    assert (when.diff(dim=0)[mask[1:]] == 1).all()                              # consecutive in time
    after = when[0] > 0
    before_is_start = starts[when[0], env] | (mask.new_tensor([(w - s) % L == 0 for w, s in zip(
        when[0].tolist(), [max([0] + [t for t in range(w + 1) if starts[t, e]]) for w, e in zip(when[0], env)])]))
    assert before_is_start[after].all()                                         # no cut without a reason


# ---------------------------------------------------------------------- what is trained is what acted

CHANGES = [{"seq_len": -1}, {"seq_len": 1}, {"burn_in": 3}, {"reset_state": False}, {"prev_action": True, "prev_reward": True},
           {"norm_obs": True, "norm_reward": True}]


@pytest.mark.parametrize("memory, layers, changes",
                         [(memory, layers, {}) for memory in MEMORIES for layers in (1, 2)]
                         + [(memory, 1, changes) for memory in ("lstm", "lru") for changes in CHANGES], ids=str)
def test_first_logratio_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed log-probabilities agree. Episodes of at most
    11 steps end inside rollouts and segments of 5."""
    rows, _ = run(tmp_path, ppo, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, "debug/first_logratio")) < 1e-5
    assert max(column(rows, "debug/padding")) > 1 or changes.get("seq_len") == 1
    assert max(column(rows, "losses/approx_kl")) > 1e-6                         # and then the policy did move


def test_classic_bug_state_saved_too_late(tmp_path, capsys):
    """The state is saved after the step has moved it."""
    assert_caught(tmp_path, capsys, ppo, ("            states.append(state)\n", ""),
                  ("                action = dist.sample() ", "                states.append(state)\n"
                   "                action = dist.sample() "))


def test_classic_bug_reshape(tmp_path, capsys):
    """Steps ordered (segment, time) reshaped to (time, segment)."""
    assert_caught(tmp_path, capsys, ppo, ("x = x.new_zeros(*mask.shape, x.shape[-1]).index_put_((mask,), x) ",
                                     "x = x.new_zeros(*mask.T.shape, x.shape[-1]).index_put_((mask.T,), x).view("
                                     "*mask.shape, -1) "))


def test_pitfall_segments_from_zero_state(tmp_path, capsys):
    assert_caught(tmp_path, capsys, ppo, ("seg_state = tuple(s[when[0], col] for s in states)",
                                     "seg_state = tuple(torch.zeros_like(s[when[0], col]) for s in states)"))


# ---------------------------------------------------------------------- padding, gradients, burn-in

def agent_and_batch(memory="lstm", **changes):
    """An agent and one batch of segments of a random rollout."""
    torch.manual_seed(0)
    args = ppo.Args(**{**small(ppo), "memory": memory, **changes})
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args).double()
    T, N = 20, 3
    obs, starts = torch.randn(T, N, 3, dtype=torch.float64), torch.rand(T, N) < 0.2
    when, env, mask = ppo.cut_segments(starts, 6)
    state = tuple(torch.randn(len(env), *s.shape[1:], dtype=torch.float64) for s in agent.memory.initial_state(1))
    index, start = (when * N + env)[mask], starts[when, env] & mask
    return agent, obs, index, state, start, mask


@pytest.mark.parametrize("memory", MEMORIES)
def test_padding_can_hold_anything(memory):
    """Garbage in the padding changes no output and no gradient: the mask, not its content, decides."""
    agent, obs, index, state, start, mask = agent_and_batch(memory)
    agent.encoder = nn.Identity()
    real = obs.flatten(0, 1)[index]

    def outputs(garbage):
        agent.zero_grad()
        x = torch.full((*mask.shape, 3), garbage, dtype=torch.float64).index_put_((mask,), real)
        y, _ = agent.memory(x, state, start)
        y[mask].square().sum().backward()
        return y[mask].detach(), [p.grad.clone() for p in agent.memory.parameters()]

    torch.testing.assert_close(outputs(0.0), outputs(1e9), rtol=0, atol=0)
    dist, value, _ = agent(real, state, start, mask)                            # the agent pads with zeros itself
    assert value.shape == dist.entropy().shape == (int(mask.sum()),)
    y, _ = agent.memory(torch.zeros(*mask.shape, 3, dtype=torch.float64).index_put_((mask,), real), state, start)
    torch.testing.assert_close(value, agent.value(agent.hidden(y[mask]).relu().chunk(2, -1)[1]).squeeze(-1))


def test_gradient_stops_at_the_segments_edge():
    """Truncated BPTT: a step's output depends on the inputs of its own segment up to itself, and on nothing else."""
    agent, obs, index, state, start, mask = agent_and_batch("gru", mlp_size=64)
    agent.encoder = nn.Identity()
    real = obs.flatten(0, 1)[index].requires_grad_()
    _, value, _ = agent(real, state, start, mask)
    rows, segment = mask.nonzero(as_tuple=True)                                 # of the M real steps
    for m in range(0, len(value), 5):
        (grad,) = torch.autograd.grad(value[m], real, retain_graph=True)
        reaches = grad.abs().sum(-1) > 0
        assert (reaches == ((segment == segment[m]) & (rows <= rows[m]))).all()


def test_burn_in_refreshes_stored_states(tmp_path):
    """With today's weights, the refreshed state is what the segment before leads to, however stale the stored one."""
    module = planted(tmp_path, ppo, ("                dist, newvalue, _ = agent(",
                                "                if args.burn_in and c.any():\n"
                                "                    seen.append((seg_state[0][mb[c]], mb_state[0][c], agent(tuple(o[at] for o "
                                "in obs), tuple(s[first] for s in states), memory_starts[at])[2][0], at, memory_starts[at]))\n"
                                "                dist, newvalue, _ = agent("))
    module.seen = seen = []
    run(tmp_path, module, memory="gru", burn_in=5, learning_rate=(0.05,))
    for stored, used, fresh, (when, _), start in seen:
        torch.testing.assert_close(used, fresh)                                 # what trains is the refreshed state
        assert (when.diff(dim=0) == 1).all() and not start[1:].any()            # from consecutive steps of one episode
    drift = [(stored - used).abs().max().item() for stored, used, *_ in seen]
    assert drift[0] < 1e-5 < 1e-3 < drift[5]                                    # 6 minibatches an update: then stale


def test_a_minibatch_of_one_step_trains(tmp_path):
    rows, folder = run(tmp_path, ppo, num_envs=1, num_steps=8, seq_len=1, num_minibatches=8, total_timesteps=32)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(ppo, folder).values())


def test_burn_in_with_images_and_nothing_to_burn(tmp_path):
    rows, _ = run(tmp_path, ppo, env_id="MinigridMemory-v0", env_kwargs="{}", num_steps=16, seq_len=16, burn_in=4)
    assert len(rows) == 6


@pytest.mark.parametrize("flags", ["--seq-len 0", "--seq-len 4 --burn-in 5", "--burn-in -1", "--seq-len -1 --burn-in 1"])
def test_bad_input(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[-2] in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- learning

@pytest.mark.parametrize("memory, low, high", [("gru", 0.98, 1.0), ("none", 0.0, 0.85)])
def test_poc_memory_is_learned_with_memory_only(tmp_path, memory, low, high):
    args = ppo.Args(memory=memory, runs_dir=str(tmp_path), run_name="run", total_timesteps=40_960, device="cpu")
    folder = ppo.train(args)
    best = max(column(list(csv.DictReader((folder / "progress.csv").open())), "charts/success")[5:])
    assert low <= best <= high


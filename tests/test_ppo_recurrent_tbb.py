"""ppo_recurrent_tbb.py: columns of tape, and --full-episodes. What all scripts do: test_scripts.py."""
import gc

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_recurrent_tbb as ppo
from models import MEMORIES
from models.flags import read_checkpoint
from tests.helpers import AsItIs, assert_caught, column, comparable, copies, run, small, weights_of

SLOW_EPISODES = {"max_steps": 70}  # rollouts of 32 steps: episodes go over two or three of them
CHANGES = [
    {"reset_state": False}, {"prev_action": True, "prev_reward": True},
    {"norm_obs": True, "norm_reward": True},
    {"full_episodes": True, "max_prefix": 4}, {"full_episodes": True, "reset_state": False, "max_prefix": 50}]
CASES = [(memory, layers, {}) for memory in MEMORIES for layers in (1, 2)]
CASES += [(memory, 1, {"full_episodes": True}) for memory in MEMORIES]
CASES += [(memory, 1, changes) for memory in ("lstm", "lru") for changes in CHANGES]


# ---------------------------------------------------------------------- what is trained is what acted

@pytest.mark.parametrize("memory, layers, changes", CASES, ids=str)
def test_first_logratio_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed log-probabilities agree."""
    rows, _ = run(tmp_path, ppo, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, "debug/first_logratio")) < 1e-5
    assert max(column(rows, "losses/approx_kl")) > 1e-6     # and then the policy moved


@pytest.mark.quick
@pytest.mark.parametrize("other", ["initial", "newest"])
def test_pitfall_columns_from_another_state(tmp_path, capsys, monkeypatch, other):
    forward, acted = ppo.Agent.forward, []

    def from_another(self, obs, state, start, prefix=0):
        if torch.is_grad_enabled():                         # training: all columns are in minibatches of one
            state = self.memory.initial_state(1) if other == "initial" else tuple(s[:1] for s in acted[-1])
        dist, value, after = forward(self, obs, state, start, prefix)
        acted.append(copies(after))
        return dist, value, after

    monkeypatch.setattr(ppo.Agent, "forward", from_another)
    assert_caught(tmp_path, capsys, ppo, num_minibatches=4)


def test_pitfall_acting_on_with_a_stale_state(tmp_path, capsys, monkeypatch):
    """With --full-episodes training recomputes states from the episode's first step: so must acting."""
    forward, acted = ppo.Agent.forward, []

    def acts_on(self, obs, state, start, prefix=0):
        dist, value, after = forward(self, obs, state, start, prefix)
        if torch.is_inference_mode_enabled():
            acted.append(copies(after))
        elif len(start) > 1 and not torch.is_grad_enabled():                    # recomputes: to no effect
            after = acted[-1]
        return dist, value, after

    monkeypatch.setattr(ppo.Agent, "forward", acts_on)
    assert_caught(
        tmp_path, capsys, ppo, full_episodes=True, env_kwargs=SLOW_EPISODES, learning_rate=(0.05,))


# ---------------------------------------------------------------------- the tape

def agent_and_tape(memory, layers=1):
    """An agent, a tape of 3 columns of 20 steps with starts at 0, 8 and 15, a carried state. float64."""
    torch.manual_seed(0)
    args = ppo.Args(**{**small(ppo), "memory": memory, "num_layers": layers})
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args).double()
    agent.encoder = AsItIs()
    x, start = torch.randn(20, 3, 3, dtype=torch.float64), torch.zeros(20, 3, dtype=torch.bool)
    start[[0, 8, 15]] = True
    return agent, x, start, tuple(torch.randn_like(s) for s in agent.memory.initial_state(3))


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.quick)])
@pytest.mark.parametrize("memory", MEMORIES)
def test_episodes_on_a_tape_know_nothing_of_each_other(memory, layers):
    """Other data in one episode change no other, to the bit; no gradient crosses an episode's edge."""
    agent, x, start, state = agent_and_tape(memory, layers)
    _, values, final = agent(x, state, start)
    changed = x.clone()
    changed[8:15, 1] = 100 * torch.randn(7, 3, dtype=torch.float64)     # second episode, middle column
    _, values_changed, final_changed = agent(changed, tuple(7 * s - 3 for s in state), start)
    same = torch.ones(20, 3, dtype=torch.bool)
    same[8:15, 1] = False
    torch.testing.assert_close(values_changed[same], values[same], rtol=0, atol=0)
    torch.testing.assert_close(final_changed, final, rtol=0, atol=0)
    assert (values_changed[~same] != values[~same]).all()
    x.requires_grad_()
    _, values, _ = agent(x, state, start)
    (grad,) = torch.autograd.grad(values[8:15, 1].sum(), x)
    assert (grad[~same] != 0).any(dim=-1).all() or memory == "none"
    assert (grad[same] == 0).all()


@pytest.mark.quick
def test_prefix_steps_are_read_and_not_returned():
    agent, x, start, state = agent_and_tape("lru")
    dist, values, final = agent(x, state, start, 5)
    _, all_values, all_final = agent(x, state, start)
    assert values.shape == dist.entropy().shape == (15, 3)  # no loss can weigh the first five
    torch.testing.assert_close((values, final), (all_values[5:], all_final))


@pytest.mark.quick
def test_the_age_of_running_episodes():
    starts = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    next_start = torch.tensor([False, False, False, True])
    assert ppo.age_of(starts, next_start).tolist() == [1, 4, 2, 0]


def tapes(monkeypatch):
    """What every update trains on: P, starts [P + T, N], observations, the states before it, the agent.

    One minibatch an update, its columns in order.
    """
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))
    forward, seen = ppo.Agent.forward, []

    def watched(self, obs, state, start, prefix=0):
        if torch.is_grad_enabled():
            seen.append((prefix, *copies((start, obs[0], state)), self))
        return forward(self, obs, state, start, prefix)

    monkeypatch.setattr(ppo.Agent, "forward", watched)
    return seen


ONE_MINIBATCH = dict(env_kwargs=SLOW_EPISODES, num_minibatches=1, update_epochs=1)


def test_full_episodes_hold_every_step_of_unfinished_episodes_and_none_before(tmp_path, monkeypatch):
    """P is the age of the oldest running episode; the tape begins with the last P steps of the one before."""
    seen = tapes(monkeypatch)
    T, oldest_ended = 8, 0
    run(tmp_path, ppo, full_episodes=True, num_steps=T, total_timesteps=4 * T * 100, **ONE_MINIBATCH)
    assert seen[0][0] == 0 and len(seen) == 100
    assert max(P for P, *_ in seen) > 2 * T                 # some episode is over two rollouts old
    for (_, starts_before, obs_before, *_), (P, starts, obs, *_) in zip(seen, seen[1:]):
        assert len(obs) == len(starts) == P + T
        length = len(obs_before)
        ages = [length - max(t for t in range(length) if starts_before[t, n]) for n in range(4)]
        running = [0 if starts[P, n] else age for n, age in enumerate(ages)]
        assert P == max(running)
        oldest_ended += max(ages) > P
        kept = slice(length - P, None)
        torch.testing.assert_close((starts[:P], obs[:P]), (starts_before[kept], obs_before[kept]))
    assert oldest_ended                                     # and its steps were dropped


def test_max_prefix_bounds_the_tape(tmp_path, monkeypatch):
    seen = tapes(monkeypatch)
    rows, _ = run(tmp_path, ppo, full_episodes=True, max_prefix=6, **ONE_MINIBATCH)
    assert max(P for P, *_ in seen) == 6 and max(column(rows, "debug/first_logratio")) < 1e-5
    seen.clear()
    run(tmp_path / "b", ppo, full_episodes=False, **ONE_MINIBATCH)
    assert {P for P, *_ in seen} == {0}


@pytest.mark.parametrize("max_prefix", [None, 6, 20])
@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_a_tape_begins_with_the_memory_of_all_that_was_before(tmp_path, monkeypatch, memory, max_prefix):
    """With weights that stay, the state before a tape is that after every step since the first rollout."""
    changes = {"full_episodes": True, "max_prefix": max_prefix} if max_prefix else {}
    seen = tapes(monkeypatch)
    T, before, compared = 8, [], 0
    run(tmp_path, ppo, memory=memory, learning_rate=(0.0,), num_steps=T, total_timesteps=4 * T * 8,
        **changes, **ONE_MINIBATCH)
    for i, (P, starts, obs, state, agent) in enumerate(seen):
        if i * T > P:
            all_obs, all_starts = (torch.cat(x)[: i * T - P] for x in zip(*before))
            with torch.no_grad():
                _, _, expected = agent((all_obs,), agent.memory.initial_state(4), all_starts)
            runs_on = ~starts[: P + 1].any(0)               # the others forget before the loss begins
            compared += runs_on.sum()
            for s, e in zip(state, expected, strict=True):
                torch.testing.assert_close(s[runs_on], e[runs_on], rtol=1e-5, atol=1e-6)
        before.append((obs[P:], starts[P:]))
    assert compared > 2


def test_a_rollout_keeps_no_states(tmp_path, monkeypatch):
    """GPT's state is its last steps: T of them would be T times the window."""
    lap, counts = ppo.Run.lap, []

    def count_states(self, name):
        if name == "batch":
            kept = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (4, 127, 8)]
            counts.append(len({x.data_ptr() for x in kept}))
        lap(self, name)

    monkeypatch.setattr(ppo.Run, "lap", count_states)
    run(tmp_path, ppo, memory="gpt")
    assert len(counts) == 3 and 0 < max(counts) < 10        # keys and values, before the rollout and after it


def test_full_episodes_carry_gradients_to_the_episodes_beginning(tmp_path, monkeypatch):
    """The loss of the rollout's steps has a gradient at the steps before it, up to the episode's start."""
    forward, seen = ppo.Agent.forward, []

    def with_gradients(self, obs, state, start, prefix=0):
        if torch.is_grad_enabled():
            obs = tuple(o.clone().requires_grad_() for o in obs)
            seen.append((prefix, obs[0], start))
        return forward(self, obs, state, start, prefix)

    monkeypatch.setattr(ppo.Agent, "forward", with_gradients)
    run(tmp_path, ppo, memory="lru", full_episodes=True, env_kwargs=SLOW_EPISODES, mlp_size=64)
    assert sum(P > 0 for P, *_ in seen) >= 6
    for P, obs, starts in seen:
        row = torch.arange(P + 32)[:, None]
        begin = torch.where(starts & (row <= P), row, 0).amax(0)    # [b] where the first step's episode began
        torch.testing.assert_close(obs.grad.abs().sum(-1) > 0, row >= begin)    # from there on every step


@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_resume_with_full_episodes_equals_never_having_stopped(tmp_path, memory):
    changes = dict(memory=memory, full_episodes=True, env_kwargs=SLOW_EPISODES)
    whole, folder = run(tmp_path, ppo, run_name="whole", **changes)
    _, half = run(tmp_path, ppo, run_name="half", total_timesteps=4 * 32 * 2, **changes)
    rows, half = run(tmp_path, ppo, resume=str(half), **changes)
    assert comparable(rows) == comparable(whole)
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, weights_of(half)[name]), name


def test_a_resumed_run_may_drop_full_episodes(tmp_path, monkeypatch):
    """The tape of the checkpoint serves once; then there is no earlier step, and no older state."""
    seen = tapes(monkeypatch)
    _, folder = run(tmp_path, ppo, full_episodes=True, **ONE_MINIBATCH)
    seen.clear()
    rows, _ = run(
        tmp_path, ppo, resume=str(folder), full_episodes=False, total_timesteps=4 * 32 * 6, **ONE_MINIBATCH)
    prefixes = [P for P, *_ in seen]
    assert prefixes[0] > 0 and prefixes[1:] == [0, 0] and max(column(rows, "debug/first_logratio")) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"full_episodes": True, "max_prefix": 4}])
def test_a_checkpoint_holds_no_more_than_it_needs(tmp_path, changes):
    """A slice of the tape is a view, and torch.save writes all that a view looks into."""
    _, folder = run(tmp_path, ppo, memory="lru", env_kwargs=SLOW_EPISODES, **changes)
    tensors = [x for xs in read_checkpoint(folder)["carried"] for x in xs]
    assert len(tensors) > 6
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)


def test_a_minibatch_of_one_column_and_one_step_trains(tmp_path):
    rows, folder = run(tmp_path, ppo, num_envs=4, num_steps=1, num_minibatches=4, total_timesteps=16)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(folder).values())


@pytest.mark.quick
@pytest.mark.parametrize("flags", ["--num-envs 4 --num-minibatches 5", "--max-prefix -1"])
def test_bad_input(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[-2] in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- learning

def test_the_default_task_is_not_learned_without_memory(tmp_path):
    """With it: entry smoke-ppo-tbb, which the gate runs."""
    own = vars(ppo.Args()) | {"runs_dir": str(tmp_path), "run_name": "run"}
    rows, _ = run(tmp_path, ppo, **{**own, "memory": "none", "total_timesteps": 32_768, "device": "cpu"})
    assert -0.6 <= column(rows, "charts/episodic_return")[-1] <= -0.35

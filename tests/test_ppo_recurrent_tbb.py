"""ppo_recurrent_tbb.py: columns of tape, and --full-episodes. What it shares with others: test_scripts.py."""
import csv
import gc

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_recurrent_tbb as ppo
from models import MEMORIES
from tests.helpers import assert_caught, column, comparable, planted, run, small, weights_of

CHANGES = [{"reset_state": False}, {"prev_action": True, "prev_reward": True}, {"norm_obs": True, "norm_reward": True},
           {"full_episodes": True, "max_prefix": 4}, {"full_episodes": True, "reset_state": False, "max_prefix": 50}]
SLOW_EPISODES = '{"max_steps": 70}'  # rollouts of 32 steps: episodes go over two or three of them


# ---------------------------------------------------------------------- what is trained is what acted

@pytest.mark.parametrize("memory, layers, changes",
                         [(memory, layers, {}) for memory in MEMORIES for layers in (1, 2)]
                         + [(memory, 1, {"full_episodes": True}) for memory in MEMORIES]
                         + [(memory, 1, changes) for memory in ("lstm", "lru") for changes in CHANGES], ids=str)
def test_first_logratio_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed log-probabilities agree. Episodes end inside."""
    rows, _ = run(tmp_path, ppo, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, "debug/first_logratio")) < 1e-5
    assert max(column(rows, "losses/approx_kl")) > 1e-6                         # and then the policy did move


@pytest.mark.parametrize("other", ["agent.memory.initial_state(N)", "state"])
def test_pitfall_columns_from_another_state(tmp_path, capsys, other):
    assert_caught(tmp_path, capsys, ppo, ("        tape_obs, tape_starts = ",
                                          f"        tape_state = {other}\n        tape_obs, tape_starts = "))


def test_pitfall_acting_on_with_a_stale_state(tmp_path, capsys):
    """With --full-episodes training recomputes the state from the episode's first step: acting has to do the same."""
    assert_caught(tmp_path, capsys, ppo, ("_, _, state = agent(prefix[:K], ", "agent(prefix[:K], "), full_episodes=True,
                  env_kwargs=SLOW_EPISODES, learning_rate=(0.05,))


# ---------------------------------------------------------------------- the tape

def agent_and_tape(memory, layers=1):
    """An agent, and a tape of 3 columns of 20 steps with episodes starting at 0, 8 and 15, and a carried state. float64."""
    torch.manual_seed(0)
    args = ppo.Args(**{**small(ppo), "memory": memory, "num_layers": layers})
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2), args).double()
    agent.encoder = torch.nn.Identity()
    x, start = torch.randn(20, 3, 3, dtype=torch.float64), torch.zeros(20, 3, dtype=torch.bool)
    start[[0, 8, 15]] = True
    return agent, x, start, tuple(torch.randn_like(s) for s in agent.memory.initial_state(3))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_episodes_on_a_tape_know_nothing_of_each_other(memory, layers):
    """Replacing one episode's data changes nothing in the others, bit for bit; no gradient crosses an episode's edge."""
    agent, x, start, state = agent_and_tape(memory, layers)
    _, values, final = agent(x, state, start)
    changed = x.clone()
    changed[8:15, 1] = 100 * torch.randn(7, 3, dtype=torch.float64)             # the second episode of the middle column
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


def test_prefix_steps_are_read_and_not_returned():
    agent, x, start, state = agent_and_tape("lru")
    dist, values, final = agent(x, state, start, 5)
    _, all_values, all_final = agent(x, state, start)
    assert values.shape == dist.entropy().shape == (15, 3)                      # no loss can weigh the first five
    torch.testing.assert_close((values, final), (all_values[5:], all_final))


PROBE = ("                dist, newvalue, _ = agent(", "                seen.append((P, tape_starts, tape_obs[0]))\n"
         "                dist, newvalue, _ = agent(")


def test_full_episodes_hold_every_step_of_unfinished_episodes_and_none_before(tmp_path):
    """P is the age of the oldest episode that goes on; the tape begins with the last P steps of the one before."""
    module = planted(tmp_path, ppo, PROBE)
    module.seen = seen = []
    T, oldest_ended = 8, 0
    run(tmp_path, module, full_episodes=True, env_kwargs=SLOW_EPISODES, num_minibatches=1, update_epochs=1, num_steps=T,
        total_timesteps=4 * T * 30)
    assert seen[0][0] == 0 and len(seen) == 30 and max(P for P, *_ in seen) > 2 * T     # some episode is over two rollouts old
    for (_, starts_before, obs_before), (P, starts, obs) in zip(seen, seen[1:]):
        assert len(obs) == len(starts) == P + T
        ages = [len(obs_before) - max(t for t in range(len(obs_before)) if starts_before[t, n]) for n in range(4)]
        goes_on = [0 if starts[P, n] else age for n, age in enumerate(ages)]
        assert P == max(goes_on)
        oldest_ended += max(ages) > P
        kept = slice(len(obs_before) - P, None)
        torch.testing.assert_close((starts[:P], obs[:P]), (starts_before[kept], obs_before[kept]))
    assert oldest_ended                                                         # its steps were dropped


def test_max_prefix_bounds_the_tape(tmp_path):
    module = planted(tmp_path, ppo, PROBE)
    module.seen = seen = []
    rows, _ = run(tmp_path, module, full_episodes=True, env_kwargs=SLOW_EPISODES, max_prefix=6)
    assert max(P for P, *_ in seen) == 6 and max(column(rows, "debug/first_logratio")) < 1e-5
    seen.clear()
    run(tmp_path / "b", module, full_episodes=False, env_kwargs=SLOW_EPISODES)
    assert {P for P, *_ in seen} == {0}


@pytest.mark.parametrize("max_prefix", [None, 6, 20])
@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_a_tape_begins_with_the_memory_of_all_that_was_before(tmp_path, memory, max_prefix):
    """With weights that stay: the state before the tape is that after every step since the first rollout's."""
    changes = {"full_episodes": True, "max_prefix": max_prefix} if max_prefix else {}
    module = planted(tmp_path, ppo, (PROBE[0], PROBE[1].replace("tape_obs[0]", "tape_obs[0], tape_state, agent")))
    module.seen = seen = []
    T, before, compared = 8, [], 0
    run(tmp_path, module, memory=memory, env_kwargs=SLOW_EPISODES, learning_rate=(0.0,), num_minibatches=1, update_epochs=1,
        num_steps=T, total_timesteps=4 * T * 8, **changes)
    for i, (P, starts, obs, state, agent) in enumerate(seen):
        if i * T > P:
            all_obs, all_starts = (torch.cat(x)[: i * T - P] for x in zip(*before))
            with torch.no_grad():
                _, _, expected = agent((all_obs,), agent.memory.initial_state(4), all_starts)
            goes_on = ~starts[: P + 1].any(0)               # the others forget before the loss begins
            compared += goes_on.sum()
            for s, e in zip(state, expected, strict=True):
                torch.testing.assert_close(s[goes_on], e[goes_on], rtol=1e-5, atol=1e-6)
        before.append((obs[P:], starts[P:]))
    assert compared > 2


def test_a_rollout_keeps_no_states(tmp_path):
    """GPT's state are its last steps: T of them would be T times the window."""
    module = planted(tmp_path, ppo, ("        lap(\"batch\")\n", "        lap(\"batch\")\n        seen.append(count(state))\n"))
    module.seen = seen = []
    module.count = lambda state: len({x.data_ptr() for x in gc.get_objects()
                                      if type(x) is torch.Tensor and x.shape == state[1].shape})
    run(tmp_path, module, memory="gpt")
    assert len(seen) == 3 and max(seen) < 10                # keys and values, before the rollout and after it


def test_full_episodes_carry_gradients_to_the_episodes_beginning(tmp_path):
    """The loss of the steps inside the rollout has a gradient at the steps before it, up to the episode's start."""
    module = planted(tmp_path, ppo,
                     ("                dist, newvalue, _ = agent(",
                      "                mb_obs = tuple(o.clone().requires_grad_() for o in mb_obs)\n"
                      "                dist, newvalue, _ = agent("),
                     ("                loss.backward()\n",
                      "                loss.backward()\n"
                      "                seen.append((P, mb_obs[0].grad, tape_starts[:, mb]))\n"))
    module.seen = seen = []
    run(tmp_path, module, memory="lru", full_episodes=True, env_kwargs=SLOW_EPISODES, mlp_size=64)
    assert sum(P > 0 for P, *_ in seen) >= 6
    for P, grad, starts in seen:
        row = torch.arange(P + 32)[:, None]
        begin = torch.where(starts & (row <= P), row, 0).amax(0)                # [b] where the episode of the first step began
        torch.testing.assert_close(grad.abs().sum(-1) > 0, row >= begin)        # before it nothing, from it on every step


@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_resume_with_full_episodes_equals_never_having_stopped(tmp_path, memory):
    changes = dict(memory=memory, full_episodes=True, env_kwargs=SLOW_EPISODES)
    whole, folder = run(tmp_path, ppo, run_name="whole", **changes)
    _, half = run(tmp_path, ppo, run_name="half", total_timesteps=4 * 32 * 2, **changes)
    rows, half = run(tmp_path, ppo, resume=str(half), **changes)
    assert comparable(rows) == comparable(whole)
    for name, weight in weights_of(ppo, folder).items():
        assert torch.equal(weight, weights_of(ppo, half)[name]), name


def test_a_resumed_run_may_drop_full_episodes(tmp_path):
    """The tape of the checkpoint serves once; then there is no earlier step, and no state older than the last rollout's."""
    module = planted(tmp_path, ppo, PROBE)
    module.seen = seen = []
    _, folder = run(tmp_path, module, full_episodes=True, env_kwargs=SLOW_EPISODES)
    seen.clear()
    rows, _ = run(tmp_path, module, resume=str(folder), full_episodes=False, env_kwargs=SLOW_EPISODES, num_minibatches=1,
                  update_epochs=1, total_timesteps=4 * 32 * 6)
    prefixes = [P for P, *_ in seen]
    assert prefixes[0] > 0 and prefixes[1:] == [0, 0] and max(column(rows, "debug/first_logratio")) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"full_episodes": True, "max_prefix": 4}])
def test_a_checkpoint_holds_no_more_than_it_needs(tmp_path, changes):
    """A slice of the tape is a view, and torch.save writes all that a view looks into."""
    _, folder = run(tmp_path, ppo, memory="lru", env_kwargs=SLOW_EPISODES, **changes)
    tensors = [x for xs in ppo.read_checkpoint(folder)["tensors"] for x in xs]
    assert len(tensors) > 6
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)


def test_a_minibatch_of_one_column_and_one_step_trains(tmp_path):
    rows, folder = run(tmp_path, ppo, num_envs=4, num_steps=1, num_minibatches=4, total_timesteps=16)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(ppo, folder).values())


@pytest.mark.parametrize("flags", ["--num-envs 4 --num-minibatches 5", "--max-prefix -1"])
def test_bad_input(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--runs-dir", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[-2] in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- learning

@pytest.mark.parametrize("memory, low, high", [("lru", 0.3, 1.0), ("none", -0.6, -0.35)])
def test_the_default_task_is_learned_with_memory_only(tmp_path, memory, low, high):
    args = ppo.Args(memory=memory, runs_dir=str(tmp_path), run_name="run", total_timesteps=65_536, device="cpu")
    folder = ppo.train(args)
    last = column(list(csv.DictReader((folder / "progress.csv").open())), "charts/episodic_return")[-1]
    assert low <= last <= high

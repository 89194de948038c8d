"""sac_discrete_sbb.py: what enters the replay, losses against their definition, temperature, learning.

What it shares with dqn_recurrent_sbb.py (replay, stored states, target network) is tested in test_dqn.py.
"""
import itertools
import math
import re

import pytest
import torch

import sac_discrete_sbb as script
from models.distributions import Categorical
from tests.helpers import column, run
from tests.probes import NUMBERS, acted, check_what_enters_the_replay, watched

MINES = dict(env_id="popgym-MineSweeperEasy-v0", env_kwargs={}, prev_action=True)   # two branches
DISCRETE = dict(NUMBERS, env_kwargs={"discrete": True})  # some episodes terminate, others are truncated
SHARED = {                                                  # flags of who trains what
    "separate": dict(shared_encoder=False),
    "shared-frozen": dict(shared_encoder=True),
    "shared-trained": dict(shared_encoder=True, freeze_memory=False),
    "shared": dict(shared_encoder=True, freeze_memory=False, freeze_critic=False)}


def as_published(**changes):
    """The script's own flags."""
    defaults = vars(script.Args())
    kept = {name: value for name, value in defaults.items() if name not in ("run_name", "runs_dir", "device")}
    return kept | changes


# ---------------------------------------------------------------------- what acts

@pytest.mark.quick
def test_what_enters_the_replay_is_what_happened(tmp_path, monkeypatch):
    check_what_enters_the_replay(
        tmp_path, monkeypatch, script, to_env=lambda action: action[:, 0], **DISCRETE)


@pytest.mark.quick
def test_acting_forgets_where_an_episode_starts_and_nowhere_else(tmp_path, monkeypatch):
    starts, entered = acted(tmp_path, monkeypatch, script, **DISCRETE)
    assert len(starts) == len(entered) > 90
    for start, now in zip(starts, entered):
        assert start.tolist() == now.start.tolist() == (now.obs[0][:, 1] == 0).tolist()


# ---------------------------------------------------------------------- losses and gradients

@pytest.mark.quick
def test_episodes_longer_than_the_replay_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, script, env_id="CartPoleMasked-v0", env_kwargs={}, buffer_size=4 * 3)
    assert "raise --buffer-size" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_soft_value_is_the_expectation():
    """Against the average over many sampled actions."""
    torch.manual_seed(0)
    policy, q = Categorical(torch.randn(4).expand(200_000, 4)), torch.randn(4)
    action = policy.sample()
    sampled = (q[action] - 0.3 * policy.log_prob(action)).mean()
    torch.testing.assert_close(script.soft_value(policy, [q], 0.3)[0], sampled, atol=0.02, rtol=0)


@pytest.mark.parametrize("q_lambda", [0.0, 0.8])
@pytest.mark.parametrize("task", [MINES, DISCRETE], ids=["two-branches", "truncated"])
@pytest.mark.parametrize("who", SHARED)
def test_losses_equal_their_definition(tmp_path, monkeypatch, who, task, q_lambda):
    """Episode by episode, step by step, action by action, from the networks as they were."""
    flags = dict(
        task, memory="lru", seq_len=-1, tau=0.1, alpha=0.2, target_entropy=0.5, q_lambda=q_lambda,
        reward_scale=0.7, **SHARED[who])
    seen, _ = watched(tmp_path, monkeypatch, script, every=8, **flags)
    assert len(seen) > 2
    for now in seen:
        agent, target, batch = now.agent, now.target, now.batch
        every_action = torch.tensor(list(itertools.product(*map(range, agent.q1[-1].sizes))))  # [A, K]
        errors, policy_losses, entropies = [], [], []
        alpha = agent.log_alpha.exp().item()

        def of_every_action(policy, q1, q2, t):
            logp = sum(p.logp[t, 0, a] for p, a in zip(policy.branches, every_action.T))    # [A]
            pairs = zip(q1.branches, q2.branches, every_action.T)
            q = sum(torch.minimum(x[t, 0, a], y[t, 0, a]) for x, y, a in pairs)
            assert abs(logp.exp().sum() - 1) < 1e-5
            return logp, q

        for b in range(batch.real.shape[1]):
            steps = int(batch.real[:, b].sum())
            rows, start = slice(steps + 1), torch.arange(steps + 1)[:, None] == 0
            obs, actions = [o[rows, [b]] for o in batch.obs], batch.actions[rows, [b]]
            policy, q1, q2, _ = agent(obs, agent.memory.initial_state(1), start)
            _, target_q1, target_q2, _ = target(obs, target.memory.initial_state(1), start)
            sampled = None                                  # what the next step brought, with its entropy
            for t in reversed(range(steps)):
                y = 0.7 * batch.rewards[t, b]
                if not batch.terminated[t, b]:
                    logp, q = of_every_action(policy, target_q1, target_q2, t + 1)
                    expected = (logp.exp() * (q - alpha * logp)).sum()
                    share = 0 if sampled is None else q_lambda
                    y = y + 0.99 * ((1 - share) * expected + share * (sampled or 0))
                y = y.detach()
                errors += [(q.of(actions)[t, 0] - y) ** 2 for q in (q1, q2)]
                logp, q = of_every_action(policy, q1, q2, t)
                if who != "shared":
                    q = q.detach()
                policy_losses.append(-(logp.exp() * (q - alpha * logp)).sum())
                entropies.append(-(logp.exp() * logp).sum().item())
                sampled = y + alpha * entropies[-1]
        assert len(policy_losses) == batch.real.sum()
        too_high = sum(entropies) / len(entropies) - 0.5 * math.log(len(every_action))
        temperature_loss = agent.log_alpha.exp() * too_high
        loss = torch.stack(errors).mean() + torch.stack(policy_losses).mean() + temperature_loss
        expected = torch.autograd.grad(
            loss, list(agent.parameters()), allow_unused=True, materialize_grads=True)
        for gradient, g in zip(now.clipped[0], expected, strict=True):
            torch.testing.assert_close(gradient, g, rtol=2e-3, atol=2e-5 * max(1, g.abs().max().item()))


def test_lambda_targets_of_one_step_and_of_whole_episodes():
    """0: r + V of the next step. 1: the discounted return, V behind a step that does not terminate."""
    torch.manual_seed(0)
    rewards, values, bonuses = torch.randn(3, 6, 2, dtype=torch.double)
    real = torch.arange(6)[:, None] < torch.tensor([5, 3])  # two segments: one terminates, one is cut
    gammas = torch.full((6, 2), 0.9, dtype=torch.double)
    gammas[4, 0] = 0
    one_step = script.lambda_targets(rewards, gammas, values, bonuses, real, 0)
    torch.testing.assert_close(one_step[:5], rewards[:5] + gammas[:5] * values[1:])
    returns = script.lambda_targets(rewards, gammas, values, bonuses, real, 1)
    paid = rewards.clone()
    paid[1:] += bonuses[1:]                                 # the first step's entropy is no part of Q
    for t in range(5):
        own = paid[t, 0] - bonuses[t, 0] * (t > 0)
        later = sum(0.9 ** (k - t) * paid[k, 0] for k in range(t + 1, 5))
        torch.testing.assert_close(returns[t, 0], own + later)
    cut = rewards[0, 1] + 0.9 * paid[1, 1] + 0.9**2 * paid[2, 1] + 0.9**3 * values[3, 1]
    torch.testing.assert_close(returns[0, 1], cut)


@pytest.mark.parametrize("memory", ["lstm", "gpt", "none"])
@pytest.mark.parametrize("who", SHARED)
def test_who_receives_a_gradient_of_which_loss(tmp_path, monkeypatch, memory, who):
    """Each loss alone, the other one made constant. A separate critic is out of the policy's reach; freezing
    takes the heads of a shared one out of it, and the memory."""
    def reached(name, replacement, of):
        flags = dict(SHARED[who], memory=memory, run_name=name)
        with monkeypatch.context() as patch:
            patch.setattr(of, name, replacement)
            seen, _ = watched(tmp_path, monkeypatch, script, every=4, **flags)
        parts = set()
        for now in seen:
            names = [name for name, _ in now.agent.named_parameters()]
            parts |= {re.match(r"memory\.\d|\w+", n)[0] for n, g in zip(names, now.clipped[0]) if g.any()}
            assert not any(p.requires_grad for p in now.target.parameters())
        return parts

    soft_value, mse_loss = script.soft_value, torch.nn.functional.mse_loss
    critics = reached("soft_value", lambda *args: soft_value(*args).detach(), script)
    policy = reached("mse_loss", lambda *args: mse_loss(*args).detach(), torch.nn.functional)
    assert critics == {"memory.1" if who == "separate" else "memory.0", "q1", "q2"}
    assert policy == {
        "separate": {"memory.0", "policy"},
        "shared-frozen": {"policy"},
        "shared-trained": {"memory.0", "policy"},
        "shared": {"memory.0", "policy", "q1", "q2"}}[who]


def test_burn_in_has_no_gradient_and_both_networks_burn_in_alone(tmp_path, monkeypatch):
    states = []
    forward = script.Agent.forward

    def recording_forward(agent, obs, state, start):
        if len(start) > 1:                                  # training, not acting
            states.append((torch.is_grad_enabled(), len(start), state))
        return forward(agent, obs, state, start)

    monkeypatch.setattr(script.Agent, "forward", recording_forward)
    run(tmp_path, script, burn_in=3, seq_len=5)
    updates = [states[i:i + 4] for i in range(0, len(states), 4)]
    assert len(updates) > 20
    for burn_in, target_burn_in, online, of_target in updates[3:]:
        assert [burn_in[:2], target_burn_in[:2]] == [(False, 3)] * 2
        assert online[0] and not of_target[0]
        assert not any(s.requires_grad for s in (*online[2], *of_target[2]))
        assert all((a != b).any() for a, b in zip(online[2], of_target[2], strict=True))


def test_critics_that_the_policy_reaches_promise_more_than_there_is(tmp_path):
    """T-Maze's best return is 1. With a shared encoder Q stays below it only if the critics are frozen."""
    q = {}
    for freeze in (True, False):
        flags = as_published(
            shared_encoder=True, freeze_critic=freeze, total_timesteps=4_000, run_name=str(freeze))
        q[freeze] = column(run(tmp_path, script, **flags)[0], "losses/qf_values")[-1]
    assert q[True] < 0.5 and q[False] > 1.0


# ---------------------------------------------------------------------- flags and learning

def test_the_temperature_is_fixed_or_moves_entropy_to_its_target(tmp_path):
    rows, folder = run(tmp_path, script, alpha=0.2)
    assert column(rows, "losses/alpha") == pytest.approx([0.2] * len(rows))
    rows, _ = run(tmp_path, script, resume=str(folder), alpha=0.1, total_timesteps=4 * 32 * 4)
    assert column(rows, "losses/alpha")[-1] == pytest.approx(0.1)               # the flag given now
    for target_entropy, rises in ((0.1, False), (1.0, True)):
        flags = dict(alpha=0.2, target_entropy=target_entropy, learning_rate=(1e-2,))
        rows, _ = run(tmp_path, script, **flags, run_name=str(target_entropy))
        alphas, entropies = column(rows, "losses/alpha"), column(rows, "losses/entropy")
        assert (alphas == sorted(alphas)) == rises and (alphas == sorted(alphas, reverse=True)) != rises
        assert (entropies[0] < target_entropy * math.log(4) + 1e-6) == rises


def test_without_memory_the_cue_is_a_coin(tmp_path):
    """With it the same command gets 1.0: entry smoke-sac-discrete, which the gate runs."""
    every = script.Args().total_timesteps // 10
    rows, _ = run(tmp_path, script, **as_published(memory="none", eval_every=every))
    assert float(rows[-1]["eval/success"]) <= 0.8

"""sac_discrete_sbb.py: losses against their definition, who receives a gradient of which, temperature, learning.

What it shares with dqn_recurrent_sbb.py (replay, stored states, target network) is tested with it in test_dqn.py.
"""
import itertools
import math
import re

import pytest
import torch

import sac_discrete_sbb as script
from models.heads import Categorical
from tests.helpers import column, run
from tests.test_dqn import MINES, probed

SHARED = [(False, True), (True, True), (True, False)]                           # (shared_encoder, freeze_critic)
NAMES = ["separate", "shared-frozen", "shared"]


def test_soft_value_is_the_expectation():
    """Against the average over many sampled actions."""
    torch.manual_seed(0)
    policy, q = Categorical(torch.randn(4).expand(200_000, 4)), torch.randn(4)
    action = policy.sample()
    sampled = (q[action] - 0.3 * policy.log_prob(action)).mean()
    torch.testing.assert_close(script.soft_value(policy, [q], 0.3)[0], sampled, atol=0.02, rtol=0)


@pytest.mark.parametrize("shared_encoder, freeze_critic", SHARED, ids=NAMES)
def test_losses_equal_their_definition(tmp_path, shared_encoder, freeze_critic):
    """Episode by episode, step by step, action by action, from the networks as they were. Actions have two branches."""
    seen, _ = probed(tmp_path, script, "            optimizer.zero_grad()\n",
                     "(copy.deepcopy(agent), copy.deepcopy(target), seg_obs, actions, rewards, terminated, real, qf_loss, "
                     "actor_loss, loss)", **MINES, memory="lru", seq_len=-1, tau=0.1, alpha=0.2, shared_encoder=shared_encoder,
                     freeze_critic=freeze_critic)
    assert len(seen) > 20
    for agent, target, obs, actions, rewards, terminated, real, qf_loss, actor_loss, loss in seen[::10]:
        joint = torch.tensor(list(itertools.product(*map(range, agent.q1[-1].sizes))))      # every action [A, K]
        errors, negative_values = [], []

        def soft_values(policy, q1, q2, t):
            logp = sum(p.logp[t, 0, a] for p, a in zip(policy.branches, joint.T))           # [A]
            q = sum(torch.minimum(x[t, 0, a], y[t, 0, a]) for x, y, a in zip(q1.branches, q2.branches, joint.T))
            assert abs(logp.exp().sum() - 1) < 1e-5
            return (logp.exp() * (q - 0.2 * logp)).sum()

        for b in range(real.shape[1]):
            steps = int(real[:, b].sum())
            piece, start = tuple(o[: steps + 1, [b]] for o in obs), torch.arange(steps + 1)[:, None] == 0
            policy, q1, q2, _ = agent(piece, agent.memory.initial_state(1), start)
            _, target_q1, target_q2, _ = target(piece, target.memory.initial_state(1), start)
            for t in range(steps):
                y = rewards[t, b]
                if not terminated[t, b]:
                    y = y + 0.99 * soft_values(policy, target_q1, target_q2, t + 1)
                errors += [(q.of(actions[: steps + 1, [b]])[t, 0] - y) ** 2 for q in (q1, q2)]
                negative_values.append(-soft_values(policy, q1, q2, t))
        assert len(negative_values) == real.sum()
        torch.testing.assert_close(2 * torch.stack(errors).mean(), qf_loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.stack(negative_values).mean(), actor_loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.stack(errors).mean() + actor_loss, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", ["lstm", "gpt", "none"])
@pytest.mark.parametrize("shared_encoder, freeze_critic", SHARED, ids=NAMES)
def test_who_receives_a_gradient_of_which_loss(tmp_path, memory, shared_encoder, freeze_critic):
    """Gradients of both losses to every part. A separate critic is out of the policy's reach; freezing takes the heads of a
    shared one out of it, and leaves to the encoder just the gradient that comes through the policy."""
    frozen = "-soft_value(policy, [torch.minimum(*q).detach() for q in zip(q1.branches, q2.branches)], alpha.detach())"
    gradients = f"""[torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
                     for loss in (qf_loss, actor_loss, {frozen}[real].mean())]"""
    seen, _ = probed(tmp_path, script, "            optimizer.zero_grad()\n",
                     f"([name for name, _ in agent.named_parameters()], {gradients}, target)", memory=memory,
                     shared_encoder=shared_encoder, freeze_critic=freeze_critic)
    parts = [set(), set()]                                                      # that the critics' and the policy's loss reach
    for names, (critic, actor, frozen_actor), target in seen[2::4]:
        for reached, grads in zip(parts, (critic, actor)):
            reached |= {re.match(r"memory\.\d|\w+", name)[0] for name, g in zip(names, grads) if g.any()}
        assert all(map(torch.equal, actor, frozen_actor)) == freeze_critic
        assert not any(p.requires_grad or p.grad is not None for p in target.parameters())
    assert parts[0] == ({"memory.0", "q1", "q2"} if shared_encoder else {"memory.1", "q1", "q2"})
    assert parts[1] == {"memory.0", "policy"} | (set() if freeze_critic else {"q1", "q2"})


def test_critics_that_the_policy_reaches_promise_more_than_there_is(tmp_path):
    """T-Maze's best return is 1. With a shared encoder Q stays below it only if the critics are frozen."""
    args = {name: value for name, value in vars(script.Args()).items() if name not in ("run_name", "runs_dir", "device")}
    q = {}
    for freeze in (True, False):
        changes = dict(shared_encoder=True, freeze_critic=freeze, total_timesteps=4_000, run_name=str(freeze))
        q[freeze] = column(run(tmp_path, script, **args | changes)[0], "losses/qf_values")[-1]
    assert q[True] < 0.5 and q[False] > 1.0


def test_the_temperature_is_fixed_or_moves_entropy_to_its_target(tmp_path):
    rows, folder = run(tmp_path, script, alpha=0.2)
    assert column(rows, "losses/alpha") == pytest.approx([0.2] * len(rows))
    rows, _ = run(tmp_path, script, resume=str(folder), alpha=0.1, total_timesteps=4 * 32 * 4)
    assert column(rows, "losses/alpha")[-1] == pytest.approx(0.1)               # the flag given now, not the saved one
    for target_entropy, rises in ((0.1, False), (1.0, True)):
        rows, _ = run(tmp_path, script, alpha=0.2, target_entropy=target_entropy, run_name=str(target_entropy),
                      learning_rate=(1e-2,))
        alphas, entropies = column(rows, "losses/alpha"), column(rows, "losses/entropy")
        assert (alphas == sorted(alphas)) == rises and (alphas == sorted(alphas, reverse=True)) != rises
        assert (entropies[0] < target_entropy * math.log(4) + 1e-6) == rises


def test_without_memory_the_cue_is_a_coin(tmp_path):
    """With it the same command gets 1.0: entry smoke-sac-discrete, which the gate runs."""
    args = {name: value for name, value in vars(script.Args()).items() if name not in ("run_name", "runs_dir", "device")}
    rows, _ = run(tmp_path, script, **{**args, "memory": "none", "eval_every": args["total_timesteps"] // 10})
    assert float(rows[-1]["eval/success"]) <= 0.8

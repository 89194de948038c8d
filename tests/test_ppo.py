"""What both PPO scripts do alike: advantages, clipped losses, normalisation, states as acting left them."""
import itertools
import json

import pytest
import torch

import envs.vector
import ppo_recurrent_sbb
import ppo_recurrent_tbb
from models import RunningMeanStd
from models.flags import read_model
from models.rnn import GRU
from tests.helpers import assert_caught, run, spy


@pytest.fixture(params=[ppo_recurrent_sbb, ppo_recurrent_tbb], ids=lambda module: module.__name__)
def script(request):
    return request.param


@pytest.mark.quick
def test_gae_equals_its_definition(script):
    torch.manual_seed(0)
    T, N, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, next_value = torch.randn(T, N), torch.randn(T, N), torch.randn(N)
    starts, next_start = torch.rand(T, N) < 0.3, torch.tensor([True, False, False])
    starts1, values1 = torch.cat([starts, next_start[None]]), torch.cat([values, next_value[None]])
    time_limit = starts1[1:] & (torch.rand(T, N) < 0.5)     # these ends are truncations
    final_values = torch.where(time_limit, torch.randn(T, N), 0)
    advantages = script.gae(rewards, values, starts, final_values, next_value, next_start, gamma, lam)
    for n in range(N):
        for t in range(T):                                  # sum_k (gamma lam)^k delta_{t+k}
            total, weight = 0.0, 1.0
            for k in range(t, T):
                after = final_values[k, n] if starts1[k + 1, n] else values1[k + 1, n]
                total += weight * (rewards[k, n] + gamma * after - values[k, n])
                weight *= gamma * lam
                if starts1[k + 1, n]:
                    break
            torch.testing.assert_close(advantages[t, n], torch.as_tensor(total))


@pytest.mark.quick
def test_classic_bug_none_as_hidden_state(script, tmp_path, capsys, monkeypatch):
    """None for the state of every call: torch silently takes zeros, in acting and in training."""
    forward = GRU.forward

    def forgetful(self, x, state, start):
        return forward(self, x, self.initial_state(x.shape[1]), start)

    monkeypatch.setattr(GRU, "forward", forgetful)
    assert_caught(tmp_path, capsys, script)


def test_normalisation_travels_with_the_model(script, tmp_path):
    _, folder = run(tmp_path, script, norm_obs=True, norm_reward=True)
    model = read_model(folder / "model.safetensors")
    weights, args = model["agent"], json.loads(model["args"])
    seen = weights["encoder.leaves.0.stats.count"]
    assert seen == weights["return_stats.count"] == args["total_timesteps"]
    assert args["norm_obs"] and args["norm_reward"] and args["device"] == "cpu"


def test_rewards_are_scaled_by_the_spread_of_discounted_returns(script, tmp_path, monkeypatch):
    updates = spy(monkeypatch, RunningMeanStd, "update")
    steps = spy(monkeypatch, envs.vector.Episodes, "step")
    advantages = spy(monkeypatch, script, "gae")
    run(tmp_path, script, norm_reward=True)
    rewards = torch.stack([torch.as_tensor(call.result[1]).float() for call in steps[1:]])
    discounted = torch.cat([call.args[1] for call in updates])                  # [3 T, N]
    starts = torch.cat([call.args[2] for call in advantages])                   # [3 T, N]
    total, gamma = torch.zeros(4), script.Args().gamma
    for reward, start, known in zip(rewards, starts, discounted, strict=True):  # across the rollouts
        total = reward + gamma * total * ~start
        torch.testing.assert_close(known, total)
    for rollout, call in enumerate(advantages):             # divided by the spread of all returns so far
        seen = discounted[:32 * (rollout + 1)]
        paid = rewards[32 * rollout : 32 * (rollout + 1)]
        torch.testing.assert_close(call.args[0] * seen.std(correction=0), paid, rtol=1e-4, atol=1e-6)


def test_the_value_loss_is_ppos_clipped_one(script, tmp_path, monkeypatch):
    """One minibatch an epoch, in order: what the agent returns lies where the rollout's tensors do."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))
    forwards, advantages = spy(monkeypatch, script.Agent, "forward"), spy(monkeypatch, script, "gae")
    changes = dict(num_minibatches=1, update_epochs=5, learning_rate=(0.1,))
    if script is ppo_recurrent_sbb:
        changes["seq_len"] = 1                              # segments are the steps, column by column
    rows, _ = run(tmp_path, script, **changes)
    clip, far = script.Args().clip_coef[0], 0
    training = iter([call.result[1] for call in forwards if call.training])
    for row, call in zip(rows, advantages, strict=True):
        values, returns = call.args[1], call.result + call.args[1]          # [T, N] each
        if script is ppo_recurrent_sbb:
            values, returns = values.T.flatten(), returns.T.flatten()
        losses = []
        for new in itertools.islice(training, 5):
            near = torch.minimum(torch.maximum(new, values - clip), values + clip)
            worse = torch.stack([(new - returns) ** 2, (near - returns) ** 2]).max(0).values
            losses.append(0.5 * worse.mean().item())
            far += int(((new - values).abs() > clip).any())
        assert float(row["losses/value_loss"]) == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert far                                              # some values were clipped


def test_target_kl_stops_the_epochs_of_an_update(script, tmp_path, monkeypatch):
    forwards = spy(monkeypatch, script.Agent, "forward")
    run(tmp_path, script, learning_rate=(0.05,))
    assert sum(call.training for call in forwards) == 3 * 2 * 3                 # updates, epochs, minibatches
    forwards.clear()
    run(tmp_path / "stopped", script, learning_rate=(0.05,), target_kl=1e-9)
    assert sum(call.training for call in forwards) == 3 * 1 * 3


def test_a_time_limit_is_bootstrapped_and_a_death_is_not(script, tmp_path, monkeypatch):
    advantages, steps = spy(monkeypatch, script, "gae"), spy(monkeypatch, envs.vector.Episodes, "step")
    valued = spy(monkeypatch, script, "values_of")
    run(tmp_path, script, env_kwargs={"max_steps": 2})      # nothing but time limits
    for call in advantages:
        _, _, starts, final_values, _, next_start = call.args
        ends = torch.cat([starts[1:], next_start[None]])
        assert ((final_values != 0) == ends).all() and ends.any()
    last = [obs for call in steps for obs in call.result[4].get("final_obs", []) if obs is not None]
    known = [leaves[0].numpy() for call in valued for leaves in call.args[1]]
    assert len(last) > 20 and all((a == b).all() for a, b in zip(last, known, strict=True))
    advantages.clear()
    run(tmp_path / "deaths", script, env_kwargs={"max_steps": 1000})
    assert all((call.args[3] == 0).all() for call in advantages)


def test_last_observations_are_valued_by_the_state_that_acting_left(script):
    """values_of goes on from the given state; a start would make the memory forget."""
    args = script.Args(memory="gru", hidden_size=8, mlp_size=8)
    space = envs.vector.gym.spaces.Box(-1, 1, (3,))
    agent = script.Agent(space, envs.vector.gym.spaces.Discrete(2), args)
    obs, state = torch.randn(6, 4, 3), agent.memory.initial_state(4)
    start = torch.zeros(6, 4, dtype=torch.bool)
    _, whole, _ = agent((obs,), state, start)
    _, _, before_last = agent((obs[:5],), state, start[:5])
    rows = [1, 3]
    values = script.values_of(agent, [(obs[5, n],) for n in rows], tuple(s[rows] for s in before_last))
    torch.testing.assert_close(values, whole[5, rows].detach())


def test_the_entropy_bonus_raises_the_entropy(script, tmp_path, monkeypatch):
    """With nothing to gain but the bonus, the policy stays uniform; with its sign turned it does not."""
    gae = script.gae
    monkeypatch.setattr(script, "gae", lambda *args, **kwargs: 0 * gae(*args, **kwargs))
    probabilities = []
    forward = script.Agent.forward

    def recording(agent, *args, **kwargs):
        dist, *rest = forward(agent, *args, **kwargs)
        probabilities.append(dist.branches[0].logp.detach().exp())
        return dist, *rest

    monkeypatch.setattr(script.Agent, "forward", recording)
    run(tmp_path, script, ent_coef=(1.0,), learning_rate=(3e-2,))
    last = probabilities[-1]
    assert (last - 1 / last.shape[-1]).abs().max() < 0.2


def test_the_learning_rate_follows_its_schedule(script, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def recording_step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    run(tmp_path, script, learning_rate=(3e-2, 0.0))
    assert sorted(set(rates), reverse=True) == pytest.approx([3e-2, 2e-2, 1e-2])    # three updates

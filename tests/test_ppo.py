"""What both PPO scripts do alike: advantages, clipped losses, normalisation, and states that are what acting left."""
import pytest
import torch

import ppo_recurrent_sbb
import ppo_recurrent_tbb
from tests.helpers import assert_caught, planted, run


@pytest.fixture(params=[ppo_recurrent_sbb, ppo_recurrent_tbb], ids=lambda module: module.__name__)
def script(request):
    return request.param


def test_gae_equals_its_definition(script):
    torch.manual_seed(0)
    T, N, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, next_value = torch.randn(T, N), torch.randn(T, N), torch.randn(N)
    starts, next_start = torch.rand(T, N) < 0.3, torch.tensor([True, False, False])
    starts1, values1 = torch.cat([starts, next_start[None]]), torch.cat([values, next_value[None]])
    time_limit = starts1[1:] & (torch.rand(T, N) < 0.5)                         # these ends are truncations
    final_values = torch.where(time_limit, torch.randn(T, N), 0)
    advantages = script.gae(rewards, values, starts, final_values, next_value, next_start, gamma, lam)
    for n in range(N):
        for t in range(T):                                                      # sum_k (gamma lam)^k delta_{t+k}
            total, weight = 0.0, 1.0
            for k in range(t, T):
                after = final_values[k, n] if starts1[k + 1, n] else values1[k + 1, n]
                total += weight * (rewards[k, n] + gamma * after - values[k, n])
                weight *= gamma * lam
                if starts1[k + 1, n]:
                    break
            torch.testing.assert_close(advantages[t, n], torch.as_tensor(total))


def test_classic_bug_none_as_hidden_state(script, tmp_path, capsys):
    """None for the state of every call: torch silently takes zeros, in acting and in training."""
    x = {"ppo_recurrent_sbb": "x", "ppo_recurrent_tbb": "self.encoder(obs)"}[script.__name__]
    assert_caught(tmp_path, capsys, script, (f"y, state = self.memory({x}, state, start) ",
                                             f"y, state = self.memory({x}, self.memory.initial_state(start.shape[1]), start) "))


def test_normalisation_travels_with_the_model(script, tmp_path):
    _, folder = run(tmp_path, script, norm_obs=True, norm_reward=True)
    content = script.load("--model", folder / "model.safetensors", script.read_model)
    weights, args = content["agent"], content["args"]
    assert weights["encoder.leaves.0.stats.count"] == weights["return_stats.count"] == args.total_timesteps
    assert args.norm_obs and args.norm_reward and args.device == "cpu"


def test_rewards_are_scaled_by_the_spread_of_discounted_returns(script, tmp_path):
    module = planted(tmp_path, script, ("            rewards /= ", "            seen.append((rewards.clone(), starts.clone(), "
                                        "discounted_returns))\n            rewards /= "),
                     ("            advantages = gae(rewards,",
                      "            seen[-1] += (rewards.clone(),)\n            advantages = gae(rewards,"))
    module.seen = seen = []
    run(tmp_path, module, norm_reward=True)
    total, gamma = torch.zeros(4), script.Args().gamma
    for rewards, starts, discounted_returns, _ in seen:                         # a plain loop, across the rollouts
        for reward, start, discounted in zip(rewards, starts, discounted_returns):
            total = reward + gamma * total * ~start
            torch.testing.assert_close(discounted, total)
    gathered = torch.cat([discounted for _, _, discounted, _ in seen])          # [3 T, N]
    torch.testing.assert_close(seen[-1][3] * gathered.std(correction=0), seen[-1][0], rtol=1e-4, atol=1e-6)


def test_the_value_loss_is_ppos_clipped_one_and_target_kl_stops_the_epochs(script, tmp_path):
    old, target = {"ppo_recurrent_sbb": ("b_values[index]", "b_returns[index]"),
                   "ppo_recurrent_tbb": ("values[:, mb]", "returns[:, mb]")}[script.__name__]
    module = planted(tmp_path, script, ("                loss = pg_loss -",
                                f"                seen.append((newvalue, {old}, {target}, v_loss, clip_coef))\n"
                                "                loss = pg_loss -"))
    module.seen = seen = []
    run(tmp_path, module, learning_rate=(0.05,))
    for new, old, returns, v_loss, clip in seen:
        near = torch.minimum(torch.maximum(new, old - clip), old + clip)
        expected = 0.5 * torch.stack([(new - returns) ** 2, (near - returns) ** 2]).max(0).values.mean()
        torch.testing.assert_close(v_loss, expected)
    assert any(((new - old).abs() > clip).any() for new, old, _, _, clip in seen) and len(seen) == 3 * 2 * 3
    seen.clear()
    run(tmp_path / "stopped", module, learning_rate=(0.05,), target_kl=1e-9)
    assert len(seen) == 3 * 1 * 3                                               # one epoch of three minibatches an update


def test_a_time_limit_is_bootstrapped_and_a_death_is_not(script, tmp_path):
    module = planted(tmp_path, script, ("            advantages = gae(rewards,",
                                "            seen.append((final_values.clone(), starts.clone(), next_start.clone()))\n"
                                "            advantages = gae(rewards,"),
                     ("                final_values[t, time_limit] = value[0]\n",
                      "                final_values[t, time_limit] = value[0]\n"
                      "                for i, n in enumerate(time_limit):\n"
                      "                    assert (last_obs[0][0, i].numpy() == infos['final_obs'][n]).all()\n"
                      "                    alone = agent((last_obs[0][:, [i]],), tuple(s[[n]] for s in state), "
                      "goes_on[:, [i]])\n"
                      "                    torch.testing.assert_close(final_values[t, n], alone[1][0, 0])\n"))
    module.seen = seen = []
    run(tmp_path, module, env_kwargs='{"max_steps": 2}')                        # nothing but time limits
    for final_values, starts, next_start in seen:
        ends = torch.cat([starts[1:], next_start[None]])
        assert ((final_values != 0) == ends).all() and ends.any()
    module.seen.clear()
    run(tmp_path / "b", module, env_kwargs='{"max_steps": 1000}')               # nothing but deaths
    assert all((final_values == 0).all() for final_values, _, _ in seen)

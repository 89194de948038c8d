"""pqn_recurrent_tbb.py: targets and updates by definition, what is trained is what acted, learning."""
import gymnasium as gym
import numpy as np
import pytest
import torch

import envs.vector
import pqn_recurrent_tbb as pqn
from models import MEMORIES
from models.heads import ActionValues
from models.layers import init
from models.rnn import GRU
from tests.helpers import assert_caught, column, comparable, copies, run, small, spy, weights_of
from tests.probes import NUMBERS

TAG = "debug/first_q_difference"
SLOW_EPISODES = {"max_steps": 70}  # rollouts of 32 steps: episodes go over two or three of them
DISCRETE = dict(NUMBERS, env_kwargs={"discrete": True})  # some episodes terminate, others are truncated
MINES = dict(env_id="popgym-MineSweeperEasy-v0", env_kwargs={})  # two branches
SPACES_OF_NUMBERS = gym.spaces.Box(0, np.inf, (2,)), gym.spaces.Discrete(3)


# ---------------------------------------------------------------------- targets

def rollout():
    """Arguments of q_lambda_targets before gamma and lambda; about half of the ends are time limits."""
    torch.manual_seed(0)
    rewards, values, at_limits = torch.randn(3, 12, 5)
    starts, next_start = torch.rand(12, 5) < 0.3, torch.arange(5) < 2
    ends = torch.cat([starts[1:], next_start[None]])
    final_values = torch.where(ends & (torch.rand(12, 5) < 0.5), at_limits, 0)
    return rewards, values, starts, final_values, torch.randn(5), next_start


def slow_targets(rewards, values, starts, final_values, next_value, next_start, gamma, lam):
    """A column and a step at a time, as the mixture of n-step returns that the recursion stands for.

    The return of n steps ends with the value after them and weighs (1 - lam) lam^(n - 1); the longest one,
    to the end of the episode or of the rollout, weighs what is left.
    """
    ends, values = torch.cat([starts[1:], next_start[None]]), torch.cat([values, next_value[None]])
    targets = torch.zeros_like(rewards)
    for t, n in np.ndindex(*rewards.shape):
        paid, left = 0.0, 1.0
        for k in range(t, len(rewards)):
            paid += gamma ** (k - t) * rewards[k, n]
            value = final_values[k, n] if ends[k, n] else values[k + 1, n]
            longest = ends[k, n] or k == len(rewards) - 1
            weight = left if longest else left * (1 - lam)
            targets[t, n] += weight * (paid + gamma ** (k + 1 - t) * value)
            left -= weight
            if longest:
                break
    return targets


@pytest.mark.quick
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.65, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_targets_equal_their_definition(gamma, lam):
    tape = rollout()
    torch.testing.assert_close(pqn.q_lambda_targets(*tape, gamma, lam), slow_targets(*tape, gamma, lam))


@pytest.mark.quick
def test_lambda_0_is_one_step_q_learning():
    rewards, values, starts, final_values, next_value, next_start = tape = rollout()
    ends, after = torch.cat([starts[1:], next_start[None]]), torch.cat([values[1:], next_value[None]])
    expected = rewards + 0.9 * torch.where(ends, final_values, after)
    torch.testing.assert_close(pqn.q_lambda_targets(*tape, 0.9, 0.0), expected)


@pytest.mark.quick
def test_lambda_1_is_the_return_with_a_bootstrap_at_the_rollouts_end():
    rewards, values, starts, _, next_value, next_start = rollout()
    no = torch.zeros_like(starts)                           # no episode ends
    targets = pqn.q_lambda_targets(rewards, values, no, 0 * values, next_value, no[0], 0.9, 1.0)
    for t in range(12):
        discounts = 0.9 ** torch.arange(12.0 - t)
        expected = discounts @ rewards[t:] + 0.9 ** (12 - t) * next_value
        torch.testing.assert_close(targets[t], expected)


@pytest.mark.quick
@pytest.mark.parametrize("lam", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("final_value", [0.0, 8.0], ids=["death", "limit"])
def test_a_death_gets_no_bootstrap_and_a_time_limit_the_last_observations(lam, final_value):
    """The episode ends in step 2 of 4. What is after it, `later`, changes nothing before it."""
    def targets(later):
        column = torch.tensor([[1.0], [2.0], [4.0], [later]])
        starts = torch.tensor([[True], [False], [False], [True]])
        final_values = torch.tensor([[0.0], [0.0], [final_value], [0.0]])
        next_value, next_start = torch.tensor([later]), torch.tensor([False])
        tape = column, 2 * column, starts, final_values, next_value, next_start
        return pqn.q_lambda_targets(*tape, 0.5, lam)

    G_2 = 4.0 + 0.5 * final_value
    G_1 = 2.0 + 0.5 * ((1 - lam) * 8.0 + lam * G_2)
    torch.testing.assert_close(targets(100.0)[1:3, 0], torch.tensor([G_1, G_2]))
    assert torch.equal(targets(100.0)[:3], targets(-100.0)[:3])


@pytest.mark.quick
def test_known_bug_the_next_episodes_return_is_noticed():
    """The definition is not what an episode's end gives that cuts the value alone."""
    rewards, values, starts, final_values, next_value, next_start = tape = rollout()
    goes_on, after = ~torch.cat([starts[1:], next_start[None]]), torch.cat([values[1:], next_value[None]])
    planted, target = torch.zeros_like(rewards), next_value
    for t in reversed(range(12)):
        value = goes_on[t] * after[t] + final_values[t]
        planted[t] = target = rewards[t] + 0.9 * (0.35 * value + 0.65 * target)
    difference = (planted - slow_targets(*tape, 0.9, 0.65)).abs()
    assert difference[~goes_on].min() > 1e-3


def test_what_targets_are_made_of(tmp_path, monkeypatch):
    """Rewards, starts and values as acting saw them. A time limit is bootstrapped from the last observation,
    with the memory that acting left, a death is not. With weights that stay, the next rollout's first value
    is the bootstrap of this one."""
    forwards, steps = spy(monkeypatch, pqn.Agent, "forward"), spy(monkeypatch, envs.vector.Episodes, "step")
    targets, valued = spy(monkeypatch, pqn, "q_lambda_targets"), spy(monkeypatch, pqn, "best_values_of")
    run(tmp_path, pqn, memory="lstm", learning_rate=(0.0,), reward_scale=0.5, **DISCRETE)
    acted = [call for call in forwards if call.result[0].branches[0].is_inference()]
    best = torch.cat([call.result[0].branches[0].amax(-1) for call in acted])               # [96, 4]
    starts = torch.cat([call.args[3] for call in acted])
    valued, ends = iter(valued), 0
    for t, (step, forward) in enumerate(zip(steps[1:], acted, strict=True)):
        call, row = targets[t // 32], t % 32
        _, reward, terminated, truncated, infos = step.result
        assert call.args[0][row].tolist() == (0.5 * reward).tolist()
        assert torch.equal(call.args[1][row], best[t]) and torch.equal(call.args[2][row], starts[t])
        assert (call.args[3][row] != 0).tolist() == truncated.tolist()
        if truncated.any():
            late, asked = np.flatnonzero(truncated), next(valued)
            last_obs = torch.stack([torch.as_tensor(infos["final_obs"][n]) for n in late])
            assert torch.equal(torch.stack([leaf for leaf, in asked.args[1]]), last_obs)
            assert all(torch.equal(s, x[late]) for s, x in zip(asked.args[2], forward.result[1]))
            assert torch.equal(asked.result, call.args[3][row, late])
            ends += len(late)
        if row == 31 and t < 95:
            torch.testing.assert_close(call.args[4], best[t + 1])
            assert torch.equal(call.args[5], starts[t + 1])
    assert ends > 20 and next(valued, None) is None


def agent_of(observations=gym.spaces.Box(-1, 1, (3,)), actions=gym.spaces.Discrete(2), **changes):
    """A new agent of the size of small runs, by default for PocMemory."""
    return pqn.Agent(observations, actions, pqn.Args(**small(pqn, **changes)))


@pytest.mark.quick
def test_last_observations_are_valued_by_the_state_that_acting_left():
    """best_values_of goes on from the given state; a start would make the memory forget."""
    agent, obs = agent_of(), torch.randn(6, 4, 3)
    state, start = agent.memory.initial_state(4), torch.zeros(6, 4, dtype=torch.bool)
    whole, _ = agent((obs,), state, start)
    _, before_last = agent((obs[:5],), state, start[:5])
    rows = [1, 3]
    values = pqn.best_values_of(agent, [(obs[5, n],) for n in rows], tuple(s[rows] for s in before_last))
    torch.testing.assert_close(values, whole.branches[0][5, rows].amax(-1).detach())


# ---------------------------------------------------------------------- updates

def watched(tmp_path, monkeypatch, **changes):
    """Trains. One record a gradient step: weights before it, columns of tape, actions, gradients before they
    are clipped. The second result is the weights at last."""
    seen, forward, clip = [], pqn.Agent.forward, torch.nn.utils.clip_grad_norm_

    def recording_forward(agent, obs, state, start):
        if torch.is_grad_enabled():
            seen.append({"weights": copies(agent.state_dict()), "tape": copies((obs, state, start))})
        return forward(agent, obs, state, start)

    def recording_of(q, action):
        if torch.is_grad_enabled():
            seen[-1]["actions"] = copies(action)
        return of(q, action)

    def recording_clip(parameters, max_norm):
        seen[-1]["gradients"] = [p.grad.clone() for p in parameters]
        return clip(parameters, max_norm)

    of = ActionValues.of
    with monkeypatch.context() as patch:
        patch.setattr(pqn.Agent, "forward", recording_forward)
        patch.setattr(ActionValues, "of", recording_of)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
        _, folder = run(tmp_path, pqn, **changes)
    return seen, weights_of(folder)


def assert_gradients(agent, loss, gradients):
    for gradient, g in zip(gradients, torch.autograd.grad(loss, list(agent.parameters())), strict=True):
        torch.testing.assert_close(gradient, g, rtol=1e-3, atol=1e-5 * max(1, g.abs().max().item()))


@pytest.mark.parametrize("memory", ["gru", "lru"])
def test_one_epoch_of_one_minibatch_with_lambda_0_is_the_online_update(tmp_path, monkeypatch, memory):
    """Q-learning by hand, one environment and one step at a time, as acting goes; the mean over all steps.

    The error of a step is Q(o_t, a_t) - r_t - gamma max_a Q(o_{t+1}, a). The last term is held fixed; it is
    0 after a death, and of the last observation at a time limit. RAdam's first step goes along the gradient.
    """
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))
    steps = spy(monkeypatch, envs.vector.Episodes, "step")
    flags = dict(memory=memory, gamma=0.9, q_lambda=0.0, num_minibatches=1, update_epochs=1)
    updates, _ = watched(tmp_path, monkeypatch, **DISCRETE, **flags)
    agent, no_start = agent_of(*SPACES_OF_NUMBERS, memory=memory), torch.zeros(1, 1, dtype=torch.bool)
    for update, step in zip(updates, np.reshape(steps[1:], (3, 32)), strict=True):
        agent.load_state_dict(update["weights"])
        (obs,), state, start = update["tape"]
        errors = []
        for n in range(4):
            h = tuple(s[[n]] for s in state)
            for t in range(32):
                next_obs, reward, terminated, truncated, infos = step[t].result
                after = infos["final_obs"][n] if truncated[n] else next_obs[n]
                q, h = agent((obs[t : t + 1, [n]],), h, start[t : t + 1, [n]])
                next_q, _ = agent((torch.as_tensor(after)[None, None],), h, no_start)
                value = 0.0 if terminated[n] else next_q.branches[0].max().item()
                q_taken = q.branches[0][0, 0, update["actions"][t, n, 0]]
                errors.append(q_taken - float(reward[n]) - 0.9 * value)
        assert_gradients(agent, (torch.stack(errors) ** 2).mean(), update["gradients"])
    first, second = updates[:2]
    norm = sum(g.square().sum() for g in first["gradients"]) ** 0.5
    for (name, parameter), g in zip(agent.named_parameters(), first["gradients"], strict=True):
        stepped = first["weights"][name] - 1e-2 * g * min(1, pqn.Args().max_grad_norm / norm)
        torch.testing.assert_close(second["weights"][name], stepped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", [DISCRETE, MINES], ids=["one-branch", "two-branches"])
def test_the_loss_is_the_mean_of_squared_errors_on_whole_columns(tmp_path, monkeypatch, task):
    """Every column once an epoch, the targets those of before the first gradient step."""
    targets, shuffled = spy(monkeypatch, pqn, "q_lambda_targets"), spy(monkeypatch, torch, "randperm")
    updates, _ = watched(tmp_path, monkeypatch, **task)     # 3 rollouts, 2 epochs, 3 minibatches
    tasks = envs.vector.make_envs(pqn.Args(**{**small(pqn), **task}), 1)
    agent = agent_of(tasks.single_observation_space, tasks.single_action_space)
    minibatches = [mb for call in shuffled for mb in call.result.tensor_split(3)]
    assert all(sorted(call.result.tolist()) == [0, 1, 2, 3] for call in shuffled)
    assert len(updates) == len(minibatches) == 3 * 2 * 3
    for i, (update, mb) in enumerate(zip(updates, minibatches)):
        agent.load_state_dict(update["weights"])
        q, _ = agent(*update["tape"])
        one_hots = [torch.nn.functional.one_hot(a, x.shape[-1])
                    for a, x in zip(update["actions"].unbind(-1), q.branches)]
        q_taken = sum((x * one_hot).sum(-1) for x, one_hot in zip(q.branches, one_hots))
        loss = ((q_taken - targets[i // 6].result[:, mb]) ** 2).mean()
        assert_gradients(agent, loss, update["gradients"])


def test_epsilon_and_the_learning_rate_fall(tmp_path, monkeypatch):
    chosen, rates = spy(monkeypatch, ActionValues, "epsilon_greedy"), []
    step = torch.optim.RAdam.step

    def recording_step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.RAdam, "step", recording_step)
    rows, _ = run(tmp_path, pqn, start_e=0.8, end_e=0.2, exploration_fraction=0.5, learning_rate=(3e-2, 0.0))
    expected = [0.8, 0.8 - 0.6 * 128 / 192, 0.2]            # of three rollouts
    assert [call.args[1] for call in chosen] == pytest.approx(np.repeat(expected, 32))
    assert column(rows, "charts/epsilon") == pytest.approx(expected)
    assert rates == pytest.approx(np.repeat([3e-2, 2e-2, 1e-2], 2 * 3))
    assert column(rows, "charts/learning_rate") == pytest.approx([3e-2, 2e-2, 1e-2])


@pytest.mark.quick
def test_layer_norm_bounds_the_action_values():
    """Whatever a memory puts out, Q is at most the length of the head's weights times that of LayerNorm's."""
    agent = agent_of()
    bound = agent.q.linear.weight.norm(dim=-1) * 8**0.5     # 8 = mlp_size
    agent.memory.forward = lambda x, state, start: (1e6 * torch.randn(50, 4, 8), state)
    q, _ = agent((torch.randn(50, 4, 3),), (), None)
    assert (q.branches[0].abs() <= bound + 1e-6).all() and q.branches[0].abs().max() > 0.1 * bound.max()


# ---------------------------------------------------------------------- what is trained is what acted

CHANGES = [
    {"env_kwargs": SLOW_EPISODES}, {"prev_action": True, "prev_reward": True}, {"norm_obs": True}, MINES]
CASES = [(memory, layers, {}) for memory in MEMORIES for layers in (1, 2)]
CASES += [(memory, 1, changes) for memory in ("lstm", "lru") for changes in CHANGES]


@pytest.mark.parametrize("memory, layers, changes", CASES, ids=str)
def test_first_q_difference_is_zero(tmp_path, memory, layers, changes):
    """Before the first gradient step of every update, stored and recomputed action values agree."""
    rows, _ = run(tmp_path, pqn, memory=memory, num_layers=layers, **changes)
    assert len(rows) == 3 and max(column(rows, TAG)) < 1e-5
    assert max(column(rows, "losses/grad_norm")) > 1e-4     # and then they moved


@pytest.mark.quick
@pytest.mark.parametrize("other", ["initial", "newest"])
def test_pitfall_columns_from_another_state(tmp_path, capsys, monkeypatch, other):
    forward, acted = pqn.Agent.forward, []

    def from_another(self, obs, state, start):
        if torch.is_grad_enabled():                         # training: all columns are in minibatches of one
            state = self.memory.initial_state(1) if other == "initial" else tuple(s[:1] for s in acted[-1])
        q, after = forward(self, obs, state, start)
        acted.append(copies(after))
        return q, after

    monkeypatch.setattr(pqn.Agent, "forward", from_another)
    assert_caught(
        tmp_path, capsys, pqn, TAG, num_minibatches=4, env_kwargs=SLOW_EPISODES, learning_rate=(0.05,))


@pytest.mark.quick
def test_classic_bug_none_as_hidden_state(tmp_path, capsys, monkeypatch):
    """None for the state of every call: torch silently takes zeros, in acting and in training."""
    forward = GRU.forward
    monkeypatch.setattr(GRU, "forward", lambda self, x, state, start: forward(
        self, x, self.initial_state(x.shape[1]), start))
    assert_caught(tmp_path, capsys, pqn, TAG, learning_rate=(0.05,))


@pytest.mark.quick
def test_the_difference_is_relative_to_large_action_values(tmp_path, monkeypatch, capsys):
    """Rounding grows with the values: rewards in the thousands give no warning."""
    monkeypatch.setattr("models.heads.init", lambda layer, gain: init(layer, 1e5 * gain))
    rows, _ = run(tmp_path, pqn, memory="lru", learning_rate=(0.0,))
    assert max(column(rows, TAG)) < 1e-5 and column(rows, "losses/q_values")[0] != 0
    assert "warning" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_a_tape_begins_with_the_memory_of_all_that_was_before(tmp_path, monkeypatch, memory):
    """With weights that stay, the state before a tape is that after every step since the first rollout."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))
    flags = dict(memory=memory, env_kwargs=SLOW_EPISODES, learning_rate=(0.0,), num_minibatches=1)
    updates, weights = watched(
        tmp_path, monkeypatch, **flags, update_epochs=1, num_steps=8, total_timesteps=4 * 8 * 8)
    agent = agent_of(memory=memory)
    agent.load_state_dict(weights)
    state = agent.memory.initial_state(4)
    for update in updates:
        obs, before, start = update["tape"]
        for s, expected in zip(before, state, strict=True):
            torch.testing.assert_close(s, expected, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            _, state = agent(obs, state, start)
    assert sum(bool(update["tape"][2][0].logical_not().any()) for update in updates) > 3    # episodes went on


@pytest.mark.parametrize("memory", ["lstm", "lru"])
def test_resume_in_the_middle_of_episodes_equals_never_having_stopped(tmp_path, memory):
    changes = dict(memory=memory, env_kwargs=SLOW_EPISODES)
    whole, folder = run(tmp_path, pqn, run_name="whole", **changes)
    _, half = run(tmp_path, pqn, run_name="half", total_timesteps=4 * 32 * 2, **changes)
    rows, half = run(tmp_path, pqn, resume=str(half), **changes)
    assert comparable(rows) == comparable(whole)
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, weights_of(half)[name]), name


def test_a_minibatch_of_one_column_and_one_step_trains(tmp_path):
    rows, folder = run(tmp_path, pqn, num_envs=4, num_steps=1, num_minibatches=4, total_timesteps=16)
    assert len(rows) == 4 and all(w.isfinite().all() for w in weights_of(folder).values())


# ---------------------------------------------------------------------- learning

def test_the_default_task_is_not_learned_without_memory(tmp_path):
    """With it: entry smoke-pqn, which the gate runs."""
    own = {name: x for name, x in vars(pqn.Args()).items() if name not in ("run_name", "runs_dir", "device")}
    changes = dict(memory="none", total_timesteps=20_480, eval_every=20_480, eval_episodes=32)
    rows, _ = run(tmp_path, pqn, **own | changes)
    assert -0.7 <= float(rows[-1]["eval/episodic_return"]) <= -0.2

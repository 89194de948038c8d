"""The DQN pair: what enters the replay, targets and losses by definition, segments against tape, learning.

sac_discrete_sbb.py has the same replay, stored states and target network: their tests are here for it too.
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dqn_recurrent_sbb as sbb
import dqn_recurrent_tbb as tbb
import sac_discrete_sbb as sac
from models import MEMORIES
from models.heads import ActionValues
from models.layers import init
from tests.helpers import column, comparable, run, spy
from tests.probes import NUMBERS, acted, check_what_enters_the_replay, watched

MINES = dict(env_id="popgym-MineSweeperEasy-v0", env_kwargs={}, prev_action=True)   # 1 to 15 steps
REPEAT = dict(                                              # 51 steps
    env_id="popgym-RepeatPreviousEasy-v0", env_kwargs={}, buffer_size=2_000, total_timesteps=800)
DISCRETE = dict(NUMBERS, env_kwargs={"discrete": True})  # some episodes terminate, others are truncated
WITH_SAC = pytest.mark.parametrize("script", [sbb, tbb, sac], ids=lambda module: module.__name__)


@pytest.fixture(params=[sbb, tbb], ids=lambda module: module.__name__)
def script(request):
    return request.param


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------- acting, and what enters the replay

@pytest.mark.quick
def test_what_enters_the_replay_is_what_happened(script, tmp_path, monkeypatch):
    """`terminated`, not whether the episode ended; an episode's own last observation, not the next one's."""
    check_what_enters_the_replay(
        tmp_path, monkeypatch, script, to_env=lambda action: action[:, 0], **DISCRETE)


@pytest.mark.quick
def test_acting_forgets_where_an_episode_starts_and_nowhere_else(script, tmp_path, monkeypatch):
    starts, entered = acted(tmp_path, monkeypatch, script, **DISCRETE)
    assert len(starts) == len(entered) > 90
    for start, now in zip(starts, entered):
        assert start.tolist() == now.start.tolist() == (now.obs[0][:, 1] == 0).tolist()


@pytest.mark.quick
@pytest.mark.parametrize("script", [sbb, sac], ids=lambda module: module.__name__)
def test_the_state_before_the_step_is_stored(script, tmp_path, monkeypatch):
    """A state stored after the step gives a segment the memory of its own first observation."""
    forwards, adds = spy(monkeypatch, script.Agent, "forward"), spy(monkeypatch, script.Replay, "add")
    run(tmp_path, script, burn_in=0)
    acting = [call for call in forwards if len(call.args[3]) == 1]
    assert len(acting) == len(adds) > 90
    for forward, add in zip(acting, adds):
        state_before, state_stored = forward.args[2], add.args[6]
        assert all(map(torch.equal, state_before, state_stored))
    for before, after in zip(acting, acting[1:]):           # acting carries it on
        assert all(map(torch.equal, before.result[-1], after.args[2]))


@pytest.mark.quick
def test_epsilon_is_1_at_first_and_then_falls():
    flags = dict(learning_starts=100, start_e=0.8, end_e=0.2, exploration_fraction=0.5, total_timesteps=640)
    args = tbb.Args(**flags)
    expected = {0: 1, 99: 1, 100: 0.8 - 0.6 * 100 / 320, 160: 0.5, 320: 0.2, 639: 0.2}
    assert {step: tbb.epsilon_at(step, args) for step in expected} == pytest.approx(expected)


def test_actions_are_random_with_probability_epsilon(script, tmp_path, monkeypatch):
    chosen = spy(monkeypatch, ActionValues, "epsilon_greedy")
    rows, _ = run(
        tmp_path, script, learning_starts=100, start_e=0.8, end_e=0.2, exploration_fraction=0.5,
        total_timesteps=640)
    visits = np.arange(0, 640, 32)                          # steps where a rollout of 8 x 4 begins
    expected = np.where(visits < 100, 1, np.maximum(0.2, 0.8 - 0.6 * visits / 320))
    assert [call.args[1] for call in chosen] == pytest.approx(np.repeat(expected, 8))
    assert column(rows, "charts/epsilon") == pytest.approx(expected[3::4])


@pytest.mark.quick
def test_random_actions_are_uniform_and_greedy_ones_the_best():
    torch.manual_seed(0)
    q = ActionValues(torch.randn(4_000, 5).mul(10), [2, 3])
    best = torch.stack([q.branches[0].argmax(-1), q.branches[1].argmax(-1)], dim=-1)
    assert torch.equal(q.epsilon_greedy(0.0), best) and torch.equal(q.greedy(), best)
    random = q.epsilon_greedy(1.0)
    counts = torch.bincount(random[:, 0] * 3 + random[:, 1], minlength=6)
    assert (counts - 4_000 / 6).abs().max() < 5 * (4_000 / 6) ** 0.5
    explored = (q.epsilon_greedy(0.3) != best).any(-1).float().mean() / (5 / 6)
    assert 0.25 < explored < 0.35                           # one coin for both branches
    every = torch.tensor([[a, b] for a in range(2) for b in range(3)])
    sums = torch.stack([q.of(pair.expand(4_000, 2)) for pair in every])
    torch.testing.assert_close(q.of(best), sums.max(0).values)                  # the best pair


# ---------------------------------------------------------------------- targets and losses

@pytest.mark.quick
def test_td_targets_equal_their_definition(script):
    torch.manual_seed(0)
    T, B, gamma = 12, 5, 0.9
    rewards, values, terminated = torch.randn(T, B), torch.randn(T, B), torch.rand(T, B) < 0.2
    real = torch.rand(T, B) < 0.8
    real[-1] = False
    for n_step in (1, 2, 5, 20):
        y = script.td_targets(rewards, terminated, real, values, gamma, n_step)
        for b in range(B):
            for t in range(T):
                expected, weight, k = 0.0, 1.0, t
                while k < t + n_step and real[k, b]:
                    expected += weight * rewards[k, b]
                    weight *= gamma * ~terminated[k, b]
                    k += 1
                expected += weight * values[k, b]           # o_k is where it bootstraps
                torch.testing.assert_close(y[t, b], torch.as_tensor(expected))


def pieces(real):
    """(column, first row, last row) of all episodes or segments in a batch; the last row holds no step."""
    for b in range(real.shape[1]):
        first = 0
        for last in (~real[:, b]).nonzero().flatten().tolist():
            if last > first:                                # otherwise padding
                yield b, first, last
            first = last + 1


def of_piece(net, batch, b, first, last):
    """Action values of a piece alone, from the initial state."""
    start = torch.arange(last + 1 - first)[:, None] == 0
    obs = [o[first : last + 1, [b]] for o in batch.obs]
    return net(obs, net.memory.initial_state(1), start)[0]


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_loss_is_the_mean_over_real_steps_of_double_dqns(script, tmp_path, monkeypatch, loss):
    """Episode by episode, step by step, from the networks as they were: its gradients are those."""
    flags = dict(MINES, memory="lru", num_layers=2, loss=loss, tau=0.1, gamma=0.9)
    seen, _ = watched(tmp_path, monkeypatch, script, every=6, **flags)
    assert len(seen) > 3
    for now in seen:
        batch, errors = now.batch, []
        for b, first, last in pieces(batch.real):
            q, target_q = (of_piece(net, batch, b, first, last) for net in (now.agent, now.target))
            values = target_q.of(q.greedy()).detach()
            q_taken = q.of(batch.actions[first : last + 1, [b]])
            for t in range(first, last):
                y = batch.rewards[t, b]
                if not batch.terminated[t, b]:
                    y = y + 0.9 * values[t + 1 - first, 0]
                error = (q_taken[t - first, 0] - y).abs()
                huber = 0.5 * error**2 if error < 1 else error - 0.5
                errors.append(huber if loss == "huber" else error**2)
        assert len(errors) == batch.real.sum()
        expected = torch.autograd.grad(torch.stack(errors).mean(), list(now.agent.parameters()))
        for gradient, g in zip(now.clipped[0], expected, strict=True):
            torch.testing.assert_close(gradient, g, rtol=1e-3, atol=1e-5 * max(1, g.abs().max().item()))


@pytest.mark.parametrize("omit", [False, True], ids=["whole", "omitted"])
def test_target_histories_contain_the_first_observation(script, tmp_path, monkeypatch, omit):
    """Values of the targets, and who chooses the action there, by definition. With --omit-first-obs the
    memory of both networks starts at o_1."""
    calls = spy(monkeypatch, script, "td_targets")
    flags = dict(memory="gru", seq_len=-1, tau=0.1, gamma=0.9, n_step=4, omit_first_obs=omit)
    seen, _ = watched(tmp_path, monkeypatch, script, every=6, **flags)
    assert len(seen) == len(calls) // 6 > 3
    for now, call in zip(seen, calls[5::6]):
        *_, values, gamma, n_step = call.args
        assert (gamma, n_step) == (0.9, 4)
        for b, first, last in pieces(now.batch.real):
            begin = first + 1 if omit else first
            nets = now.agent, now.target
            q, target_q = (of_piece(net, now.batch, b, begin, last) for net in nets)
            expected = target_q.of(q.greedy())[:, 0].detach()
            torch.testing.assert_close(values[begin : last + 1, b], expected, rtol=1e-4, atol=1e-6)


def test_changing_the_first_observation_changes_all_values_after_it(script, tmp_path, monkeypatch):
    """With --omit-first-obs it changes none of them."""
    sample = script.Replay.sample

    def changed_sample(*args):
        batch = sample(*args)
        batch.obs[0][batch.starts] += 1.0
        return batch

    def values_and_rows(name, sample, omit):
        with monkeypatch.context() as patch:
            patch.setattr(script.Replay, "sample", sample)
            calls = spy(patch, script, "td_targets")
            run(tmp_path, script, learning_rate=(0.0,), seq_len=-1, omit_first_obs=omit, run_name=name)
        real, values = calls[-1].args[2:4]
        return values, real.roll(1, 0)                      # rows with a step before them

    for omit in (False, True):
        before, after_o_0 = values_and_rows(f"{omit}", sample, omit)
        after, _ = values_and_rows(f"changed-{omit}", changed_sample, omit)
        assert after_o_0.sum() > 30
        assert ((before != after)[after_o_0] == (not omit)).all()


@pytest.mark.quick
def test_a_fixed_tape_has_one_shape(tmp_path, monkeypatch):
    drawn = spy(monkeypatch, tbb.Replay, "sample")
    run(tmp_path, tbb, fixed_tape=True)
    assert {len(call.result.real) for call in drawn} == {64}
    assert len({int(call.result.real.sum()) for call in drawn}) > 1


# ---------------------------------------------------------------------- segments against tape

def losses_and_gradients(tmp_path, monkeypatch, script, **flags):
    """[(loss, gradients before clipping)] of all gradient steps."""
    with monkeypatch.context() as patch:
        losses = spy(patch, torch.Tensor, "backward")
        gradients, clip = [], torch.nn.utils.clip_grad_norm_

        def recording_clip(parameters, max_norm):
            parameters = list(parameters)
            gradients.append([p.grad.clone() for p in parameters])
            return clip(parameters, max_norm)

        patch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
        run(tmp_path, script, run_name=script.__name__, **flags)
    return [(call.args[0], g) for call, g in zip(losses, gradients, strict=True)]


@pytest.mark.parametrize(
    "memory, task", [*((memory, MINES) for memory in MEMORIES), ("gru", REPEAT), ("lru", REPEAT)],
    ids=lambda x: x["env_id"] if isinstance(x, dict) else x)
def test_segments_as_long_as_episodes_equal_the_tape(tmp_path, monkeypatch, float64, memory, task):
    """One seed, one random stream: both scripts draw the same episodes and train alike until the end."""
    flags = dict(task, memory=memory, n_step=3, batch_size=120, tape_len=120, seq_len=-1)
    segments, tape = (losses_and_gradients(tmp_path, monkeypatch, script, **flags) for script in (sbb, tbb))
    assert len(segments) == len(tape) > 20
    for (loss, gradients), (tape_loss, tape_gradients) in zip(segments, tape):
        torch.testing.assert_close(tape_loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tape_gradients, gradients, rtol=1e-8, atol=1e-11)
    assert sum(g.abs().sum() for g in gradients) > 1e-5


def test_short_segments_do_not(tmp_path, monkeypatch, float64):
    flags = dict(MINES, memory="lru", batch_size=120, tape_len=120, seq_len=3)
    segments, tape = (losses_and_gradients(tmp_path, monkeypatch, script, **flags) for script in (sbb, tbb))
    assert max(abs(loss - tape_loss) for (loss, _), (tape_loss, _) in zip(segments, tape)) > 1e-5


@pytest.mark.quick
def test_known_bug_huber_of_the_mean_is_noticed(tmp_path, monkeypatch, float64):
    """memory-monoids' segment arm: huber(mean |error|), planted in sbb, is not what the tape computes."""
    flags = dict(MINES, memory="lru", batch_size=120, tape_len=120, seq_len=-1)
    tape = losses_and_gradients(tmp_path, monkeypatch, tbb, **flags)
    smooth_l1_loss = F.smooth_l1_loss

    def huber_of_mean(q, targets, reduction):
        mean = (q - targets).abs().mean()
        return smooth_l1_loss(mean, torch.zeros_like(mean)).expand_as(q)

    monkeypatch.setattr(F, "smooth_l1_loss", huber_of_mean)
    segments = losses_and_gradients(tmp_path, monkeypatch, sbb, **flags)
    assert abs(segments[0][0] - tape[0][0]) > 1e-5


# ---------------------------------------------------------------------- stored states, burn-in

def error_of_stored_states(tmp_path, monkeypatch, script, memory, burn_in):
    """Greatest difference between outputs in training and those of whole episodes; the weights do not move.

    An observation is (episode, step) and says all that there is to know of its history. New heads hardly look
    at the memory: theirs are made a hundred times larger.
    """
    monkeypatch.setattr("models.heads.init", lambda layer, gain: init(layer, 100 * gain))
    forwards = spy(monkeypatch, script.Agent, "forward")
    drawn = spy(monkeypatch, script.Replay, "sample")
    run(
        tmp_path, script, **DISCRETE, memory=memory, num_layers=2, burn_in=burn_in, seq_len=2,
        learning_rate=(0.0,))
    online = [call for call in forwards if call.training]
    agent, errors, known = online[0].args[0], [], {}

    def numbers(outputs):
        """[T, B, ...] of the action values, or of policy and critics."""
        tensors = [getattr(x.branches[0], "logp", x.branches[0]) for x in outputs[:-1]]
        return torch.cat(tensors, dim=-1).detach()

    def of_whole_episode(episode, t):
        if episode not in known:
            steps = torch.arange(6.0)
            obs = torch.stack([torch.full_like(steps, episode), steps], dim=-1)[:, None]
            start = (steps == 0)[:, None]
            known[episode] = numbers(agent((obs,), agent.memory.initial_state(1), start))[:, 0]
        return known[episode][int(t)]

    for batch, call in zip(drawn, online, strict=True):
        real, out = batch.result.real, numbers(call.result)
        for obs, x in zip(batch.result.obs[0][real].tolist(), out[real]):
            expected = of_whole_episode(*obs)
            errors.append(((x - expected).abs().max() / expected.abs().max()).item())
    assert len(errors) > 1_000
    return max(errors)


MEMORIES_WITH_STATES = [
    (sbb, "lstm"), (sbb, "lru"), (sbb, "ffm"), (sbb, "deltanet"), (sbb, "gpt"), (sac, "lstm"), (sac, "gpt")]


@pytest.mark.parametrize(
    "script, memory", MEMORIES_WITH_STATES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("burn_in", [0, 3])
def test_stored_states_are_those_of_the_whole_episode(script, tmp_path, monkeypatch, memory, burn_in):
    assert error_of_stored_states(tmp_path, monkeypatch, script, memory, burn_in) < 1e-4


@pytest.mark.parametrize("memory", ["lstm", "lru", "ffm", "deltanet", "gpt"])
def test_pitfall_segments_that_start_from_zeros(tmp_path, monkeypatch, memory):
    assert error_of_stored_states(tmp_path, monkeypatch, sbb, memory, None) > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("memory", ["lstm", "gpt"])
def test_states_of_another_step_are_noticed(tmp_path, monkeypatch, memory):
    """Planted: the state of the step before is stored."""
    add, states = sbb.Replay.add, []

    def late_add(replay, obs, start, action, reward, terminated, state, *rest):
        states.append(state)
        add(replay, obs, start, action, reward, terminated, states[-2:][0], *rest)

    monkeypatch.setattr(sbb.Replay, "add", late_add)
    assert error_of_stored_states(tmp_path, monkeypatch, sbb, memory, 0) > 1e-3


@pytest.mark.quick
def test_burn_in_has_no_gradient_and_both_networks_burn_in_alone(tmp_path, monkeypatch):
    calls, forward = [], sbb.Agent.forward

    def recording_forward(agent, obs, state, start):
        if len(start) > 1:                                  # training, not acting
            calls.append((agent, torch.is_grad_enabled(), len(start), state))
        return forward(agent, obs, state, start)

    monkeypatch.setattr(sbb.Agent, "forward", recording_forward)
    run(tmp_path, sbb, burn_in=3, seq_len=5)
    updates = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(updates) > 20
    for update in updates[3:]:
        agents, gradients, lengths, states = zip(*update)
        assert agents[0] is agents[2] is not agents[1] and agents[1] is agents[3]
        assert gradients == (False, False, True, False) and lengths[:2] == (3, 3)
        assert not any(s.requires_grad for state in states for s in state)
        assert all((a != b).any() for a, b in zip(states[2], states[3], strict=True))


# ---------------------------------------------------------------------- gradient steps, target, resume

@pytest.mark.quick
@WITH_SAC
def test_the_target_network_follows(script, tmp_path, monkeypatch):
    seen, _ = watched(tmp_path, monkeypatch, script, tau=1.0, target_network_frequency=3)
    for i, now in enumerate(seen[2:], 2):
        copied, _ = seen[i - (i + 1) % 3].after             # after the last multiple of 3 steps
        assert all(map(torch.equal, copied.parameters(), now.after[1].parameters()))
    seen, _ = watched(tmp_path, monkeypatch, script, tau=0.25, run_name="polyak")
    for now in seen:
        online, target = now.after
        for before, p, after in zip(now.target.parameters(), online.parameters(), target.parameters()):
            torch.testing.assert_close(0.75 * before + 0.25 * p, after)


@WITH_SAC
def test_there_are_as_many_gradient_steps_as_ordered(script, tmp_path):
    rows, _ = run(tmp_path, script, replay_ratio=0.25, learning_starts=100, total_timesteps=640)
    steps = column(rows, "global_step")
    assert steps == [128, 256, 384, 512, 640]
    assert column(rows, "charts/gradient_steps") == [0.25 * (step - 100) for step in steps]
    assert min(column(rows, "charts/transitions")) >= 64


def test_the_learning_rate_follows_its_schedule(script, tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def recording_step(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", recording_step)
    rows, _ = run(tmp_path, script, learning_rate=(1e-2, 0.0))
    assert rates == sorted(rates, reverse=True) and len(set(rates)) > 5
    assert rates[-1] == pytest.approx(1e-2 * (1 - 352 / 384))               # of the last 32 steps
    assert column(rows, "charts/learning_rate")[-1] == pytest.approx(rates[-1])


def test_a_resume_keeps_the_losses_since_the_last_row(script, tmp_path):
    """Interrupted between two rows: at step 256, rows are written at 160 and 320."""
    whole, _ = run(tmp_path, script, run_name="whole", log_every=160)
    _, half = run(tmp_path, script, run_name="half", log_every=160, total_timesteps=256)
    rows, _ = run(tmp_path, script, resume=str(half), log_every=160)
    assert comparable(rows) == comparable(whole) and len(rows) == 2


@WITH_SAC
def test_running_episodes_of_other_peoples_tasks_do_not_continue(script, tmp_path, monkeypatch):
    forgotten = spy(monkeypatch, script.Replay, "forget_running")
    _, ours = run(tmp_path, script, run_name="ours")
    run(tmp_path, script, resume=str(ours), total_timesteps=512)
    assert not forgotten
    cartpole = dict(env_id="CartPole-v1", env_kwargs={})
    _, theirs = run(tmp_path, script, **cartpole, run_name="theirs")
    run(tmp_path, script, **cartpole, resume=str(theirs), total_timesteps=512)
    assert len(forgotten) == 1


@WITH_SAC
def test_episodes_longer_than_the_replay_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, script, env_id="CartPoleMasked-v0", env_kwargs={}, buffer_size=4 * 3)
    assert "raise --buffer-size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()                  # nothing was learned


def test_it_does_not_learn_what_needs_memory_without(script, tmp_path):
    """With memory: entries smoke-dqn-sbb and smoke-dqn-tbb, which the gate runs."""
    defaults = vars(script.Args())
    own = {name: x for name, x in defaults.items() if name not in ("run_name", "runs_dir", "device")}
    changes = dict(memory="none", total_timesteps=8_000, eval_every=8_000, eval_episodes=32)
    rows, _ = run(tmp_path, script, **own | changes)
    assert -0.7 <= float(rows[-1]["eval/episodic_return"]) <= -0.2

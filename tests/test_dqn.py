"""The DQN pair: targets, losses and gradients against their definitions, segments against tape, stored states, schedules."""
import pytest
import torch

import dqn_recurrent_sbb as sbb
import dqn_recurrent_tbb as tbb
import sac_discrete_sbb as sac
from models import MEMORIES
from models.heads import ActionValues
from tests.helpers import column, planted, run

OBS, STATE = {sbb: "seg_obs", tbb: "tape_obs"}, {sbb: "seg_state", tbb: "agent.memory.initial_state(1)"}
MINES = dict(env_id="popgym-MineSweeperEasy-v0", env_kwargs="{}", prev_action=True)        # 1 to 15 steps, two branches
REPEAT = dict(env_id="popgym-RepeatPreviousEasy-v0", env_kwargs="{}", buffer_size=2_000, total_timesteps=800)  # 51 steps


@pytest.fixture(params=[sbb, tbb], ids=lambda module: module.__name__)
def script(request):
    return request.param


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def probed(tmp_path, script, before, probe, **changes):
    """Train with `seen.append(probe)` planted as a line of its own before a line; returns what was seen."""
    indent = before[: len(before) - len(before.lstrip())]
    module = planted(tmp_path, script, ("\n" + before, f"\n{indent}seen.append({probe})\n{before}"))
    module.seen = []
    rows, _ = run(tmp_path, module, **changes)
    return module.seen, rows


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
                    expected, weight = expected + weight * rewards[k, b], weight * gamma * ~terminated[k, b]
                    k += 1
                torch.testing.assert_close(y[t, b], expected + weight * values[k, b])       # k: o_k is where it bootstraps


@pytest.mark.parametrize("memory, task", [*((memory, MINES) for memory in MEMORIES), ("gru", REPEAT), ("lru", REPEAT)],
                         ids=lambda x: x["env_id"] if isinstance(x, dict) else x)
def test_segments_as_long_as_episodes_equal_the_tape(tmp_path, float64, memory, task):
    """One seed, one random stream: both scripts draw the same episodes and train alike, from the first step to the last."""
    flags = dict(task, memory=memory, n_step=3, batch_size=120, tape_len=120, seq_len=-1)
    seen = [probed(tmp_path, script, "            optimizer.step()\n", "(loss.detach(), [p.grad.clone() for p in parameters])",
                   **flags, run_name=script.__name__)[0] for script in (sbb, tbb)]
    assert len(seen[0]) == len(seen[1]) > 20
    for (loss, gradients), (tape_loss, tape_gradients) in zip(*seen):
        torch.testing.assert_close(tape_loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(tape_gradients, gradients, rtol=1e-8, atol=1e-11)
    assert sum(g.abs().sum() for g in gradients) > 1e-5


def test_short_segments_do_not(tmp_path, float64):
    flags = dict(MINES, memory="lru", batch_size=120, tape_len=120, seq_len=3)
    seen = [probed(tmp_path, script, "            optimizer.step()\n", "loss.detach()", **flags, run_name=script.__name__)[0]
            for script in (sbb, tbb)]
    assert max(abs(a - b) for a, b in zip(*seen)) > 1e-5


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_loss_is_the_mean_over_real_steps_of_double_dqns(script, tmp_path, loss):
    """Episode by episode, step by step, from the networks as they were."""
    seen, _ = probed(tmp_path, script, "            optimizer.zero_grad()\n",
                     f"(copy.deepcopy(agent), copy.deepcopy(target), {OBS[script]}, actions, rewards, terminated, real, loss)",
                     **MINES, memory="lru", num_layers=2, loss=loss, tau=0.1)
    assert len(seen) > 20
    for agent, target, obs, actions, rewards, terminated, real, total in seen[::6]:
        errors = []
        for b in range(real.shape[1]):
            ends = [t for t in range(len(real)) if not real[t, b]]
            for a, end in zip([0] + [t + 1 for t in ends], ends):                           # pieces: steps a .. end - 1
                if a == end:
                    continue                                                                # more padding
                piece, start = tuple(o[a : end + 1, [b]] for o in obs), torch.arange(end + 1 - a)[:, None] == 0
                q, target_q = (net(piece, net.memory.initial_state(1), start)[0] for net in (agent, target))
                values = target_q.of(q.greedy())
                for t in range(a, end):
                    y = rewards[t, b] + 0.99 * (0 if terminated[t, b] else values[t + 1 - a, 0])
                    error = (q.of(actions[a : end + 1, [b]])[t - a, 0] - y).abs()
                    huber = 0.5 * error**2 if error < 1 else error - 0.5
                    errors.append(huber if loss == "huber" else error**2)
        assert len(errors) == real.sum()
        torch.testing.assert_close(torch.stack(errors).mean(), total, rtol=1e-4, atol=1e-6)


def test_target_histories_contain_the_first_observation(script, tmp_path):
    """Changing o_0 changes the values of all that follows in its episode; with --omit-first-obs those of none."""
    for omit in (False, True):
        state = {sbb: "target_state", tbb: STATE[tbb]}[script]
        starts = {sbb: "real.new_ones(1).expand(real.shape[1]), 0", tbb: "tape_starts[:, 0], 1"}[script]
        seen, _ = probed(tmp_path, script, "                values = target(",
                         f"(target, {OBS[script]}, {state}, target_starts, real, best, {starts})",
                         env_id="PocMemory-v0", env_kwargs='{"max_steps": 11}', memory="gru", learning_rate=(0.0,),
                         omit_first_obs=omit, seq_len=-1, run_name=str(omit))
        target, (obs,), state, starts, real, best, first, is_tape = seen[-1]
        at = first.nonzero().flatten()                                                      # where o_0 are
        changed = obs.clone()
        (changed if is_tape else changed[0])[at] += 1.0
        q, q_changed = (target((o,), state, starts)[0].of(best) for o in (obs, changed))
        followers = real.roll(1, 0)                                                         # positions with a step before them
        second = real & ~followers
        assert second.any() and followers.sum() > 30
        assert ((q != q_changed)[followers] == (not omit)).all() and (q != q_changed)[second].all()
        if omit and is_tape:                                                                # a fresh memory at o_1
            a, b = at[0].item() + 1, at[1].item()
            alone = target((obs[a:b],), state, torch.arange(b - a)[:, None] == 0)[0].of(best[a:b])
            torch.testing.assert_close(alone, q[a:b])


def test_the_online_network_chooses_with_the_same_history(script, tmp_path):
    """With the omission kept, the argmax too comes from histories without o_0, as the predecessor's."""
    seen, _ = probed(tmp_path, script, "                values = target(",
                     f"(best, agent({OBS[script]}, {STATE[script]}, target_starts)[0].greedy())", omit_first_obs=True,
                     seq_len=-1)
    assert seen and all(torch.equal(a, b) for a, b in seen)


@pytest.mark.parametrize("script, memory", [(sbb, "lstm"), (sbb, "lru"), (sbb, "ffm"), (sbb, "deltanet"), (sbb, "gpt"),
                                            (sac, "lstm"), (sac, "gpt")], ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("burn_in", [0, 3])
def test_stored_states_are_those_of_the_whole_episode(script, tmp_path, memory, burn_in):
    """With weights that do not move, outputs from a stored state, burnt in or not, are those of the whole episode."""
    outputs = {sbb: ("q",), sac: ("policy", "q1", "q2")}[script]

    def numbers(*outputs):
        return torch.cat([getattr(x.branches[0], "logp", x.branches[0]) for x in outputs], dim=-1)

    seen, _ = probed(tmp_path, script, "            optimizer.zero_grad()\n",
                     f"(agent, ({', '.join(outputs)},), real, seg_obs[0], replay)",
                     memory=memory, num_layers=2, burn_in=burn_in, learning_rate=(0.0,), env_kwargs='{"max_steps": 40}',
                     total_timesteps=640, buffer_size=4 * 300)
    checked = 0
    for agent, trained, real, obs, replay in seen[-3:]:
        whole = {}                                                                          # observation: its Q
        for n in range(replay.N):
            held = range(max(0, replay.head[n] - replay.C), replay.head[n])
            x, start = (torch.from_numpy(replay.data[i][n])[[p % replay.C for p in held]][:, None] for i in (0, 1))
            y = numbers(*agent((x,), agent.memory.initial_state(1), start)[:-1])
            begun = start[:, 0].long().cumsum(0) > 0                                        # before that: no beginning
            whole |= {(tuple(o.tolist()), n, i): v for i, (o, v, ok) in enumerate(zip(x[:, 0], y[:, 0], begun)) if ok}
        values = {}
        for (key, n, i), v in whole.items():
            values.setdefault(key, []).append(v)
        for o, v in zip(obs[real], numbers(*trained)[real]):
            candidates = values.get(tuple(o.tolist()), [])
            if candidates:
                checked += 1
                assert min((v - c).abs().max() for c in candidates) < 1e-5
    assert checked > 50


def test_burn_in_has_no_gradient_and_both_networks_burn_in_alone(tmp_path):
    seen, _ = probed(tmp_path, sbb, "            optimizer.zero_grad()\n", "(seg_state, target_state, W)", burn_in=3, seq_len=5)
    for state, target_state, W in seen[3:]:
        assert W == 3 and not any(s.requires_grad for s in (*state, *target_state))
        assert all((s != t).any() for s, t in zip(state, target_state))


@pytest.mark.parametrize("script", [sbb, tbb, sac], ids=lambda module: module.__name__)
def test_the_target_network_follows(script, tmp_path):
    seen, _ = probed(tmp_path, script, "            lap(\"update\")\n",
                     "([p.detach().clone() for p in parameters], [p.clone() for p in target.parameters()])", tau=1.0,
                     target_network_frequency=3)
    for i, (online, target) in enumerate(seen):
        copied = seen[i - (i + 1) % 3][0] if i >= 2 else None                               # the last multiple of 3 steps
        assert copied is None or all(map(torch.equal, copied, target))
    seen, _ = probed(tmp_path, script, "            lap(\"update\")\n",
                     "([p.detach().clone() for p in parameters], [p.clone() for p in target.parameters()])", tau=0.25,
                     run_name="polyak")
    for (_, before), (online, after) in zip(seen, seen[1:]):
        torch.testing.assert_close([0.75 * b + 0.25 * o for b, o in zip(before, online)], after)


@pytest.mark.parametrize("script", [sbb, tbb, sac], ids=lambda module: module.__name__)
def test_steps_of_the_gradient_and_epsilon_are_as_ordered(script, tmp_path):
    rows, _ = run(tmp_path, script, replay_ratio=0.25, learning_starts=100, start_e=0.8, end_e=0.2, exploration_fraction=0.5,
                  total_timesteps=640)
    steps = column(rows, "global_step")
    assert steps == [128, 256, 384, 512, 640]
    assert column(rows, "charts/gradient_steps") == [0.25 * (step - 100) for step in steps]
    assert min(column(rows, "charts/transitions")) >= 64
    if script is not sac:
        before = [1.0 if step - 32 < 100 else max(0.2, 0.8 - 0.6 * (step - 32) / 320) for step in steps]
        assert column(rows, "charts/epsilon") == pytest.approx(before)                      # of the last 32 steps


def test_random_actions_are_uniform_and_greedy_ones_the_best():
    torch.manual_seed(0)
    q = ActionValues(torch.randn(4_000, 5).mul(10), [2, 3])
    best = torch.stack([q.branches[0].argmax(-1), q.branches[1].argmax(-1)], dim=-1)
    assert torch.equal(q.epsilon_greedy(0.0), best) and torch.equal(q.greedy(), best)
    random = q.epsilon_greedy(1.0)
    counts = torch.bincount(random[:, 0] * 3 + random[:, 1], minlength=6)
    assert (counts - 4_000 / 6).abs().max() < 5 * (4_000 / 6) ** 0.5
    assert 0.25 < ((q.epsilon_greedy(0.3) != best).any(-1)).float().mean() / (5 / 6) < 0.35     # one coin for both branches
    every = torch.tensor([[a, b] for a in range(2) for b in range(3)])
    sums = torch.stack([q.of(pair.expand(4_000, 2)) for pair in every])                     # the best pair is the best of all
    torch.testing.assert_close(q.of(best), sums.max(0).values)


def test_a_fixed_tape_has_one_shape(tmp_path):
    seen, _ = probed(tmp_path, tbb, "            optimizer.zero_grad()\n", "(len(real), int(real.sum()))", fixed_tape=True)
    assert {length for length, _ in seen} == {64} and len({steps for _, steps in seen}) > 1


@pytest.mark.parametrize("script", [sbb, tbb, sac], ids=lambda module: module.__name__)
def test_episodes_longer_than_the_replay_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, script, env_id="CartPoleMasked-v0", env_kwargs="{}", buffer_size=4 * 3)
    assert "raise --buffer-size" in capsys.readouterr().err


@pytest.mark.parametrize("memory, low, high", [("lru", 0.9, 1.0), ("none", -0.7, -0.2)])
def test_it_learns_what_needs_memory_and_not_without(script, tmp_path, memory, low, high):
    flags = {name: default for name, default in vars(script.Args()).items() if name not in ("run_name", "runs_dir", "device")}
    rows, _ = run(tmp_path, script, **{**flags, "memory": memory, "total_timesteps": 16_000, "eval_every": 16_000,
                                       "eval_episodes": 32})
    assert low <= float(rows[-1]["eval/episodic_return"]) <= high

"""sac_gru.py and td3_gru.py: sequences, masks, losses and gradients against their definitions, each switch, learning."""
import itertools
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sac_gru as sac
import td3_gru as td3
from envs.batch import BatchEnv, SingleEnv
from models import MEMORIES
from tests.helpers import column, planted, run
from tests.test_dqn import probed
from tests.test_replay import SIZES, World

COUNT = dict(env_id="CountInput-v0", env_kwargs='{"episode_length": 11}', seq_len=6, batch_size=8, gamma=0.99,
             policy_learning_starts=0)


@pytest.fixture(params=[sac, td3], ids=lambda module: module.__name__)
def script(request):
    return request.param


class CueBatch(BatchEnv):
    """o_0 shows a cue of -1 or 1, once. The action at step 1 is paid at the last step: cue * action. Nothing else counts."""

    def __init__(self, num_envs=1, length=4, **kwargs):
        super().__init__(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), num_envs, **kwargs)
        self.t, self.length = np.zeros(num_envs, int), length
        self.cue, self.action = np.zeros(num_envs), np.zeros(num_envs)

    def begin(self, rows):
        self.t[rows], self.cue[rows] = 0, 2 * self.np_random.integers(2, size=len(rows)) - 1

    def move(self, actions):
        self.action = np.where(self.t == 1, actions[:, 0], self.action)
        self.t = self.t + 1
        ended, earned = self.t == self.length, self.cue * self.action
        return ended * earned, ended, np.zeros_like(ended), earned > 0

    def observe(self):
        return np.where(self.t == 0, self.cue, 0)[:, None].astype(np.float32)


class Cue(SingleEnv):
    batch_class = CueBatch


gym.register("Cue-v0", Cue, vector_entry_point=CueBatch)


# ---------------------------------------------------------------------- sequences

def switches(**changes):
    return types.SimpleNamespace(**{name: getattr(sac.Args(), name) for name in vars(sac.Args())} | changes)


def replay_of(step):
    return sac.SequenceReplay(step[0].size * replay_of.capacity, step)


@settings(max_examples=300, deadline=None)
@given(**SIZES, S=st.integers(1, 20), L=st.sampled_from([1, 3, 7, 60]), initial=st.booleans(), random=st.booleans())
def test_sequences_are_made_of_observed_steps(num_envs, capacity, seed, ends, steps, S, L, initial, random):
    replay_of.capacity = max(3, capacity)
    world = World(replay_of, num_envs, seed, ends)
    world.run(steps + 1)
    replay = world.replay
    known = {}                                              # the step or final observation of every number
    for number, episode in enumerate(e for episodes in world.episodes for e in episodes):
        for t, obs in enumerate(episode.obs):
            known[obs] = (number, t, episode.steps[t] if t < len(episode.steps) else None)
    if initial and not any((replay.begin[n, t % replay.C] >= replay.head[n] - replay.C) and not replay.last[n, t % replay.C]
                           for n in range(replay.N) for t in range(max(0, replay.head[n] - replay.C), replay.head[n] - 1)):
        return                                              # no episode is whole; the script refuses this
    if not any(not replay.last[n, t % replay.C]
               for n in range(replay.N) for t in range(max(0, replay.head[n] - replay.C), replay.head[n] - 1)):
        return
    args = switches(batch_size=S, seq_len=L, always_sample_from_initial_state=initial, random_seq_length=random)
    real, starts, obs, _, actions, rewards, terminated = replay.sample(args)
    assert real.shape[1] == S and real.shape[0] <= L + 1 and not real[-1].any() and real[0].all()
    assert starts[0].all() and not starts[1:].any()
    for b in range(S):
        length = int(real[:, b].sum())
        assert real[:length, b].all()
        number, first, _ = known[int(obs[0, b])]
        assert first == 0 or not initial
        for t in range(len(real)):
            episode, step, content = known[int(obs[t, b])]
            assert (episode, step) == (number, first + min(t, length))          # in order, one episode, then its successor
            if t < length:
                stored = (int(obs[t, b]), int(actions[t, b, 0]), float(rewards[t, b]), bool(terminated[t, b]))
                assert stored == pytest.approx(content)


def played(episode_length, episodes, num_envs=1, capacity=10_000):
    """A replay of episodes of one length; an observation is (episode, step)."""
    step = (np.zeros((num_envs, 2)), np.zeros((num_envs, 1)), np.zeros(num_envs), np.zeros(num_envs, bool))
    replay = sac.SequenceReplay(capacity * num_envs, step)
    for t in range(episode_length * episodes):
        obs = np.tile([t // episode_length, t % episode_length], (num_envs, 1))
        ended = np.arange(num_envs if t % episode_length == episode_length - 1 else 0)
        replay.add((obs, *step[1:]), ended, [(torch.tensor(obs[0] + [0, 1]),)] * len(ended))
    return replay


def test_every_step_is_as_often_the_first():
    torch.manual_seed(0)
    replay = played(5, 7, capacity=25)                      # the ring holds four episodes of 5 + 1 and one final observation
    _, _, obs, *_ = replay.sample(switches(batch_size=20_000, seq_len=3))
    where, counts = obs[0].unique(dim=0, return_counts=True)
    assert where.tolist() == [[e, t] for e in (3, 4, 5, 6) for t in range(5)]
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_sequences_from_the_initial_state_hold_the_cue():
    """Of episodes of 20 steps one sequence in 20 begins with the first, or each."""
    replay, share = played(20, 100), {}
    for initial in (False, True):
        args = switches(batch_size=4_000, seq_len=20, always_sample_from_initial_state=initial)
        share[initial] = (replay.sample(args)[2][0, :, 1] == 0).double().mean()
    assert share[False] == pytest.approx(0.05, abs=0.015) and share[True] == 1


def test_lengths_are_those_ordered():
    replay, L = played(5_000, 1), 10
    def lengths(**changes):
        return replay.sample(switches(batch_size=8_000, seq_len=L, **changes))[0].sum(0).bincount(minlength=L + 1) / 8_000

    assert lengths(random_seq_length=False)[L] > 0.99       # those at the newest step are shorter
    for nominal in (0.0, 0.3, 1.0):
        shares = lengths(nominal_seq_length_probability=nominal)
        torch.testing.assert_close(shares[1:L], torch.full((L - 1,), (1 - nominal) / (L - 1)), atol=0.02, rtol=0)
        assert shares[L] == pytest.approx(nominal, abs=0.02) and shares[0] == 0


# ---------------------------------------------------------------------- losses and gradients

def pieces(real, *sequences):
    """One sequence after the other, without padding: its steps, then [steps + 1, 1, ...] of everything."""
    for b in range(real.shape[1]):
        steps = int(real[:, b].sum())
        cut = (slice(steps + 1), [b])
        yield (steps, *(tuple(o[cut] for o in s) if isinstance(s, list) else s[cut] for s in sequences))


def histories(critics, obs):
    start = torch.arange(len(obs[0]))[:, None] == 0
    return critics.memory(obs, critics.memory.initial_state(1), start)[0]


SWITCHES = [dict(mask_non_terminal=mask, include_first_step_in_targets=first)
            for mask, first in itertools.product((False, True), repeat=2)]


@pytest.mark.parametrize("changes", [*({**s, "entropy_bonus": e, "entropy_bonus_next_step": n} for s in SWITCHES[:2]
                                       for e, n in ((True, True), (True, False), (False, True))), SWITCHES[2], SWITCHES[3]],
                         ids=lambda c: "-".join(str(int(v)) for v in c.values()))
def test_losses_equal_their_definition(tmp_path, changes):
    """Sequence by sequence, step by step, from the networks as they were. A test task terminates, another is truncated."""
    for task in (dict(env_id="Cue-v0", env_kwargs="{}"), dict(env_id="CountInput-v0", env_kwargs='{"episode_length": 4}')):
        flags = {**COUNT, **task, "alpha": 0.3, "tau": 0.2, "run_name": task["env_id"], "memory": "gru", **changes}
        seen, _ = probed(tmp_path, sac, "            optimizers[\"q_lr\"].zero_grad()\n",
                         "(copy.deepcopy(agent), copy.deepcopy(target), real, seq_obs, actions, rewards, terminated, "
                         "new_actions, logprobs, next_actions, next_logprobs, qf_loss)", **flags)
        assert len(seen) > 20
        for agent, target, real, obs, actions, rewards, terminated, new, logprobs, nexts, next_logprobs, qf_loss in seen[1::12]:
            errors, alpha = [], agent.log_alpha.exp()
            if changes["include_first_step_in_targets"]:
                assert torch.equal(nexts, new[1:]) and torch.equal(next_logprobs, logprobs[1:])
            for steps, o, a, r, done, new_a, lp, next_a, next_lp in pieces(
                    real, obs, actions, rewards, terminated, new, logprobs, nexts, next_logprobs):
                h, skip = histories(agent.critics, o), not changes["include_first_step_in_targets"]
                next_h = histories(target, tuple(x[skip:] for x in o))          # of o_0 or of o_1 on
                for t in range(steps - 1 if changes["mask_non_terminal"] else 0, steps):
                    value = min(q[0] for q in target(next_h[t + 1 - skip], next_a[t]))
                    if flags.get("entropy_bonus", True) and flags.get("entropy_bonus_next_step", True):
                        value = value - alpha * next_lp[t, 0]
                    y = r[t, 0] + (0 if done[t, 0] else 0.99 * value)
                    if flags.get("entropy_bonus", True) and not flags.get("entropy_bonus_next_step", True):
                        y = y - alpha * lp[t, 0]
                    errors.append(sum((q[0] - y) ** 2 for q in agent.critics(h[t], a[t])))
            torch.testing.assert_close(torch.stack(errors).mean(), qf_loss, rtol=1e-4, atol=1e-6)
        seen, _ = probed(tmp_path, sac, "                optimizers[\"policy_lr\"].zero_grad()\n",
                         "(copy.deepcopy(agent), h.detach(), real, seq_obs, new_actions.detach(), logprobs.detach(), "
                         "actor_loss.detach())", **{**flags, "run_name": "policy" + task["env_id"]})
        for agent, h, real, obs, new, logprobs, loss in seen[1::12]:
            losses, alpha = [], agent.log_alpha.exp()
            for steps, o, h_b, a, lp in pieces(real, obs, torch.cat([h, h[-1:]]), new, logprobs):
                start = torch.arange(steps + 1)[:, None] == 0
                policy, _ = agent.pi(o, agent.memory.initial_state(1), start)
                for t in range(steps - 1 if changes["mask_non_terminal"] else 0, steps):
                    normal = torch.distributions.Normal(policy.mean[t, 0], policy.log_std[t, 0].exp())
                    u = torch.atanh(a[t, 0].double().clamp(-1 + 1e-7, 1 - 1e-7)).float()
                    if u.abs() < 4:                         # beyond, atanh of a float knows too little
                        torch.testing.assert_close((normal.log_prob(u) - torch.log(1 - a[t, 0] ** 2)).sum(), lp[t, 0],
                                                   rtol=1e-2, atol=1e-2)
                    losses.append(alpha * lp[t, 0] - min(q[0] for q in agent.critics(h_b[t], a[t])))
            torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", SWITCHES, ids=lambda c: "-".join(str(int(v)) for v in c.values()))
def test_td3s_losses_equal_their_definition(tmp_path, changes):
    for task in (dict(env_id="Cue-v0", env_kwargs="{}"), dict(env_id="CountInput-v0", env_kwargs='{"episode_length": 4}')):
        flags = {**COUNT, **task, "tau": 0.2, "policy_tau": 0.1, "run_name": task["env_id"], "policy_frequency": 1, **changes}
        seen, _ = probed(tmp_path, td3, "            optimizers[\"q_lr\"].zero_grad()\n",
                         "(copy.deepcopy(agent), copy.deepcopy(target), real, seq_obs, actions, rewards, terminated, noise, "
                         "qf_loss)", **flags)
        assert len(seen) > 20 and all((noise.abs() <= 0.5).all() for *_, noise, _ in seen)
        assert torch.stack([noise.std() for *_, noise, _ in seen]).mean() == pytest.approx(0.2, abs=0.02)
        for agent, target, real, obs, actions, rewards, terminated, noise, qf_loss in seen[1::12]:
            errors, skip = [], not changes["include_first_step_in_targets"]
            for steps, o, a, r, done, e in pieces(real, obs, actions, rewards, terminated, noise):
                known = tuple(x[skip:] for x in o)
                start = torch.arange(len(known[0]))[:, None] == 0
                h, next_h = histories(agent.critics, o), histories(target.critics, known)
                next_a = (target.pi(known, target.memory.initial_state(1), start)[0][1 - skip :] + e[:steps]).clamp(-1, 1)
                for t in range(steps - 1 if changes["mask_non_terminal"] else 0, steps):
                    value = min(q[0] for q in target.critics(next_h[t + 1 - skip], next_a[t]))
                    y = r[t, 0] + (0 if done[t, 0] else 0.99 * value)
                    errors.append(sum((q[0] - y) ** 2 for q in agent.critics(h[t], a[t])))
            torch.testing.assert_close(torch.stack(errors).mean(), qf_loss, rtol=1e-4, atol=1e-6)
        seen, _ = probed(tmp_path, td3, "                optimizers[\"policy_lr\"].zero_grad()\n",
                         "(copy.deepcopy(agent), h.detach(), real, seq_obs, actor_loss.detach())",
                         **{**flags, "run_name": "policy" + task["env_id"]})
        for agent, h, real, obs, loss in seen[1::12]:
            losses = []
            for steps, o, h_b in pieces(real, obs, torch.cat([h, h[-1:]])):
                a, _ = agent.pi(o, agent.memory.initial_state(1), torch.arange(steps + 1)[:, None] == 0)
                q, _ = agent.critics(h_b, a)
                losses += [-q[t, 0] for t in range(steps - 1 if changes["mask_non_terminal"] else 0, steps)]
            torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-4, atol=1e-6)


def test_log_probabilities_are_those_of_the_squashed_normal():
    torch.manual_seed(0)
    mean, log_std = torch.randn(500, 3, dtype=torch.double), torch.randn(500, 3, dtype=torch.double) / 2 - 1
    action, logp = sac.SquashedGaussian(mean, log_std).rsample()
    squashed = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()),
                                                           torch.distributions.TanhTransform())
    torch.testing.assert_close(logp, squashed.log_prob(action).sum(-1), rtol=1e-5, atol=1e-5)
    far = torch.tensor([[30.0], [-30.0], [7.0]], requires_grad=True)            # where 1 - tanh^2 is 0 in float32
    _, logp = sac.SquashedGaussian(far, torch.full((3, 1), -5.0)).rsample()
    (gradient,) = torch.autograd.grad(logp.sum(), far)                          # d logp / du = 2 tanh(u)
    torch.testing.assert_close(gradient, 2 * far.detach().tanh(), rtol=1e-3, atol=1e-3)
    u = torch.atanh(sac.SquashedGaussian(torch.full((50_000, 1), 0.3), torch.full((50_000, 1), -0.5)).rsample()[0])
    assert u.mean() == pytest.approx(0.3, abs=0.01) and u.std() == pytest.approx(0.6065, abs=0.01)


def test_which_steps_train(script, tmp_path):
    """All real ones, or the last of each sequence: by the mask, and by what receives a gradient."""
    for mask in (False, True):
        seen, _ = probed(tmp_path, script, "                optimizers[\"policy_lr\"].zero_grad()\n",
                         "(real, trained, torch.autograd.grad(actor_loss, new_actions, retain_graph=True)[0].abs().sum(-1))",
                         **COUNT, mask_non_terminal=mask, run_name=str(mask))
        for real, trained, gradient in seen:
            expected = real.clone()
            if mask:
                expected[:] = False
                expected[real.sum(0) - 1, torch.arange(real.shape[1])] = True
            assert torch.equal(trained, expected[:-1])
            assert torch.equal(gradient[:-1] > 0, trained) and not gradient[-1].any()


@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "none"])
def test_the_policys_gradient_goes_to_the_start_and_no_further(script, memory):
    """Value of the action at step 7, of a sequence that starts anew at step 3: o_3 ... o_7 matter, and nothing else."""
    torch.manual_seed(0)
    args = script.Args(memory=memory, hidden_size=16, memory_kwargs='{"window": 12}' if memory == "gpt" else "{}")
    box = gym.spaces.Box(-1, 1, (2,))
    agent = script.Agent(box, box, args)
    for layer in (agent.policy[-1], agent.critics.q1[-1]):
        torch.nn.init.normal_(layer.weight)
    obs, start = torch.randn(10, 4, 2, requires_grad=True), torch.zeros(10, 4, dtype=torch.bool)
    start[0], start[3, 1] = True, True
    policy, _ = agent.pi((obs,), agent.memory.initial_state(4), start)
    action = policy.rsample()[0] if script is sac else policy
    h = agent.critics.histories((obs.detach(),), start)
    (gradient,) = torch.autograd.grad(agent.critics(h[7], action[7])[0][1], obs)
    reached = gradient.abs().sum(-1) > 0                    # [10, 4]
    assert reached[:, [0, 2, 3]].any().item() is False      # other sequences
    assert reached[:, 1].tolist() == [3 <= t <= 7 for t in range(10)]


def test_the_policys_loss_leaves_the_critics_alone(script, tmp_path):
    """Their gradients are the same before and after it; so are the targets', which have none."""
    probe = "([None if p.grad is None else p.grad.clone() for p in q_parameters], [p.grad for p in target.parameters()])"
    before, _ = probed(tmp_path, script, "            actor_loss = actor_grad_norm =", probe, **COUNT, policy_frequency=1)
    after, _ = probed(tmp_path, script, "            gradient_steps += 1\n", probe, **COUNT, policy_frequency=1, run_name="b")
    assert len(before) == len(after) > 20
    for (a, targets), (b, _) in zip(before, after):
        assert all(map(torch.equal, a, b)) and targets == [None] * len(targets)


# ---------------------------------------------------------------------- flags

def test_the_temperature_is_fixed_or_moves_entropy_to_its_target(tmp_path):
    rows, folder = run(tmp_path, sac, **COUNT, alpha=0.2, autotune=False)
    assert column(rows, "losses/alpha") == pytest.approx([0.2] * len(rows))
    rows, _ = run(tmp_path, sac, resume=str(folder), alpha=0.1, autotune=False, total_timesteps=4 * 32 * 4, **COUNT)
    assert column(rows, "losses/alpha")[-1] == pytest.approx(0.1)               # the flag given now, not the saved one
    for target_entropy, rises in ((-3, False), (3, True)):
        rows, _ = run(tmp_path, sac, **COUNT, alpha=0.2, target_entropy=target_entropy, run_name=str(target_entropy),
                      alpha_lr=(1e-2,))
        alphas = column(rows, "losses/alpha")
        assert len(alphas) > 1 and alphas == sorted(alphas, reverse=not rises) and alphas[0] != alphas[-1]


@pytest.mark.parametrize("flags", [dict(policy_frequency=3, policy_learning_starts=200), dict(policy_frequency=1)])
def test_steps_of_the_gradient_are_as_ordered(script, tmp_path, flags):
    flags = {**COUNT, "replay_ratio": 0.25, "learning_starts": 100, "total_timesteps": 640, **flags}
    seen, rows = probed(tmp_path, script, "            lap(\"update\")\n", "(global_step, gradient_steps, policy_learns)",
                        **flags)
    assert column(rows, "charts/gradient_steps") == [0.25 * (step - 100) for step in (128, 256, 384, 512, 640)]
    for step, gradient_step, learns in seen:
        assert learns == (step > flags["policy_learning_starts"] and (gradient_step - 1) % flags["policy_frequency"] == 0)
    assert {learns for *_, learns in seen} == {True, False} or flags["policy_frequency"] == 1


def test_random_actions_at_first_then_the_policys(script, tmp_path):
    line = "            if global_step < args.learning_starts:\n"
    script = planted(tmp_path, script, (line, f"            the_policys = action\n{line}"))
    seen, _ = probed(tmp_path, script, "            next_obs, reward, terminated, truncated, infos = envs.step(",
                     "(global_step, action, the_policys)", **COUNT, learning_starts=256, total_timesteps=512)
    early = torch.cat([action for step, action, _ in seen if step < 256])
    assert early.abs().max() <= 1 and early.std() == pytest.approx(3**-0.5, abs=0.05)
    assert all(torch.equal(action, the_policys) == (step >= 256) for step, action, the_policys in seen)


def test_the_targets_follow(script, tmp_path):
    networks = "target.parameters()", "(q_parameters if 'td3' not in SCRIPT else agent.parameters())"
    probe = f"([p.detach().clone() for p in {networks[1]}], [p.clone() for p in {networks[0]}])"
    flags = dict(**COUNT, tau=1.0, target_network_frequency=3, policy_tau=1.0)
    seen, _ = probed(tmp_path, script, "            lap(\"update\")\n", probe, **flags)
    for i, (online, target) in enumerate(seen):
        copied = seen[i - (i + 1) % 3][0] if i >= 2 else None                   # the last multiple of 3 steps
        assert copied is None or all(map(torch.equal, copied, target))
    flags = dict(**COUNT, tau=0.25, target_network_frequency=1, policy_tau=0.5)
    seen, _ = probed(tmp_path, script, "            lap(\"update\")\n", probe, run_name="polyak", **flags)
    of_critics = len(list(sac.Agent(gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), sac.Args()).critics.parameters()))
    for (_, before), (online, after) in zip(seen, seen[1:]):
        for i, (b, o, a) in enumerate(zip(before, online, after, strict=True)):
            tau = 0.25 if i >= len(after) - of_critics else 0.5
            torch.testing.assert_close((1 - tau) * b + tau * o, a)


def test_wiping(script, tmp_path):
    """In training, evaluation and enjoying the state is fresh every 4 steps of an episode of 11; by default at its start."""
    for wipe, expected in ((0, [0]), (4, [0, 4, 8])):
        flags = {**COUNT, "wipe_state_every": wipe, "run_name": f"wipe{wipe}"}
        seen, _ = probed(tmp_path, script, "            with torch.inference_mode():  ", "start.clone()", **flags)
        assert [t for t in range(33) if seen[t].all()] == [t for t in range(33) if t % 11 in expected]
        assert all(start.all() or not start.any() for start in seen)
        args = script.Args(**{k: v for k, v in flags.items() if hasattr(script.Args, k)})
        envs, starts = script.make_envs(args, 3, play=True), []
        agent = script.make_agent(args, envs)
        act, agent.act = agent.act, lambda obs, state, start: (starts.append(start), act(obs, state, start))[1]
        script.play(agent, envs, args, 3, seed=0)
        assert [t for t in range(11) if starts[t].all()] == expected


def test_episodes_longer_than_the_replay_are_named(script, tmp_path, capsys):
    long = {**COUNT, "env_kwargs": '{"episode_length": 500}', "buffer_size": 4 * 10}
    assert run(tmp_path, script, **long)                    # sequences from anywhere do not mind
    with pytest.raises(SystemExit):
        run(tmp_path, script, **long, always_sample_from_initial_state=True, run_name="initial")
    assert "raise --buffer-size" in capsys.readouterr().err


# ---------------------------------------------------------------------- learning

def test_a_cue_needs_the_first_step_in_targets(script, tmp_path):
    """The cue is in o_0, what is done about it at step 1 is paid at step 3: only targets that know o_0 can tell."""
    task = dict(env_id="Cue-v0", env_kwargs="{}", memory="gru", hidden_size=16, mlp_size=32, random_seq_length=False, seq_len=4,
                always_sample_from_initial_state=True, batch_size=64, learning_starts=200, policy_learning_starts=200,
                q_lr=(3e-3,), policy_lr=(3e-3,), alpha_lr=(3e-3,), alpha=0.1, tau=0.05, num_envs=16, train_every=64,
                replay_ratio=0.2, total_timesteps=4_000, log_every=1_000, buffer_size=10_000)
    success = {}
    for include in (True, False):
        rows, _ = run(tmp_path, script, **task, include_first_step_in_targets=include, run_name=str(include))
        success[include] = column(rows, "charts/success")[-1]
    assert success[True] > 0.9 and success[False] < 0.75


def test_it_does_not_learn_what_needs_memory_without(script, tmp_path):
    """Ones among the last three bits, for 30 steps. Who knows the newest bit only is wrong by half a one a step: -15. The
    previous action could carry what was seen, so the agent without memory does not get it. With memory: entries smoke-sac and
    smoke-td3, which the gate runs."""
    rows, _ = run(tmp_path, script, env_id="CountInput-v0", env_kwargs='{"horizon": 3, "divisor": 3, "episode_length": 30}',
                  memory="none", prev_action=False, gamma=0.0, hidden_size=32, mlp_size=32, seq_len=15,
                  batch_size=32, num_envs=16, train_every=64, replay_ratio=0.1, learning_starts=1_000, exploration_noise=0.3,
                  policy_learning_starts=2_000, policy_frequency=1, q_lr=(3e-3,),
                  policy_lr=(3e-3,) if script is sac else (1e-3,), alpha=0.1, alpha_lr=(3e-3,),
                  target_entropy=-3.0, total_timesteps=8_000, eval_every=8_000, eval_episodes=50, log_every=2_000,
                  buffer_size=10_000)
    assert float(rows[-1]["eval/episodic_return"]) <= -14


def test_enjoying_count_input_prints_counts_and_predictions(script, tmp_path, capsys):
    _, folder = run(tmp_path, script, **COUNT)
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "1"])
    out = capsys.readouterr().out
    assert out.count("count ") == out.count("prediction ") == 11 and "hits" in out and "misses" in out

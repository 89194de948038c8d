"""sac_gru.py and td3_gru.py: what enters the replay, sequences, losses against their definition, learning."""
import itertools
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

import sac_gru as sac
import td3_gru as td3
from envs.batch import BatchEnv, SingleEnv
from envs.vector import make_envs
from models import MEMORIES, SquashedGaussian, Trunk
from models.play import play
from tests.helpers import column, run, spy
from tests.probes import NUMBERS, acted, check_what_enters_the_replay, watched

COUNT = dict(
    env_id="CountInput-v0", env_kwargs={"episode_length": 11}, seq_len=6, batch_size=8, gamma=0.99,
    policy_learning_starts=0)


@pytest.fixture(params=[sac, td3], ids=lambda module: module.__name__)
def script(request):
    return request.param


# ---------------------------------------------------------------------- tasks

class CueBatch(BatchEnv):
    """o_0 shows a cue of -1 or 1, once. The action at step 1 is paid at the last step: cue * action."""

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


# ---------------------------------------------------------------------- what a run does, seen from outside

@pytest.mark.quick
def test_what_enters_the_replay_is_what_happened(script, tmp_path, monkeypatch):
    check_what_enters_the_replay(
        tmp_path, monkeypatch, script, to_env=lambda action: 2 + 4 * action)    # [-1, 1] -> [-2, 6]


@pytest.mark.quick
def test_acting_forgets_where_an_episode_starts_and_nowhere_else(script, tmp_path, monkeypatch):
    starts, entered = acted(tmp_path, monkeypatch, script, **NUMBERS)
    assert len(starts) == len(entered) > 90
    for start, now in zip(starts, entered):
        assert start.tolist() == (now.obs[0][:, 1] == 0).tolist()


def test_acting_carries_its_state(script, tmp_path, monkeypatch):
    """With weights that do not move, what acting remembers is what the whole run makes of it."""
    states = []
    pi = script.Agent.pi

    def recording_pi(agent, obs, state, start):
        policy, after = pi(agent, obs, state, start)
        if len(start) == 1:
            states.append((agent, obs[0][0], start[0], after[0]))
        return policy, after

    monkeypatch.setattr(script.Agent, "pi", recording_pi)
    run(tmp_path, script, **NUMBERS, replay_ratio=0.0)
    agent = states[0][0]
    _, obs, starts, after = zip(*states)
    _, (whole, *_) = pi(agent, (torch.stack(obs),), agent.memory.initial_state(4), torch.stack(starts))
    torch.testing.assert_close(after[-1], whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- sequences

class Episodes:
    """Random episodes of N environments. Every observation is a number of its own."""

    def __init__(self, N, seed, ends):
        self.N, self.ends, self.rng = N, ends, np.random.default_rng(seed)
        self.fresh = itertools.count()
        self.obs = np.array([next(self.fresh) for _ in range(N)])
        self.known, self.begins = {}, list(self.obs)  # observation: (its episode, step, what lies beside it)
        self.t = np.zeros(N, int)

    def step(self):
        actions, rewards = self.rng.normal(size=(self.N, 1)), self.rng.normal(size=self.N)
        terminated, truncated = self.rng.random((2, self.N)) < self.ends / 2
        for n, o in enumerate(self.obs):
            beside = (actions[n, 0], rewards[n], terminated[n])
            self.known[o] = (self.begins[n], self.t[n], beside)
        return ((torch.tensor(self.obs),), torch.tensor(actions), rewards, terminated), terminated | truncated

    def add_to(self, replay, steps):
        for _ in range(steps):
            step, done = self.step()
            after = np.array([next(self.fresh) for _ in range(self.N)])
            self.t += 1
            for n in range(self.N):
                self.known[after[n]] = (self.begins[n], self.t[n], None)
            ended = np.flatnonzero(done)
            replay.add(*step, ended, [(torch.tensor(after[n]),) for n in ended], step[0])
            for n in ended:
                self.begin(n, after)
            self.obs = after

    def begin(self, n, obs):
        obs[n] = self.begins[n] = next(self.fresh)
        self.t[n] = 0


def steps_in(replay, whole):
    """How many steps lie in the replay with their burn-in, or with all of their episode that was before."""
    count = 0
    for n in range(replay.N):
        oldest = max(0, replay.head[n] - replay.C)
        for t in range(oldest, replay.head[n] - 1):
            begin = replay.begin[n, t % replay.C]
            needed = begin if whole else max(begin, t - replay.W)
            count += not replay.last[n, t % replay.C] and needed >= oldest
    return count


@settings(max_examples=300, deadline=None)
@given(
    N=st.integers(1, 4), C=st.integers(3, 40), seed=st.integers(0, 2**20),
    ends=st.sampled_from([0.02, 0.1, 0.3, 0.9]), steps=st.integers(2, 120), S=st.integers(1, 20),
    L=st.sampled_from([1, 3, 7, 60]), W=st.sampled_from([None, 0, 2, 9]), initial=st.booleans(),
    random=st.booleans(), stopped=st.booleans())
def test_sequences_are_made_of_observed_steps(N, C, seed, ends, steps, S, L, W, initial, random, stopped):
    """In order, of one episode, then its next observation. `stopped`: a resume ended all episodes midway.

    The state of a step is its observation.
    """
    world = Episodes(N, seed, ends)
    obs, action = world.step()[0][:2]
    replay = sac.SequenceReplay(N * C, obs, action, obs, W)
    world.add_to(replay, steps)
    if stopped:
        replay.forget_running()
        for n in range(N):
            world.begin(n, world.obs)
        world.add_to(replay, steps)
    if not steps_in(replay, whole=initial):
        return                                              # the script refuses this
    args = sac.Args(
        batch_size=S, seq_len=L, always_sample_from_initial_state=initial, random_seq_length=random)
    if initial and (replay.head - replay.first).max() > replay.C:
        with pytest.raises(SystemExit):
            replay.sample(args, "cpu")
        return
    batch = replay.sample(args, "cpu")
    assert batch.real.shape[1] == S and len(batch.real) <= L + 1
    assert batch.real[0].all() and not batch.real[-1].any()
    assert not batch.starts[1:].any()
    for b in range(S):
        length = int(batch.real[:, b].sum())
        assert batch.real[:length, b].all()
        episode, first, _ = world.known[int(batch.obs[0][0, b])]
        assert first == 0 or not initial
        assert batch.starts[0, b] == (W is None or first == 0)
        back = [max(0, first - k) for k in range(W or 0, 0, -1)]                # steps of the episode
        obs_before, starts_before = batch.before
        assert [world.known[int(o)][:2] for o in obs_before[:, b]] == [(episode, t) for t in back]
        assert starts_before[:, b].tolist() == [t == 0 for t in back]
        if W is not None:
            assert world.known[int(batch.state[0][b])][:2] == (episode, max(0, first - W))
        for t in range(len(batch.real)):
            *place, beside = world.known[int(batch.obs[0][t, b])]
            assert place == [episode, first + min(t, length)]
            if t < length:
                stored = batch.actions[t, b, 0], batch.rewards[t, b], batch.terminated[t, b]
                assert [float(x) for x in stored] == pytest.approx([float(x) for x in beside])


def played(episode_length, episodes, capacity=10_000):
    """A replay of episodes of one length; an observation is (episode, step)."""
    action, nothing = torch.zeros(1, 1), np.zeros(1)
    replay = sac.SequenceReplay(capacity, (torch.zeros(1, 2),), action)
    for t in range(episode_length * episodes):
        obs = torch.tensor([[t // episode_length, t % episode_length]])
        ended = [0] if t % episode_length == episode_length - 1 else []
        last_obs = [(obs[0] + torch.tensor([0, 1]),)] * len(ended)
        replay.add((obs,), action, nothing, nothing, ended, last_obs)
    return replay


@pytest.mark.quick
def test_every_step_is_as_often_the_first():
    torch.manual_seed(0)
    replay = played(5, 7, capacity=25)                      # four episodes of 5 + 1, and an o_5
    batch = replay.sample(sac.Args(batch_size=20_000, seq_len=3), "cpu")
    where, counts = batch.obs[0][0].unique(dim=0, return_counts=True)
    assert where.tolist() == [[e, t] for e in (3, 4, 5, 6) for t in range(5)]
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


@pytest.mark.quick
def test_sequences_from_the_initial_state_hold_the_cue():
    """Of episodes of 20 steps one sequence in 20 begins with the first, or each."""
    replay, share = played(20, 100), {}
    for initial in (False, True):
        args = sac.Args(batch_size=4_000, seq_len=20, always_sample_from_initial_state=initial)
        share[initial] = (replay.sample(args, "cpu").obs[0][0, :, 1] == 0).double().mean()
    assert share[False] == pytest.approx(0.05, abs=0.015) and share[True] == 1


@pytest.mark.quick
def test_lengths_are_those_ordered():
    replay, L = played(5_000, 1), 10

    def lengths(**changes):
        batch = replay.sample(sac.Args(batch_size=8_000, seq_len=L, **changes), "cpu")
        return batch.real.sum(0).bincount(minlength=L + 1) / 8_000

    assert lengths(random_seq_length=False)[L] > 0.99       # those at the newest step are shorter
    for nominal in (0.0, 0.3, 1.0):
        shares = lengths(nominal_seq_length_probability=nominal)
        uniform = torch.full((L - 1,), (1 - nominal) / (L - 1))
        torch.testing.assert_close(shares[1:L], uniform, atol=0.02, rtol=0)
        assert shares[L] == pytest.approx(nominal, abs=0.02) and shares[0] == 0


@pytest.mark.quick
def test_a_restored_replay_draws_and_continues_alike(tmp_path, capsys):
    world = Episodes(3, 0, 0.2)
    obs, action = world.step()[0][:2]
    replays = [sac.SequenceReplay(90, obs, action, obs, burn_in=2) for _ in range(2)]
    world.add_to(replays[0], 70)                            # twice around
    torch.save(replays[0].state_dict(), tmp_path / "replay.pt")
    saved = torch.load(tmp_path / "replay.pt", weights_only=True)
    replays[1].load_state_dict(saved)
    for _ in range(3):
        samples = []
        for replay in replays:
            torch.manual_seed(3)
            samples.append(replay.sample(sac.Args(), "cpu"))
        assert all(map(torch.equal, *(pytree.tree_leaves(list(sample)) for sample in samples)))
        both = types.SimpleNamespace(add=lambda *step: [replay.add(*step) for replay in replays])
        world.add_to(both, 13)
    with pytest.raises(SystemExit):
        sac.SequenceReplay(93, *world.step()[0][:2]).load_state_dict(saved)
    assert "the saved replay has other sizes" in capsys.readouterr().err


# ---------------------------------------------------------------------- stored states, burn-in

def calls_of_updates(calls, burn_in):
    """Calls of Trunk.forward, together those of a gradient step: burn-in of every trunk, then training."""
    calls = [call for call in calls if len(call.args[3]) > 1]                   # others act
    together = len({id(call.args[0]) for call in calls}) * (2 if burn_in else 1)
    return [calls[i:i + together] for i in range(0, len(calls), together)]


STILL = dict(policy_lr=(0.0,), q_lr=(0.0,), policy_learning_starts=0, policy_frequency=1, num_layers=2)


def error_of_stored_states(tmp_path, monkeypatch, script, memory, burn_in):
    """Greatest difference between h_t in training and h_t of the whole episode; the weights do not move.

    An observation is (episode, step) and says all that there is to know of its history. Policy, critics and
    targets are asked.
    """
    calls, drawn = spy(monkeypatch, Trunk, "forward"), spy(monkeypatch, script.SequenceReplay, "sample")
    run(tmp_path, script, **NUMBERS, **STILL, memory=memory, burn_in=burn_in, seq_len=2)
    updates, errors, known = calls_of_updates(calls, burn_in), [], {}

    def of_whole_episode(trunk, episode):
        if (id(trunk), episode) not in known:
            steps = torch.arange(6.0)
            obs = torch.stack([torch.full_like(steps, episode), steps], dim=-1)[:, None]
            h, _ = trunk((obs,), trunk.initial_state(1), (steps == 0)[:, None])
            known[id(trunk), episode] = h[:, 0].detach()
        return known[id(trunk), episode]

    for batch, update in zip(drawn, updates, strict=True):
        real = batch.result.real
        for call in update[len(update) // 2 if burn_in else 0:]:
            for (episode, t), h in zip(batch.result.obs[0][real].tolist(), call.result[0][real]):
                expected = of_whole_episode(call.args[0], episode)[int(t)]
                errors.append(((h - expected).abs().max() / expected.abs().max()).item())
    assert len(errors) > 900
    return max(errors)


@pytest.mark.parametrize("memory", ["lstm", "lru", "deltanet", "gpt"])
@pytest.mark.parametrize("burn_in", [0, 3])
def test_stored_states_are_those_of_the_whole_episode(script, tmp_path, monkeypatch, memory, burn_in):
    assert error_of_stored_states(tmp_path, monkeypatch, script, memory, burn_in) < 1e-4


def test_pitfall_sequences_that_start_from_zeros(script, tmp_path, monkeypatch):
    assert error_of_stored_states(tmp_path, monkeypatch, script, "lstm", None) > 1e-2


@pytest.mark.quick
def test_burn_in_has_no_gradient_and_every_network_burns_in_alone(script, tmp_path, monkeypatch):
    calls, forward = [], Trunk.forward

    def recording_forward(trunk, obs, state, start):
        y, after = forward(trunk, obs, state, start)
        calls.append(types.SimpleNamespace(
            args=(trunk, obs, state, start), after=after, training=torch.is_grad_enabled()))
        return y, after

    monkeypatch.setattr(Trunk, "forward", recording_forward)
    run(tmp_path, script, **NUMBERS, policy_learning_starts=0, policy_frequency=1, burn_in=3, seq_len=5)
    updates = calls_of_updates(calls, burn_in=True)
    assert len(updates) > 20
    for update in updates[3:]:
        burned = {id(call.args[0]): call for call in update[:len(update) // 2]}
        stored = {}
        for call in burned.values():
            assert not call.training and len(call.args[3]) == 3
            stored.setdefault(call.args[2][0].numpy().tobytes(), []).append(call.after[0])
        # what acting left of the policy and of the critics, from which each network makes a state of its own
        assert len(stored) == 2 and [len(x) for x in stored.values()] == ([1, 2] if script is sac else [2, 2])
        assert not any(torch.equal(*states) for states in stored.values() if len(states) == 2)
        for call in update[len(update) // 2:]:
            assert call.args[2] is burned[id(call.args[0])].after


# ---------------------------------------------------------------------- losses and gradients

SWITCHES = [dict(mask_non_terminal=mask, include_first_step_in_targets=first)
            for mask, first in itertools.product((False, True), repeat=2)]
BONUSES = [dict(entropy_bonus=bonus, entropy_bonus_next_step=after)
           for bonus, after in ((True, True), (True, False), (False, True))]
CASES = [*({**switches, **bonus} for switches in SWITCHES[:2] for bonus in BONUSES), *SWITCHES[2:]]
TASKS = [                                                   # one terminates, the other is truncated
    dict(env_id="Cue-v0", env_kwargs={}),
    dict(env_id="CountInput-v0", env_kwargs={"episode_length": 4})]


def names(changes):
    return "-".join(str(int(value)) for value in changes.values())


def features(trunk, obs):
    """[T, H] of one sequence that begins without a state.   obs [T, F]: what the encoder would give"""
    start = torch.arange(len(obs))[:, None] == 0
    return trunk.memory(obs[:, None], trunk.initial_state(1), start)[0][:, 0]


def minimum(critics, h, action):
    return torch.minimum(*critics(h, action))


def sequences(batch, mask_non_terminal):
    """One after the other, float64, without padding: [steps + 1, ...] of obs, actions, rewards, ends."""
    obs, actions, rewards = torch.cat(batch.obs, -1).double(), batch.actions.double(), batch.rewards.double()
    for b in range(batch.real.shape[1]):
        steps = int(batch.real[:, b].sum())
        trained = range(steps - 1 if mask_non_terminal else 0, steps)
        rows = slice(steps + 1)
        yield b, steps, trained, obs[rows, b], actions[rows, b], rewards[rows, b], batch.terminated[rows, b]


def squashed(agent, h, noise):
    """Actions and log-probabilities, by the change of variables.   h [T, H], noise [T, A]"""
    mean, log_std = agent.policy(h).chunk(2, dim=-1)
    normal = torch.distributions.Normal(mean, log_std.exp())
    u = mean + log_std.exp() * noise
    logprob = normal.log_prob(u) - torch.log(1 - u.tanh() ** 2)
    return u.tanh(), logprob.sum(-1)


def assert_gradients(loss, parameters, expected):
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    for gradient, g in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, g.double(), rtol=1e-3, atol=1e-5)
    assert sum(g.abs().sum() for g in expected) > 1e-4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["env_id"])
@pytest.mark.parametrize("changes", CASES, ids=names)
def test_losses_equal_their_definition(tmp_path, monkeypatch, task, changes):
    """Sequence by sequence, step by step, from the networks as they were: gradients of all three losses."""
    flags = {**COUNT, **task, "alpha": 0.3, "tau": 0.2, "memory": "gru", **changes}
    seen, _ = watched(tmp_path, monkeypatch, sac, every=8, **flags)
    assert len(seen) > 3
    include, bonus = changes["include_first_step_in_targets"], changes.get("entropy_bonus", True)
    of_next = changes.get("entropy_bonus_next_step", True)
    for now in seen:
        agent, target, late = now.agent.double(), now.target.double(), now.late.double()
        alpha = agent.log_alpha.exp().item()
        torch.set_rng_state(now.random)
        noise = torch.randn(*now.batch.real.shape, 1).double()
        later_noise = torch.randn_like(noise.float()).double()[1:]
        squares, policy_losses, logprobs = [], [], []
        drawn = sequences(now.batch, changes["mask_non_terminal"])
        for b, steps, trained, obs, actions, rewards, ends in drawn:
            new, logprob = squashed(agent, features(agent.memory, obs), noise[: steps + 1, b])
            if include:
                next_new, next_logprob = new[1:], logprob[1:]
                next_h = features(target.memory, obs)[1:]
            else:
                next_h = features(target.memory, obs[1:])
                next_new, next_logprob = squashed(
                    agent, features(agent.memory, obs[1:]), later_noise[:steps, b])
            h = features(agent.critics.memory, obs)
            for t in trained:
                value = minimum(target, next_h[t], next_new[t])
                if bonus and of_next:
                    value = value - alpha * next_logprob[t]
                y = rewards[t] + (0 if ends[t] else 0.99 * value)
                if bonus and not of_next:
                    y = y - alpha * logprob[t]
                squares.append(sum((q - y.detach()) ** 2 for q in agent.critics(h[t], actions[t])))
                q = minimum(late.critics, h[t].detach(), new[t])
                policy_losses.append(alpha * logprob[t] - q)
                logprobs.append(logprob[t].item())
        assert_gradients(torch.stack(squares).mean(), agent.critics.parameters(), now.clipped[0])
        policy_parameters = [*agent.memory.parameters(), *agent.policy.parameters()]
        assert_gradients(torch.stack(policy_losses).mean(), policy_parameters, now.clipped[1])
        # alpha (entropy - target), by log alpha
        temperature = alpha * (-np.mean(logprobs) - -1)
        assert now.gradients["log_alpha"].item() == pytest.approx(temperature, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("policy_noise, noise_clip", [(0.2, 0.1), (1.0, 2.0)])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["env_id"])
@pytest.mark.parametrize("changes", SWITCHES, ids=names)
def test_td3s_losses_equal_their_definition(tmp_path, monkeypatch, task, changes, policy_noise, noise_clip):
    flags = {**COUNT, **task, "tau": 0.2, "policy_tau": 0.1, "policy_frequency": 1, **changes}
    flags |= {"policy_noise": policy_noise, "noise_clip": noise_clip}
    seen, _ = watched(tmp_path, monkeypatch, td3, every=8, **flags)
    assert len(seen) > 3
    include, outside = changes["include_first_step_in_targets"], 0
    for now in seen:
        agent, target, late = now.agent.double(), now.target.double(), now.late.double()
        torch.set_rng_state(now.random)
        noise = torch.randn(len(now.batch.real) - 1, now.batch.real.shape[1], 1).double()
        noise = (policy_noise * noise).clamp(-noise_clip, noise_clip)
        squares, policy_losses = [], []
        drawn = sequences(now.batch, changes["mask_non_terminal"])
        for b, steps, trained, obs, actions, rewards, ends in drawn:
            known = obs if include else obs[1:]
            next_h, next_policy_h = features(target.critics.memory, known), features(target.memory, known)
            if include:
                next_h, next_policy_h = next_h[1:], next_policy_h[1:]
            next_actions = target.policy(next_policy_h).tanh() + noise[:steps, b]
            outside += (next_actions.abs() > 1).sum()
            next_actions = next_actions.clamp(-1, 1)
            h, new = features(agent.critics.memory, obs), agent.policy(features(agent.memory, obs)).tanh()
            for t in trained:
                value = minimum(target.critics, next_h[t], next_actions[t])
                y = rewards[t] + (0 if ends[t] else 0.99 * value.detach())
                squares.append(sum((q - y) ** 2 for q in agent.critics(h[t], actions[t])))
                policy_losses.append(-late.critics(h[t].detach(), new[t])[0])
        assert_gradients(torch.stack(squares).mean(), agent.critics.parameters(), now.clipped[0])
        policy_parameters = [*agent.memory.parameters(), *agent.policy.parameters()]
        assert_gradients(torch.stack(policy_losses).mean(), policy_parameters, now.clipped[1])
    assert outside > 0 or noise_clip < 1                    # than [-1, 1]


@pytest.mark.quick
def test_log_probabilities_are_those_of_the_squashed_normal():
    torch.manual_seed(0)
    mean = torch.randn(500, 3, dtype=torch.double)
    log_std = torch.randn(500, 3, dtype=torch.double) / 2 - 1
    action, logp = SquashedGaussian(mean, log_std).rsample()
    expected = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform())
    torch.testing.assert_close(logp, expected.log_prob(action).sum(-1), rtol=1e-5, atol=1e-5)
    far = torch.tensor([[30.0], [-30.0], [7.0]], requires_grad=True)  # where 1 - tanh^2 is 0 in float32
    _, logp = SquashedGaussian(far, torch.full((3, 1), -5.0)).rsample()
    (gradient,) = torch.autograd.grad(logp.sum(), far)                  # d logp / du = 2 tanh(u)
    torch.testing.assert_close(gradient, 2 * far.detach().tanh(), rtol=1e-3, atol=1e-3)
    many = SquashedGaussian(torch.full((50_000, 1), 0.3), torch.full((50_000, 1), -0.5))
    u = torch.atanh(many.rsample()[0])
    assert u.mean() == pytest.approx(0.3, abs=0.01) and u.std() == pytest.approx(0.6065, abs=0.01)


@pytest.mark.parametrize("mask", [False, True])
def test_which_steps_train(script, tmp_path, monkeypatch, mask):
    """All real ones, or the last of each sequence: which actions and which values receive a gradient."""
    values, actions = [], []
    forward = script.Critics.forward

    def recording_forward(critics, h, action):
        q1, q2 = forward(critics, h, action)
        if q1.requires_grad:                                # not the targets'
            kept, x = (actions, action) if action.requires_grad else (values, q1)
            x.retain_grad()
            kept.append(x)
        return q1, q2

    monkeypatch.setattr(script.Critics, "forward", recording_forward)
    drawn = spy(monkeypatch, script.SequenceReplay, "sample")
    run(tmp_path, script, **COUNT, mask_non_terminal=mask, policy_frequency=1)
    assert len(drawn) == len(values) == len(actions) > 20
    for batch, value, action in zip((call.result for call in drawn), values, actions):
        expected = batch.real.clone()
        if mask:
            expected[:] = False
            expected[batch.real.sum(0) - 1, torch.arange(expected.shape[1])] = True
        assert torch.equal(value.grad != 0, expected[:-1])
        assert torch.equal(action.grad.abs().sum(-1) > 0, expected[:-1])


@pytest.mark.quick
@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "none"])
def test_the_policys_gradient_goes_to_the_start_and_no_further(script, memory):
    """Value of the action at step 7, of a sequence that starts again at step 3: o_3 ... o_7 matter."""
    torch.manual_seed(0)
    kwargs = {"window": 12} if memory == "gpt" else {}
    args = script.Args(memory=memory, hidden_size=16, memory_kwargs=kwargs)
    box = gym.spaces.Box(-1, 1, (2,))
    agent = script.Agent(box, box, args)
    for layer in (agent.policy[-1], agent.critics.q1[-1]):
        torch.nn.init.normal_(layer.weight)
    obs, start = torch.randn(10, 4, 2, requires_grad=True), torch.zeros(10, 4, dtype=torch.bool)
    start[0], start[3, 1] = True, True
    policy, _ = agent.pi((obs,), agent.memory.initial_state(4), start)
    action = policy.rsample()[0] if script is sac else policy
    h, _ = agent.critics.memory((obs.detach(),), agent.critics.memory.initial_state(4), start)
    (gradient,) = torch.autograd.grad(agent.critics(h[7], action[7])[0][1], obs)
    reached = gradient.abs().sum(-1) > 0                    # [10, 4]
    assert reached[:, [0, 2, 3]].any().item() is False      # other sequences
    assert reached[:, 1].tolist() == [3 <= t <= 7 for t in range(10)]


def test_the_policys_loss_leaves_the_critics_alone(script, tmp_path, monkeypatch):
    """Their gradients are the same before and after it; so are the targets', which have none."""
    flags = dict(COUNT, policy_frequency=1, max_grad_norm=1e9)                  # nothing is clipped
    seen, _ = watched(tmp_path, monkeypatch, script, every=4, **flags)
    assert len(seen) > 3
    for now in seen:
        assert len(now.clipped) == 2
        after = [gradient for name, gradient in now.gradients.items() if name.startswith("critics.")]
        assert all(map(torch.equal, now.clipped[0], after))
        assert not any(p.requires_grad for p in now.after[1].parameters())


# ---------------------------------------------------------------------- flags

def test_the_temperature_is_fixed_or_moves_entropy_to_its_target(tmp_path):
    rows, folder = run(tmp_path, sac, **COUNT, alpha=0.2, autotune=False)
    assert column(rows, "losses/alpha") == pytest.approx([0.2] * len(rows))
    changes = dict(COUNT, alpha=0.1, autotune=False, total_timesteps=4 * 32 * 4)
    rows, _ = run(tmp_path, sac, resume=str(folder), **changes)
    assert column(rows, "losses/alpha")[-1] == pytest.approx(0.1)               # the flag given now
    for target_entropy, rises in ((-3.0, False), (3.0, True)):
        changes = dict(COUNT, alpha=0.2, target_entropy=target_entropy, alpha_lr=(1e-2,))
        rows, _ = run(tmp_path, sac, **changes, run_name=str(target_entropy))
        alphas = column(rows, "losses/alpha")
        assert len(alphas) > 1 and alphas[0] != alphas[-1]
        assert alphas == sorted(alphas, reverse=not rises)


@pytest.mark.parametrize("flags", [
    dict(policy_frequency=3, policy_learning_starts=200), dict(policy_frequency=1, policy_learning_starts=0)])
def test_steps_of_the_gradient_are_as_ordered(script, tmp_path, monkeypatch, flags):
    clipped = []                                            # how often in each step: 1 or 2 networks
    sample, clip = script.SequenceReplay.sample, torch.nn.utils.clip_grad_norm_

    def counting_sample(*args):
        clipped.append(0)
        return sample(*args)

    def counting_clip(*args):
        clipped[-1] += 1
        return clip(*args)

    monkeypatch.setattr(script.SequenceReplay, "sample", counting_sample)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counting_clip)
    flags = {**COUNT, "replay_ratio": 0.25, "learning_starts": 100, "total_timesteps": 640, **flags}
    rows, _ = run(tmp_path, script, **flags)
    logged = [int(steps) for steps in column(rows, "charts/gradient_steps")]
    assert logged == [0.25 * (step - 100) for step in (128, 256, 384, 512, 640)]
    assert len(clipped) == logged[-1]
    for i, times in enumerate(clipped):
        visit = next(step for step in range(32, 641, 32) if 0.25 * (step - 100) > i)  # to the replay
        waited = visit > flags["policy_learning_starts"]
        assert (times == 2) == (waited and i % flags["policy_frequency"] == 0)


def test_columns_stay_where_nothing_was_measured(script, tmp_path):
    """Before any learning, and while the policy waits, cells are empty; every row has the same columns."""
    rows, _ = run(tmp_path, script, **dict(COUNT, learning_starts=128, policy_learning_starts=256))
    assert [bool(row["losses/qf_loss"]) for row in rows] == [False, True, True]
    assert [bool(row["losses/actor_loss"]) for row in rows] == [False, False, True]
    assert not any(row["eval/episodic_return"] for row in rows)


def test_random_actions_at_first_then_the_policys(script, tmp_path, monkeypatch):
    from_policy = []
    if script is sac:
        class Recording(SquashedGaussian):
            def rsample(self):
                action, logprob = super().rsample()
                if len(action) == 1:
                    from_policy.append(action[0].numpy())
                return action, logprob

        monkeypatch.setattr(sac, "SquashedGaussian", Recording)
    else:
        pi = td3.Agent.pi

        def recording_pi(agent, obs, state, start):
            action, state = pi(agent, obs, state, start)
            if len(start) == 1:
                from_policy.append(action[0].numpy())
            return action, state

        monkeypatch.setattr(td3.Agent, "pi", recording_pi)
    flags = dict(COUNT, learning_starts=256, total_timesteps=512, exploration_noise=0.3)
    _, entered = acted(tmp_path, monkeypatch, script, **flags)
    actions, from_policy = np.stack([now.action for now in entered]), np.stack(from_policy)
    early = actions[:64]                                    # of 4 environments
    assert abs(early).max() <= 1 and early.std() == pytest.approx(3**-0.5, abs=0.05)
    assert not np.isclose(early, from_policy[:64]).any()
    noise = actions[64:] - from_policy[64:]
    if script is sac:
        assert not noise.any()
    else:
        assert noise.mean() == pytest.approx(0, abs=0.07) and noise.std() == pytest.approx(0.3, abs=0.05)


def test_the_targets_follow(script, tmp_path, monkeypatch):
    def pairs(now):
        """(target, online) of every part that has a target, with the flag that says how fast it follows."""
        agent, target = now
        if script is sac:
            return [("tau", target, agent.critics)]
        policies = [("policy_tau", target.memory, agent.memory), ("policy_tau", target.policy, agent.policy)]
        return [("tau", target.critics, agent.critics), *policies]

    flags = dict(COUNT, tau=1.0, target_network_frequency=3, policy_tau=1.0)
    seen, _ = watched(tmp_path, monkeypatch, script, **flags)
    for i, now in enumerate(seen):
        source = now if i % 3 == 2 else None                # every third step copies
        for (_, target, online), (_, before, _) in zip(pairs(now.after), pairs((now.agent, now.target))):
            expected = online if source else before
            assert all(map(torch.equal, target.parameters(), expected.parameters()))
    flags = dict(COUNT, tau=0.25, target_network_frequency=1, policy_tau=0.5, run_name="polyak")
    seen, _ = watched(tmp_path, monkeypatch, script, **flags)
    for now in seen:
        for (flag, target, online), (_, before, _) in zip(pairs(now.after), pairs((now.agent, now.target))):
            share = flags[flag]
            parameters = zip(target.parameters(), online.parameters(), before.parameters(), strict=True)
            for after, o, b in parameters:
                torch.testing.assert_close(after, (1 - share) * b + share * o)


def test_wiping(script, tmp_path, monkeypatch):
    """In training, evaluation and enjoying the state is fresh every 4 steps of an episode of 11."""
    for wipe, expected in ((0, [0]), (4, [0, 4, 8])):
        flags = {**COUNT, "wipe_state_every": wipe, "run_name": f"wipe{wipe}"}
        starts, _ = acted(tmp_path, monkeypatch, script, **flags)
        assert [t for t in range(33) if starts[t].all()] == [t for t in range(33) if t % 11 in expected]
        assert all(start.all() or not start.any() for start in starts)
        args = script.Args(env_id=COUNT["env_id"], env_kwargs=COUNT["env_kwargs"], wipe_state_every=wipe)
        envs, starts = make_envs(args, 3, training=False), []
        agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
        act = agent.act

        def recording_act(obs, state, start):
            starts.append(start)
            return act(obs, state, start)

        agent.act = recording_act
        play(agent, envs, 3, seed=0)
        assert [t for t in range(11) if starts[t].all()] == expected


def test_episodes_longer_than_the_replay_are_named(script, tmp_path, capsys):
    long = {**COUNT, "env_kwargs": {"episode_length": 500}, "buffer_size": 4 * 10}
    assert run(tmp_path, script, **long)                    # sequences from anywhere do not mind
    with pytest.raises(SystemExit):
        run(tmp_path, script, **long, always_sample_from_initial_state=True, run_name="initial")
    assert "raise --buffer-size" in capsys.readouterr().err
    assert not (tmp_path / "initial").exists()                  # nothing was learned


# ---------------------------------------------------------------------- learning

def test_a_cue_needs_the_first_step_in_targets(script, tmp_path):
    """The cue is in o_0, the action of step 1 is paid at step 3: only targets that know o_0 can tell."""
    task = dict(
        env_id="Cue-v0", env_kwargs={}, memory="gru", hidden_size=16, mlp_size=32, random_seq_length=False,
        seq_len=4, always_sample_from_initial_state=True, batch_size=32, learning_starts=200,
        policy_learning_starts=200, q_lr=(1e-2,), policy_lr=(1e-2,), alpha_lr=(1e-2,), alpha=0.1, tau=0.1,
        num_envs=16, train_every=64, replay_ratio=0.2, total_timesteps=3_072, log_every=512,
        buffer_size=10_000)
    success = {}
    for include in (True, False):
        rows, _ = run(tmp_path, script, **task, include_first_step_in_targets=include, run_name=str(include))
        success[include] = column(rows, "charts/success")[-1]
    assert success[True] > 0.9 and success[False] < 0.75


def test_it_does_not_learn_what_needs_memory_without(script, tmp_path):
    """Ones among the last three bits, for 30 steps. An agent that knows the newest bit only is wrong by half
    a one a step: -15. The previous action could carry what was seen, so the agent does not get it.
    With memory: entries smoke-sac and smoke-td3, which the gate runs."""
    rows, _ = run(
        tmp_path, script, env_id="CountInput-v0",
        env_kwargs={"horizon": 3, "divisor": 3, "episode_length": 30}, memory="none", prev_action=False,
        gamma=0.0, hidden_size=32, mlp_size=32, seq_len=15, batch_size=32, num_envs=16, train_every=64,
        replay_ratio=0.1, learning_starts=1_000, exploration_noise=0.3, policy_learning_starts=2_000,
        policy_frequency=1, q_lr=(3e-3,), policy_lr=(3e-3,) if script is sac else (1e-3,), alpha=0.1,
        alpha_lr=(3e-3,), target_entropy=-3.0, total_timesteps=8_000, eval_every=8_000, eval_episodes=50,
        log_every=2_000, buffer_size=10_000)
    assert float(rows[-1]["eval/episodic_return"]) <= -14


def test_enjoying_count_input_prints_counts_and_predictions(script, tmp_path, capsys):
    _, folder = run(tmp_path, script, **COUNT)
    script.main(["--model", str(folder / "model.safetensors"), "--episodes", "1"])
    out = capsys.readouterr().out
    assert out.count("count ") == out.count("prediction ") == 11 and "hits" in out and "misses" in out

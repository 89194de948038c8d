"""The replays of the DQN pair: whatever is drawn was observed, in order, inside one episode, and as often as is stated."""
import collections
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_recurrent_sbb as sbb
import dqn_recurrent_tbb as tbb

SIZES = dict(num_envs=st.integers(1, 4), capacity=st.integers(2, 40), seed=st.integers(0, 2**20),
             ends=st.sampled_from([0.02, 0.1, 0.3, 0.9]), steps=st.integers(1, 120))


class World:
    """Environments whose every observation is a number of its own; remembers all episodes and what the replay may hold."""

    def __init__(self, replay_of, num_envs, seed, ends):
        self.N, self.ends, self.rng, self.fresh = num_envs, ends, np.random.default_rng(seed), iter(range(10**9))
        self.episodes = [[self.new_episode()] for _ in range(num_envs)]                     # of each environment
        self.replay = replay_of(self.step()[0])

    def new_episode(self):
        return types.SimpleNamespace(obs=[next(self.fresh)], steps=[])

    def step(self):
        now = [episodes[-1] for episodes in self.episodes]
        obs = np.array([e.obs[-1] for e in now])
        start, rewards = np.array([not e.steps for e in now]), self.rng.normal(size=self.N).astype(np.float32)
        actions, terminated = self.rng.integers(5, size=(self.N, 1)), self.rng.random(self.N) < self.ends / 2
        truncated = self.rng.random(self.N) < self.ends / 2
        return (obs, start, actions, rewards, terminated), terminated | truncated

    def run(self, steps):
        for _ in range(steps):
            step, done = self.step()
            obs, _, actions, rewards, terminated = step
            last_obs = []
            for n in range(self.N):
                episode = self.episodes[n][-1]
                episode.steps.append((int(obs[n]), int(actions[n, 0]), float(rewards[n]), bool(terminated[n])))
                episode.obs.append(next(self.fresh))
                if done[n]:
                    last_obs.append((torch.tensor(episode.obs[-1]),))
                    self.episodes[n].append(self.new_episode())
            self.replay.add(step, np.flatnonzero(done), last_obs)

    def held(self):
        """The ended episodes of which nothing is overwritten: the newest of each ring, with a final observation each."""
        out = []
        for episodes in self.episodes:
            positions = len(episodes[-1].steps)
            for episode in reversed(episodes[:-1]):
                positions += len(episode.obs)
                if positions <= self.replay.C:
                    out.append(episode)
        return out


def tape_of(world, *args):
    """The steps of a tape as (observation, action, reward, terminated, next observation), one list an episode."""
    obs, starts, actions, rewards, terminated = (x[:, 0] for x in world.replay.sample(*args))
    begins = [*starts.nonzero().flatten().tolist(), len(starts)]
    assert begins[0] == 0
    return [[(obs[i].item(), actions[i, 0].item(), rewards[i].item(), terminated[i].item(), obs[i + 1].item())
             for i in range(a, b - 1)] for a, b in zip(begins, begins[1:])]


def observed(episode):
    return [(*step, after) for step, after in zip(episode.steps, episode.obs[1:])]


@settings(max_examples=300, deadline=None)
@given(**SIZES, tape_len=st.integers(1, 30), fixed=st.booleans())
def test_a_tape_is_made_of_whole_observed_episodes(num_envs, capacity, seed, ends, steps, tape_len, fixed):
    world = World(lambda step: tbb.Replay(num_envs * capacity, step), num_envs, seed, ends)
    torch.manual_seed(seed)
    world.run(steps)
    held = [observed(e) for e in world.held()]
    assert len([x for x in world.replay.index if world.replay.whole(*x)]) == len(held)     # nothing is missing, nothing dead
    if not held:
        return
    pieces = tape_of(world, tape_len, fixed)
    if fixed:
        assert sum(len(p) + 1 for p in pieces) == tape_len
        assert pieces[-1] in [e[: len(pieces[-1])] for e in held]                           # the last may be cut
        pieces = pieces[:-1]
    else:
        assert tape_len <= sum(map(len, pieces)) < tape_len + len(pieces[-1])
    assert all(piece in held for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(**SIZES, batch_size=st.integers(1, 30), L=st.sampled_from([-1, 1, 3, 7]), W=st.sampled_from([0, 2, 5]))
def test_segments_are_made_of_observed_steps(num_envs, capacity, seed, ends, steps, batch_size, L, W):
    world = World(lambda step: sbb.Replay(num_envs * capacity, step, L, W), num_envs, seed, ends)
    torch.manual_seed(seed)
    world.run(steps)
    if not world.replay.index:
        return
    real, obs, starts, actions, rewards, terminated = world.replay.sample(batch_size)       # [W + L + 1, S]
    assert batch_size <= real.sum() < batch_size + real[:, -1].sum() and not real[:W].any() and not real[-1].any()
    whole = {step: (observed(e), t) for episodes in world.episodes for e in episodes[:-1] for t, step in enumerate(observed(e))}
    for s in range(real.shape[1]):
        rows = real[:, s].nonzero().flatten().tolist()
        assert rows == list(range(W, W + len(rows)))
        steps_of = [(obs[i, s].item(), actions[i, s, 0].item(), rewards[i, s].item(), terminated[i, s].item(),
                     obs[i + 1, s].item()) for i in rows]
        episode, t = whole[steps_of[0]]
        length = len(episode) if L == -1 else L
        assert t % length == 0 and steps_of == episode[t : t + length]                      # cut at multiples of L, not padded
        early = [max(0, t - k) for k in range(W, 0, -1)]                                    # burn-in: the steps before
        assert obs[:W, s].tolist() == [episode[k][0] for k in early]
        assert starts[: W + len(rows), s].tolist() == [k == 0 for k in early] + [k == 0 for k in range(t, t + len(rows))]
        assert len(set(obs[W + len(rows) :, s].tolist())) == 1                              # padding repeats the last position


def frequencies(draw, n):
    counts = collections.Counter()
    for _ in range(n):
        counts.update(draw())
    return counts


def assert_uniform(counts, keys):
    """All keys, and nothing else, equally often: a chi-square statistic within 5 standard deviations of its mean."""
    expected = counts.total() / len(keys)
    assert set(counts) == set(keys)
    chi2 = sum((counts[k] - expected) ** 2 / expected for k in keys)
    assert chi2 < len(keys) - 1 + 5 * (2 * (len(keys) - 1)) ** 0.5


def test_episodes_are_drawn_uniformly():
    """Every whole episode, the newest and the shortest too. Which lengths a tape ends with does not matter: tapes of one."""
    world = World(lambda step: tbb.Replay(3 * 50, step), 3, 0, 0.2)
    torch.manual_seed(0)
    world.run(200)
    counts = frequencies(lambda: [tape_of(world, 1)[0][0][0]], 5_000)
    assert_uniform(counts, [e.obs[0] for e in world.held()])


@pytest.mark.parametrize("L", [3, -1])
def test_segments_are_drawn_uniformly(L):
    world = World(lambda step: sbb.Replay(3 * 50, step, L, 0), 3, 0, 0.2)
    torch.manual_seed(0)
    world.run(200)
    counts = frequencies(lambda: [world.replay.sample(1)[1][0, 0].item()], 5_000)
    firsts = [obs for e in world.held() for obs in e.obs[: -1 : L if L > 0 else len(e.obs)]]
    torn = set(counts) - set(firsts)                # segments of episodes whose beginning is overwritten are still whole
    assert len(torn) <= 3 * 50 / 3 if L > 0 else not torn
    assert_uniform(counts, [*firsts, *torn])


def test_both_arms_train_on_the_same_number_of_steps():
    """At least as many real steps as asked for, and less than one piece more: padding does not count."""
    for replay_of, piece in ((lambda step: tbb.Replay(800, step), 12), (lambda step: sbb.Replay(800, step, 5, 0), 5)):
        world = World(replay_of, 2, 0, 0.0)
        for _ in range(20):                                                                 # episodes of 12 steps
            world.run(11)
            world.ends = 2.0
            world.run(1)
            world.ends = 0.0
        batch = world.replay.sample(100)
        steps = (~batch[1].roll(-1, 0)).sum() if piece == 12 else batch[0].sum()
        assert 100 <= steps < 100 + piece


@pytest.mark.parametrize("script, more", [(tbb, ()), (sbb, (5, 2))], ids=["tbb", "sbb"])
def test_a_restored_replay_draws_and_goes_on_alike(script, more, tmp_path):
    world = World(lambda step: script.Replay(90, step, *more), 3, 1, 0.3)
    world.run(70)                                                                           # twice around
    torch.save(world.replay.state_dict(), tmp_path / "replay.pt")
    other = World(lambda step: script.Replay(90, step, *more), 3, 1, 0.3)
    other.run(70)                                                                           # the same world, another replay
    other.replay = script.Replay(90, other.step()[0], *more)
    other.rng, other.fresh = np.random.default_rng(5), iter(range(10**6, 10**7))
    world.rng, world.fresh = np.random.default_rng(5), iter(range(10**6, 10**7))
    other.replay.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    other.rng = np.random.default_rng(5)
    for _ in range(3):
        samples = []
        for w in (world, other):
            torch.manual_seed(3)
            samples.append(w.replay.sample(40))
            w.run(13)
        assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


@pytest.mark.parametrize("script, more", [(tbb, ()), (sbb, (20, 0))], ids=["tbb", "sbb"])
def test_a_million_images_take_their_stated_memory_and_are_not_copied(script, more):
    """21 GB are promised, as pages that are not written yet; drawing touches the drawn."""
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    N, image = 8, np.zeros((8, 84, 84, 3), np.uint8)
    step = (image, np.zeros(N, bool), np.zeros((N, 1), np.int64), np.zeros(N, np.float32), np.zeros(N, bool))
    before = resident()
    try:
        replay = script.Replay(10**6, step, *more)
    except MemoryError:
        pytest.skip("this machine has less than 21 GB")
    assert replay.nbytes == sum(x.nbytes for x in replay.data) == 10**6 * (84 * 84 * 3 + 1 + 8 + 4 + 1)
    for t in range(60):
        done = np.full(N, t % 20 == 19)
        replay.add((image + t, np.full(N, t % 20 == 0), *step[2:]), np.flatnonzero(done),
                   [(torch.zeros(84, 84, 3, dtype=torch.uint8),)] * done.sum())
    obs = next(x for x in replay.sample(100) if x.dtype == torch.uint8)
    assert obs.shape[-3:] == (84, 84, 3)
    assert resident() - before < 60 * N * 21_168 + 100e6 + 2 * obs.nbytes

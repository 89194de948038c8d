"""The replays of the DQN pair: what is drawn was observed, in order, in one episode, as often as stated."""
import collections
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_recurrent_sbb as sbb
import dqn_recurrent_tbb as tbb

SIZES = dict(
    N=st.integers(1, 4), C=st.integers(2, 40), seed=st.integers(0, 2**20),
    ends=st.sampled_from([0.02, 0.1, 0.3, 0.9]), steps=st.integers(1, 120), stopped=st.booleans())
SCRIPTS = pytest.mark.parametrize("script, more", [(tbb, ()), (sbb, (5, 2))], ids=["tbb", "sbb"])


def replay_of(script, N, C, *more):
    """more: --seq-len and --burn-in of sbb. A state is one number."""
    obs, action = torch.zeros(N, dtype=torch.long), torch.zeros(N, 1, dtype=torch.long)
    if script is tbb:
        return tbb.Replay(N * C, (obs,), action)
    return sbb.Replay(N * C, (obs,), action, (torch.zeros(N),), *more)


class World:
    """Random episodes of N environments. Every observation is a number of its own.

    The memory's state before a step is the number of the step's observation. All episodes are remembered:
    where they begin, their observations, their steps and whether they ended.
    """

    def __init__(self, replay, seed, ends):
        self.replay, self.ends, self.rng = replay, ends, np.random.default_rng(seed)
        self.observed, self.head = 0, [0] * replay.N        # head [N]: positions that are used up
        self.episodes = [[self.new_episode(n)] for n in range(replay.N)]

    def new_episode(self, n):
        return types.SimpleNamespace(begin=self.head[n], obs=[self.new_obs()], steps=[], ended=False)

    def new_obs(self):
        self.observed += 1
        return self.observed

    def run(self, steps):
        N = self.replay.N
        for _ in range(steps):
            running = [episodes[-1] for episodes in self.episodes]
            obs = torch.tensor([episode.obs[-1] for episode in running])
            start = torch.tensor([not episode.steps for episode in running])
            action = torch.from_numpy(self.rng.integers(5, size=(N, 1)))
            reward = self.rng.normal(size=N)
            terminated, truncated = self.rng.random((2, N)) < self.ends / 2
            ended = np.flatnonzero(terminated | truncated)
            for n, episode in enumerate(running):
                episode.steps.append((action[n].item(), np.float32(reward[n]).item(), terminated[n]))
                episode.obs.append(self.new_obs())
                self.head[n] += 1
            last_obs = [(torch.tensor(running[n].obs[-1]),) for n in ended]
            state = [(obs,)] if hasattr(self.replay, "states") else []
            self.replay.add((obs,), start, action, reward, terminated, *state, ended, last_obs)
            for n in ended:
                running[n].ended = True
                self.head[n] += 1
                self.episodes[n].append(self.new_episode(n))

    def stop(self):
        """As a resume does with other people's tasks: the running episodes do not continue."""
        self.replay.forget_running()
        for n, episodes in enumerate(self.episodes):
            episodes.append(self.new_episode(n))

    def held(self, L=10**9, W=0):
        """(episode, first step) of all segments in the replay of which nothing is overwritten."""
        found = []
        for n, episodes in enumerate(self.episodes):
            for episode in episodes:
                for first in range(0, len(episode.steps), L) if episode.ended else []:
                    if episode.begin + max(0, first - W) >= self.head[n] - self.replay.C:
                        found.append((episode, first))
        return found


def world_of(script, N, C, seed, ends, steps, stopped, *more):
    torch.manual_seed(seed)
    world = World(replay_of(script, N, C, *more), seed, ends)
    world.run(steps)
    if stopped:
        world.stop()
        world.run(steps)
    return world


def transitions(episode, first=0, end=None):
    """(observation, action, reward, terminated, next observation) of steps first ... end - 1"""
    obs = episode.obs
    return [(obs[t], *step, obs[t + 1]) for t, step in enumerate(episode.steps)][first:end]


def transitions_of(batch, b, rows):
    """The same of what was drawn: rows of column b."""
    obs = batch.obs[0][:, b].tolist()
    actions, rewards = batch.actions[:, b, 0].tolist(), batch.rewards[:, b].tolist()
    terminated = batch.terminated[:, b].tolist()
    return [(obs[i], actions[i], rewards[i], terminated[i], obs[i + 1]) for i in rows]


def pieces_of(tape):
    """The transitions of each episode of a tape; where an episode begins, the tape says so."""
    begins = [*tape.starts[:, 0].nonzero().flatten().tolist(), len(tape.starts)]
    assert begins[0] == 0
    return [transitions_of(tape, 0, range(a, b - 1)) for a, b in zip(begins, begins[1:])]


def whole_in_index(replay):
    return sum(replay.whole(*entry[:2]) for entry in replay.index)


# ---------------------------------------------------------------------- what is drawn

@pytest.mark.quick
@settings(max_examples=300, deadline=None)
@given(**SIZES, tape_len=st.integers(1, 30), fixed=st.booleans())
def test_a_tape_is_made_of_whole_observed_episodes(N, C, seed, ends, steps, stopped, tape_len, fixed):
    world = world_of(tbb, N, C, seed, ends, steps, stopped)
    held = [transitions(episode) for episode, _ in world.held()]
    assert whole_in_index(world.replay) == len(held)
    if not held:
        assert not world.replay.index
        return
    tape = world.replay.sample(tape_len, fixed, "cpu")
    pieces = pieces_of(tape)
    if fixed:
        assert len(tape.starts) == tape_len
        assert pieces[-1] in [steps[:len(pieces[-1])] for steps in held]  # the last one may be cut
    else:
        assert tape_len <= sum(map(len, pieces)) < tape_len + len(pieces[-1])
        assert pieces[-1] in held
    assert all(piece in held for piece in pieces[:-1])
    ends_of_pieces = np.cumsum([len(piece) + 1 for piece in pieces]) - 1
    assert (~tape.real[:, 0]).nonzero().flatten().tolist() == ends_of_pieces.tolist()


@pytest.mark.quick
@settings(max_examples=300, deadline=None)
@given(
    **SIZES, batch_size=st.integers(1, 30), L=st.sampled_from([-1, 1, 3, 7]),
    W=st.sampled_from([None, 0, 2, 5]))
def test_segments_are_made_of_observed_steps(N, C, seed, ends, steps, stopped, batch_size, L, W):
    world = world_of(sbb, N, C, seed, ends, steps, stopped, L, W)
    cut_at, back = (10**9 if L == -1 else L), W or 0
    held = {episode.obs[first]: (episode, first) for episode, first in world.held(cut_at, back)}
    assert whole_in_index(world.replay) == len(held)
    if not held:
        assert not world.replay.index
        return
    batch = world.replay.sample(batch_size, "cpu")
    lengths = batch.real.sum(0).tolist()
    assert batch_size <= sum(lengths) < batch_size + lengths[-1]
    assert len(batch.real) == max(lengths) + 1
    *_, before, starts_before = batch.before
    assert len(before) == len(starts_before) == back
    for b, length in enumerate(lengths):
        assert batch.real[:length, b].all()
        episode, first = held[batch.obs[0][0, b].item()]
        assert length == min(cut_at, len(episode.steps) - first)        # not padded, not cut short
        assert transitions_of(batch, b, range(length)) == transitions(episode, first, first + length)
        assert batch.starts[:, b].tolist() == [first == 0] + [False] * max(lengths)
        assert len(set(batch.obs[0][length:, b].tolist())) == 1                 # padding
        burn_in = [max(0, first - k) for k in range(back, 0, -1)]           # steps of the episode
        assert before[:, b].tolist() == [episode.obs[t] for t in burn_in]
        assert starts_before[:, b].tolist() == [t == 0 for t in burn_in]
        states = [state[b].item() for state in batch.state]
        assert states == ([] if W is None else [episode.obs[max(0, first - W)]])


# ---------------------------------------------------------------------- how often

def assert_uniform(counts, keys):
    """All keys, and nothing else, equally often: chi-square within 5 standard deviations of its mean."""
    expected = counts.total() / len(keys)
    assert set(counts) == set(keys)
    chi2 = sum((counts[k] - expected) ** 2 / expected for k in keys)
    assert chi2 < len(keys) - 1 + 5 * (2 * (len(keys) - 1)) ** 0.5


def test_episodes_are_drawn_uniformly():
    """The newest and the shortest too. Tapes of one episode: how a longer one ends depends on lengths."""
    world = world_of(tbb, 3, 50, 0, 0.2, 200, False)
    drawn = [world.replay.sample(1, False, "cpu").obs[0][0].item() for _ in range(5_000)]
    assert_uniform(collections.Counter(drawn), [episode.obs[0] for episode, _ in world.held()])


@pytest.mark.parametrize("L", [3, -1])
def test_segments_are_drawn_uniformly(L):
    """Also those of episodes whose beginning is overwritten."""
    world = world_of(sbb, 3, 50, 0, 0.2, 200, False, L, None)
    drawn = [world.replay.sample(1, "cpu").obs[0][0].item() for _ in range(5_000)]
    held = world.held(10**9 if L == -1 else L)
    torn = [first for episode, first in held if (episode, 0) not in held]
    assert bool(torn) == (L == 3)
    assert_uniform(collections.Counter(drawn), [episode.obs[first] for episode, first in held])


@pytest.mark.quick
def test_both_arms_train_on_the_same_number_of_steps():
    """At least as many real steps as asked for, and less than a piece more: padding does not count."""
    for script, piece, more in ((tbb, 12, ()), (sbb, 5, (5, None))):
        world = World(replay_of(script, 2, 400, *more), 0, 0.0)
        for _ in range(20):                                 # episodes of 12 steps
            world.run(11)
            world.ends = 2.0
            world.run(1)
            world.ends = 0.0
        arguments = (100, False, "cpu") if script is tbb else (100, "cpu")
        assert 100 <= world.replay.sample(*arguments).real.sum() < 100 + piece


# ---------------------------------------------------------------------- saved and restored

@SCRIPTS
def test_a_restored_replay_draws_and_continues_alike(script, more, tmp_path):
    worlds = [world_of(script, 3, 30, 1, 0.3, 70, False, *more) for _ in range(2)]  # twice around
    torch.save(worlds[0].replay.state_dict(), tmp_path / "replay.pt")
    worlds[1].replay = replay_of(script, 3, 30, *more)
    worlds[1].replay.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    arguments = (40, False, "cpu") if script is tbb else (40, "cpu")
    for _ in range(3):
        samples = []
        for world in worlds:
            torch.manual_seed(3)
            samples.append(world.replay.sample(*arguments))
            world.run(13)
        torch.testing.assert_close(*samples, rtol=0, atol=0)


@pytest.mark.quick
@SCRIPTS
def test_a_replay_of_other_sizes_is_refused(script, more, capsys):
    saved = replay_of(script, 4, 30, *more).state_dict()
    others = [(5, 24, *more), (4, 31, *more)]
    if script is sbb:
        others += [(4, 30, 5, 3), (4, 30, 5, None)]         # burnt in from further back; from zeros
    for sizes in others:
        with pytest.raises(SystemExit):
            replay_of(script, *sizes).load_state_dict(saved)
        assert "the saved replay has other sizes" in capsys.readouterr().err


# ---------------------------------------------------------------------- memory of the machine

@pytest.mark.parametrize("script, more", [(tbb, ()), (sbb, ((), 20, None))], ids=["tbb", "sbb"])
def test_a_million_images_take_their_stated_memory_and_are_not_copied(script, more):
    """21 GB are promised, as pages that are not written yet; drawing touches what it draws."""
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    N, image = 8, torch.zeros(8, 84, 84, 3, dtype=torch.uint8)
    action, reward, terminated = torch.zeros(N, 1, dtype=torch.long), np.zeros(N), np.zeros(N, bool)
    before = resident()
    try:
        replay = script.Replay(10**6, (image,), action, *more)
    except SystemExit:
        pytest.skip("this machine has less than 21 GB")
    assert replay.nbytes == sum(x.nbytes for x in replay.data) == 10**6 * (84 * 84 * 3 + 1 + 8 + 4 + 1)
    for t in range(60):
        ended = np.arange(N if t % 20 == 19 else 0)
        start, last_obs = np.full(N, t % 20 == 0), [(image[n],) for n in ended]
        replay.add((image + t,), start, action, reward, terminated, *more[:1], ended, last_obs)
    arguments = (100, False, "cpu") if script is tbb else (100, "cpu")
    obs = replay.sample(*arguments).obs[0]
    assert obs.shape[2:] == (84, 84, 3)
    assert resident() - before < 60 * N * 21_168 + 100e6 + 2 * obs.nbytes


@pytest.mark.quick
@SCRIPTS
def test_a_replay_that_does_not_fit_the_machine_is_refused(script, more, capsys):
    with pytest.raises(SystemExit):
        replay_of(script, 4, 10**12, *more)
    error = capsys.readouterr().err
    assert "--buffer-size 4000000000000 needs" in error and "GiB of memory" in error

"""--show-memory, --forget-at, --probe: what is noted happened, what is wiped is gone."""
import importlib
import json
import sys
import types

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import dqn_recurrent_sbb
import ppo_recurrent_sbb
from envs.vector import make_envs
from models import MEMORIES, insight, probe, strip, watch
from models import play as playing
from models.gpt import F as of_gpt
from models.play import play
from models.run_folder import make_agent
from tests.conftest import ROOT, SCRIPTS
from tests.helpers import run, spy

sys.path.insert(0, str(ROOT / "benchmark"))
import lessons  # noqa: E402
from horizon import load_model  # noqa: E402

MODELS = ROOT / "benchmark/models"
TMAZE = str(MODELS / "tmaze-length__50__dqn__lstm.safetensors")


def agent_and_envs(path, num_envs):
    script, args, saved, envs = load_model(str(path))
    return make_agent(script.Agent, args, envs, saved)[0], make_envs(args, num_envs, training=False)


def memoryless(num_envs):
    """An agent that can remember nothing, in the same T-Maze; not trained."""
    args = dqn_recurrent_sbb.Args(
        env_id="TMazePassive-v0", env_kwargs={"length": 50}, memory="none", prev_action=True, device="cpu")
    torch.manual_seed(0)
    envs = make_envs(args, num_envs, training=False)
    return make_agent(dqn_recurrent_sbb.Agent, args, envs, {})[0], envs


# ---------------------------------------------------------------------- wiping

def test_a_wiped_state_costs_the_tmaze_agent_its_return_and_a_memoryless_one_nothing():
    agent, envs = agent_and_envs(TMAZE, 40)
    assert play(agent, envs, 40, seed=3)[0].mean() == 1
    assert play(agent, envs, 40, seed=3, forget_at=12)[0].mean() < 0.7
    agent, envs = memoryless(40)
    kept, forgot = play(agent, envs, 40, seed=3), play(agent, envs, 40, seed=3, forget_at=12)
    np.testing.assert_array_equal(kept, forgot)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_wiped_memory_is_a_new_one_also_where_it_never_resets(name):
    """From the step on the outputs are those of an episode that begins there; other rows go on."""
    args = ppo_recurrent_sbb.Args(env_id="PocMemory-v0", memory=name, hidden_size=8, reset_state=False)
    envs = make_envs(args, 3, training=False)
    agent = ppo_recurrent_sbb.Agent(envs.single_observation_space, envs.single_action_space, args)
    asked = []
    agent.act, act = lambda obs, state, start: asked.append((obs, state)) or act(obs, state, start), agent.act
    play(agent, envs, 3, seed=1, forget_at=2)
    empty = agent.memory.initial_state(3)
    for s, e in zip(asked[2][1], empty):
        assert torch.equal(s, e)
    assert all(not torch.equal(s, e) for s, e in zip(asked[1][1][:1], empty[:1]))
    assert all(not torch.equal(s, e) for s, e in zip(asked[3][1][:1], empty[:1]))


@pytest.mark.parametrize("name", MEMORIES)
def test_only_the_rows_that_are_at_the_step_are_wiped(name):
    memory = MEMORIES[name](3, 8)
    empty = memory.initial_state(3)
    state = tuple(torch.ones_like(s) for s in empty)
    rows = torch.tensor([False, True, False])
    for s, e, after in zip(state, empty, playing.wiped(state, empty, rows), strict=True):
        assert torch.equal(after[rows], e[rows]) and torch.equal(after[~rows], s[~rows])


# ---------------------------------------------------------------------- what is noted

def noted(memory, hidden_size=8, steps=5, **kwargs):
    """An agent with this memory that acts on random observations; what was noted, and its memory."""
    torch.manual_seed(0)
    args = ppo_recurrent_sbb.Args(memory=memory, hidden_size=hidden_size, memory_kwargs=kwargs)
    agent = ppo_recurrent_sbb.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2), args)
    return agent, torch.randn(steps, 1, 3)


@pytest.mark.parametrize("name", ["gru", "lstm", "mingru", "minlstm", "lru"])
@torch.no_grad()
def test_what_is_kept_is_what_a_difference_of_states_is_multiplied_with(name):
    agent, xs = noted(name)
    if name == "gru":
        agent.memory.rnn.weight_hh_l0.zero_()               # then its gates do not depend on the state either
    state = agent.memory.initial_state(1)
    other = (*state[:-1], state[-1] + 1)                    # LSTM's c; the layer's state behind Stack's own
    start = torch.zeros(1, dtype=torch.bool)
    with insight.noting(agent) as steps:
        _, (*_, after) = agent.act((xs[0],), state, start)
        _, (*_, after_other) = agent.act((xs[0],), other, start)
    kept, = steps[0]["kept"]
    np.testing.assert_allclose(kept, (after_other - after).abs().flatten(), rtol=1e-4, atol=1e-6)
    assert "act" not in vars(agent)                         # it acts as before


@torch.no_grad()
def test_attention_is_what_the_transformer_multiplies_its_values_with(monkeypatch):
    agent, xs = noted("gpt", hidden_size=16, steps=7, window=5, head_size=4)
    calls = spy(monkeypatch, of_gpt, "scaled_dot_product_attention")
    state, start = agent.memory.initial_state(1), torch.ones(1, dtype=torch.bool)
    with insight.noting(agent) as steps:
        for x in xs:
            _, state = agent.act((x,), state, start)
            start = torch.zeros_like(start)
    assert [len(step["attention"][0]) for step in steps] == [1, 2, 3, 4, 5, 5, 5]
    for step, call in zip(steps, calls):
        query, key = call.args[0], call.args[1]             # [1, heads, 1 or keys, head_size]
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).flatten(0, 2)
        np.testing.assert_allclose(step["attention"], weights, rtol=1e-4)
    looked = strip.attended(steps)                          # [7 steps of the episode, 7]; 2 of them are gone
    np.testing.assert_allclose(looked[2:, 6], weights.amax(0), rtol=1e-4)
    assert np.isnan(looked[:2, 6]).all() and np.isnan(looked[1:, 0]).all()


def test_values_and_probabilities_are_those_of_the_policy_that_acts():
    agent, xs = noted("gru")
    start = torch.ones(1, dtype=torch.bool)
    with insight.noting(agent) as steps:
        action, (h,) = agent.act((xs[0],), agent.memory.initial_state(1), start)
    dist, value, _ = agent((xs[:1],), agent.memory.initial_state(1), start[None])
    step, = steps
    np.testing.assert_allclose(step["policy"], dist.logp.detach().exp().flatten(), rtol=1e-5)
    assert step["sizes"] == [2]                             # so the rows of its panel are numbered 0 and 1
    assert step["policy"].argmax() == action and step["values"] == pytest.approx([value.item()])
    np.testing.assert_array_equal(step["state"], h.detach().flatten())
    assert step["age"] == 0 and step["empty"]


def test_the_critics_that_do_not_act_see_the_same_episode_and_the_same_wipe():
    script = importlib.import_module("sac_gru")
    args = script.Args(env_id="CountInput-v0", env_kwargs={"episode_length": 9}, hidden_size=8)
    envs = make_envs(args, 1, training=False)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)

    def values(forget_at):
        with insight.noting(agent) as steps:
            play(agent, envs, 1, seed=0, forget_at=forget_at)
        return insight.critics_of(agent, steps)

    kept, forgot = values(0), values(4)
    assert np.array_equal(kept[:4], forgot[:4]) and not np.isclose(kept[4:], forgot[4:]).any()


# ---------------------------------------------------------------------- films

@pytest.mark.parametrize("script", [*SCRIPTS, "ppo_recurrent_tbb_multigpu"], indirect=True)
def test_a_film_of_every_script(script, tmp_path, capsys):
    _, folder = run(tmp_path, script)
    look = ["--model", str(folder / "model.safetensors"), "--render-mode", "rgb_array", "--show-memory"]
    script.main([*look, "--episodes", "2", "--forget-at", "3"])
    said = capsys.readouterr().out
    assert "state kept: return" in said and "state wiped at step 3: return" in said
    film, last = folder / "model-forget-3.gif", imageio.imread(folder / "model-forget-3.png")
    frames = imageio.mimread(film, memtest=False)
    assert last.shape[1] == 2 * watch.HALF and frames[-1].shape[:2] == last.shape[:2]
    to_come = [(frame[-200:, :, :3] == 238).all(-1).mean() for frame in frames]
    assert to_come[0] > 0.5 and to_come[-1] < 0.05          # the strip grows with time


def test_both_halves_of_a_film_have_the_same_rows_and_scales():
    agent, xs = noted("lstm", steps=6)

    def acted(xs):
        state, start = agent.memory.initial_state(1), torch.ones(1, dtype=torch.bool)
        with torch.no_grad(), insight.noting(agent) as steps:
            for x in xs:
                _, state = agent.act((x,), state, start)
                start = torch.zeros_like(start)
        return steps

    def halves(*films):
        args, shot = types.SimpleNamespace(forget_at=99), np.zeros((9, 9, 3), np.uint8)
        parts = [(steps, [(len(steps), shot)], "", 0.0) for steps in films]
        frame, = watch.films_of(agent, parts, args)
        return np.split(frame, 2, axis=1)

    little, much = acted(xs), acted(5 * xs)
    left, right = halves(little, little)
    np.testing.assert_array_equal(left, right)
    beside_much, _ = halves(little, much)
    assert (left != beside_much).any(-1).mean() > 0.01


def test_a_long_film_has_few_frames_and_plays_in_under_a_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SHOTS", 10)
    _, folder = run(tmp_path, ppo_recurrent_sbb)
    ppo_recurrent_sbb.main(["--model", str(folder / "model.safetensors"), "--render-mode", "rgb_array",
                            "--show-memory", "--episodes", "9"])
    frames = imageio.mimread(folder / "model-memory.gif")
    assert 10 <= len(frames) <= 21
    assert seconds_of(folder / "model-memory.gif") < 60


def seconds_of(path):
    film = imageio.get_reader(path)
    return sum(film.get_meta_data(i)["duration"] for i in range(len(film))) / 1000


def test_films_of_six_agents_are_committed_small_and_short():
    films = [*MODELS.glob("*-memory.gif"), *MODELS.glob("*-forget-*.gif")]
    agents = {film.name.rsplit("-memory")[0].rsplit("-forget")[0] for film in films}
    assert len(agents) >= 6 and all((MODELS / f"{agent}.safetensors").exists() for agent in agents)
    assert sum(film.stat().st_size + film.with_suffix(".png").stat().st_size for film in films) < 5e6
    assert all(seconds_of(film) < 60 for film in films)


# ---------------------------------------------------------------------- probes

def test_the_cue_is_read_at_every_step_from_a_tmaze_agent_and_not_once_its_state_is_wiped():
    agent, envs = agent_and_envs(TMAZE, 400)
    _, kept = probe.readouts(agent, envs, 1, 0)["cue"]
    assert [t for t, *_ in kept] == list(range(51))
    assert min(right for _, right, _ in kept) >= 0.99
    _, wiped = probe.readouts(agent, envs, 1, 12)["cue"]
    assert min(right for t, right, _ in wiped if t < 12) >= 0.99
    assert max(right for t, right, _ in wiped if t >= 12) < 0.65
    agent, envs = memoryless(400)
    _, nothing = probe.readouts(agent, envs, 1, 0)["cue"]
    assert max(right for _, right, _ in nothing) < 0.65


def test_a_readout_is_linear_knows_an_order_and_is_tested_on_what_it_was_not_fitted_to():
    rng = np.random.default_rng(0)
    number = rng.integers(0, 7, 800)
    x = np.column_stack([0.3 * number - 1, rng.normal(size=(800, 3))]).astype(np.float32)
    right, most = probe.accuracy(x, number)
    assert right == 1 and most < 0.25
    right, _ = probe.accuracy(rng.normal(size=(800, 300)).astype(np.float32), number % 2)
    assert right < 0.62                                     # of those it was fitted to it gets nearly all
    signs = rng.choice([-1, 1], size=(800, 2))
    right, _ = probe.accuracy(signs.astype(np.float32), (signs.prod(1) > 0).astype(int))
    assert right < 0.8                                      # a line cuts off one corner of an exclusive or


def test_probing_an_agent_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("envs.vector.PROBED", 240)
    _, folder = run(tmp_path, ppo_recurrent_sbb, env_id="popgym-RepeatPreviousEasy-v0", env_kwargs={},
                    hidden_size=32)
    ppo_recurrent_sbb.main(["--model", str(folder / "model.safetensors"), "--probe", "--forget-at", "5"])
    assert "card is read from the state, steps ago 0 to 39" in capsys.readouterr().out
    header, *rows = (folder / "model-probe.csv").read_text().splitlines()
    assert header == "state,quantity,x,at,accuracy,chance" and len(rows) == 80
    assert imageio.imread(folder / "model-probe.png").shape[1] > 300
    newest, oldest = (float(rows[i].split(",")[4]) for i in (0, 39))
    assert newest > 0.9 and oldest < 0.4


@pytest.mark.parametrize("env_id, answer", [
    ("popgym-RepeatPreviousEasy-v0", lambda named: named["card"][:, 3]),
    ("popgym-RepeatFirstEasy-v0", lambda named: named["first card"]),
    ("CountInput-v0", lambda named: named["number"][:, None] / 10)])
def test_who_answers_what_is_to_be_remembered_is_right(env_id, answer):
    envs = gym.make_vec(env_id, 5)
    envs.reset(seed=0)
    for t in range(40):
        named = envs.unwrapped.remembered()
        _, reward, *_ = envs.step(answer(named).clip(0))
        assert (reward >= 0).all() and (t < 4 or env_id == "CountInput-v0" or (reward > 0).all())
        if "bit" in named:
            recent = named["bit"][:, :10]
            np.testing.assert_array_equal(recent.clip(0).sum(1), named["number"])
            assert ((recent < 0).sum(1) == max(0, 9 - t)).all()


def test_what_the_other_tasks_name_is_what_is_there():
    rows = np.arange(6)
    cards = gym.make_vec("popgym-AutoencodeEasy-v0", 6)
    (_, first), _ = cards.reset(seed=0)
    for t in range(1, 53):
        (_, newest), *_ = cards.step(np.zeros(6, int))
        card = cards.unwrapped.remembered()["card"]
        assert (card == -1).all() if t > 51 else (card[:, 0] == newest).all() and (card[:, t] == first).all()
    counts = gym.make_vec("popgym-CountRecallEasy-v0", 6)
    obs, _ = counts.reset(seed=0)
    black = 1 * (obs[:, 0] == 0)
    for _ in range(20):
        np.testing.assert_array_equal(counts.unwrapped.remembered()["how many b"], black)
        obs, *_ = counts.step(np.zeros(6, int))
        black = black + (obs[:, 0] == 0)
    maze = gym.make_vec("MinigridMemory-v0", 6)
    maze.reset(seed=0)
    named = maze.unwrapped.remembered()["object"]
    seen = [maze.unwrapped.world(i).grid.get(1, 3).encode()[0] for i in rows]
    assert named.tolist() == seen and len(set(seen)) == 2


def test_a_cue_that_was_not_seen_is_not_to_be_remembered():
    envs = gym.make_vec("TMazeActive-v0", 8)
    envs.reset(seed=0)
    assert (envs.unwrapped.remembered()["cue"] == -1).all()
    obs, *_ = envs.step(np.full(8, 2))                      # left, to the oracle
    np.testing.assert_array_equal(envs.unwrapped.remembered()["cue"], obs[:, 1] > 0)


# ---------------------------------------------------------------------- refusals, pictures, lessons

@pytest.mark.parametrize("flags, says", [
    (["--probe", "--env-id", "CartPoleMasked-v0"], "--probe finds nothing to read out: CartPoleMasked-v0"),
    (["--probe", "--env-id", "CartPole-v1", "--env-kwargs", "{}"], "--probe finds nothing to read out"),
    (["--forget-at", "100"], "no episode lasts so long"),
    (["--show-memory"], "add --render-mode rgb_array"),
    (["--show-memory", "--probe", "--render-mode", "rgb_array"], "leave out --show-memory")])
def test_what_cannot_be_looked_into_is_one_sentence(flags, says, tmp_path, capsys):
    model = str(MODELS / "poc-gru.safetensors")
    with pytest.raises(SystemExit) as stop:
        ppo_recurrent_sbb.main(["--model", model, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and len(error.strip().splitlines()) == 1


def test_a_picture_of_cards_shows_what_was_dealt_and_frames_what_is_asked():
    envs = gym.make_vec("popgym-RepeatPreviousEasy-v0", 1, render_mode="rgb_array")
    envs.reset(seed=0)
    for _ in range(5):
        envs.step(np.zeros(1, int))
    picture, = envs.render()
    middles = picture[12::24, 12::24].reshape(-1, 3)        # [52, 3]
    cards = envs.unwrapped.cards[0]
    assert (middles[6:] == 235).all()
    assert len({tuple(m) for m in middles[:6]}) == len(set(cards[:6]))
    framed = (picture[2::24, 12::24] == 0).all(-1).flatten()
    assert np.flatnonzero(framed).tolist() == [5 + 1 - 4]


def test_the_lessons_show_what_their_page_says(tmp_path, capsys):
    for figure in ("segments", "late", "cue"):
        lessons.main([figure, "--out", str(tmp_path)])
        assert imageio.imread(tmp_path / f"lesson-{figure}.png").shape[1] >= 700
    said = capsys.readouterr().out.splitlines()
    right, late = (float(line.split()[-3]) for line in said if "differ" in line)
    assert right < 1e-4 and late > 1


def test_models_trained_before_these_flags_existed_have_their_defaults():
    _, args, saved, _ = load_model(TMAZE)
    assert "probe" not in json.loads(saved["args"])
    assert (args.show_memory, args.forget_at, args.probe) == (False, 0, False)

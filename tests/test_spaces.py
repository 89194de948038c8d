"""Observations and actions of any task: MiniGrid's symbols, pictures, bounds, what is refused."""
import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import vector
from envs.wrappers import TOKENS, Symbols
from models import Encoder, PolicyHead, to_tensors
from models.images import Image
from tests.helpers import run
from tests.test_door import Stranger

pytestmark = pytest.mark.quick
Box = gym.spaces.Box


def make_envs(env_id, **flags):
    import ppo_recurrent_tbb as ppo

    return vector.make_envs(ppo.Args(env_id=env_id, **flags), 2)


@pytest.mark.parametrize("env_id, mission", [
    ("MiniGrid-Empty-8x8-v0", "get to the green goal square"),
    ("MiniGrid-MemoryS13-v0", "go to the matching object at the end of the hallway"),
    ("BabyAI-GoToRedBall-v0", "go to the red ball"),
])
def test_minigrid_is_read_as_symbols(env_id, mission):
    """Every cell's object, colour and state is a one-hot of its own; the mission is its words."""
    raw = gym.make(env_id).reset(seed=1)[0]                 # make_envs seeds the first one with --seed 1
    envs = make_envs(env_id)
    space = envs.single_observation_space
    obs, _ = envs.reset(seed=1)
    assert np.array_equal(obs["image"][0], raw["image"]) and obs["direction"][0] == raw["direction"]
    assert space["image"].nvec[3, 3].tolist() == [11, 6, 4]
    words = {token: word for word, token in TOKENS.items()}
    assert " ".join(words[token] for token in obs["mission"][0] if token) == mission
    features = Encoder(space)(to_tensors(space, obs, "cpu"))                            # [2, F]
    assert (features[0] != 0).sum() == 7 * 7 * 3 + 1 + space["mission"].shape[0]


@pytest.mark.parametrize("env_id", [
    "MiniGrid-Fetch-8x8-N3-v0", "MiniGrid-GoToObject-6x6-N2-v0", "MiniGrid-PutNear-8x8-N3-v0",
    "MiniGrid-LockedRoom-v0", "BabyAI-BossLevel-v0", "BabyAI-MoveTwoAcrossS5N2-v0"])
def test_missions_fit_and_their_words_are_known(env_id):
    env = gym.make(env_id, disable_env_checker=True)
    symbols = Symbols(env)
    for seed in range(10):
        obs, _ = symbols.reset(seed=seed)
        assert symbols.observation_space["mission"].contains(obs["mission"]) and 1 not in obs["mission"]
        assert symbols.observation_space["image"].contains(obs["image"])
        assert len(env.unwrapped.mission.split()) == np.count_nonzero(obs["mission"])


def test_a_word_that_no_mission_has_is_unknown():
    symbols = Symbols(gym.make("MiniGrid-Empty-8x8-v0"))
    image = symbols.observation_space["image"].sample()
    mission = symbols.observation({"image": image, "mission": "get to, the zeppelin"})["mission"]
    assert mission.tolist() == [TOKENS["get"], TOKENS["to"], TOKENS["the"], 1, 0, 0]


def test_training_and_filming_minigrid(tmp_path, capsys):
    import ppo_recurrent_tbb as ppo

    rows, folder = run(
        tmp_path, ppo, env_id="MiniGrid-Empty-5x5-v0", env_kwargs={"max_steps": 9}, capture_video=True,
        prev_action=True, eval_every=128, eval_episodes=2)
    ppo.main(["--model", str(folder / "model.safetensors"), "--episodes", "1", "--render-mode", "rgb_array"])
    assert len(rows) == 3 and (folder / "model.gif").exists() and list((folder / "videos").iterdir())


class Aim(Stranger):
    """Pays for actions close to 3/4 of the way from the lower to the upper bound."""

    observation_space = Box(-10, 10, (2,), np.float32)

    def step(self, action):
        obs, _, terminated, truncated, infos = super().step(action)
        low, high = self.action_space.low, self.action_space.high
        return obs, -float(abs((action - low) / (high - low) - 0.75).sum()), terminated, truncated, infos


@pytest.mark.parametrize("bounds", [(100, 200), (-0.01, 0.01), (-1000, 1000)])
def test_actions_fill_their_bounds(tmp_path, bounds):
    """An agent that keeps to a bound gets -3.75 an episode of 5 steps at best, -1.25 at the other."""
    import ppo_recurrent_tbb as ppo

    gym.registry.pop("Aim-v0", None)
    gym.register("Aim-v0", type("Bounded", (Aim,), {"action_space": Box(*bounds, (1,), np.float32)}))
    rows, _ = run(
        tmp_path, ppo, env_id="Aim-v0", env_kwargs={}, num_envs=16, total_timesteps=16 * 32 * 20,
        num_minibatches=4, eval_every=16 * 32 * 20, eval_episodes=16)
    assert float(rows[-1]["eval/episodic_return"]) > -0.5


def test_actions_in_the_environments_units():
    action = torch.tensor([[-3.0, 0.3, 0.3, 0.6]])
    space = Box(np.array([100, -1, -np.inf, -2], np.float32), np.array([200, 1, np.inf, 4], np.float32))
    mapped = PolicyHead(3, space).to_env(action)[0]
    assert np.allclose(mapped, [100, 0.3, 0.3, 2.8]) and mapped.dtype == np.float32
    ones = torch.randn(1000, 2) * 2                         # [-1, 1] and no bounds: equal to the bit
    assert np.array_equal(PolicyHead(3, Box(-1, 1, (2,))).to_env(ones), ones.clamp(-1, 1).numpy())
    assert np.array_equal(PolicyHead(3, Box(-np.inf, np.inf, (2,))).to_env(ones), ones.numpy())
    whole = PolicyHead(3, Box(0, 4, (2,), np.int32)).to_env(ones)
    assert set(np.unique(whole)) == {0, 1, 2, 3, 4} and whole.dtype == np.int32
    near = PolicyHead(3, Box(0, 4, (1,), np.int32)).to_env(torch.tensor([[0.9], [-0.9]]))
    assert near.tolist() == [[4], [0]]                      # 3.8 and 0.2: the nearest


@pytest.mark.parametrize("shape, dtype", [
    ((40, 40), np.uint8), ((4, 40, 40, 3), np.uint8), ((4, 3, 40, 30), np.uint8), ((40, 40, 1), np.uint8),
    ((40, 40), np.float32), ((40, 40, 3), np.float16), ((40, 40, 3), np.uint16), ((10, 12), np.uint8)])
def test_pictures_of_every_layout(shape, dtype):
    """They go through convolutions, as numbers from 0 to 1."""
    space = Box(0, 255, shape, dtype)
    encoder = Encoder(space)
    image, = encoder.leaves
    assert isinstance(image, Image)
    seen = []
    image.cnn.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    x, = to_tensors(space, np.stack([space.high, space.low]), "cpu")
    y = encoder((x[None],))
    assert y.shape == (1, 2, encoder.out_size) and y.isfinite().all()
    assert {0.0, 1.0} == {round(v, 6) for v in seen[0].unique().tolist()}


def test_a_stack_shows_its_pictures_as_channels():
    """[K, H, W, C] is equal to the picture [H, W, K C] of its pictures beside each other."""
    stack = np.random.default_rng(0).integers(0, 256, (5, 4, 12, 12, 3), np.uint8)      # [5, K, H, W, C]
    beside = np.moveaxis(stack, 1, 3).reshape(5, 12, 12, 12)
    stacked, flat = Image(Box(0, 255, (4, 12, 12, 3), np.uint8)), Image(Box(0, 255, (12, 12, 12), np.uint8))
    flat.load_state_dict(stacked.state_dict())
    assert torch.allclose(stacked(torch.as_tensor(stack)), flat(torch.as_tensor(beside)), atol=1e-5)


@pytest.mark.parametrize("space, scaled", [
    (Box(0, 255, (128,), np.uint8), (0, 1)),                # a console's RAM
    (Box(0, 255, (4, 128), np.uint8), (0, 1)),
    (Box(-3, 1, (2,), np.int8), (0, 1)),
    (Box(0, 1, (2,), np.int64), (0, 1)),
    (Box(-5, 5, (2,), np.float16), (-5, 5)),                # floats as they are
    (Box(0, 255, (2,), np.float32), (0, 255)),
    (Box(7, 7, (2,), np.int32), (7, 7)),
])
def test_integers_with_bounds_are_scaled(space, scaled):
    x, = to_tensors(space, np.stack([space.low, space.high]), "cpu")
    y = Encoder(space)((x,))
    assert y.dtype == torch.float32
    assert (y[0].unique().tolist(), y[1].unique().tolist()) == ([scaled[0]], [scaled[1]])


def test_integers_without_bounds_are_not():
    space = Box(-(2**31), 2**31 - 1, (2,), np.int32)
    assert Encoder(space)((torch.tensor([[3, -4]]),)).tolist() == [[3, -4]]


def test_training_on_half_floats_and_short_integers(tmp_path):
    """Acting, the replay and the update take them. torch can do little with uint16: they are int64."""
    import dqn_recurrent_sbb as dqn

    for dtype in np.uint16, np.uint32:
        x, = to_tensors(Box(0, 9, (2,), dtype), np.array([[1, 2], [3, 4]], dtype), "cpu")
        assert x.masked_fill(x > 2, 0).tolist() == [[1, 2], [0, 0]]
    for name, space in ("Half-v0", Box(-10, 10, (2,), np.float16)), ("Short-v0", Box(0, 9, (2,), np.uint16)):
        gym.registry.pop(name, None)
        gym.register(name, type("Typed", (Stranger,), {"observation_space": space}))
        assert len(run(tmp_path, dqn, env_id=name, env_kwargs={}, run_name=name)[0]) == 3


@pytest.mark.parametrize("space", [
    gym.spaces.MultiBinary(3), gym.spaces.Dict(a=gym.spaces.Discrete(2)), Box(-1, 1, (2, 2)),
    gym.spaces.MultiDiscrete([[2, 2], [2, 2]])])
@pytest.mark.parametrize("prev_action", [False, True])
def test_actions_that_cannot_be_given_are_refused(tmp_path, capsys, space, prev_action):
    import ppo_recurrent_tbb as ppo

    gym.registry.pop("Odd-v0", None)
    gym.register("Odd-v0", type("Odd", (Stranger,), {
        "action_space": space, "step": lambda self, _: (self.observe(), 0.0, False, False, {})}))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, ppo, env_id="Odd-v0", env_kwargs={}, prev_action=prev_action)
    error, space = capsys.readouterr().err, " ".join(str(space).split())
    assert stop.value.code == 2 and f"action space {space} is not supported: it can be" in error
    assert not list(tmp_path.iterdir())


def test_text_is_refused_with_a_remedy(tmp_path, capsys):
    import ppo_recurrent_tbb as ppo

    gym.registry.pop("Text-v0", None)
    gym.register("Text-v0", type("Text", (Stranger,), {
        "observation_space": gym.spaces.Text(5), "observe": lambda self: "north"}))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, ppo, env_id="Text-v0", env_kwargs={})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is not supported" in error and "gymnasium.ObservationWrapper" in error
    assert not list(tmp_path.iterdir())


def test_the_leaf_that_left_its_space_is_named(tmp_path, capsys):
    import ppo_recurrent_tbb as ppo

    space = gym.spaces.Dict(hand=gym.spaces.Tuple([gym.spaces.Discrete(9), gym.spaces.MultiDiscrete([6, 2])]))
    gym.registry.pop("Hand-v0", None)
    gym.register("Hand-v0", type("Hand", (Stranger,), {
        "observation_space": space, "observe": lambda self: {"hand": (self.t, np.array([6, 1]))}}))
    with pytest.raises(SystemExit):
        run(tmp_path, ppo, env_id="Hand-v0", env_kwargs={})
    error = capsys.readouterr().err
    assert "left its space hand[1]: MultiDiscrete([6 2]) with [6 1] in environment 0" in error


class Gallery(Stranger):
    """Pictures of all kinds, another one in every step; an episode has two steps."""

    observation_space = gym.spaces.Dict({
        "rgb": Box(0, 255, (12, 16, 3), np.uint8), "stack": Box(0.0, 1.0, (2, 4, 6, 6), np.float32),
        "grey": Box(0, 255, (8, 8), np.uint8), "channels_first": Box(0, 255, (3, 7, 8), np.uint8),
        "parts": gym.spaces.Tuple([Box(-1, 1, (4,)), gym.spaces.Discrete(3)])})

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.t, self.seen = 0, [self.observation_space.sample()]
        return self.seen[0], {}

    def step(self, action):
        self.t += 1
        self.seen.append(self.observation_space.sample())
        return self.seen[-1], 0.0, False, self.t == 2, {}


gym.register("Gallery-v0", Gallery)


def mean_of_squares(picture, k):
    """[H, W] -> [H // k, W // k], one square after the other."""
    h, w = picture.shape[0] // k, picture.shape[1] // k
    small = np.array([[picture[k * i:k * i + k, k * j:k * j + k].mean() for j in range(w)] for i in range(h)])
    return small if picture.dtype.kind == "f" else small.round()


def assert_shrunk(small, obs, k):
    for c in range(3):
        assert np.array_equal(small["rgb"][..., c], mean_of_squares(obs["rgb"][..., c], k))
        assert np.array_equal(small["channels_first"][c], mean_of_squares(obs["channels_first"][c], k))
    assert np.array_equal(small["grey"], mean_of_squares(obs["grey"], k))
    for index in np.ndindex(2, 4):
        np.testing.assert_allclose(small["stack"][index], mean_of_squares(obs["stack"][index], k), atol=1e-6)
    assert np.array_equal(small["parts"][0], obs["parts"][0]) and small["parts"][1] == obs["parts"][1]


def test_shrink_images_takes_the_mean_of_each_square():
    """Of every observation, an episode's first and last ones too; what is no picture stays as it is."""
    envs = make_envs("Gallery-v0", shrink_images=3)
    space = envs.single_observation_space
    assert {name: space[name].shape for name in ("rgb", "stack", "grey", "channels_first")} == {
        "rgb": (4, 5, 3), "stack": (2, 4, 2, 2), "grey": (2, 2), "channels_first": (3, 2, 2)}
    first, _ = envs.reset(seed=1)
    tasks = [env.unwrapped for env in envs.unwrapped.envs]
    assert_shrunk({**{k: x[1] for k, x in first.items()}, "parts": [p[1] for p in first["parts"]]},
                  tasks[1].seen[0], 3)
    obs, *_ = envs.step(np.array([0, 0]))
    assert_shrunk({**{k: x[0] for k, x in obs.items()}, "parts": [p[0] for p in obs["parts"]]},
                  tasks[0].seen[1], 3)
    assert envs.observation_space.contains(obs)
    before = [task.seen for task in tasks]
    infos = envs.step(np.array([0, 0]))[4]
    for last_obs, seen in zip(infos["final_obs"], before):
        assert_shrunk(last_obs, seen[2], 3)


@pytest.mark.parametrize("env_id, factor, complaint", [
    ("CartPole-v1", 2, "--shrink-images finds no picture"),
    ("Gallery-v0", 9, "--shrink-images 9 leaves nothing of a picture of 7 x 8"),
    ("Gallery-v0", 5, "--shrink-images 5 leaves too little of a picture: (2, 3, 3)"),
])
def test_shrink_images_is_refused_where_it_makes_no_sense(env_id, factor, complaint, capsys):
    with pytest.raises(SystemExit) as refused:
        make_envs(env_id, shrink_images=factor)
    assert refused.value.code == 2 and complaint in capsys.readouterr().err

"""Numbered pictures: the function, the gradient and the agent are those of the pictures, for less work."""
import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs  # noqa: F401  registers the tasks
from models.encoder import Encoder, leaves
from models.images import Image
from models.views import Views, Whitened
from tests.conftest import DISCRETE, PPO
from tests.helpers import run, spy, weights_of

K = 12
PICTURES = np.random.default_rng(0).integers(0, 256, (K, 20, 20, 3), dtype=np.uint8)
NUMBERED, PICTURED = Views(PICTURES), Views(PICTURES).picture_space
ACTION = gym.spaces.Discrete(5, start=-1)
SPACES = {
    "alone": lambda seen: seen,
    "tuple": lambda seen: gym.spaces.Tuple([seen, ACTION, gym.spaces.Box(-1, 1, (2,))]),
    "dict": lambda seen: gym.spaces.Dict(a=ACTION, seen=seen),
    "two": lambda seen: gym.spaces.Tuple([seen, seen]),
}


def pair(name, size=7, whiten=False):
    """An encoder of numbers and one of pictures with the same weights."""
    encoders = [Encoder(SPACES[name](seen), size, whiten=whiten) for seen in (NUMBERED, PICTURED)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    return encoders


def observations(name, shape=(6, 5)):
    """Leaves of the numbered space, and the same with pictures in place of numbers."""
    drawn = []
    for space in leaves(SPACES[name](NUMBERED)):
        if isinstance(space, gym.spaces.Discrete):
            drawn.append(torch.randint(int(space.start), int(space.start + space.n), shape))
        else:
            drawn.append(torch.rand(*shape, *space.shape))
    shown = [torch.from_numpy(PICTURES)[x] if isinstance(space, Views) else x
             for x, space in zip(drawn, leaves(SPACES[name](NUMBERED)))]
    return tuple(drawn), tuple(shown)


@pytest.mark.quick
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("size", [0, 7])
@pytest.mark.parametrize("name", SPACES)
def test_same_function_and_gradient_as_with_pictures(name, size, whiten):
    (numbered, pictured), (numbers, pictures) = pair(name, size, whiten), observations(name)
    ys = numbered(numbers), pictured(pictures)
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(numbered(numbers), ys[1], rtol=1e-4, atol=1e-4)
    if not ys[0].requires_grad:
        assert whiten and size == 0                         # whitening is not trained
        return
    weight = torch.randn_like(ys[0])
    for y in ys:
        (y * weight).sum().backward()
    for p, q in zip(numbered.parameters(), pictured.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm()


def fused_step(encoder, numbers):
    encoder(numbers).square().sum().backward()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        encoder(numbers)                                    # between gradient and step, as double Q-learning
    optimizer.step()


def target_update(encoder, numbers):
    """As the scripts do it: after a step of the online network, through .data."""
    online, other = pair("alone")
    fused_step(online, numbers)
    for target, parameter in zip(encoder.parameters(), other.parameters(), strict=True):
        target.data.lerp_(parameter.data, 0.5)


def loading(encoder, _):
    encoder.load_state_dict({name: 2 * x for name, x in encoder.state_dict().items()})


@pytest.mark.quick
@pytest.mark.parametrize("change", [fused_step, target_update, loading])
def test_no_picture_is_remembered_from_other_weights(change):
    (numbered, pictured), (numbers, pictures) = pair("alone"), observations("alone")
    with torch.inference_mode():
        before = numbered(numbers)
    change(numbered, numbers)
    pictured.load_state_dict(numbered.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(numbered(numbers), pictured(pictures))
        assert not torch.equal(numbered(numbers), before)


@pytest.mark.quick
def test_a_picture_is_encoded_once(monkeypatch):
    """Once a minibatch in training; while acting once until the next gradient step."""
    encoder, encoded = pair("two")[0], spy(monkeypatch, Image, "encode")

    def count():
        numbers = [len(call.args[1]) for call in encoded]
        encoded.clear()
        return numbers

    view = torch.tensor([[3, 1, 3], [1, 1, 3]])
    encoder((view, view + 1))
    assert count() == [2, 2]
    with torch.inference_mode():
        encoder((view[:1], view[:1]))
        assert count() == [2, 2]
        encoder((view, view + 1))                           # 2 and 4 are new to the second leaf
        assert count() == [2]
    with torch.no_grad():
        encoder((view, view + 1))
        assert count() == []
    fused_step(encoder, (view, view))
    count()
    with torch.inference_mode():
        encoder((view, view))
    assert count() == [2, 2]


@pytest.mark.quick
def test_whitened_pictures_are_equally_far_apart():
    """K pictures have K - 1 principal components: their codes are the corners of a regular simplex."""
    whitened = Whitened(NUMBERED)
    codes = whitened(torch.arange(K))                       # [K, out_size]
    assert codes.shape == (K, whitened.out_size) and not [*whitened.parameters()]
    assert codes.square().mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(codes.mean(0), torch.zeros(whitened.out_size), rtol=0, atol=1e-3)
    distances = torch.pdist(codes)
    torch.testing.assert_close(distances, distances.mean().expand_as(distances), rtol=1e-3, atol=0)


@pytest.mark.quick
def test_pictures_without_a_difference_and_few_directions():
    """Equal pictures have equal codes; directions without spread are 0, not noise; few are the first."""
    images = PICTURES[[0, 1, 2, 0]]
    codes = Whitened(Views(images))(torch.arange(4))
    assert torch.equal(codes[0], codes[3]) and codes.isfinite().all()
    assert (codes.abs().amax(0) > 0).sum() == 2             # three different pictures span a plane
    few = Whitened(NUMBERED, out_size=4)(torch.arange(K))
    assert few.square().mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(few.T @ few / K, torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.quick
def test_a_loaded_model_whitens_other_pictures_as_it_learned_to():
    learned, playing = Whitened(NUMBERED), Whitened(Views(PICTURES[::-1][:5]))
    playing(torch.arange(5))                                # it has a table of its own
    playing.load_state_dict(learned.state_dict())
    assert torch.equal(playing(torch.arange(5)), learned(torch.arange(K - 1, K - 6, -1)))


@pytest.mark.quick
@pytest.mark.parametrize("task, complaint", [
    ({"env_id": "CartPole-v1"}, "--whiten-images finds no picture"),
    ({"env_id": "MinigridMemory-v0", "env_kwargs": {"views": False}}, "can be trained on numbered pictures"),
])
def test_whitening_is_refused_without_numbered_pictures(task, complaint, capsys, tmp_path):
    import ppo_recurrent_tbb

    with pytest.raises(SystemExit) as refused:
        run(tmp_path, ppo_recurrent_tbb, whiten_images=True, **{"env_kwargs": {}, **task})
    assert refused.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("script", [*PPO, *DISCRETE], indirect=True)
def test_an_agent_of_whitened_pictures_plays_on_pictures(tmp_path, script, capsys):
    kwargs = {"tile_size": 8, "max_steps": 9}
    folder = run(tmp_path, script, env_id="MinigridMemory-v0", env_kwargs=kwargs, shrink_images=2,
                 whiten_images=True, total_timesteps=256, learning_starts=128)[1]
    names = weights_of(folder).keys()
    assert any("directions" in name for name in names) and not any("cnn" in name for name in names)
    told = []
    for views in (True, False):
        capsys.readouterr()
        script.main(["--model", f"{folder}/model.safetensors", "--env-kwargs",
                     json.dumps({**kwargs, "views": views}), "--episodes", "5", "--render-mode", "none"])
        told.append(capsys.readouterr().out)
    assert "mean of 5" in told[0] and told[0] == told[1]


@pytest.mark.quick
def test_an_agent_plays_where_pictures_have_its_size():
    """horizon.py --sweep asks for the same space."""
    assert NUMBERED == Views(PICTURES[:3]) and NUMBERED != Views(PICTURES[:, :10])
    assert NUMBERED != gym.spaces.Discrete(K) and repr(NUMBERED) == "Views(12 pictures of 20 x 20 x 3)"


CASES = {"plain": {}, "inputs": {"prev_action": True, "prev_reward": True}, "shrunk": {"shrink_images": 3}}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("script", [*PPO, *DISCRETE], indirect=True)
def test_training_is_the_same_as_with_pictures(tmp_path, script, changes, capsys):
    """Same weights after the first gradient steps but for rounding. And --model plays on pictures too."""
    folders = []
    for views in (True, False):
        flags = {
            "env_id": "MinigridMemory-v0", "env_kwargs": {"views": views, "tile_size": 4, "max_steps": 9},
            "encoder_size": 16, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 256,
            "learning_starts": 128, "learning_rate": (1e-4,), "policy_lr": (1e-4,), "q_lr": (1e-4,)}
        folders.append(run(tmp_path, script, run_name=f"{views}", **flags, **changes)[1])
    weights = [weights_of(folder) for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][name], rtol=1e-3, atol=2e-5, msg=name)
    capsys.readouterr()
    told = []
    for views in (True, False):
        kwargs = json.dumps({"views": views, "tile_size": 4, "max_steps": 9})
        script.main(["--model", f"{folders[0]}/model.safetensors", "--env-kwargs", kwargs, "--episodes", "5",
                     "--render-mode", "none"])
        told.append(capsys.readouterr().out)
    assert "mean of 5" in told[0] and told[0] == told[1]

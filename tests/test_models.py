"""Encoders for every space, heads against torch.distributions, running statistics against numpy."""
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch.utils._python_dispatch import TorchDispatchMode

from models import MEMORIES, Encoder, PolicyHead, RunningMeanStd, to_tensors
from models.cpu_speed import Linear
from models.images import distinct
from models.layers import SPAN
from tests.conftest import ROOT

SPACES = {
    "vector": (spaces.Box(-1, 1, (5,), np.float32), 5),
    "float64": (spaces.Box(-1, 1, (2, 3), np.float64), 6),
    "scalar": (spaces.Box(-1, 1, (), np.float32), 1),
    "nature HWC": (spaces.Box(0, 255, (84, 84, 3), np.uint8), 3136),
    "nature CHW": (spaces.Box(0, 255, (4, 84, 84), np.uint8), 3136),
    "small HWC": (spaces.Box(0, 10, (8, 8, 3), np.uint8), 256),
    "small CHW": (spaces.Box(0, 255, (3, 9, 9), np.uint8), 576),
    "cells HWC": (spaces.Box(0, 10, (3, 3, 3), np.uint8), 27),
    "cells CHW": (spaces.Box(0, 255, (3, 7, 7), np.uint8), 147),
    "discrete": (spaces.Discrete(4, start=-1), 4),
    "multi-discrete": (spaces.MultiDiscrete([2, 5, 3]), 10),
    "multi-discrete 2d": (spaces.MultiDiscrete([[2, 5], [3, 3]]), 13),
    "multi-binary": (spaces.MultiBinary(6), 6),
    "tuple": (spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (3,), np.float32)]), 5),
    "dict": (spaces.Dict(b=spaces.Discrete(2), a=spaces.Dict(x=spaces.MultiBinary(2), y=spaces.Discrete(3))),
             7),
}
UNSUPPORTED = [spaces.Text(5), spaces.Dict(m=spaces.Text(5)), spaces.Sequence(spaces.Discrete(2))]


@pytest.mark.quick
@pytest.mark.parametrize("name", SPACES)
def test_encoder_encodes_every_space_at_any_leading_shape(name):
    space, width = SPACES[name]
    encoder, sized = Encoder(space), Encoder(space, size=9)
    batched = batch_space(space, 6)
    batched.seed(0)
    obs = to_tensors(space, batched.sample(), "cpu")        # leaves of [6, ...]
    features = encoder(obs)
    assert features.shape == (6, width) == (6, encoder.out_size) and features.dtype == torch.float32
    assert sized(obs).shape == (6, 9)
    as_sequence = encoder(tuple(o.view(3, 2, *o.shape[1:]) for o in obs))
    torch.testing.assert_close(as_sequence, features.view(3, 2, width))         # step by step
    assert (features[0] != features[1]).any() or name in ("discrete", "multi-binary")


@pytest.mark.quick
def test_one_hots_are_one_hot():
    encoder = Encoder(spaces.MultiDiscrete([2, 3], start=[0, 5]))
    out = encoder((torch.tensor([[1, 5], [0, 7]]),))
    assert (out > 0).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2))        # unit mean square
    out = Encoder(spaces.Discrete(3, start=-1))((torch.tensor([-1, 1]),))
    assert (out > 0).int().tolist() == [[1, 0, 0], [0, 0, 1]]


def test_leaves_keep_the_order_of_the_space():
    space = spaces.Dict(z=spaces.Discrete(2), a=spaces.Discrete(9))
    # whatever order the environment uses
    obs = to_tensors(space, {"a": np.array([7]), "z": np.array([1])}, "cpu")
    assert [int(o) for o in obs] == [1, 7]


@pytest.mark.parametrize("space", UNSUPPORTED)
def test_unsupported_observations_are_named(space):
    with pytest.raises(ValueError, match="not supported"):
        Encoder(space)


@pytest.mark.quick
def test_encoding_each_distinct_image_once_changes_neither_values_nor_gradients():
    torch.manual_seed(0)
    encoder = Encoder(spaces.Box(0, 255, (8, 8, 3), np.uint8))
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)[torch.randint(4, (30,))]
    images[7, 0, 0, 0] += 1                                 # differs in one pixel
    kept, where = distinct(images)
    assert len(kept) == len(images.flatten(1).unique(dim=0)) and (kept[where] == images).all()
    weight = torch.randn(30, encoder.out_size)
    once, each = encoder((images,)), encoder.leaves[0].cnn(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(once, each)
    grads_once = torch.autograd.grad((once * weight).sum(), list(encoder.parameters()))
    grads_each = torch.autograd.grad((each * weight).sum(), list(encoder.parameters()))
    torch.testing.assert_close(grads_once, grads_each, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_categorical_agrees_with_torch():
    torch.manual_seed(0)
    head = PolicyHead(5, spaces.Discrete(4))
    head.linear.weight.data.mul_(100)
    y = torch.randn(3, 2, 5)
    ours, ref = head(y), torch.distributions.Categorical(logits=head.linear(y))
    action = ref.sample()
    torch.testing.assert_close(ours.log_prob(action), ref.log_prob(action))
    torch.testing.assert_close(ours.entropy(), ref.entropy())
    assert (ours.mode() == ref.probs.argmax(-1)).all()
    samples = torch.stack([head(y[:1, :1]).sample() for _ in range(4000)]).flatten()
    shares = samples.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, ref.probs[0, 0], rtol=0, atol=0.03)  # 4 standard errors


@pytest.mark.quick
def test_multi_categorical_is_the_product_of_its_branches():
    torch.manual_seed(0)
    head = PolicyHead(5, spaces.MultiDiscrete([2, 3]))
    head.linear.weight.data.mul_(100)
    y = torch.randn(7, 5)
    refs = [torch.distributions.Categorical(logits=x) for x in head.linear(y).split([2, 3], -1)]
    action = head(y).sample()
    assert action.shape == (7, 2)
    log_prob = sum(r.log_prob(a) for r, a in zip(refs, action.T))
    torch.testing.assert_close(head(y).log_prob(action), log_prob)
    torch.testing.assert_close(head(y).entropy(), sum(r.entropy() for r in refs))


@pytest.mark.quick
def test_gaussian_agrees_with_torch_and_actions_are_clipped_for_the_environment():
    torch.manual_seed(0)
    head = PolicyHead(5, spaces.Box(-0.1, 0.1, (3,), np.float32))
    y = torch.randn(7, 5)
    ref = torch.distributions.Normal(head.linear(y), 1.0)
    action = head(y).sample()
    torch.testing.assert_close(head(y).log_prob(action), ref.log_prob(action).sum(-1))
    torch.testing.assert_close(head(y).entropy(), ref.entropy().sum(-1))
    assert action.abs().max() > 0.1 and np.abs(head.to_env(action)).max() <= np.float32(0.1)


def test_integer_actions_begin_where_the_space_does():
    head = PolicyHead(5, spaces.Discrete(3, start=4))
    assert head.to_env(torch.tensor([0, 2])).tolist() == [4, 6]


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Dict(a=spaces.Discrete(2))])
def test_unsupported_actions_are_named(space):
    with pytest.raises(ValueError, match="not supported"):
        PolicyHead(5, space)


@pytest.mark.quick
def test_running_statistics_equal_numpys():
    torch.manual_seed(0)
    stats, data = RunningMeanStd(3), torch.randn(50, 4, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2
    for piece in data.split([7, 13, 30]):
        stats.update(piece)
    flat = data.reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(stats.mean, flat.mean(0))
    np.testing.assert_allclose(stats.var, flat.var(0))
    assert stats.normalize(data).std().item() == pytest.approx(1, abs=0.01)
    assert len(stats.state_dict()) == 3                     # they travel with the model


def test_encoder_normalises_vectors_only_and_only_when_asked():
    space = spaces.Tuple([spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(2)])
    obs = (torch.randn(100, 2) * 5 + 3, torch.randint(2, (100,)))
    for normalize in (False, True):
        encoder = Encoder(space, normalize=normalize)
        encoder.update_stats(obs)
        out = encoder(obs)
        assert abs(out[:, :2].mean().item()) < 0.01 if normalize else (out[:, :2] == obs[0]).all()
        assert (out[:, 2:].count_nonzero(-1) == 1).all()


def test_initial_policy_is_uniform():
    dist = PolicyHead(64, spaces.Discrete(4))(torch.randn(100, 64))
    assert (dist.logp.exp() - 0.25).abs().max() < 0.02


@pytest.mark.quick
@pytest.mark.parametrize("kwargs", [{}, {"span": 500}])
@pytest.mark.parametrize("name, forget_block", [("gru", 1), ("lstm", 1)])
def test_gates_remember_for_1_to_span_steps(name, forget_block, kwargs):
    """With inputs and state 0 a unit keeps 1 - 1/tau of its state a step, with tau from 1 to span + 1."""
    torch.manual_seed(0)
    rnn, span = MEMORIES[name](3, 200, num_layers=2, **kwargs).rnn, kwargs.get("span", SPAN)
    for layer in range(2):
        bias = getattr(rnn, f"bias_ih_l{layer}") + getattr(rnn, f"bias_hh_l{layer}")
        bias = bias.detach().split(200)
        tau = 1 / (1 - bias[forget_block].sigmoid())
        assert 2 <= tau.min() < span / 8 and 0.9 * span < tau.max() <= span + 1
        if name == "lstm":
            torch.testing.assert_close(bias[0], -bias[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"span": 500}])
@pytest.mark.parametrize("name, share", [("mingru", 1), ("minlstm", 0.5)])
def test_gates_of_linear_recurrences_remember_for_1_to_span_steps(name, share, kwargs):
    """The same of minGRU; minLSTM's forget gate is 1/2 at first, which halves tau."""
    torch.manual_seed(0)
    layers, span = MEMORIES[name](3, 200, 2, **kwargs).layers, kwargs.get("span", SPAN)
    for layer in layers:
        tau = 1 / (1 - layer.lift(torch.zeros(1, 1, 200))[0])
        assert 1 < tau.min() < span / 8 and 0.8 * span < tau.max() / share < 1.2 * span


def test_observations_with_negative_strides_are_taken():
    flipped = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]
    (tensor,) = to_tensors(spaces.Box(0, 9, (3,), np.float32), flipped, "cpu")
    assert tensor.tolist() == flipped.tolist()


def test_integer_box_actions_stay_integers():
    head = PolicyHead(5, spaces.Box(0, 3, (2,), np.int64))
    assert head.to_env(torch.tensor([[0.2, 9.0]])).tolist() == [[2, 3]]         # 1.5 + 1.5 x 0.2 = 1.8


@pytest.mark.quick
def test_the_stack_tells_its_layers_where_an_episode_starts():
    """Beside the features, the embedding sees 1, 1/2, 1/4, ... from every start, and from a fresh state."""
    stack, seen = MEMORIES["mingru"](2, 4), []
    stack.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0, -1]))
    start = torch.zeros(6, 1, dtype=torch.bool)
    start[3] = True
    _, state = stack(torch.zeros(6, 1, 2), stack.initial_state(1), start)
    stack(torch.zeros(1, 1, 2), state, start[:1])           # goes on where the call before stopped
    assert torch.cat(seen).tolist() == [1, 0.5, 0.25, 1, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("name, kwargs, shapes", [
    ("lru", {"state_size": 5}, [(4, 1), (4, 5)]),
    ("ffm", {"contexts": 2}, [(4, 1), (4, 4, 2)]),
    ("s6", {"state_size": 3}, [(4, 1), (4, 8, 3)]),
    ("linear-attention", {"heads": 1, "key_size": 3}, [(4, 1), (4, 1, 2, 3)]),
    ("deltanet", {"heads": 3, "key_size": 4}, [(4, 1), (4, 3, 4, 4)])])
def test_layers_take_arguments_of_their_own(name, kwargs, shapes):
    """--memory-kwargs: other sizes of the state, the same law."""
    memory = MEMORIES[name](3, 8, 1, **kwargs)
    x, start = torch.randn(40, 4, 3), torch.rand(40, 4) < 0.1
    state = memory.initial_state(4)
    assert [tuple(s.shape) for s in state] == shapes
    y, _ = memory(x, state, start)
    for t in range(40):
        y_t, state = memory(x[t : t + 1], state, start[t : t + 1])
        torch.testing.assert_close(y_t, y[t : t + 1], rtol=1e-4, atol=1e-5)


def test_whole_episodes_through_gpt_hold_no_matrix_of_steps_by_steps():
    """No operation of a forward and backward pass over T steps has a result of T x T numbers."""
    T, B, largest = 1_000, 2, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            results = function(*args, **(kwargs or {}))
            for x in results if isinstance(results, (tuple, list)) else [results]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return results

    memory = MEMORIES["gpt"](8, 16, 2, window=T)
    start = torch.arange(T)[:, None].expand(T, B) == 0
    with Watch():
        y, _ = memory(torch.randn(T, B, 8), memory.initial_state(B), start)
        y.sum().backward()
    assert B * T * 16 < largest < T * T / 2


@pytest.mark.quick
@pytest.mark.parametrize("x", [torch.randn(16, 50, 128), torch.randn(50, 16, 128).transpose(0, 1),
                               torch.randn(512, 1, 128)])
def test_linear_equals_torchs(x):
    """With its gradients: for many steps, for a time-major tape, for the single step of acting."""
    ours = Linear(128, 256)
    layers = ours, torch.nn.Linear(128, 256)
    layers[1].load_state_dict(ours.state_dict())
    weight, results = torch.randn(*x.shape[:2], 256), []
    for layer in layers:
        y = layer(x.requires_grad_())
        results.append((y, *torch.autograd.grad((y * weight).sum(), (x, layer.weight, layer.bias))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_linear_over_many_steps_is_onednns_and_copies_no_activations():
    x, layer = torch.randn(16, 50, 128, requires_grad=True), Linear(128, 256)
    with torch.profiler.profile(record_shapes=True) as profile:
        y = layer(x)
        torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))
    names = {event.name for event in profile.events()}
    assert {"aten::mkldnn_convolution", "aten::convolution_backward"} <= names
    assert not {"aten::addmm", "aten::mm"} & names
    for event in profile.events():
        if event.name == "aten::copy_":
            assert all(np.prod(shape) < x.numel() for shape in event.input_shapes)


@pytest.mark.parametrize("B, T", [(512, 1), (8, 50), (50, 8)])
def test_linear_over_few_rows_or_short_ones_is_no_convolution(B, T):
    """There it would be the slower one."""
    with torch.profiler.profile() as profile:
        Linear(128, 256)(torch.randn(B, T, 128))
    names = {event.name for event in profile.events()}
    assert "aten::linear" in names and "aten::convolution" not in names


FAULTS = """
import resource, torch
from models import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)                                   # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_the_memory_of_freed_tensors_is_used_again():
    """Without page faults. To fetch 640 MiB from the system makes at least 300 of them (2 MiB pages)."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    assert before > 300 and after < before / 10


@pytest.mark.quick
@pytest.mark.parametrize("low", [-20.0, -40.0])
def test_low_keys_and_queries(low):
    """1 + elu is 0 there in float32; what linear attention divides by must not be."""
    torch.manual_seed(0)
    memory = MEMORIES["linear-attention"](3, 16)
    layer = memory.layers[0]
    layer.qkv.bias.data[: 2 * layer.heads * layer.key_size] = low
    y, state = memory(torch.randn(7, 2, 3), memory.initial_state(2), torch.zeros(7, 2, dtype=torch.bool))
    assert y.isfinite().all() and all(s.isfinite().all() for s in state)

"""The laws that every memory in the registry obeys: a new memory is tested once it is registered.

The interface is described in models/memory.py.
"""
import pytest
import torch

from models import MEMORIES

T, B, F, H = 23, 5, 3, 8
pytestmark = [
    pytest.mark.parametrize("layers", [1, 2]),
    pytest.mark.parametrize("name", list(MEMORIES)),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make(name, layers, dtype=torch.float64, p_start=0.25):
    torch.manual_seed(0)
    memory = MEMORIES[name](F, H, layers).to(dtype)
    x, start = torch.randn(T, B, F, dtype=dtype), torch.rand(T, B) < p_start
    state = tuple(torch.randn_like(s) for s in memory.initial_state(B))     # a carried, non-zero state
    return memory, x, state, start


def stepwise(memory, x, state, start):
    ys = []
    for t in range(len(x)):
        y, state = memory(x[t : t + 1], state, start[t : t + 1])
        ys.append(y)
    return torch.cat(ys), state


@pytest.mark.quick
@dtypes
def test_law_1_acting_equals_training(name, layers, dtype):
    memory, x, state, start = make(name, layers, dtype)
    y, final = memory(x, state, start)
    y_steps, final_steps = stepwise(memory, x, state, start)
    assert y.shape == (T, B, memory.hidden_size)
    torch.testing.assert_close(y_steps, y)
    torch.testing.assert_close(final_steps, final)


@dtypes
@pytest.mark.parametrize("cut", [1, 9, T - 1])
def test_law_2_a_call_may_be_split_anywhere(name, layers, dtype, cut):
    memory, x, state, start = make(name, layers, dtype)
    y, final = memory(x, state, start)
    y_left, middle = memory(x[:cut], state, start[:cut])
    y_right, end = memory(x[cut:], middle, start[cut:])
    torch.testing.assert_close(torch.cat([y_left, y_right]), y)
    torch.testing.assert_close(end, final)


@pytest.mark.quick
@dtypes
def test_law_3_a_reset_forgets_values_and_gradients(name, layers, dtype):
    memory, x, state, start = make(name, layers, dtype, p_start=0.0)
    k = 11
    start[k] = True
    x.requires_grad_()
    y, final = memory(x, state, start)
    no_start = torch.zeros(T - k, B, dtype=torch.bool)
    fresh, fresh_final = memory(x[k:], memory.initial_state(B), no_start)
    torch.testing.assert_close(y[k:], fresh)                # as if the episode stood alone
    torch.testing.assert_close(final, fresh_final)
    (grad,) = torch.autograd.grad(y[k:].sum(), x)
    assert grad[:k].abs().max() == 0 and grad[k:].abs().max() > 0


@pytest.mark.quick
def test_law_4_start_overrides_the_carried_state(name, layers):
    memory, x, state, start = make(name, layers)
    start[0] = True
    y, final = memory(x, state, start)
    y_other, final_other = memory(x, tuple(1e3 * s + 7 for s in state), start)
    torch.testing.assert_close((y_other, final_other), (y, final), rtol=0, atol=0)


@pytest.mark.quick
def test_law_5_rows_are_independent_and_states_batch_first(name, layers):
    memory, x, state, start = make(name, layers)
    y, final = memory(x, state, start)
    rows = torch.tensor([3, 0, 4])
    y_rows, final_rows = memory(x[:, rows], tuple(s[rows] for s in state), start[:, rows])
    torch.testing.assert_close(y_rows, y[:, rows])
    torch.testing.assert_close(final_rows, tuple(s[rows] for s in final))


@pytest.mark.parametrize("length", [1, 2, 7, 32, 67])       # chunks: a scan's has 16 steps, a matrix's 32
def test_law_6_one_call_equals_the_loop_in_values_and_gradients(name, layers, length):
    memory, _, state, _ = make(name, layers)
    x, start = torch.randn(length, B, F, dtype=torch.float64), torch.rand(length, B) < 0.2
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in state), *memory.parameters()]
    weight = torch.randn(length, B, H, dtype=torch.float64)
    y, _ = memory(x, state, start)
    y_loop, _ = stepwise(memory, x, state, start)
    torch.testing.assert_close(y, y_loop)
    grad = torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)
    grad_loop = torch.autograd.grad((y_loop * weight).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(grad, grad_loop)


def test_law_7_it_can_remember(name, layers):
    """One of 4 cues at the first step, 7 steps of noise, then the question. Two episodes in a row."""
    torch.manual_seed(1)
    hidden = 32
    memory, readout = MEMORIES[name](6, hidden, layers), torch.nn.Linear(hidden, 4)
    optimizer = torch.optim.Adam([*memory.parameters(), *readout.parameters()], lr=1e-2)

    def batch(size):
        cue = torch.randint(4, (2, size))
        x = torch.zeros(16, size, 6)
        x[..., 5] = torch.randn(16, size)
        x[[7, 15], :, 4] = 1
        x[0].scatter_(1, cue[0][:, None], 1.0), x[8].scatter_(1, cue[1][:, None], 1.0)
        start = torch.zeros(16, size, dtype=torch.bool)
        start[[0, 8]] = True
        y, _ = memory(x, memory.initial_state(size), start)
        return readout(y[[7, 15]]), cue

    for _ in range(250):
        logits, cue = batch(32)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), cue.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:                                     # every batch is new: this is no overfitting
            break
    with torch.no_grad():
        logits, cue = batch(500)
    accuracy = (logits.argmax(-1) == cue).float().mean().item()
    assert accuracy < 0.35 if name == "none" else accuracy > 0.95


def test_the_state_is_a_flat_tuple_and_none_is_refused(name, layers):
    memory, x, state, start = make(name, layers)
    assert isinstance(state, tuple) and all(s.shape[0] == B for s in state)
    if state:
        with pytest.raises((TypeError, AttributeError)):    # torch's own layers would take zeros
            memory(x, None, start)


def test_no_tensor_of_a_state_is_another_one(name, layers):
    """Exporters take what shares its memory for one input."""
    memory = make(name, layers)[0]
    pointers = [s.data_ptr() for s in memory.initial_state(3)]
    assert len(pointers) == len(set(pointers))

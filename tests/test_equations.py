"""Every memory against the equations of its docstring and paper, as tests/literal.py writes them out.

The laws of tests/test_memory.py hold one memory to itself; here it is held to what it should be. float64.
"""
import functools
import math

import pytest
import torch

from models import MEMORIES
from models.memory import MONOIDS
from tests import literal

T, B, F, H = 20, 3, 5, 8
# Row 0 goes on with its episode, then starts two. Row 1 starts at the first and the last step, and two in
# a row. Row 2 never starts.
STARTS = [(5, 0), (16, 0), (0, 1), (9, 1), (10, 1), (19, 1)]

LAYERS = [(name, {}) for name in MONOIDS]
LAYERS += [("lru", {"state_size": 5}), ("s6", {"state_size": 3}), ("ffm", {"contexts": 2})]
LAYERS += [(name, {"key_size": 4, "heads": heads})
           for name in ("linear-attention", "deltanet") for heads in (1, 2, 3)]


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def starts():
    start = torch.zeros(T, B, dtype=torch.bool)
    for t, row in STARTS:
        start[t, row] = True
    return start


def with_random_weights(memory):
    """New weights hide bugs: many biases are 0, all norms multiply by 1."""
    with torch.no_grad():
        for p in memory.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return memory


def carried(memory, step, size):
    """The state after six earlier steps: row 0 is 4 steps old, row 1 6, row 2 has not begun."""
    start = torch.zeros(6, B, dtype=torch.bool)
    start[2, 0] = True
    x = torch.randn(6, B, size)
    _, state = literal.loop(step, memory, x, memory.initial_state(B), start)
    fresh = memory.initial_state(B)
    return tuple(torch.cat([s[:2], new[2:]]).detach() for s, new in zip(state, fresh))


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def assert_equals_its_equations(memory, step, size):
    memory = with_random_weights(memory)
    x, state = torch.randn(T, B, size), carried(memory, step, size)
    states = {f"state {i}": s for i, s in enumerate(state)}
    leaves = {"x": x, **states, **dict(memory.named_parameters())}
    for leaf in leaves.values():
        leaf.requires_grad_()
    direction = torch.randn(T, B, H)

    def everything(y, final):
        projection = (y * direction).sum()
        grads = torch.autograd.grad(projection, list(leaves.values()), materialize_grads=True)
        return {"y": y, "final state": final, "gradients": dict(zip(leaves, grads))}

    found = everything(*memory(x, state, starts()))
    right = everything(*literal.loop(step, memory, x, state, starts()))
    assert_close(found, right)
    assert_close(acting(memory, x, state, starts()), (right["y"], right["final state"]))


@torch.no_grad()
def acting(memory, x, state, start):
    ys = []
    for t in range(T):
        y, state = memory(x[t : t + 1], state, start[t : t + 1])
        ys.append(y[0])
    return torch.stack(ys), state


@pytest.mark.quick
@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_equals_its_equations(name):
    assert_equals_its_equations(MEMORIES[name](F, H, 2), literal.MEMORIES[name], F)


@pytest.mark.parametrize("window", [1, 2, 5, 23])       # 23: reached by the row that never starts
def test_gpt_equals_its_equations_with_any_window(window):
    gpt = MEMORIES["gpt"](F, H, 2, window=window, head_size=4)
    assert_equals_its_equations(gpt, functools.partial(literal.gpt, window=window), F)


@pytest.mark.parametrize("name, kwargs", LAYERS, ids=str)
def test_a_layer_equals_its_equations(name, kwargs):
    assert_equals_its_equations(MONOIDS[name](H, **kwargs), literal.LAYERS[name], H)


def test_every_memory_has_its_equations():
    assert literal.MEMORIES.keys() == MEMORIES.keys() and literal.LAYERS.keys() == MONOIDS.keys()


@pytest.mark.parametrize("name", MEMORIES)
def test_the_final_state_after_a_reset_is_that_of_a_fresh_episode(name):
    memory = with_random_weights(MEMORIES[name](F, H, 2))
    x, start = torch.randn(T, B, F), starts()
    y, final = memory(x, carried(memory, literal.MEMORIES[name], F), start)
    for row, last in ((0, 16), (1, 19)):
        alone = torch.zeros(T - last, 1, dtype=torch.bool)
        fresh_y, fresh = memory(x[last:, row : row + 1], memory.initial_state(1), alone)
        assert_close(y[last:, row : row + 1], fresh_y)
        assert_close(tuple(s[row : row + 1] for s in final), fresh)


# ---------------------------------------------------------------------- what docstrings say of new weights

@pytest.mark.quick
@pytest.mark.parametrize("ring", [{}, {"r_min": 0.2, "r_max": 0.8}])
def test_a_new_lru_is_uniform_over_the_ring_and_gamma_normalises_it(ring):
    lru = MONOIDS["lru"](4, state_size=4000, **ring)
    r_min, r_max = ring.values() or (0.9, 0.999)
    modulus, angle = torch.exp(-torch.exp(lru.nu)), torch.exp(lru.theta)
    assert r_min <= modulus.min() and modulus.max() <= r_max
    assert_uniform(modulus**2, r_min**2, r_max**2)          # areas of the ring, not radii
    assert_uniform(angle, 0, 2 * math.pi)
    torch.testing.assert_close(torch.exp(lru.gamma_log), torch.sqrt(1 - modulus**2))


@pytest.mark.quick
def test_a_new_s5_is_the_normal_part_of_hippo_legs():
    """Smith et al. 2023, appendix B.1.1: LegS + p p^T, its eigenvalues in conjugate pairs."""
    N = 16
    legs = torch.zeros(N, N)
    for n in range(N):
        legs[n, n] = -(n + 1)
        for k in range(n):
            legs[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
    p = torch.tensor([math.sqrt(n + 0.5) for n in range(N)])
    eigenvalues = torch.linalg.eigvals(legs + torch.outer(p, p))
    one_of_each_pair = eigenvalues[eigenvalues.imag > 0]
    s5 = MONOIDS["s5"](N)
    L = torch.complex(-torch.exp(s5.log_real), s5.imaginary)
    torch.testing.assert_close(L, one_of_each_pair[one_of_each_pair.imag.argsort()])


@pytest.mark.quick
def test_a_new_s5_reads_and_writes_with_unit_scale():
    """Rows of B and C are of length 1, up to chance. C.weight holds 2 C."""
    s5 = MONOIDS["s5"](400)
    torch.testing.assert_close(s5.B.weight.std(), torch.tensor(800**-0.5), rtol=0.02, atol=0)
    torch.testing.assert_close(s5.C.weight.std(), torch.tensor(2 * 800**-0.5), rtol=0.02, atol=0)
    assert_uniform(s5.log_dt, math.log(0.001), math.log(0.1), tolerance=0.1)


@pytest.mark.quick
def test_a_new_s6_decays_at_rates_1_to_n_and_steps_of_a_thousandth_to_a_tenth():
    s6 = MONOIDS["s6"](400)
    torch.testing.assert_close(torch.exp(s6.A_log), torch.arange(1.0, 9).expand(400, 8))
    Delta = literal.softplus(s6.dt.bias)
    assert_uniform(torch.log(Delta), math.log(0.001), math.log(0.1), tolerance=0.1)


@pytest.mark.quick
def test_a_new_ffm_has_even_decays_and_even_periods():
    ffm = MONOIDS["ffm"](24)
    step = (0.5 - 1e-6) / 5
    torch.testing.assert_close(ffm.alpha, torch.tensor([1e-6 + step * i for i in range(6)]))
    periods = 2 * math.pi / ffm.omega
    torch.testing.assert_close(periods, torch.tensor([1.0, 334.0, 667.0, 1000.0]))


@pytest.mark.quick
def test_a_new_deltanet_keeps_half_for_5_to_760_steps():
    deltanet = MONOIDS["deltanet"](4, heads=500)
    alpha = torch.exp(-literal.softplus(deltanet.gates.bias[:500]))
    half_life = math.log(0.5) / torch.log(alpha)
    assert 5 <= half_life.min() < 6 and 700 < half_life.max() <= 760


def assert_uniform(x, low, high, tolerance=0.05):
    """Sorted, the numbers lie on the line from low to high."""
    line = torch.linspace(low, high, x.numel())
    assert (x.sort().values - line).abs().max() < tolerance * (high - low)

"""models/scan.py against a plain loop: values, gradients, resets, any length, any monoid."""
import pytest
import torch

from models.scan import CHUNK, associative_scan, linear_scan, recur, resettable

DTYPES = [torch.float64, torch.complex128]
LENGTHS = [1, 2, 3, 7, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3, 1_000]


def loop(a, b, h):
    hs = []
    for a_t, b_t in zip(a.unbind(), b.unbind()):
        h = a_t * h + b_t
        hs.append(h)
    return torch.stack(hs)


def recurrence(T, dtype, shape=(3, 4), p_reset=0.1):
    torch.manual_seed(T)
    a = torch.rand(T, *shape, dtype=torch.float64).to(dtype)
    a = a * torch.exp(torch.rand(T, *shape, dtype=torch.float64) * 6.28j) if dtype.is_complex else a
    a = a.masked_fill(torch.rand(T, shape[0]).lt(p_reset).view(T, shape[0], *[1] * (len(shape) - 1)), 0)
    b, h = torch.randn(T, *shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return [x.requires_grad_() for x in (a, b, h)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [1, 10**9])                            # the plain loop, the chunks
def test_linear_scan_equals_the_loop_in_values_and_gradients(monkeypatch, dtype, T, wide):
    monkeypatch.setattr("models.scan.WIDE", wide)
    a, b, h = recurrence(T, dtype)
    y, y_loop = linear_scan(a, b, h), loop(a, b, h)
    torch.testing.assert_close(y, y_loop)
    weight = torch.randn_like(y)
    grads, grads_loop = (torch.autograd.grad((out * weight).real.sum(), (a, b, h)) for out in (y, y_loop))
    torch.testing.assert_close(grads, grads_loop)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_scan_on_100_000_steps(dtype):
    """Every step of the result and of its gradient obeys the recurrence: what the loop above says, without the loop."""
    a, b, h = recurrence(100_000, dtype, shape=(1, 2), p_reset=1e-3)
    y = linear_scan(a, b, h)
    weight = torch.randn_like(y)
    grad_a, grad_b, grad_h = torch.autograd.grad(y, (a, b, h), weight)
    before = torch.cat([h[None], y[:-1]]).detach()                      # h_{t-1}
    torch.testing.assert_close(y, a * before + b)
    torch.testing.assert_close(grad_b[-1], weight[-1])
    torch.testing.assert_close(grad_b[:-1], weight[:-1] + a[1:].conj() * grad_b[1:])        # backwards in time
    torch.testing.assert_close(grad_a, grad_b * before.conj())
    torch.testing.assert_close(grad_h, grad_b[0] * a[0].conj())


def test_linear_scan_passes_gradcheck():
    assert torch.autograd.gradcheck(linear_scan, recurrence(2 * CHUNK + 5, torch.float64, (2, 1)))
    assert torch.autograd.gradcheck(linear_scan, recurrence(CHUNK + 2, torch.complex128, (2, 1)))


def test_a_zero_resets_exactly():
    a, b, h = (x.detach() for x in recurrence(50, torch.float64, p_reset=0.0))
    a[20] = 0
    fresh = recur(a[20:], b[20:], torch.zeros_like(h))
    torch.testing.assert_close(linear_scan(a, b, h)[20:], fresh)
    torch.testing.assert_close(linear_scan(a, b, 1e6 * h)[20:], linear_scan(a, b, h)[20:], rtol=0, atol=0)


def test_nan_crosses_a_zero():
    """Why the scripts watch for non-finite losses; the general reset selects, and keeps NaN where it is."""
    a, b = torch.full((6, 1), 0.5), torch.ones(6, 1)
    a[3], b[1] = 0, torch.nan
    assert linear_scan(a, b, torch.zeros(1))[5].isnan().all()
    flags = torch.tensor([False, False, False, True, False, False])
    _, (_, y) = associative_scan(resettable(affine), (flags, (a, b)))
    assert y[2].isnan().all() and not y[3:].isnan().any()


def affine(left, right):
    (a, b), (a2, b2) = left, right
    return a * a2, a2 * b + b2


@pytest.mark.parametrize("T", LENGTHS)
def test_associative_scan_of_affine_maps_equals_linear_scan(T):
    a, b, h = recurrence(T, torch.float64)
    first = b[:1] + a[:1] * h
    _, y = associative_scan(affine, (a, torch.cat([first, b[1:]])))
    torch.testing.assert_close(y, linear_scan(a, b, h))
    weight = torch.randn_like(y)
    grads = (torch.autograd.grad((out * weight).sum(), (a, b, h)) for out in (y, linear_scan(a, b, h)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("T", LENGTHS)
def test_associative_scan_takes_any_monoid_and_any_pytree(T):
    """Matrix products do not commute: a wrong order shows. Leaves of different shapes in dicts and tuples."""
    torch.manual_seed(T)
    elements = {"product": 0.6 * torch.randn(T, 3, 3, dtype=torch.float64), "more": (torch.randn(T, 2), torch.ones(T))}

    def op(left, right):
        return {"product": left["product"] @ right["product"],
                "more": (torch.maximum(left["more"][0], right["more"][0]), left["more"][1] + right["more"][1])}

    out = associative_scan(op, elements)
    product = torch.eye(3, dtype=torch.float64)
    for t in range(T):
        product = product @ elements["product"][t]
        torch.testing.assert_close(out["product"][t], product)
    torch.testing.assert_close(out["more"][0], elements["more"][0].cummax(0).values)
    torch.testing.assert_close(out["more"][1], torch.arange(1.0, T + 1))


@pytest.mark.parametrize("T", [1, 2, 9, 64])
def test_resettable_scan_starts_anew_at_flags(T):
    torch.manual_seed(T)
    flags, x = torch.rand(T, 2) < 0.3, torch.randn(T, 2, 3, 3, dtype=torch.float64)
    _, out = associative_scan(resettable(torch.matmul), (flags, x))
    for row in range(2):
        product = torch.eye(3, dtype=torch.float64)
        for t in range(T):
            product = x[t, row] if flags[t, row] else product @ x[t, row]
            torch.testing.assert_close(out[t, row], product)


def test_the_reset_operator_is_associative():
    torch.manual_seed(0)
    op = resettable(torch.matmul)
    x, y, z = ((torch.rand(50) < 0.5, torch.randn(50, 2, 2, dtype=torch.float64)) for _ in range(3))
    torch.testing.assert_close(op(op(x, y), z), op(x, op(y, z)))

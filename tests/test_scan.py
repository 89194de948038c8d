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
    resets = torch.rand(T, shape[0]) < p_reset
    a = a.masked_fill(resets.view(T, shape[0], *[1] * (len(shape) - 1)), 0)
    b, h = torch.randn(T, *shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return [x.requires_grad_() for x in (a, b, h)]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [1, 10**9])                # the plain loop, the chunks
def test_linear_scan_equals_the_loop_in_values_and_gradients(monkeypatch, dtype, T, wide):
    monkeypatch.setattr("models.scan.WIDE", wide)
    a, b, h = recurrence(T, dtype)
    y, y_loop = linear_scan(a, b, h), loop(a, b, h)
    torch.testing.assert_close(y, y_loop)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad((y * weight).real.sum(), (a, b, h))
    grads_loop = torch.autograd.grad((y_loop * weight).real.sum(), (a, b, h))
    torch.testing.assert_close(grads, grads_loop)


@pytest.mark.quick
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("wide", [1, 10**9])
def test_backwards_in_time_is_the_mirror_image(monkeypatch, T, wide):
    monkeypatch.setattr("models.scan.WIDE", wide)
    a, b, h = (x.detach() for x in recurrence(T, torch.complex128))
    torch.testing.assert_close(recur(a, b, h, reverse=True), recur(a.flip(0), b.flip(0), h).flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_scan_on_100_000_steps(dtype):
    """Every step of the result and of its gradient obeys the recurrence. (A loop would be too slow.)"""
    a, b, h = recurrence(100_000, dtype, shape=(1, 2), p_reset=1e-3)
    y = linear_scan(a, b, h)
    weight = torch.randn_like(y)
    grad_a, grad_b, grad_h = torch.autograd.grad(y, (a, b, h), weight)
    before = torch.cat([h[None], y[:-1]]).detach()          # h_{t-1}
    torch.testing.assert_close(y, a * before + b)
    torch.testing.assert_close(grad_b[-1], weight[-1])
    torch.testing.assert_close(grad_b[:-1], weight[:-1] + a[1:].conj() * grad_b[1:])  # backwards in time
    torch.testing.assert_close(grad_a, grad_b * before.conj())
    torch.testing.assert_close(grad_h, grad_b[0] * a[0].conj())


@pytest.mark.quick
def test_linear_scan_passes_gradcheck():
    assert torch.autograd.gradcheck(linear_scan, recurrence(2 * CHUNK + 5, torch.float64, (2, 1)))
    assert torch.autograd.gradcheck(linear_scan, recurrence(CHUNK + 2, torch.complex128, (2, 1)))


@pytest.mark.quick
def test_a_zero_resets_exactly():
    a, b, h = (x.detach() for x in recurrence(50, torch.float64, p_reset=0.0))
    a[20] = 0
    fresh = recur(a[20:], b[20:], torch.zeros_like(h))
    y, y_other = linear_scan(a, b, h), linear_scan(a, b, 1e6 * h)
    torch.testing.assert_close(y[20:], fresh)
    torch.testing.assert_close(y_other[20:], y[20:], rtol=0, atol=0)


@pytest.mark.quick
def test_nan_crosses_a_zero():
    """This is why scripts watch for losses that are not finite. The general reset keeps NaN in its place."""
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
    grads = torch.autograd.grad((y * weight).sum(), (a, b, h))
    grads_linear = torch.autograd.grad((linear_scan(a, b, h) * weight).sum(), (a, b, h))
    torch.testing.assert_close(grads, grads_linear)


@pytest.mark.quick
@pytest.mark.parametrize("T", LENGTHS)
def test_associative_scan_takes_any_monoid_and_any_pytree(T):
    """Matrix products do not commute: a wrong order shows. Leaves of different shapes in dicts and tuples."""
    torch.manual_seed(T)
    elements = {"product": 0.6 * torch.randn(T, 3, 3, dtype=torch.float64),
                "more": (torch.randn(T, 2), torch.ones(T))}

    def op(left, right):
        (largest, count), (right_largest, right_count) = left["more"], right["more"]
        return {"product": left["product"] @ right["product"],
                "more": (torch.maximum(largest, right_largest), count + right_count)}

    out = associative_scan(op, elements)
    product = torch.eye(3, dtype=torch.float64)
    for t in range(T):
        product = product @ elements["product"][t]
        torch.testing.assert_close(out["product"][t], product)
    torch.testing.assert_close(out["more"][0], elements["more"][0].cummax(0).values)
    torch.testing.assert_close(out["more"][1], torch.arange(1.0, T + 1))


@pytest.mark.parametrize("T", [1, 2, 9, 64])
def test_resettable_scan_starts_again_at_flags(T):
    torch.manual_seed(T)
    flags, x = torch.rand(T, 2) < 0.3, torch.randn(T, 2, 3, 3, dtype=torch.float64)
    _, out = associative_scan(resettable(torch.matmul), (flags, x))
    for row in range(2):
        product = torch.eye(3, dtype=torch.float64)
        for t in range(T):
            product = x[t, row] if flags[t, row] else product @ x[t, row]
            torch.testing.assert_close(out[t, row], product)


@pytest.mark.quick
def test_the_reset_operator_is_associative():
    torch.manual_seed(0)
    op = resettable(torch.matmul)
    x, y, z = ((torch.rand(50) < 0.5, torch.randn(50, 2, 2, dtype=torch.float64)) for _ in range(3))
    torch.testing.assert_close(op(op(x, y), z), op(x, op(y, z)))

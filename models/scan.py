"""Scans: what a recurrence does step by step, for a whole sequence at once.

A monoid is a set with an associative operator and an identity. If a memory's step is such an operator, its states along a
tape are all prefixes x_0 . x_1 . ... . x_t, and a scan finds them in O(log T) rounds instead of T steps.

    associative_scan(op, elements)         any monoid, any pytree of tensors, autograd's gradients: the definition
    resettable(op)                         the same monoid with a flag that forgets what lies before it
    linear_scan(a, b, h)                   the special case h_t = a_t h_{t-1} + b_t, made for speed; a reset is a_t = 0

Sequences are time-major, [T, ...].   Blelloch 1990, "Prefix sums and their applications"; the reset operator is that of
Morad et al. 2024, "Revisiting recurrent reinforcement learning with memory monoids" (https://arxiv.org/abs/2402.09900).
"""
import torch
from torch.utils import _pytree as pytree


def associative_scan(op, elements):
    """All prefixes x_0, x_0 . x_1, ... of a sequence.   elements: pytree of tensors, each [T, ...], T >= 1; so the result

    op(left, right) combines two pytrees of [K, ...] elementwise, for any K, and must be associative. Halves the sequence
    in every round: 2 log2(T) calls of op, about 2 T combinations.
    """
    T = len(pytree.tree_leaves(elements)[0])
    if T == 1:
        return elements

    def every_second(first, last=None):
        return pytree.tree_map(lambda x: x[first:last:2], elements)

    pairs = op(every_second(0, T - 1), every_second(1))                 # x_0 . x_1, x_2 . x_3, ...
    odd = associative_scan(op, pairs)                                   # prefixes that end at 1, 3, 5, ...
    if T == 2:
        even = every_second(0)
    else:
        before = pytree.tree_map(lambda x: x[: (T - 1) // 2], odd)
        even = pytree.tree_map(lambda first, rest: torch.cat([first[:1], rest]), elements, op(before, every_second(2)))

    def interleave(e, o):                                               # ceil(T / 2) and floor(T / 2) of them
        both = torch.stack([e[: len(o)], o], dim=1).flatten(0, 1)
        return torch.cat([both, e[len(o) :]])

    return pytree.tree_map(interleave, even, odd)


def resettable(op):
    """The operator on pairs (flag, element): a set right flag drops the left operand. flag [K] or [K, B], bool

    (f, x) . (g, y) = (f or g,  y if g else x . y).   Associative where op is; the identity is (False, identity of op).
    Chosen by a select, not by multiplication with the flag: NaN in one episode stays there.
    """
    def op_with_reset(left, right):
        (f, x), (g, y) = left, right
        pick = lambda xy, y: torch.where(g.view(g.shape + (1,) * (y.dim() - g.dim())), y, xy)  # noqa: E731
        return f | g, pytree.tree_map(pick, op(x, y), y)

    return op_with_reset


CHUNK = 16    # steps scanned one after the other while all chunks of a tape are scanned side by side
WIDE = 2_048  # elements a step from which a plain loop over T is faster on a CPU: it touches memory once


def linear_scan(a, b, h):
    """h_t = a_t h_{t-1} + b_t for all t, from h_{-1} = h.   a, b [T, ...], h [...], real or complex -> [T, ...]

    The monoid: (a, b) . (a', b') = (a a', a' b + b'), identity (1, 0). Exact for a_t = 0: no division, no logarithm.
    PITFALL: a reset by a_t = 0 multiplies: 0 x NaN is NaN, so one non-finite step spoils all later episodes of its column.
      Symptom: the loss is NaN; scripts stop there and name the last checkpoint. Test: test_scan.py::test_nan_crosses_a_zero.
    """
    return torch.addcmul(b, a, h[None]) if len(b) == 1 else LinearScan.apply(a, b, h)


class LinearScan(torch.autograd.Function):
    """The gradient is the same recurrence backwards. With G_t = dL/dh_t in total and g_t its direct part:

    G_t = g_t + a*_{t+1} G_{t+1},   dL/db_t = G_t,   dL/da_t = G_t h*_{t-1},   dL/dh = a*_0 G_0.   (* conjugates)
    """

    @staticmethod
    def forward(ctx, a, b, h):
        hs = recur(a, b, h)
        ctx.save_for_backward(a, h, hs)
        return hs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        a, h, hs = ctx.saved_tensors
        G = recur(torch.cat([a[1:], torch.zeros_like(a[:1])]).conj(), g, torch.zeros_like(h), reverse=True)
        return torch.cat([h[None], hs[:-1]]).conj().mul(G), G, a[0].conj() * G[0]


def recur(a, b, h, reverse=False):
    """linear_scan without autograd, in either direction.

    Cut the tape into chunks, scan them side by side as if each started from zero, scan the chunks' ends (by recursion),
    then add to each chunk what is left of the state it inherits. About 2 CHUNK log_CHUNK(T) launches instead of T.
    """
    T, order = len(b), slice(None, None, -1 if reverse else 1)
    if T <= CHUNK or (b[0].numel() >= WIDE and b.device.type == "cpu"):
        hs = torch.empty_like(b)
        for a_t, b_t, h_t in zip(*(x.unbind()[order] for x in (a, b, hs))):     # unbind once: x[t] costs a view a step
            h = torch.addcmul(b_t, a_t, h, out=h_t)
        return hs
    if T % CHUNK:                                                       # steps of a = b = 0 at the end do no harm
        a, b = (torch.cat([x, x.new_zeros(-T % CHUNK, *x.shape[1:])]) for x in (a, b))
    a, b = (x.unflatten(0, (-1, CHUNK)) for x in (a, b))                # [chunks, CHUNK, ...]
    hs, left = torch.empty_like(b), torch.empty_like(a)                 # left: the share of the inherited state
    local = torch.zeros_like(b[:, 0])
    share = torch.ones_like(local)
    for a_t, b_t, h_t, left_t in zip(*(x.unbind(1)[order] for x in (a, b, hs, left))):
        local = torch.addcmul(b_t, a_t, local, out=h_t)
        share = torch.mul(a_t, share, out=left_t)
    ends = recur(share, local, h, reverse)                              # [chunks, ...] the true state there
    inherited = torch.cat([ends[1:], h[None]] if reverse else [h[None], ends[:-1]])
    return hs.addcmul_(left, inherited[:, None]).flatten(0, 1)[:T]

"""Scans: what a recurrence does step by step, for a whole sequence at once.

A monoid is a set with an associative operator and an identity. If a memory's step is such an
operator, its states along a tape are all prefixes x_0 . x_1 . ... . x_t, and a scan finds them in
O(log T) rounds instead of T steps.

    associative_scan(op, elements)   any monoid, any pytree of tensors, autograd's gradients
    resettable(op)                   the same monoid with a flag that forgets what lies before it
    linear_scan(a, b, h)             h_t = a_t h_{t-1} + b_t, made for speed; a reset is a_t = 0

Sequences are time-major, [T, ...]. Scans: Blelloch 1990, "Prefix sums and their applications". The
reset operator: Morad et al. 2024, "Revisiting recurrent reinforcement learning with memory monoids"
(https://arxiv.org/abs/2402.09900).
"""
import torch
from torch.utils import _pytree as pytree


def associative_scan(op, elements):
    """All prefixes x_0, x_0 . x_1, ... of a sequence: the definition, for any monoid.

    elements: pytree of tensors, each [T, ...], T >= 1; the result is one too.
    op(left, right) combines two pytrees of [K, ...] elementwise, for any K, and must be associative.
    Halves the sequence in every round: 2 log2(T) calls of op, about 2 T combinations.
    """
    T = len(pytree.tree_leaves(elements)[0])
    if T == 1:
        return elements

    def every_second(first, last=None):
        return pytree.tree_map(lambda x: x[first:last:2], elements)

    pairs = op(every_second(0, T - 1), every_second(1))     # x_0 . x_1, x_2 . x_3, ...
    odd = associative_scan(op, pairs)                       # prefixes that end at 1, 3, 5, ...
    if T == 2:
        even = every_second(0)
    else:
        before = pytree.tree_map(lambda x: x[: (T - 1) // 2], odd)
        later = op(before, every_second(2))                 # prefixes that end at 2, 4, 6, ...
        even = pytree.tree_map(lambda first, rest: torch.cat([first[:1], rest]), elements, later)

    def interleave(e, o):                                   # ceil(T / 2) and floor(T / 2) of them
        both = torch.stack([e[: len(o)], o], dim=1).flatten(0, 1)
        return torch.cat([both, e[len(o) :]])

    return pytree.tree_map(interleave, even, odd)


def resettable(op):
    """The operator on pairs (flag, element): a set right flag drops the left operand.

    (f, x) . (g, y) = (f or g,  y if g else x . y).   flag: [K] or [K, B] bool
    Associative where op is; the identity is (False, identity of op). The flag selects, it is no
    factor: NaN in one episode stays there.
    """
    def op_with_reset(left, right):
        (f, x), (g, y) = left, right

        def pick(xy, y):
            return torch.where(g.view(g.shape + (1,) * (y.dim() - g.dim())), y, xy)

        return f | g, pytree.tree_map(pick, op(x, y), y)

    return op_with_reset


CHUNK = 16    # steps scanned one after the other while all chunks of a tape are scanned side by side
WIDE = 2_048  # elements a step from which a plain loop over T is faster on a CPU: it touches memory once


def linear_scan(a, b, h):
    """h_t = a_t h_{t-1} + b_t for all t, from h_{-1} = h.

    a, b [T, ...], h [...], real or complex -> [T, ...]
    The monoid: (a, b) . (a', b') = (a a', a' b + b'), identity (1, 0).
    Exact for a_t = 0: no division, no logarithm.
    """
    # PITFALL: a reset by a_t = 0 multiplies, and 0 x NaN is NaN: one non-finite step spoils all later
    #   episodes of its column. Symptom: the loss is NaN. Here: scripts stop there and name the last
    #   checkpoint. Test: test_scan.py::test_nan_crosses_a_zero.
    return torch.addcmul(b, a, h[None]) if len(b) == 1 else LinearScan.apply(a, b, h)


class LinearScan(torch.autograd.Function):
    """The gradient is the same recurrence backwards in time.

    With G_t = dL/dh_t in total, g_t its direct part, and * for conjugates:
    G_t = g_t + a*_{t+1} G_{t+1},   dL/db_t = G_t,   dL/da_t = G_t h*_{t-1},   dL/dh = a*_0 G_0
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
        next_a = torch.cat([a[1:], torch.zeros_like(a[:1])])                # a_{t+1}
        G = recur(next_a.conj(), g, torch.zeros_like(h), reverse=True)
        del next_a                                          # PERF: its memory serves the next line
        grad_a = torch.cat([h[None], hs[:-1]]).conj().mul(G)                # of h_{t-1}
        return grad_a, G, a[0].conj() * G[0]


def recur(a, b, h, reverse=False):
    """linear_scan without autograd.   reverse: from the last step to the first"""
    if len(b) <= CHUNK or (b.device.type == "cpu" and b[0].numel() >= WIDE):
        return step_by_step(a, b, h, reverse)
    return side_by_side(a, b, h, reverse)


def step_by_step(a, b, h, reverse):
    hs = torch.empty_like(b)
    for a_t, b_t, h_t in steps(a, b, hs, reverse=reverse):
        h = torch.addcmul(b_t, a_t, h, out=h_t)
    return hs


def side_by_side(a, b, h, reverse):
    """Scan all chunks at once, as if each began with the state 0, then add what each inherits.

        steps   | 0 ... 15           | 16 ... 31            | 32 ... 47            |
        local   | states from 0      | states from 0        | states from 0        |
        share   | a_0, a_0 a_1, ...  | a_16, a_16 a_17, ... | a_32, a_32 a_33, ... |
        result  | local + share h    | local + share h_15   | local + share h_31   |

    share is how much of the inherited state is left. h_15, h_31, ... obey a recurrence of the same
    kind, h_31 = share_31 h_15 + local_31. About 2 CHUNK log_CHUNK(T) launches instead of T.
    """
    T = len(b)
    if T % CHUNK:                                           # fill up: h -> 1 h + 0 changes nothing
        missing = CHUNK - T % CHUNK
        a = torch.cat([a, a.new_ones(missing, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(missing, *b.shape[1:])])
    a, b = a.unflatten(0, (-1, CHUNK)), b.unflatten(0, (-1, CHUNK))         # [chunks, CHUNK, ...]
    hs, shares = torch.empty_like(b), torch.empty_like(a)   # hs: local at first
    local = torch.zeros_like(b[:, 0])                       # [chunks, ...]
    share = torch.ones_like(local)
    for a_t, b_t, h_t, share_t in steps(a, b, hs, shares, dim=1, reverse=reverse):
        local = torch.addcmul(b_t, a_t, local, out=h_t)
        share = torch.mul(a_t, share, out=share_t)
    ends = recur(share, local, h, reverse)                  # [chunks, ...] where they end
    inherited = torch.cat([ends[1:], h[None]] if reverse else [h[None], ends[:-1]])
    return hs.addcmul_(shares, inherited[:, None]).flatten(0, 1)[:T]


def steps(*tensors, dim=0, reverse=False):
    """What the tensors hold at each step along dim.   reverse: from the last step to the first"""
    unbound = [x.unbind(dim) for x in tensors]              # once: x[t] costs a view a step
    if reverse:
        unbound = [x[::-1] for x in unbound]
    return zip(*unbound)

"""Memories whose state is a matrix of associations, key -> value.

Each is one layer, size -> size; Stack in models/memory.py makes a network of them.

To write out all T states would cost T matrices. Within a chunk of steps the answers follow from the
products of keys and queries alone (a masked square, as in attention), and a state is passed on
between chunks only: the chunked form of Yang et al. 2024 (https://arxiv.org/abs/2312.06635). A
reset is zeros in the square: step i sees step j if no episode starts in between.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import check_sizes

CHUNK = 32  # steps of one square


class MatrixMemory(nn.Module):
    """What they share: heads, chunks, reading.   state: S [B, heads, K, V]

    key_size: K, lowered to a divisor of size; heads: by default as many as fill size.

    At step i of a chunk that begins with the state S, with u the values that are written:

        S_i = d_i S + sum over j <= i of D_ij k_j u_j^T             u = U - W S
        y_i = read(q_i S_i)

    A memory defines
        chunks(x, start)    q, k, U, W, D, d of C chunks at once: [C, B, heads, T, *] with * = K, K, V,
                            K, T, 1; W is None if what is written does not depend on the state
    and may define
        read(y)             what becomes of an answer q S
        value_extra         columns of S beside those of the values
    """

    value_extra = 0

    def __init__(self, size, key_size, heads):
        super().__init__()
        check_sizes(key_size=key_size, heads=heads)
        key_size = min(key_size, size)
        while size % key_size:
            key_size -= 1
        self.hidden_size, self.key_size, self.heads = size, key_size, heads or size // key_size
        self.qkv = nn.Linear(size, 3 * self.heads * key_size)
        self.out = nn.Linear(self.heads * key_size, size)

    def initial_state(self, batch_size):
        K = self.key_size
        return (self.out.weight.new_zeros(batch_size, self.heads, K, K + self.value_extra),)

    def forward(self, x, state, start):
        (S,), ys = state, []
        rest = len(x) % CHUNK
        parts = [n for n in (len(x) - rest, rest) if n]     # the full chunks, then a shorter one
        for x_part, start_part in zip(x.split(parts), start.split(parts)):
            T = min(len(x_part), CHUNK)
            y, S = self.answer(x_part.unflatten(0, (-1, T)), S, start_part.unflatten(0, (-1, T)))
            ys.append(y)
        return self.out(torch.cat(ys)), (S,)

    def answer(self, x, S, start):
        """C chunks of T steps -> the answers to their queries [C T, B, heads K], and the state.

        x [C, T, B, size], S [B, heads, K, V], start [C, T, B]
        """
        q, k, U, W, D, d = self.chunks(x, start)
        # Chunk after chunk: the state S before it, and what it writes, u.
        before, us = [], []
        kept_keys = (k * D[..., -1, :, None]).mT            # what is left of k_j at the end of its chunk
        Ws = [None] * len(U) if W is None else W.unbind()
        for k_c, d_c, U_c, W_c in zip(kept_keys.unbind(), d[..., -1:, :].unbind(), U.unbind(), Ws):
            u = U_c if W_c is None else U_c - product(W_c, S)
            us.append(u)
            before.append(S)
            S = product(k_c, u) + d_c * S
        # All chunks at once: queries read what was written in their chunk, and the state before it.
        y = product((q @ k.mT) * D, torch.stack(us)) + d * product(q, torch.stack(before))
        y = self.read(y).permute(0, 3, 1, 2, 4)             # [C, T, B, heads, V]
        return y.flatten(0, 1).flatten(2), S

    def read(self, y):
        return y

    def project(self, x):
        """x [C, T, B, size] -> queries, keys, values, each [C, B, heads, T, K]"""
        return self.qkv(x).unflatten(-1, (3, self.heads, self.key_size)).permute(3, 0, 2, 4, 1, 5)

    def seen(self, start):
        """Whether step i sees step j, [C, B, 1, T, T] bool, and the carried state, [C, B, 1, T, 1]."""
        episode = start.transpose(1, 2).cumsum(-1)[:, :, None]              # [C, B, 1, T]
        return (episode[..., :, None] == episode[..., None, :]).tril(), (episode == 0)[..., None]


def product(a, b):
    """a @ b, [..., n, m] and [..., m, p]."""
    # PERF: acting, T = 1. On a CPU torch takes 3 to 8 times as long for many outer products, or single rows.
    if a.shape[-1] == 1:
        return a * b
    if a.shape[-2] == 1:
        return (a.mT * b).sum(-2, keepdim=True)
    return a @ b


def positive(x):
    """1 + elu(x), which is exp(x) below 0."""
    # PITFALL: written as 1 + elu(x) it is rounded to 0 from x = -17 on. Symptom: 0 / 0 in the readout where
    #   all keys or queries of a head are so low. Here: exact.
    #   Test: test_models.py::test_low_keys_and_queries.
    return x.clamp(max=0).exp() + x.relu()


class LinearAttention(MatrixMemory):
    """Linear transformer (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236).

    A sum of associations:
    S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t      k = 1 + elu(W_k x), v = W_v x; per head
    monoid ((S, z), +, 0)      lift (k v^T, k)      readout y = W (q S / q z), q = 1 + elu(W_q x)
    z travels as one more column of S, for a value that is always 1.
    """

    value_extra = 1

    def __init__(self, size, key_size=16, heads=None):
        super().__init__(size, key_size, heads)

    def chunks(self, x, start):
        q, k, v = self.project(x)
        return positive(q), positive(k), F.pad(v, (0, 1), value=1.0), None, *self.seen(start)

    def read(self, y):
        return y[..., :-1] / y[..., -1:]


class GatedDeltaNet(MatrixMemory):
    """Gated delta rule (Yang et al. 2025, https://arxiv.org/abs/2412.06464).

    Overwrites the value that a key had:
    S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    alpha = exp(-softplus(w_a x)), beta = sigmoid(w_b x)
    monoid (A, S), (A, S) . (A', S') = (A' A, A' S + S'), identity (1, 0)
    lift (alpha (1 - beta k k^T), beta k v^T)
    readout y = W (q S); q = W_q x and k = W_k x of length 1, v = W_v x.
    In a chunk, u_i = beta_i (v_i - what k_i recalled just before): a triangular system.
    """

    def __init__(self, size, key_size=16, heads=None):
        super().__init__(size, key_size, heads)
        self.gates = nn.Linear(size, 2 * self.heads)
        self.gates.bias.data[: self.heads].uniform_(-7, -2)  # half is left after 5 to 760 steps

    def chunks(self, x, start):
        q, k, v = self.project(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        gates = self.gates(x).unflatten(-1, (2, self.heads)).permute(3, 0, 2, 4, 1)
        log_alpha, beta = gates[..., None].unbind()         # [C, B, heads, T, 1] each
        log_alpha, beta = -F.softplus(log_alpha), beta.sigmoid()
        seen, carried = self.seen(start)
        # D_ij = alpha_{j+1} ... alpha_i: sum just these logs. total_i - total_j leaks gradients of 1e-18.
        between = log_alpha.expand(-1, -1, -1, -1, x.shape[1]).tril(-1).cumsum(-2)
        D = between.masked_fill(~seen, -torch.inf).exp()    # [C, B, heads, T, T]
        d = log_alpha.cumsum(-2).masked_fill(~carried, -torch.inf).exp()    # [C, B, heads, T, 1]
        # u_i + beta_i sum over j < i of D_ij (k_i k_j) u_j = beta_i (v_i - d_i k_i S)
        # unitriangular: the solver takes the diagonal as 1.
        recalled = beta * (k @ k.mT) * D
        right_side = beta * torch.cat([v, d * k], dim=-1)
        solution = right_side                               # of a single step
        if x.shape[1] > 1:
            solution = torch.linalg.solve_triangular(recalled, right_side, upper=False, unitriangular=True)
        U, W = solution.chunk(2, dim=-1)
        return q, k, U, W, D, d

"""Memories whose state is a matrix of associations, key -> value. One layer each, size -> size; Stack makes a network of them.

Writing out all T states would cost T matrices. Inside a chunk of steps the answers follow from the products of keys and
queries alone (a masked square, as in attention), and only between chunks a state is passed on: the chunked form of Yang et
al. 2024 (https://arxiv.org/abs/2312.06635). Resets are zeros in the square: step i sees step j if no episode starts in between.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CHUNK = 32  # steps of one square


class MatrixMemory(nn.Module):
    """What they share: heads, chunks, the square of decays, and reading.   state: S [B, heads, K, V]"""

    value_extra = 0

    def __init__(self, size, key_size):
        super().__init__()
        key_size = min(key_size, size)
        while size % key_size:
            key_size -= 1
        self.hidden_size, self.key_size, self.heads = size, key_size, size // key_size
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def initial_state(self, batch_size):
        K = self.key_size
        return (self.out.weight.new_zeros(batch_size, self.heads, K, K + self.value_extra),)

    def forward(self, x, state, start):
        (S,), ys = state, []
        for x_c, start_c in zip(x.split(CHUNK), start.split(CHUNK)):
            y, S = self.chunk(x_c, S, start_c)
            ys.append(y)
        return self.out(torch.cat(ys)), (S,)

    def project(self, x):
        """x [T, B, size] -> queries, keys, values, each [B, heads, T, K]"""
        return self.qkv(x).unflatten(-1, (3, self.heads, self.key_size)).permute(2, 1, 3, 0, 4)

    def seen(self, start):
        """What a reset leaves: of step j at step i, [B, 1, T, T] bool, and of the carried state at step i, [B, 1, T, 1]."""
        episode = start.T.cumsum(-1)[:, None]                           # [B, 1, T]
        return (episode[..., :, None] == episode[..., None, :]).tril(), (episode == 0)[..., None]

    def read(self, q, k, u, D, d, S):
        """Answers q_i S_i and the last state, where S_i = d_i S + sum over j <= i of D_ij k_j u_j^T."""
        y = ((q @ k.mT) * D) @ u + d * (q @ S)                          # [B, heads, T, V]
        return y, (k * D[..., -1, :, None]).mT @ u + d[..., -1:, :] * S


class LinearAttention(MatrixMemory):
    """Linear transformer (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236): a sum of associations.

    S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t      k = 1 + elu(W_k x), v = W_v x; per head
    monoid ((S, z), +, 0)      lift (k v^T, k)      readout y = W (q S / q z), q = 1 + elu(W_q x)
    z travels as one more column of S, for a value that is always 1.
    """

    value_extra = 1

    def __init__(self, size, key_size=16):
        super().__init__(size, key_size)

    def chunk(self, x, S, start):
        q, k, v = self.project(x)
        q, k, v = 1 + F.elu(q), 1 + F.elu(k), F.pad(v, (0, 1), value=1.0)
        D, d = self.seen(start)
        y, S = self.read(q, k, v, D, d, S)
        y = y[..., :-1] / y[..., -1:]
        return y.permute(2, 0, 1, 3).flatten(2), S


class GatedDeltaNet(MatrixMemory):
    """Gated delta rule (Yang et al. 2025, https://arxiv.org/abs/2412.06464): overwrite the value that a key had.

    S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      alpha = exp(-softplus(w_a x)), beta = sigmoid(w_b x)
    monoid (A, S), (A, S) . (A', S') = (A' A, A' S + S'), identity (1, 0)      lift (alpha (1 - beta k k^T), beta k v^T)
    readout y = W (q S); q = W_q x and k = W_k x of length 1, v = W_v x.
    In a chunk, S_i is a sum of k_j u_j^T with u_i = beta_i (v_i - what k_i recalled just before), a triangular system for u.
    """

    def __init__(self, size, key_size=16):
        super().__init__(size, key_size)
        self.gates = nn.Linear(size, 2 * self.heads)
        self.gates.bias.data[: self.heads].uniform_(-7, -2)             # alpha: half of it is left after 5 to 760 steps

    def chunk(self, x, S, start):
        q, k, v = self.project(x)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        log_alpha, beta = self.gates(x).unflatten(-1, (2, self.heads)).permute(2, 1, 3, 0)         # [B, heads, T] each
        log_alpha, beta = -F.softplus(log_alpha)[..., None], beta.sigmoid()[..., None]      # [B, heads, T, 1] each
        seen, carried = self.seen(start)
        # D_ij = alpha_{j+1} ... alpha_i as a sum of just these logs: total_i - total_j leaks gradients of 1e-18
        between = log_alpha.expand(-1, -1, -1, len(x)).tril(-1).cumsum(-2)                         # [B, heads, T, T]
        D = between.masked_fill(~seen, -torch.inf).exp()
        d = log_alpha.cumsum(-2).masked_fill(~carried, -torch.inf).exp()                           # [B, heads, T, 1]
        # u_i + beta_i sum over j < i of D_ij (k_i k_j) u_j = beta_i (v_i - d_i k_i S); the solver takes the diagonal as 1
        recalled = beta * (k @ k.mT) * D
        u = torch.linalg.solve_triangular(recalled, beta * (v - d * (k @ S)), upper=False, unitriangular=True)
        y, S = self.read(q, k, u, D, d, S)
        return y.permute(2, 0, 1, 3).flatten(2), S

"""Memories with a linear recurrence of one number a channel: h_t = a_t h_{t-1} + b_t.

Each is one layer, size -> size, behind the interface of models/memory.py; Stack there makes a
network of them. The recurrence is computed by models/scan.py. They share

    element    (a, b)                                   what a step does to the state: h -> a h + b
    operator   (a, b) . (a', b') = (a a', a' b + b')    first the left one, then the right one
    identity   (1, 0)
    reset      a_t = 0 where an episode starts

and differ in the lift, x_t -> (a_t, b_t), and in the readout, (h_t, x_t) -> y_t. Each docstring
gives both. * is elementwise.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.layers import SPAN, check_rising, check_sizes, chrono
from models.scan import linear_scan


class LinearRecurrence(nn.Module):
    """What they share: lift, scan, readout."""

    def __init__(self, size, state_shape, dtype=torch.float32):
        super().__init__()
        self.hidden_size, self.state_shape, self.complex = size, state_shape, dtype.is_complex

    def initial_state(self, batch_size):
        p = next(self.parameters())
        dtype = p.dtype.to_complex() if self.complex else p.dtype
        return (p.new_zeros(batch_size, *self.state_shape, dtype=dtype),)

    def forward(self, x, state, start):
        a, b = self.lift(x)                                 # [T, B, *state_shape]; a may lack T and B
        start = start.view(start.shape + (1,) * len(self.state_shape))
        # PITFALL: the log-space scan of minGRU's paper (appendix B) cannot take this reset: log 0 = -inf, and
        #   -inf - -inf = NaN. Symptom: NaN from the first reset on. Here: linear_scan takes no logarithm.
        #   Test: test_scan.py::test_a_zero_resets_exactly.
        h = linear_scan(a.expand_as(b).masked_fill(start, 0), b, *state)
        return self.readout(h, x), (h[-1],)


class MinGRU(LinearRecurrence):
    """minGRU (Feng et al. 2024, https://arxiv.org/abs/2410.01201, section 3.1).

    A GRU whose gate sees the input only:
    h_t = (1 - z_t) h_{t-1} + z_t c_t      z = sigmoid(W_z x), c = W_c x
    lift a = 1 - z, b = z c      readout y = h
    """

    def __init__(self, size, span=SPAN):
        super().__init__(size, (size,))
        self.maps = nn.Linear(size, 2 * size)
        self.maps.bias.data[:size] = -chrono(size, span)    # 1 / z from 2 to span + 1

    def lift(self, x):
        z, c = self.maps(x).chunk(2, dim=-1)
        z = z.sigmoid()
        return 1 - z, z * c

    def readout(self, h, x):
        return h


class MinLSTM(LinearRecurrence):
    """minLSTM (Feng et al. 2024, section 3.2): forget and input gate, normalised to f + i = 1.

    h_t = f_t h_{t-1} + i_t c_t      f = f' / (f' + i'), i = i' / (f' + i')
                                     f' = sigmoid(W_f x), i' = sigmoid(W_i x), c = W_c x
    lift a = f, b = i c      readout y = h
    """

    def __init__(self, size, span=SPAN):
        super().__init__(size, (size,))
        self.maps = nn.Linear(size, 3 * size)
        self.maps.bias.data[size : 2 * size] = -chrono(size, span)

    def lift(self, x):
        f, i, c = self.maps(x).chunk(3, dim=-1)
        f, i = f.sigmoid(), i.sigmoid()
        return f / (f + i), i / (f + i) * c

    def readout(self, h, x):
        return h


class LRU(LinearRecurrence):
    """Linear recurrent unit (Orvieto et al. 2023, https://arxiv.org/abs/2303.06349).

    A constant complex number a channel:
    h_t = lambda h_{t-1} + gamma B x_t      lambda = exp(-exp(nu) + i exp(theta))
    lift a = lambda, b = gamma B x      readout y = Re(C h) + D x
    When new, lambda is uniform over the ring 0.9 < |lambda| < 0.999, so channels remember for 10 steps
    and more, and gamma = sqrt(1 - |lambda|^2). state_size: channels of h, by default as many as of x.
    """

    def __init__(self, size, state_size=None, r_min=0.9, r_max=0.999):
        check_sizes(state_size=state_size)
        check_rising(r_min=r_min, r_max=r_max)
        if r_max >= 1:
            raise ValueError(f"r_max must be less than 1, not {r_max}")
        N = state_size or size
        super().__init__(size, (N,), torch.complex64)
        modulus2 = torch.empty(N).uniform_(r_min**2, r_max**2)
        self.nu = nn.Parameter((-0.5 * modulus2.log()).log())
        self.theta = nn.Parameter(torch.empty(N).uniform_(0, 2 * math.pi).log())
        self.gamma_log = nn.Parameter(0.5 * (1 - modulus2).log())
        self.B = nn.Linear(size, 2 * N, bias=False)         # (real, imaginary) of each channel
        self.C = nn.Linear(2 * N, size, bias=False)         # (real, -imaginary)
        self.D = nn.Parameter(torch.randn(size))
        nn.init.normal_(self.B.weight, std=(2 * size) ** -0.5)
        nn.init.normal_(self.C.weight, std=N**-0.5)

    def lift(self, x):
        a = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        b = F.linear(x, self.B.weight * self.gamma_log.exp().repeat_interleave(2)[:, None])
        return a, torch.view_as_complex(b.unflatten(-1, (-1, 2)))

    def readout(self, h, x):
        return self.C(torch.view_as_real(h).flatten(-2)) + self.D * x


class S5(LinearRecurrence):
    """S5 (Smith et al. 2023, https://arxiv.org/abs/2208.04933).

    A linear system in continuous time, dh/dt = L h + B x, with x held for a time step Delta:
    h_t = exp(L Delta) h_{t-1} + (exp(L Delta) - 1) / L B x_t
    lift a = exp(L Delta), b = (a - 1) / L B x, L and Delta one number a channel
    readout y = 2 Re(C h) + D x
    L begins as the eigenvalues of the normal part of HiPPO-LegS, B and C at random. Eigenvalues are
    conjugate pairs; one of each pair is kept, `size` / 2 in all.
    """

    def __init__(self, size, dt_min=0.001, dt_max=0.1):
        check_rising(dt_min=dt_min, dt_max=dt_max)
        if size % 2:
            raise ValueError(f"hidden_size must be even, not {size}")
        super().__init__(size, (size // 2,), torch.complex64)
        # Why HiPPO-LegS: its state is the past input in Legendre polynomials, so a new S5 remembers.
        # Its normal part, HiPPO-LegS + p p^T = -1/2 + (skew - skew^T), has orthogonal eigenvectors.
        p = (torch.arange(size, dtype=torch.float64) + 0.5).sqrt()
        skew = torch.tril(-2 * torch.outer(p, p), -1) / 2
        eigenvalues, V = torch.linalg.eigh(-1j * (skew - skew.T))           # ascending
        kept = slice(size - size // 2, None)                # the positive half
        V = V[:, kept]
        self.log_real = nn.Parameter(torch.full((size // 2,), math.log(0.5)))
        self.imaginary = nn.Parameter(eigenvalues[kept].to(torch.get_default_dtype()))
        self.log_dt = nn.Parameter(torch.empty(size // 2).uniform_(math.log(dt_min), math.log(dt_max)))
        self.B = nn.Linear(size, size, bias=False)
        self.C = nn.Linear(size, size, bias=False)
        self.D = nn.Parameter(torch.randn(size))
        random_B, random_C = (size**-0.5 * torch.randn(2, size, size)).to(V.dtype).unbind()
        B, C = V.mH @ random_B, random_C @ V
        with torch.no_grad():
            self.B.weight.copy_(torch.view_as_real(B).transpose(1, 2).flatten(0, 1))
            self.C.weight.copy_(torch.view_as_real(2 * C.conj()).flatten(1))

    def lift(self, x):
        rate = torch.complex(-self.log_real.exp(), self.imaginary)
        a = (rate * self.log_dt.exp()).exp()
        Bx = torch.view_as_complex(self.B(x).unflatten(-1, (-1, 2)))
        return a, Bx * ((a - 1) / rate)

    def readout(self, h, x):
        return self.C(torch.view_as_real(h).flatten(-2)) + self.D * x


class S6(LinearRecurrence):
    """Selective state space, as in Mamba (Gu and Dao 2023, https://arxiv.org/abs/2312.00752).

    Each of the D channels keeps N numbers, without Mamba's convolution:
    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t      [D, N]
    lift a = exp(Delta A), b = Delta B x, A = -exp(A_log), Delta [D] = softplus(W_Delta x), B [N] = W_B x
    readout y = h C + D x, C [N] = W_C x
    """

    def __init__(self, size, state_size=8, dt_min=0.001, dt_max=0.1):
        check_sizes(state_size=state_size)
        check_rising(dt_min=dt_min, dt_max=dt_max)
        super().__init__(size, (size, state_size))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(size, 1))
        self.D = nn.Parameter(torch.ones(size))
        self.dt = nn.Linear(size, size)
        self.B = nn.Linear(size, state_size)
        self.C = nn.Linear(size, state_size)
        dt = torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt.weight.data *= 0.1
        self.dt.bias.data = dt + (-torch.expm1(-dt)).log()  # softplus(bias) = dt

    def lift(self, x):
        dt = F.softplus(self.dt(x))[..., None]              # [T, B, D, 1]
        return torch.exp(-dt * self.A_log.exp()), dt * x[..., None] * self.B(x)[..., None, :]

    def readout(self, h, x):
        return (self.C(x)[..., None, :] @ h.mT).squeeze(-2) + self.D * x     # PERF: h C takes longer


class FFM(LinearRecurrence):
    """Fast and forgetful memory (Morad et al. 2023, https://arxiv.org/abs/2310.04128).

    Each of m traces is kept in c contexts, which decay alike but turn at different speeds:
    S_t = gamma S_{t-1} + u_t 1^T      [m, c]
    lift a = gamma = exp(-|alpha| + i omega), b = u = sigmoid(W_g x) * W_u x for all contexts
    readout y = LN(z) * sigmoid(W_o x) + (1 - sigmoid(W_o x)) * W_s x, z = W_z [Re S; Im S]
    alpha begins evenly in [1e-6, 0.5], the periods 2 pi / omega evenly in [1, 1000].
    (memory-monoids computes LN(z * sigmoid(W_o x)).)
    """

    def __init__(self, size, contexts=4):
        check_sizes(contexts=contexts)
        traces = size // contexts
        if traces == 0:
            raise ValueError(f"contexts must be at most hidden_size {size}, not {contexts}")
        super().__init__(size, (traces, contexts), torch.complex64)
        self.alpha = nn.Parameter(torch.linspace(1e-6, 0.5, traces))
        self.omega = nn.Parameter(2 * math.pi / torch.linspace(1, 1000, contexts))
        self.inputs = nn.Linear(size, 2 * traces)
        self.outputs = nn.Linear(size, 2 * size)
        self.mix = nn.Linear(2 * traces * contexts, size)
        self.norm = nn.LayerNorm(size, elementwise_affine=False)

    def lift(self, x):
        gate, u = self.inputs(x).chunk(2, dim=-1)
        u = (gate.sigmoid() * u)[..., None].expand(*x.shape[:-1], *self.state_shape)
        decay = -self.alpha.abs()[:, None].expand(self.state_shape)
        a = torch.exp(torch.complex(decay, self.omega.expand(self.state_shape)))
        return a, u.to(a.dtype)

    def readout(self, h, x):
        z = self.mix(torch.view_as_real(h).flatten(-3))
        gate, skip = self.outputs(x).chunk(2, dim=-1)
        gate = gate.sigmoid()
        return self.norm(z) * gate + (1 - gate) * skip

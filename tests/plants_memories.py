# ruff: noqa: E501
"""(name, what is planted, snippet run before the tests are collected, test that catches it)."""

HEAD = """
import math, types, torch
import torch.nn.functional as F
from models import gpt, linear_recurrences, matrix_memories, memory, rnn, scan
from models.gpt import GPT, Block
from models.linear_recurrences import FFM, LRU, S5, S6, LinearRecurrence, MinGRU, MinLSTM
from models.matrix_memories import GatedDeltaNet, LinearAttention, MatrixMemory
from models.memory import NoMemory, Stack
from models.rnn import GRU, LSTM
"""


def after_init(cls, change):
    """Plant in the new weights of a class."""
    return f"""
original = {cls}.__init__
def planted(self, *args, **kwargs):
    original(self, *args, **kwargs)
    {change}
{cls}.__init__ = planted
"""


def gru_cell(
    r="(W_r + U_r).sigmoid()",
    z="(W_z + U_z).sigmoid()",
    n="(W_n + r * U_n).tanh()",
    h="(1 - z) * n + z * h",
):
    return f"""
def sequence(self, x, state):
    ys = []
    for x_t in x:
        after = []
        for h, (W, U, b, d) in zip(state, self.rnn.all_weights):
            (W_r, W_z, W_n), (U_r, U_z, U_n) = F.linear(x_t, W, b).chunk(3, -1), F.linear(h, U, d).chunk(3, -1)
            U_of_n, d_of_n = U.chunk(3)[2], d.chunk(3)[2]
            r = {r}
            z = {z}
            n = {n}
            x_t = {h}
            after.append(x_t)
        state = after
        ys.append(x_t)
    return torch.stack(ys), tuple(state)
GRU.sequence = sequence
"""


def lstm_cell(
    c="f.sigmoid() * c + i.sigmoid() * g.tanh()",
    h="o.sigmoid() * c.tanh()",
    order="i, f, g, o",
    out="(*hs, *cs)",
):
    return f"""
def sequence(self, x, state):
    ys, n = [], self.num_layers
    for x_t in x:
        hs, cs = [], []
        for h, c, (W, U, b, d) in zip(state[:n], state[n:], self.rnn.all_weights):
            {order} = (F.linear(x_t, W, b) + F.linear(h, U, d)).chunk(4, -1)
            c = {c}
            x_t = {h}
            hs.append(x_t)
            cs.append(c)
        state = (*hs, *cs)
        ys.append(x_t)
    return torch.stack(ys), {out}
LSTM.sequence = sequence
"""


def stack_forward(
    new="2 - 2 * old",
    embed="self.embed(torch.cat([x, new], dim=-1))",
    y="layer(norm(x), (before,), start)",
    mixed="x + F.glu(mixer(F.gelu(y)), dim=-1)",
    end="x",
):
    return f"""
def forward(self, x, state, start):
    half = x.new_full((*x.shape[:2], 1), 0.5)
    old = memory.linear_scan(half.masked_fill(start[..., None], 0), half, state[0])
    new = {new}
    x = {embed}
    after = (old[-1],)
    for norm, layer, mixer, before in zip(self.norms, self.layers, self.mixers, state[1:], strict=True):
        y, layer_state = {y}
        x = {mixed}
        after += layer_state
    return {end}, after
Stack.forward = forward
"""


def block_forward(normed="self.norm(x)", residual="x", end="x + self.mlp(x)"):
    return f"""
def forward(self, x, kept_keys, kept_values, mask, turns):
    q, k, v = self.qkv({normed}).chunk(3, dim=-1)
    k, v = torch.cat([kept_keys, k], dim=1), torch.cat([kept_values, v], dim=1)
    visible = len(turns)
    x = {residual} + self.out(self.attention(q, k[:, -visible:], v[:, -visible:], mask, turns))
    return {end}, k, v
Block.forward = forward
"""


def lift(cls, a="a", b="b"):
    return f"""
original = {cls}.lift
def planted(self, x):
    a, b = original(self, x)
    return {a}, {b}
{cls}.lift = planted
"""


def readout(cls, y):
    return f"""
original = {cls}.readout
def planted(self, h, x):
    y = original(self, h, x)
    return {y}
{cls}.readout = planted
"""


def project(cls, result):
    """Plant in queries, keys and values."""
    return f"""
original = {cls}.project
def planted(self, x):
    q, k, v = original(self, x)
    return {result}
{cls}.project = planted
"""


def deltanet_chunks(
    change="",
    k="F.normalize(k, dim=-1)",
    q="F.normalize(q, dim=-1)",
    order="log_alpha, beta",
    beta="beta.sigmoid()",
    alpha="-F.softplus(log_alpha)",
    recalled="beta * (k @ k.mT) * D",
    u="v",
    w="d * k",
):
    return f"""
def chunks(self, x, start):
    q, k, v = self.project(x)
    q, k = {q}, {k}
    gates = self.gates(x).unflatten(-1, (2, self.heads)).permute(3, 0, 2, 4, 1)
    {order} = gates[..., None].unbind()
    log_alpha, beta = {alpha}, {beta}
    seen, carried = self.seen(start)
    between = log_alpha.expand(-1, -1, -1, -1, x.shape[1]).tril(-1).cumsum(-2)
    D = between.masked_fill(~seen, -torch.inf).exp()
    d = log_alpha.cumsum(-2).masked_fill(~carried, -torch.inf).exp()
    recalled = {recalled}
    right_side = beta * torch.cat([{u}, {w}], dim=-1)
    U, W = torch.linalg.solve_triangular(recalled, right_side, upper=False, unitriangular=True).chunk(2, dim=-1)
    return q, k, U, W, D, d
GatedDeltaNet.chunks = chunks
"""


ORIGINAL_SCAN_BACKWARD = """
def backward(ctx, g):
    a, h, hs = ctx.saved_tensors
    next_a = torch.cat([a[1:], torch.zeros_like(a[:1])])
    G = scan.recur({next_a}, g, torch.zeros_like(h), reverse=True)
    grad_a = torch.cat([{before}]).conj().mul(G)
    return grad_a, G, {grad_h}
scan.LinearScan.backward = staticmethod(backward)
"""


def scan_backward(next_a="next_a.conj()", before="h[None], hs[:-1]", grad_h="a[0].conj() * G[0]"):
    return ORIGINAL_SCAN_BACKWARD.format(next_a=next_a, before=before, grad_h=grad_h)


M = "test_a_memory_equals_its_equations"
L = "test_a_layer_equals_its_equations"
W = "test_gpt_equals_its_equations_with_any_window"
# fake pairs that must NOT fail: the rewritten functions, with nothing planted
CONTROLS = [
    ("control-gru", gru_cell()),
    ("control-lstm", lstm_cell()),
    ("control-stack", stack_forward()),
    ("control-block", block_forward()),
    ("control-deltanet", deltanet_chunks()),
    ("control-scan", scan_backward()),
]

PLANTS = [
    # GRU, LSTM, none
    ("gru-reset-gate-missing", "the reset gate is 1", gru_cell(n="(W_n + U_n).tanh()")),
    (
        "gru-reset-gate-before-the-product",
        "r times h before the product (Cho 2014), not after (torch)",
        gru_cell(n="(W_n + F.linear(r * h, U_of_n, d_of_n)).tanh()"),
    ),
    ("gru-update-gate-turned", "z and 1 - z swapped", gru_cell(h="z * n + (1 - z) * h")),
    (
        "gru-gates-swapped",
        "reset and update gate swapped",
        gru_cell(r="(W_z + U_z).sigmoid()", z="(W_r + U_r).sigmoid()"),
    ),
    ("lstm-forget-gate-missing", "the forget gate is 1", lstm_cell(c="c + i.sigmoid() * g.tanh()")),
    ("lstm-forget-and-input-gate-swapped", "forget and input gate swapped", lstm_cell(order="f, i, g, o")),
    ("lstm-output-gate-missing", "the output gate is 1", lstm_cell(h="c.tanh()")),
    ("lstm-cell-not-squashed", "h = o c, without the tanh", lstm_cell(h="o.sigmoid() * c")),
    (
        "lstm-cell-and-hidden-swapped-in-the-state",
        "final state (c, h) instead of (h, c)",
        lstm_cell(out="(*cs, *hs)"),
    ),
    ("rnn-never-forgets", "resets do nothing in GRU and LSTM", "rnn.forget = lambda state, start: state"),
    (
        "rnn-forgets-every-row",
        "a start in one row resets all rows",
        "rnn.forget = lambda state, start: tuple(s * 0 if start.any() else s for s in state)",
    ),
    (
        "lstm-forgets-h-only",
        "resets h and keeps c",
        "original = rnn.forget\nrnn.forget = lambda state, start: original(state[:len(state) // 2], start) + state[len(state) // 2:]",
    ),
    (
        "none-without-tanh",
        "the memoryless baseline is linear",
        "NoMemory.forward = lambda self, x, state, start: (self.layers[1:](self.layers[0](x)) if len(self.layers) == 2 else self.layers[2](self.layers[0](x)).tanh(), state)",
    ),
    (
        "gru-step-without-its-bias",
        "acting (T = 1): the state's bias is left out",
        """
original = torch.gru_cell
rnn.torch = types.SimpleNamespace(**vars(torch) | {"gru_cell": lambda x, h, W, U, b, d: original(x, h, W, U, b, 0 * d)})
""",
    ),
    (
        "lstm-step-keeps-its-cell",
        "acting (T = 1): c is not passed on",
        """
original = LSTM.step
def step(self, x, state):
    y, after = original(self, x, state)
    return y, after[: self.num_layers] + state[self.num_layers :]
LSTM.step = step
""",
    ),
    # GPT
    (
        "gpt-window-one-longer",
        "a step sees one earlier step too many",
        "original = gpt.earlier_steps\ngpt.earlier_steps = lambda age, start, most: original(age, start, most + 1)",
    ),
    (
        "gpt-window-one-shorter",
        "a step sees one earlier step too few",
        "original = gpt.earlier_steps\ngpt.earlier_steps = lambda age, start, most: original(age, start, max(most - 1, 0))",
    ),
    (
        "gpt-window-built-one-longer",
        "window + 1 everywhere, in the state too",
        after_init("GPT", "self.kept += 1"),
    ),
    (
        "gpt-window-built-one-shorter",
        "window - 1 everywhere, in the state too",
        after_init("GPT", "self.kept -= self.kept > 1"),
    ),
    (
        "gpt-sees-the-future",
        "no causal mask",
        """
def window_mask(earlier, old):
    T = len(earlier)
    distance = (old + torch.arange(T))[:, None] - torch.arange(old + T)
    return (distance <= earlier.T[..., None])[:, None]
gpt.window_mask = window_mask
""",
    ),
    (
        "gpt-sees-across-episodes",
        "the mask ignores starts",
        """
original = gpt.earlier_steps
gpt.earlier_steps = lambda age, start, most: original(age, torch.zeros_like(start), most)
""",
    ),
    (
        "gpt-sees-the-previous-last-step",
        "one step of the episode before is visible",
        """
original = gpt.window_mask
gpt.window_mask = lambda earlier, old: original(earlier + 1, old)
""",
    ),
    (
        "gpt-carried-steps-not-cleared",
        "kept steps of another episode stay in the state's first reset row",
        """
gpt.carried = lambda kept, used, start: tuple(s[:, s.shape[1] - used :] for s in kept)
""",
    ),
    (
        "gpt-no-rotation",
        "no positions at all",
        """
Block.rotate = lambda self, x, turns: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
""",
    ),
    (
        "gpt-rotation-backwards",
        "pairs turn by the negative angle",
        """
original = GPT.turns
GPT.turns = lambda self, n: original(self, n).conj()
""",
    ),
    (
        "gpt-rotation-of-queries-one-late",
        "query positions off by one",
        """
original = Block.rotate
Block.rotate = lambda self, x, turns: original(self, x, turns if torch.view_as_real(turns[0])[0, 1] == 0 else turns * turns[1].conj() * turns[0])
""",
    ),
    (
        "gpt-rotation-of-other-pairs",
        "halves are paired (NeoX), not neighbours",
        """
def rotate(self, x, turns):
    a, b = x.unflatten(-1, (self.heads, 2, -1)).unbind(-2)
    turned = torch.complex(a, b) * turns[:, None]
    return torch.cat([turned.real, turned.imag], -1).transpose(1, 2)
Block.rotate = rotate
""",
    ),
    ("gpt-rotation-speeds", "all pairs turn at one speed", after_init("GPT", "self.speed.fill_(1)")),
    ("gpt-rotation-base", "a base of 1,000 instead of 10,000", after_init("GPT", "self.speed.pow_(0.75)")),
    (
        "gpt-rotation-speeds-of-the-paper",
        "10,000^(-2i / head_size), which never reaches 1/10,000",
        after_init(
            "GPT",
            "heads = self.blocks[0].heads; n = len(self.speed) // heads; "
            "self.speed.copy_((10_000 ** (-torch.arange(n) / n)).repeat(heads))",
        ),
    ),
    (
        "gpt-values-rotated",
        "values turn as keys do",
        """
original = Block.attention
def planted(self, q, k, v, mask, turns):
    return original(self, q, k, self.rotate(v, turns).transpose(1, 2).flatten(2), mask, turns)
Block.attention = planted
""",
    ),
    (
        "gpt-scores-not-scaled",
        "no 1 / sqrt(head size)",
        """
original = F.scaled_dot_product_attention
gpt.F = types.SimpleNamespace(scaled_dot_product_attention=lambda *args, **kw: original(*args, scale=1.0, **kw))
""",
    ),
    (
        "gpt-scores-scaled-by-all-heads",
        "1 / sqrt(hidden size) instead of 1 / sqrt(head size)",
        """
original = F.scaled_dot_product_attention
gpt.F = types.SimpleNamespace(scaled_dot_product_attention=lambda q, *args, **kw: original(
    q, *args, scale=(q.shape[1] * q.shape[3]) ** -0.5, **kw))
""",
    ),
    ("gpt-attention-norm-missing", "no LN before attention", block_forward(normed="x")),
    ("gpt-mlp-norm-missing", "no LN before the MLP", block_forward(end="x + self.mlp[1:](x)")),
    ("gpt-final-norm-missing", "no LN at the end", after_init("GPT", "self.norm.forward = lambda x: x")),
    (
        "gpt-post-norm",
        "LN after the residual sum, as in the first transformer",
        block_forward(normed="x", end="self.norm(x + self.mlp(x))"),
    ),
    ("gpt-attention-residual-missing", "attention replaces x", block_forward(residual="0 * x")),
    ("gpt-mlp-residual-missing", "the MLP replaces x", block_forward(end="self.mlp(x)")),
    ("gpt-relu", "ReLU in the MLP", after_init("Block", "self.mlp[2].forward = torch.relu")),
    (
        "gpt-gelu-approximated",
        "the tanh approximation of gelu",
        after_init("Block", "self.mlp[2].approximate = 'tanh'"),
    ),
    (
        "gpt-heads-merged-wrongly",
        "answers of heads are interleaved",
        """
original = Block.attention
def planted(self, *args):
    y = original(self, *args)
    return y.unflatten(2, (self.heads, -1)).transpose(2, 3).flatten(2)
Block.attention = planted
""",
    ),
    (
        "gpt-age-not-reset",
        "the state's age counts on after a start",
        """
original = GPT.forward
def planted(self, x, state, start):
    y, (age, *kept) = original(self, x, state, start)
    return y, (torch.full_like(age, self.kept), *kept)
GPT.forward = planted
""",
    ),
    # minGRU, minLSTM
    (
        "mingru-gates-swapped",
        "h = z h + (1 - z) c",
        """
def lift(self, x):
    z, c = self.maps(x).chunk(2, dim=-1)
    return z.sigmoid(), (1 - z.sigmoid()) * c
MinGRU.lift = lift
""",
    ),
    (
        "mingru-maps-swapped",
        "gate and candidate swapped",
        """
def lift(self, x):
    c, z = self.maps(x).chunk(2, dim=-1)
    return 1 - z.sigmoid(), z.sigmoid() * c
MinGRU.lift = lift
""",
    ),
    (
        "mingru-log-space-scan",
        "the paper's scan, in which a reset is log 0",
        """
def log_space(a, b, h):
    log_a = a.log().cumsum(0)
    return log_a.exp() * h + (log_a + torch.logcumsumexp((b.to(torch.complex128).log() - log_a), 0)).exp().real
linear_recurrences.linear_scan = log_space
""",
    ),
    (
        "mingru-input-not-gated",
        "b = c, not z c",
        """
def lift(self, x):
    z, c = self.maps(x).chunk(2, dim=-1)
    return 1 - z.sigmoid(), c
MinGRU.lift = lift
""",
    ),
    (
        "mingru-candidate-squashed",
        "c = tanh(W_c x), as in a GRU",
        """
def lift(self, x):
    z, c = self.maps(x).chunk(2, dim=-1)
    return 1 - z.sigmoid(), z.sigmoid() * c.tanh()
MinGRU.lift = lift
""",
    ),
    (
        "minlstm-gates-swapped",
        "forget and input gate swapped",
        """
def lift(self, x):
    i, f, c = self.maps(x).chunk(3, dim=-1)
    f, i = f.sigmoid(), i.sigmoid()
    return f / (f + i), i / (f + i) * c
MinLSTM.lift = lift
""",
    ),
    (
        "minlstm-not-normalised",
        "f + i is not 1",
        """
def lift(self, x):
    f, i, c = self.maps(x).chunk(3, dim=-1)
    return f.sigmoid(), i.sigmoid() * c
MinLSTM.lift = lift
""",
    ),
    (
        "minlstm-softmax",
        "gates normalised by a softmax instead of sigmoids",
        """
def lift(self, x):
    f, i, c = self.maps(x).chunk(3, dim=-1)
    f, i = torch.stack([f, i]).softmax(0)
    return f, i * c
MinLSTM.lift = lift
""",
    ),
    # LRU
    ("lru-gamma-missing", "b = B x", lift("LRU", b="b / self.gamma_log.exp()")),
    ("lru-gamma-squared", "gamma twice", lift("LRU", b="b * self.gamma_log.exp()")),
    (
        "lru-gamma-from-lambda",
        "gamma = sqrt(1 - |lambda|^2) always, no weight of its own",
        lift("LRU", b="b / self.gamma_log.exp() * (1 - a.abs() ** 2).sqrt()"),
    ),
    ("lru-not-complex", "lambda without its angle", lift("LRU", a="a.abs().to(a.dtype)")),
    ("lru-turns-backwards", "conjugate of lambda", lift("LRU", a="a.conj().resolve_conj()")),
    (
        "lru-modulus-not-doubly-exponential",
        "lambda = exp(-nu + i exp(theta))",
        lift("LRU", a="torch.exp(torch.complex(-self.nu.abs(), self.theta.exp()))"),
    ),
    (
        "lru-imaginary-part-lost",
        "y = Re(C) Re(h) + D x",
        readout("LRU", "self.C((torch.view_as_real(h) * torch.tensor([1., 0.])).flatten(-2)) + self.D * x"),
    ),
    (
        "lru-C-conjugated",
        "y = Re(conj(C) h) + D x",
        readout("LRU", "self.C(torch.view_as_real(h.conj().resolve_conj()).flatten(-2)) + self.D * x"),
    ),
    ("lru-D-missing", "y = Re(C h)", readout("LRU", "y - self.D * x")),
    (
        "lru-new-ring-by-radius",
        "new moduli are uniform in the radius, so most lie near the inner edge",
        """
original = LRU.__init__
def planted(self, size, state_size=None, r_min=0.9, r_max=0.999):
    original(self, size, state_size, r_min, r_max)
    modulus = torch.empty_like(self.nu).uniform_(r_min, r_max)
    self.nu.data.copy_((-modulus.log()).log())
    self.gamma_log.data.copy_(0.5 * (1 - modulus**2).log())
LRU.__init__ = planted
""",
    ),
    ("lru-new-gamma-1", "new gammas are 1", after_init("LRU", "self.gamma_log.data.zero_()")),
    # S5
    (
        "s5-without-discretisation",
        "b = B x",
        """
def lift(self, x):
    rate = torch.complex(-self.log_real.exp(), self.imaginary)
    return (rate * self.log_dt.exp()).exp(), torch.view_as_complex(self.B(x).unflatten(-1, (-1, 2)))
S5.lift = lift
""",
    ),
    (
        "s5-euler",
        "a = 1 + L Delta, b = Delta B x",
        """
def lift(self, x):
    rate, dt = torch.complex(-self.log_real.exp(), self.imaginary), self.log_dt.exp()
    return 1 + rate * dt, torch.view_as_complex(self.B(x).unflatten(-1, (-1, 2))) * dt
S5.lift = lift
""",
    ),
    (
        "s5-b-by-euler",
        "b = Delta B x",
        """
def lift(self, x):
    rate, dt = torch.complex(-self.log_real.exp(), self.imaginary), self.log_dt.exp()
    return (rate * dt).exp(), torch.view_as_complex(self.B(x).unflatten(-1, (-1, 2))) * dt
S5.lift = lift
""",
    ),
    (
        "s5-a-without-delta",
        "a = exp(L)",
        """
def lift(self, x):
    rate = torch.complex(-self.log_real.exp(), self.imaginary)
    a = rate.exp()
    return a, torch.view_as_complex(self.B(x).unflatten(-1, (-1, 2))) * ((a - 1) / rate)
S5.lift = lift
""",
    ),
    (
        "s5-b-times-L",
        "b = (a - 1) L B x",
        lift("S5", b="b * torch.complex(-self.log_real.exp(), self.imaginary) ** 2"),
    ),
    (
        "s5-C-conjugated",
        "y = 2 Re(conj(C) h) + D x",
        readout("S5", "self.C(torch.view_as_real(h.conj().resolve_conj()).flatten(-2)) + self.D * x"),
    ),
    ("s5-half-of-the-pairs-lost", "y = Re(C h) + D x", readout("S5", "(y + self.D * x) / 2")),
    ("s5-D-missing", "y = 2 Re(C h)", readout("S5", "y - self.D * x")),
    (
        "s5-new-eigenvalues-of-another-matrix",
        "skew part scaled by 2",
        after_init("S5", "self.imaginary.data.mul_(2)"),
    ),
    (
        "s5-new-eigenvalues-real-part",
        "real parts -1 instead of -1/2",
        after_init("S5", "self.log_real.data.zero_()"),
    ),
    ("s5-new-C-without-the-2", "C.weight holds C, not 2 C", after_init("S5", "self.C.weight.data.div_(2)")),
    # S6
    ("s6-b-without-delta", "b = B x", lift("S6", b="b / F.softplus(self.dt(x))[..., None]")),
    ("s6-a-without-delta", "a = exp(A)", lift("S6", a="torch.exp(-self.A_log.exp()).expand_as(b)")),
    (
        "s6-delta-not-selective",
        "Delta = softplus(bias), whatever x is",
        """
def lift(self, x):
    dt = F.softplus(self.dt.bias + 0 * self.dt(x))[..., None]
    return torch.exp(-dt * self.A_log.exp()), dt * x[..., None] * self.B(x)[..., None, :]
S6.lift = lift
""",
    ),
    (
        "s6-delta-without-softplus",
        "Delta = exp(W_Delta x)",
        """
def lift(self, x):
    dt = self.dt(x).exp()[..., None]
    return torch.exp(-dt * self.A_log.exp()), dt * x[..., None] * self.B(x)[..., None, :]
S6.lift = lift
""",
    ),
    (
        "s6-exact-discretisation",
        "b = (exp(Delta A) - 1) / A B x, as S5",
        lift("S6", b="b / F.softplus(self.dt(x))[..., None] * (a - 1) / -self.A_log.exp()"),
    ),
    (
        "s6-b-and-c-swapped",
        "W_B and W_C swapped",
        after_init("S6", "self.B, self.C = self.C, self.B")
        + "\nplain = MinGRU.forward\n"
        + "def lift(self, x):\n    dt = F.softplus(self.dt(x))[..., None]\n"
        + "    return torch.exp(-dt * self.A_log.exp()), dt * x[..., None] * self.C(x)[..., None, :]\nS6.lift = lift\nS6.__init__ = original\n",
    ),
    ("s6-D-missing", "y = h C", readout("S6", "y - self.D * x")),
    ("s6-new-rates", "new rates are all 1", after_init("S6", "self.A_log.data.zero_()")),
    (
        "s6-new-delta",
        "bias = dt instead of softplus(bias) = dt",
        after_init("S6", "self.dt.bias.data = F.softplus(self.dt.bias.data)"),
    ),
    # FFM
    (
        "ffm-output-gates-swapped",
        "(1 - gate) LN(z) + gate skip",
        """
def readout(self, h, x):
    z = self.mix(torch.view_as_real(h).flatten(-3))
    gate, skip = self.outputs(x).chunk(2, dim=-1)
    gate = gate.sigmoid()
    return self.norm(z) * (1 - gate) + gate * skip
FFM.readout = readout
""",
    ),
    (
        "ffm-input-gate-swapped",
        "W_g x * sigmoid(W_u x)",
        """
def lift(self, x):
    u, gate = self.inputs(x).chunk(2, dim=-1)
    u = (gate.sigmoid() * u)[..., None].expand(*x.shape[:-1], *self.state_shape)
    decay = -self.alpha.abs()[:, None].expand(self.state_shape)
    a = torch.exp(torch.complex(decay, self.omega.expand(self.state_shape)))
    return a, u.to(a.dtype)
FFM.lift = lift
""",
    ),
    (
        "ffm-input-not-gated",
        "u = W_u x",
        """
original = FFM.lift
def lift(self, x):
    gate, u = self.inputs(x).chunk(2, dim=-1)
    a, b = original(self, x)
    return a, b / gate.sigmoid()[..., None]
FFM.lift = lift
""",
    ),
    (
        "ffm-norm-after-the-gate",
        "LN(z gate), as memory-monoids computes",
        """
def readout(self, h, x):
    z = self.mix(torch.view_as_real(h).flatten(-3))
    gate, skip = self.outputs(x).chunk(2, dim=-1)
    gate = gate.sigmoid()
    return self.norm(z * gate) + (1 - gate) * skip
FFM.readout = readout
""",
    ),
    ("ffm-norm-missing", "z instead of LN(z)", after_init("FFM", "self.norm.forward = lambda z: z")),
    (
        "ffm-skip-missing",
        "y = LN(z) gate",
        """
def readout(self, h, x):
    z = self.mix(torch.view_as_real(h).flatten(-3))
    return self.norm(z) * self.outputs(x).chunk(2, dim=-1)[0].sigmoid()
FFM.readout = readout
""",
    ),
    (
        "ffm-imaginary-part-lost",
        "z = W_z [Re S; 0]",
        """
original = FFM.readout
FFM.readout = lambda self, h, x: original(self, torch.complex(h.real, 0 * h.imag), x)
""",
    ),
    ("ffm-decay-missing", "gamma = exp(i omega)", lift("FFM", a="a / a.abs()")),
    (
        "ffm-decay-of-contexts",
        "contexts decay, traces do not (indices swapped)",
        lift("FFM", a="torch.exp(-self.alpha.abs().mean() + 0j) * a / a.abs()"),
    ),
    (
        "ffm-decay-without-abs",
        "gamma = exp(-alpha + i omega): grows where alpha is negative",
        lift("FFM", a="a / a.abs() * torch.exp(-self.alpha)[:, None]"),
    ),
    ("ffm-does-not-turn", "gamma = exp(-|alpha|)", lift("FFM", a="a.abs().to(a.dtype)")),
    (
        "ffm-turns-by-periods",
        "gamma = exp(-|alpha| + i 2 pi / omega)",
        lift("FFM", a="torch.polar(a.abs(), (2 * math.pi / self.omega).expand_as(a))"),
    ),
    (
        "ffm-new-periods",
        "omega = 1 / period, without 2 pi",
        after_init("FFM", "self.omega.data.div_(2 * math.pi)"),
    ),
    (
        "ffm-new-frequencies-even",
        "frequencies instead of periods are even",
        after_init(
            "FFM",
            "self.omega.data.copy_(torch.linspace(self.omega[0].item(), self.omega[-1].item(), len(self.omega)))",
        ),
    ),
    ("ffm-new-decay", "new decays in [1e-6, 0.1]", after_init("FFM", "self.alpha.data.mul_(0.2)")),
    # what linear recurrences share
    (
        "recurrence-never-resets",
        "a is not 0 where an episode starts",
        """
def forward(self, x, state, start):
    a, b = self.lift(x)
    h = linear_recurrences.linear_scan(a.expand_as(b).clone(), b, *state)
    return self.readout(h, x), (h[-1],)
LinearRecurrence.forward = forward
""",
    ),
    (
        "recurrence-reset-one-late",
        "forgets after it has read the first step",
        """
def forward(self, x, state, start):
    a, b = self.lift(x)
    start = torch.cat([torch.zeros_like(start[:1]), start[:-1]])
    start = start.view(start.shape + (1,) * len(self.state_shape))
    h = linear_recurrences.linear_scan(a.expand_as(b).masked_fill(start, 0), b, *state)
    return self.readout(h, x), (h[-1],)
LinearRecurrence.forward = forward
""",
    ),
    (
        "recurrence-reset-drops-the-first-step",
        "a reset clears b too",
        """
def forward(self, x, state, start):
    a, b = self.lift(x)
    start = start.view(start.shape + (1,) * len(self.state_shape))
    h = linear_recurrences.linear_scan(a.expand_as(b).masked_fill(start, 0), b.masked_fill(start, 0), *state)
    return self.readout(h, x), (h[-1],)
LinearRecurrence.forward = forward
""",
    ),
    (
        "recurrence-reads-the-state-before",
        "y_t from h_{t-1}",
        """
def forward(self, x, state, start):
    a, b = self.lift(x)
    start = start.view(start.shape + (1,) * len(self.state_shape))
    h = linear_recurrences.linear_scan(a.expand_as(b).masked_fill(start, 0), b, *state)
    return self.readout(torch.cat([state[0][None], h[:-1]]), x), (h[-1],)
LinearRecurrence.forward = forward
""",
    ),
    (
        "scan-gradient-without-conjugate",
        "the reverse recurrence takes a, not its conjugate",
        scan_backward(next_a="next_a"),
    ),
    ("scan-gradient-of-a-shifted", "dL/da_t = G_t h_t instead of h_{t-1}", scan_backward(before="hs")),
    (
        "scan-gradient-of-the-state-missing",
        "nothing flows into the carried state",
        scan_backward(grad_h="0 * h"),
    ),
    # linear attention
    (
        "linear-attention-undivided",
        "q S, without q z",
        "LinearAttention.read = lambda self, y: y[..., :-1]",
    ),
    (
        "linear-attention-feature-map",
        "relu instead of 1 + elu",
        """
def chunks(self, x, start):
    q, k, v = self.project(x)
    return F.relu(q) + 1e-6, F.relu(k) + 1e-6, F.pad(v, (0, 1), value=1.0), None, *self.seen(start)
LinearAttention.chunks = chunks
""",
    ),
    (
        "linear-attention-queries-not-mapped",
        "q = W_q x",
        """
def chunks(self, x, start):
    q, k, v = self.project(x)
    return q, 1 + F.elu(k), F.pad(v, (0, 1), value=1.0), None, *self.seen(start)
LinearAttention.chunks = chunks
""",
    ),
    (
        "matrix-keys-and-queries-swapped",
        "q and k swapped, linear attention and deltanet",
        project("MatrixMemory", "(k, q, v)"),
    ),
    (
        "matrix-keys-and-values-swapped",
        "k and v swapped, linear attention and deltanet",
        project("MatrixMemory", "(q, v, k)"),
    ),
    (
        "matrix-never-resets",
        "steps see across episodes",
        """
original = MatrixMemory.seen
MatrixMemory.seen = lambda self, start: original(self, torch.zeros_like(start))
""",
    ),
    (
        "matrix-carried-state-outlives-a-start",
        "the carried state is seen by all steps",
        """
original = MatrixMemory.seen
MatrixMemory.seen = lambda self, start: (original(self, start)[0], torch.ones_like(original(self, start)[1]))
""",
    ),
    (
        "matrix-sees-the-future",
        "the square is not triangular",
        """
original = MatrixMemory.seen
def seen(self, start):
    triangle, carried = original(self, start)
    return triangle | triangle.mT, carried
MatrixMemory.seen = seen
""",
    ),
    (
        "matrix-does-not-see-itself",
        "answers before it writes",
        """
original = MatrixMemory.seen
def seen(self, start):
    triangle, carried = original(self, start)
    return triangle.tril(-1) | triangle.triu(1), carried
MatrixMemory.seen = seen
""",
    ),
    # DeltaNet
    ("deltanet-keys-not-normalised", "k = W_k x", deltanet_chunks(k="k")),
    ("deltanet-queries-not-normalised", "q = W_q x", deltanet_chunks(q="q")),
    (
        "deltanet-normalised-over-all-heads",
        "length 1 over all heads together",
        deltanet_chunks(k="k / k.pow(2).sum((2, 4), keepdim=True).sqrt()"),
    ),
    ("deltanet-alpha-and-beta-swapped", "the two gates swapped", deltanet_chunks(order="beta, log_alpha")),
    (
        "deltanet-alpha-missing",
        "alpha = 1: the delta rule without decay",
        deltanet_chunks(alpha="0 * log_alpha"),
    ),
    (
        "deltanet-alpha-turned",
        "alpha = sigmoid(w_a x) instead of exp(-softplus(w_a x))",
        deltanet_chunks(alpha="F.logsigmoid(log_alpha)"),
    ),
    ("deltanet-beta-missing", "beta = 1", deltanet_chunks(beta="1 + 0 * beta")),
    ("deltanet-beta-doubled", "beta in (0, 2)", deltanet_chunks(beta="2 * beta.sigmoid()")),
    (
        "deltanet-does-not-overwrite",
        "a gated sum: no beta k k^T",
        deltanet_chunks(recalled="0 * (k @ k.mT)", w="0 * k"),
    ),
    (
        "deltanet-does-not-overwrite-the-carried",
        "the carried state is not corrected",
        deltanet_chunks(w="0 * k"),
    ),
    (
        "deltanet-correction-without-decay",
        "within a call, recalled without alpha",
        deltanet_chunks(recalled="beta * (k @ k.mT) * seen"),
    ),
    (
        "deltanet-new-alpha",
        "new gates keep half for one step",
        after_init("GatedDeltaNet", "self.gates.bias.data.zero_()"),
    ),
    # Stack
    ("stack-residual-missing", "layers replace x", stack_forward(mixed="F.glu(mixer(F.gelu(y)), dim=-1)")),
    ("stack-norm-missing", "no LN before the layer", stack_forward(y="layer(x, (before,), start)")),
    (
        "stack-post-norm",
        "LN after the residual sum",
        stack_forward(y="layer(x, (before,), start)", mixed="norm(x + F.glu(mixer(F.gelu(y)), dim=-1))"),
    ),
    ("stack-new-missing", "new = 0", stack_forward(new="0 * old")),
    ("stack-new-always-1", "new = 1 at every step", stack_forward(new="1 + 0 * old")),
    (
        "stack-new-only-at-the-start",
        "new = 1, 0, 0, ...",
        stack_forward(new="start[..., None].to(x.dtype)"),
    ),
    ("stack-new-old", "old instead of new", stack_forward(new="old")),
    (
        "stack-new-not-reset",
        "new goes on over a start",
        """
original = memory.linear_scan
memory.linear_scan = lambda a, b, h: original(torch.full_like(a, 0.5), b, h)
""",
    ),
    (
        "stack-new-at-the-other-end",
        "x = W [new, x]",
        stack_forward(embed="self.embed(torch.cat([new, x], dim=-1))"),
    ),
    ("stack-gelu-missing", "g = layer(LN(x))", stack_forward(mixed="x + F.glu(mixer(y), dim=-1)")),
    (
        "stack-gelu-approximated",
        "the tanh approximation of gelu",
        stack_forward(mixed="x + F.glu(mixer(F.gelu(y, approximate='tanh')), dim=-1)"),
    ),
    ("stack-relu", "relu instead of gelu", stack_forward(mixed="x + F.glu(mixer(F.relu(y)), dim=-1)")),
    (
        "stack-gate-missing",
        "W_1 g, not gated",
        stack_forward(mixed="x + mixer(F.gelu(y)).chunk(2, dim=-1)[0]"),
    ),
    (
        "stack-gate-swapped",
        "sigmoid(W_1 g) W_2 g",
        stack_forward(mixed="x + F.glu(mixer(F.gelu(y)).roll(mixer.out_features // 2, -1), dim=-1)"),
    ),
    (
        "stack-states-of-layers-in-reverse",
        "final states of the layers in reverse order",
        """
original = Stack.forward
def forward(self, x, state, start):
    y, (old, *layers) = original(self, x, state, start)
    return y, (old, *reversed(layers))
Stack.forward = forward
""",
    ),
]

TESTS = {
    "gru-reset-gate-missing": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "gru-reset-gate-before-the-product": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "gru-update-gate-turned": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "gru-gates-swapped": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "lstm-forget-gate-missing": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "lstm-forget-and-input-gate-swapped": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "lstm-output-gate-missing": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "lstm-cell-not-squashed": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "lstm-cell-and-hidden-swapped-in-the-state": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "rnn-never-forgets": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "rnn-forgets-every-row": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "lstm-forgets-h-only": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "none-without-tanh": "test_equations.py::test_a_memory_equals_its_equations[none]",
    "gru-step-without-its-bias": "test_equations.py::test_a_memory_equals_its_equations[gru]",
    "lstm-step-keeps-its-cell": "test_equations.py::test_a_memory_equals_its_equations[lstm]",
    "gpt-window-one-longer": "test_equations.py::test_gpt_equals_its_equations_with_any_window[1]",
    "gpt-window-one-shorter": "test_equations.py::test_gpt_equals_its_equations_with_any_window[2]",
    "gpt-window-built-one-longer": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-window-built-one-shorter": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-sees-the-future": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-sees-across-episodes": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-sees-the-previous-last-step": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-carried-steps-not-cleared": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-no-rotation": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-backwards": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-of-queries-one-late": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-of-other-pairs": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-speeds": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-speeds-of-the-paper": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-rotation-base": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-values-rotated": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-scores-not-scaled": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-scores-scaled-by-all-heads": "test_equations.py::test_gpt_equals_its_equations_with_any_window[2]",
    "gpt-attention-norm-missing": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-mlp-norm-missing": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-final-norm-missing": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-post-norm": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-attention-residual-missing": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-mlp-residual-missing": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-relu": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-gelu-approximated": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "gpt-heads-merged-wrongly": "test_equations.py::test_gpt_equals_its_equations_with_any_window[1]",
    "gpt-age-not-reset": "test_equations.py::test_a_memory_equals_its_equations[gpt]",
    "mingru-gates-swapped": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "mingru-maps-swapped": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "mingru-log-space-scan": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "mingru-input-not-gated": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "mingru-candidate-squashed": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "minlstm-gates-swapped": "test_equations.py::test_a_memory_equals_its_equations[minlstm]",
    "minlstm-not-normalised": "test_equations.py::test_a_memory_equals_its_equations[minlstm]",
    "minlstm-softmax": "test_equations.py::test_a_memory_equals_its_equations[minlstm]",
    "lru-gamma-missing": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-gamma-squared": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-gamma-from-lambda": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-not-complex": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-turns-backwards": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-modulus-not-doubly-exponential": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-imaginary-part-lost": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-C-conjugated": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-D-missing": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "lru-new-ring-by-radius": "test_equations.py::test_a_new_lru_is_uniform_over_the_ring_and_gamma_normalises_it[ring1]",
    "lru-new-gamma-1": "test_equations.py::test_a_new_lru_is_uniform_over_the_ring_and_gamma_normalises_it[ring0]",
    "s5-without-discretisation": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-euler": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-b-by-euler": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-a-without-delta": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-b-times-L": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-C-conjugated": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-half-of-the-pairs-lost": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-D-missing": "test_equations.py::test_a_memory_equals_its_equations[s5]",
    "s5-new-eigenvalues-of-another-matrix": "test_equations.py::test_a_new_s5_is_the_normal_part_of_hippo_legs",
    "s5-new-eigenvalues-real-part": "test_equations.py::test_a_new_s5_is_the_normal_part_of_hippo_legs",
    "s5-new-C-without-the-2": "test_equations.py::test_a_new_s5_reads_and_writes_with_unit_scale",
    "s6-b-without-delta": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-a-without-delta": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-delta-not-selective": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-delta-without-softplus": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-exact-discretisation": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-b-and-c-swapped": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-D-missing": "test_equations.py::test_a_memory_equals_its_equations[s6]",
    "s6-new-rates": "test_equations.py::test_a_new_s6_decays_at_rates_1_to_n_and_steps_of_a_thousandth_to_a_tenth",
    "s6-new-delta": "test_equations.py::test_a_new_s6_decays_at_rates_1_to_n_and_steps_of_a_thousandth_to_a_tenth",
    "ffm-output-gates-swapped": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-input-gate-swapped": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-input-not-gated": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-norm-after-the-gate": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-norm-missing": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-skip-missing": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-imaginary-part-lost": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-decay-missing": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-decay-of-contexts": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-decay-without-abs": "test_equations.py::test_a_layer_equals_its_equations[ffm-{}]",
    "ffm-does-not-turn": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-turns-by-periods": "test_equations.py::test_a_memory_equals_its_equations[ffm]",
    "ffm-new-periods": "test_equations.py::test_a_new_ffm_has_even_decays_and_even_periods",
    "ffm-new-frequencies-even": "test_equations.py::test_a_new_ffm_has_even_decays_and_even_periods",
    "ffm-new-decay": "test_equations.py::test_a_new_ffm_has_even_decays_and_even_periods",
    "recurrence-never-resets": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "recurrence-reset-one-late": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "recurrence-reset-drops-the-first-step": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "recurrence-reads-the-state-before": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "scan-gradient-without-conjugate": "test_equations.py::test_a_memory_equals_its_equations[lru]",
    "scan-gradient-of-a-shifted": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "scan-gradient-of-the-state-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "linear-attention-undivided": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "linear-attention-feature-map": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "linear-attention-queries-not-mapped": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-keys-and-queries-swapped": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-keys-and-values-swapped": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-never-resets": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-carried-state-outlives-a-start": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-sees-the-future": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "matrix-does-not-see-itself": "test_equations.py::test_a_memory_equals_its_equations[linear-attention]",
    "deltanet-keys-not-normalised": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-queries-not-normalised": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-normalised-over-all-heads": "test_equations.py::test_a_layer_equals_its_equations[deltanet-{'key_size': 4, 'heads': 2}]",
    "deltanet-alpha-and-beta-swapped": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-alpha-missing": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-alpha-turned": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-beta-missing": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-beta-doubled": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-does-not-overwrite": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-does-not-overwrite-the-carried": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-correction-without-decay": "test_equations.py::test_a_memory_equals_its_equations[deltanet]",
    "deltanet-new-alpha": "test_equations.py::test_a_new_deltanet_keeps_half_for_5_to_760_steps",
    "stack-residual-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-norm-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-post-norm": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-always-1": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-only-at-the-start": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-old": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-not-reset": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-new-at-the-other-end": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-gelu-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-gelu-approximated": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-relu": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-gate-missing": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-gate-swapped": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
    "stack-states-of-layers-in-reverse": "test_equations.py::test_a_memory_equals_its_equations[mingru]",
}

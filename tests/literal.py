"""Every memory of the registry as its equations say it: one row, one step at a time.

Slow and plain on purpose. A function here is one step: m is the module, of which only the weights are
read, x [F] is what the step reads, state is a tuple of tensors without a batch axis. It returns y and
the next state. There is no scan, no chunk, no mask and no layer of torch.
"""
import functools
import math

import torch


def loop(step, m, x, state, start):
    """Row after row, step after step, as a memory: x [T, B, F], state, start [T, B] -> y, state.

    Where an episode starts, the state becomes that of a new episode: zeros.
    """
    ys, states = [], []
    for row in range(x.shape[1]):
        h = tuple(s[row] for s in state)
        y_row = []
        for t in range(x.shape[0]):
            if start[t, row]:
                h = tuple(torch.zeros_like(s) for s in h)
            y, h = step(m, x[t, row], h)
            y_row.append(y)
        ys.append(torch.stack(y_row))
        states.append(h)
    return torch.stack(ys, dim=1), tuple(torch.stack(s) for s in zip(*states))


# ---------------------------------------------------------------------- functions

def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def softplus(x):
    return torch.log(1 + torch.exp(x))


def elu(x):
    return torch.where(x > 0, x, torch.exp(x) - 1)


def gelu(x):
    """x times the normal distribution function of x (Hendrycks and Gimpel 2016)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def softmax(x):
    return torch.exp(x) / torch.exp(x).sum()


def normalised(x):
    """Mean 0 and variance 1 over the features (Ba et al. 2016)."""
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(variance + 1e-5)


def LN(norm, x):
    return norm.weight * normalised(x) + norm.bias


def linear(layer, x):
    return layer.weight @ x + layer.bias


def complex_rows(weight):
    """Rows (real, imaginary) of each channel: [2 N, F] -> complex [N, F]"""
    return torch.complex(weight[0::2], weight[1::2])


def conjugate_columns(weight):
    """Columns (real, -imaginary) of each channel: [F, 2 N] -> complex [F, N]"""
    return torch.complex(weight[:, 0::2], -weight[:, 1::2])


# ---------------------------------------------------------------------- GRU, LSTM, none

def of_layer(rnn, layer):
    """Weights and biases of the inputs and of the state: W, U, b, d."""
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return [getattr(rnn, f"{name}_l{layer}") for name in names]


def gru(m, x, state):
    after = []
    for layer, h in enumerate(state):
        W, U, b, d = of_layer(m.rnn, layer)
        W_x_r, W_x_z, W_x_n = (W @ x + b).chunk(3)
        U_h_r, U_h_z, U_h_n = (U @ h + d).chunk(3)
        r = sigmoid(W_x_r + U_h_r)                          # reset gate
        z = sigmoid(W_x_z + U_h_z)                          # update gate
        n = torch.tanh(W_x_n + r * U_h_n)               # torch's reset: of the product, not of h
        h = (1 - z) * n + z * h
        after.append(h)
        x = h
    return x, tuple(after)


def lstm(m, x, state):
    hs, cs = [], []
    layers = len(state) // 2
    for layer in range(layers):
        h, c = state[layer], state[layers + layer]
        W, U, b, d = of_layer(m.rnn, layer)
        i, f, g, o = (W @ x + b + U @ h + d).chunk(4)   # input gate, forget gate, new, output gate
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
        x = h
    return x, (*hs, *cs)


def none(m, x, state):
    for layer in m.layers[0::2]:                            # every second one is a tanh
        x = torch.tanh(linear(layer, x))
    return x, state


# ---------------------------------------------------------------------- GPT

def gpt(m, x, state, window=128):
    """State: the age, then the keys and the values of the last window - 1 steps of every layer."""
    age, kept = int(state[0]), state[1:]
    assert len(kept[0]) == window - 1
    x = linear(m.embed, x)
    after = []
    for layer, block in enumerate(m.blocks):
        q, k, v = linear(block.qkv, LN(block.norm, x)).chunk(3)
        keys = torch.cat([kept[2 * layer], k[None]])        # [window, H], this step is the last
        values = torch.cat([kept[2 * layer + 1], v[None]])
        first = window - 1 - age                            # of its episode, or of the window
        of_heads = zip(*(a.chunk(block.heads, dim=-1) for a in (q, keys[first:], values[first:])))
        answers = [attention(*of_head) for of_head in of_heads]
        x = x + linear(block.out, torch.cat(answers))       # x + W attention(LN(x))
        norm, wider, _, narrower = block.mlp
        x = x + linear(narrower, gelu(linear(wider, LN(norm, x))))          # x + MLP(LN(x))
        after += [keys[1:], values[1:]]
    age = torch.full_like(state[0], min(age + 1, window - 1))
    return LN(m.norm, x), (age, *after)


def attention(q, keys, values):
    """The answer of the last of these steps (Vaswani et al. 2017), its positions as rotations."""
    last = len(keys) - 1
    scores = [rotate(q, last) @ rotate(k, j) / math.sqrt(len(q)) for j, k in enumerate(keys)]
    weights = softmax(torch.stack(scores))
    return sum(w * v for w, v in zip(weights, values))


def rotate(x, position):
    """Pair i of the numbers turns by position * speed_i (Su et al. 2021, equation 15).

    The speeds fall evenly, in logarithms, from 1 to 1 / 10,000 radians a step.
    """
    pairs = len(x) // 2
    speed = torch.tensor([10_000 ** -(i / max(pairs - 1, 1)) for i in range(pairs)])
    cos, sin = torch.cos(position * speed), torch.sin(position * speed)
    a, b = x[0::2], x[1::2]
    return torch.stack([cos * a - sin * b, sin * a + cos * b], dim=1).flatten()


# ---------------------------------------------------------------------- linear recurrences

def mingru(m, x, state):
    (h,) = state
    W_z_x, W_c_x = linear(m.maps, x).chunk(2)
    z = sigmoid(W_z_x)
    c = W_c_x
    h = (1 - z) * h + z * c
    return h, (h,)


def minlstm(m, x, state):
    (h,) = state
    W_f_x, W_i_x, c = linear(m.maps, x).chunk(3)
    f_, i_ = sigmoid(W_f_x), sigmoid(W_i_x)                 # f', i'
    f = f_ / (f_ + i_)
    i = i_ / (f_ + i_)
    h = f * h + i * c
    return h, (h,)


def lru(m, x, state):
    (h,) = state
    B, C = complex_rows(m.B.weight), conjugate_columns(m.C.weight)
    lambda_ = torch.exp(torch.complex(-torch.exp(m.nu), torch.exp(m.theta)))
    gamma = torch.exp(m.gamma_log)
    h = lambda_ * h + gamma * (B @ x.to(B.dtype))
    y = (C @ h).real + m.D * x
    return y, (h,)


def s5(m, x, state):
    (h,) = state
    L = torch.complex(-torch.exp(m.log_real), m.imaginary)
    Delta = torch.exp(m.log_dt)
    B, C = complex_rows(m.B.weight), conjugate_columns(m.C.weight) / 2      # C.weight holds 2 C
    h = torch.exp(L * Delta) * h + (torch.exp(L * Delta) - 1) / L * (B @ x.to(B.dtype))
    y = 2 * (C @ h).real + m.D * x
    return y, (h,)


def s6(m, x, state):
    (h,) = state                                            # [D, N]
    A = -torch.exp(m.A_log)
    Delta = softplus(linear(m.dt, x))
    B, C = linear(m.B, x), linear(m.C, x)
    after = []
    for d in range(len(x)):
        after.append(torch.exp(Delta[d] * A[d]) * h[d] + Delta[d] * B * x[d])
    h = torch.stack(after)
    y = h @ C + m.D * x
    return y, (h,)


def ffm(m, x, state):
    (S,) = state                                            # [traces, contexts]
    traces, contexts = S.shape
    W_g_x, W_u_x = linear(m.inputs, x).chunk(2)
    W_o_x, W_s_x = linear(m.outputs, x).chunk(2)
    u = sigmoid(W_g_x) * W_u_x
    alpha, omega = m.alpha[:, None].expand(S.shape), m.omega[None].expand(S.shape)
    gamma = torch.exp(torch.complex(-torch.abs(alpha), omega))
    S = gamma * S + torch.outer(u, torch.ones(contexts))    # u 1^T
    parts = [part for trace in range(traces) for context in range(contexts)
             for part in (S[trace, context].real, S[trace, context].imag)]
    z = linear(m.mix, torch.stack(parts))
    y = normalised(z) * sigmoid(W_o_x) + (1 - sigmoid(W_o_x)) * W_s_x
    return y, (S,)


# ---------------------------------------------------------------------- matrix memories

def linear_attention(m, x, state):
    W_q_x, W_k_x, W_v_x = (w.unflatten(0, (m.heads, -1)) for w in linear(m.qkv, x).chunk(3))
    answers, after = [], []
    for head, S_z in enumerate(state[0]):               # [K, V + 1]: S, and z as one more column
        S, z = S_z[:, :-1], S_z[:, -1]
        q, k, v = 1 + elu(W_q_x[head]), 1 + elu(W_k_x[head]), W_v_x[head]
        S = S + torch.outer(k, v)
        z = z + k
        answers.append((q @ S) / (q @ z))
        after.append(torch.cat([S, z[:, None]], dim=1))
    return linear(m.out, torch.cat(answers)), (torch.stack(after),)


def deltanet(m, x, state):
    W_q_x, W_k_x, W_v_x = (w.unflatten(0, (m.heads, -1)) for w in linear(m.qkv, x).chunk(3))
    w_a_x, w_b_x = linear(m.gates, x).chunk(2)
    answers, after = [], []
    for head, S in enumerate(state[0]):                     # [K, V]
        q, k, v = W_q_x[head] / W_q_x[head].norm(), W_k_x[head] / W_k_x[head].norm(), W_v_x[head]
        alpha = torch.exp(-softplus(w_a_x[head]))
        beta = sigmoid(w_b_x[head])
        S = alpha * (torch.eye(len(k)) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
        answers.append(q @ S)
        after.append(S)
    return linear(m.out, torch.cat(answers)), (torch.stack(after),)


# ---------------------------------------------------------------------- the network of layers

def stack(layer_step, m, x, state):
    """State: 1 - new of the next step, then the states of all layers."""
    new = 1 - state[0]                                  # 1, 1/2, 1/4, ... from an episode's start
    x = linear(m.embed, torch.cat([x, new]))                # x = W [x, new]
    after = (1 - new / 2,)
    for norm, layer, mixer, h in zip(m.norms, m.layers, m.mixers, state[1:]):
        y, h = layer_step(layer, LN(norm, x), (h,))
        g = gelu(y)
        W_1_g, W_2_g = linear(mixer, g).chunk(2)
        x = x + W_1_g * sigmoid(W_2_g)
        after += h
    return x, after


LAYERS = {
    "mingru": mingru, "minlstm": minlstm, "lru": lru, "s5": s5, "s6": s6, "ffm": ffm,
    "linear-attention": linear_attention, "deltanet": deltanet}
MEMORIES = {"gru": gru, "lstm": lstm, "gpt": gpt, "none": none}
MEMORIES |= {name: functools.partial(stack, step) for name, step in LAYERS.items()}

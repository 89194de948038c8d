"""Memory models: everything between the encoder and the heads.

One interface for acting (T = 1) and for training (T > 1), so what is trained is what acts:

    memory   = MEMORIES[name](input_size, hidden_size, num_layers, **kwargs)      kwargs: of the layers, e.g. state_size
    state    = memory.initial_state(B)             flat tuple of tensors, every one [B, ...]; () if there is none
    y, state = memory(x, state, start)             x [T, B, F]   start [T, B] bool   y [T, B, hidden_size]

start[t, b] = True says that x[t, b] is the first step of an episode: the memory forgets, then reads x[t, b].
States are batch first, so tuple(s[rows] for s in state) picks environments or segments for every memory.

To add a memory, write such a class and add it to MEMORIES: every script's --memory and every law in
tests/test_memory.py then include it.
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.attention import GPT
from models.linear import FFM, LRU, S5, S6, SPAN, MinGRU, MinLSTM
from models.matrix import GatedDeltaNet, LinearAttention
from models.scan import linear_scan


class RNN(nn.Module):
    """What GRU and LSTM share: torch's recurrent layers behind the interface.

    State: one h [B, H] a layer, and for the LSTM then one c [B, H] a layer.
    """

    layer, cell, kinds = None, None, None                    # kinds: 1 (h) or 2 (h, c)

    def __init__(self, input_size, hidden_size, num_layers=1, span=SPAN):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.rnn = self.layer(input_size, hidden_size, num_layers)
        for name, p in self.rnn.named_parameters():          # orthogonal and zero, as recurrent-ppo
            nn.init.orthogonal_(p, 2**0.5) if "weight" in name else nn.init.zeros_(p)
        # DEVIATION (recurrent-ppo model.py, zero biases: half of the state is gone after one step): chrono initialisation
        #   (Tallec and Ollivier 2018, https://arxiv.org/abs/1804.11188), units remember for 1 to `span` steps. The second block
        #   of gates is the GRU's update and the LSTM's forget gate, the LSTM's first block its input gate.
        #   Test: test_models.py::test_gates_remember_for_1_to_span_steps.
        for layer in range(num_layers):
            bias, remember = getattr(self.rnn, f"bias_ih_l{layer}").data, torch.empty(hidden_size).uniform_(1, span).log()
            bias[hidden_size : 2 * hidden_size] = remember
            if self.kinds == 2:
                bias[:hidden_size] = -remember

    def initial_state(self, batch_size):
        # KNOWN BUG (recurrent-ppo readme): None as hidden state. torch takes it for zeros and says nothing. Symptom: the
        #   memory restarts at every call, the value function explodes. Here: a state is always given, None fails.
        #   Test: test_ppo.py::test_classic_bug_none_as_hidden_state.
        return (self.rnn.weight_hh_l0.new_zeros(batch_size, self.hidden_size),) * (self.kinds * self.num_layers)

    def forward(self, x, state, start):
        if len(x) == 1:
            return self.step(x[0], forget(state, start[0]))
        # torch's layers know no reset: cut where some row starts, one fused call between two cuts.
        cuts = [0, *(start[1:].any(dim=1).nonzero().flatten() + 1).tolist(), len(x)]
        ys = []
        for first, piece in zip(cuts, x.split([b - a for a, b in zip(cuts, cuts[1:])])):
            y, state = self.sequence(piece, forget(state, start[first]))
            ys.append(y)
        return torch.cat(ys) if len(ys) > 1 else y, state

    def sequence(self, x, state):                            # x [T, B, F]
        hx = torch.stack(state).split(self.num_layers)       # kinds x [layers, B, H]
        y, hx = self.rnn(x, hx if self.kinds == 2 else hx[0])
        return y, torch.cat(hx).unbind() if self.kinds == 2 else hx.unbind()

    def step(self, x, state):                                # x [B, F]
        # PERF: acting. For T = 1 torch's cells take 1/3 (LSTM) to 1/2 (GRU) of the time of its sequence kernels.
        hs, cs = [], []
        for i, weights in enumerate(self.rnn.all_weights):
            if self.kinds == 2:
                x, c = self.cell(x, (state[i], state[self.num_layers + i]), *weights)
                cs.append(c)
            else:
                x = self.cell(x, state[i], *weights)
            hs.append(x)
        return x[None], (*hs, *cs)


def forget(state, start):
    """Zero in the rows that start.   state: tuple of [B, H]; start [B]"""
    return tuple(s.masked_fill(start[:, None], 0) for s in state)


class GRU(RNN):
    """Gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078)."""

    layer, cell, kinds = nn.GRU, staticmethod(torch.gru_cell), 1


class LSTM(RNN):
    """Long short-term memory (Hochreiter and Schmidhuber 1997)."""

    layer, cell, kinds = nn.LSTM, staticmethod(torch.lstm_cell), 2


class NoMemory(nn.Module):
    """The memoryless baseline: every benchmark plot needs this curve."""

    def __init__(self, input_size, hidden_size, num_layers=1):
        super().__init__()
        self.hidden_size = hidden_size
        sizes = [input_size] + [hidden_size] * num_layers
        self.layers = nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())))

    def initial_state(self, batch_size):
        return ()

    def forward(self, x, state, start):
        return self.layers(x), state


class Stack(nn.Module):
    """A network of memory layers, each [T, B, H] -> [T, B, H]: what makes a linear recurrence a strong memory.

    x = W [x, new]; then for every layer  x = x + W_1 g * sigmoid(W_2 g),  g = gelu(layer(LN(x))): pre-norm, residual, with a
    gated linear unit, as S5 and the LRU are used. new_t = 1, 1/2, 1/4, ... from the start of the episode: what these layers
    store does not depend on their state, so that nothing else tells them that a step is the first. (Without it one layer
    cannot learn popgym-RepeatFirst; a GRU sees its state of zeros.) State: 1 - new, then the states of all layers.
    """

    def __init__(self, layer, input_size, hidden_size, num_layers=1, **kwargs):
        super().__init__()
        self.hidden_size = hidden_size
        self.embed = nn.Linear(input_size + 1, hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(num_layers))
        self.layers = nn.ModuleList(layer(hidden_size, **kwargs) for _ in range(num_layers))
        self.mixers = nn.ModuleList(nn.Linear(hidden_size, 2 * hidden_size) for _ in range(num_layers))

    def initial_state(self, batch_size):
        old = self.embed.weight.new_zeros(batch_size, 1)
        return (old, *(s for layer in self.layers for s in layer.initial_state(batch_size)))

    def forward(self, x, state, start):
        half = x.new_full((*x.shape[:2], 1), 0.5)                        # [T, B, 1]
        old = linear_scan(half.masked_fill(start[..., None], 0), half, state[0])        # 1/2, 3/4, 7/8, ...
        x, after = self.embed(torch.cat([x, 2 - 2 * old], dim=-1)), (old[-1],)
        for norm, layer, mixer, before in zip(self.norms, self.layers, self.mixers, state[1:], strict=True):
            y, layer_state = layer(norm(x), (before,), start)
            x, after = x + F.glu(mixer(F.gelu(y)), dim=-1), after + layer_state
        return x, after


MONOIDS = {"mingru": MinGRU, "minlstm": MinLSTM, "lru": LRU, "s5": S5, "s6": S6, "ffm": FFM,
           "linear-attention": LinearAttention, "deltanet": GatedDeltaNet}
MEMORIES = {"gru": GRU, "lstm": LSTM, "gpt": GPT, "none": NoMemory}
MEMORIES |= {name: functools.partial(Stack, layer) for name, layer in MONOIDS.items()}

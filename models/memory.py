"""Memory models: everything between the encoder and the heads.

One interface for acting (T = 1) and for training (T > 1), so what is trained is what acts:

    memory   = MEMORIES[name](input_size, hidden_size, num_layers)
    state    = memory.initial_state(B)             flat tuple of tensors, every one [B, ...]; () if there is none
    y, state = memory(x, state, start)             x [T, B, F]   start [T, B] bool   y [T, B, hidden_size]

start[t, b] = True says that x[t, b] is the first step of an episode: the memory forgets, then reads x[t, b].
States are batch first, so tuple(s[rows] for s in state) picks environments or segments for every memory.

To add a memory, write such a class and add it to MEMORIES: every script's --memory and every law in
tests/test_memory.py then include it.
"""
import torch
import torch.nn as nn


class RNN(nn.Module):
    """What GRU and LSTM share: torch's recurrent layers behind the interface. States: num_states x [B, layers, H]."""

    layer, cell, num_states = None, None, None

    def __init__(self, input_size, hidden_size, num_layers=1):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.rnn = self.layer(input_size, hidden_size, num_layers)
        for name, p in self.rnn.named_parameters():         # orthogonal and zero, as recurrent-ppo
            nn.init.orthogonal_(p, 2**0.5) if "weight" in name else nn.init.zeros_(p)

    def initial_state(self, batch_size):
        zeros = self.rnn.weight_hh_l0.new_zeros(batch_size, self.num_layers, self.hidden_size)
        # KNOWN BUG (recurrent-ppo readme): None as hidden state. torch takes it for zeros and says nothing. Symptom: the
        #   memory restarts at every call, the value function explodes. Here: None cannot be unpacked. Test:
        #   test_ppo_recurrent_sbb.py::test_classic_bug_none_as_hidden_state.
        return (zeros,) * self.num_states

    def forward(self, x, state, start):
        # The RNN sees no reset inside a call: cut where some row starts, one fused call between two cuts.
        cuts = [0, *(start[1:].any(dim=1).nonzero().flatten() + 1).tolist(), len(x)]
        ys = []
        for first, piece in zip(cuts, x.split([b - a for a, b in zip(cuts, cuts[1:])])):
            state = tuple(s.masked_fill(start[first, :, None, None], 0) for s in state)
            y, state = self.step(piece[0], state) if len(piece) == 1 else self.sequence(piece, state)
            ys.append(y)
        return torch.cat(ys) if len(ys) > 1 else y, state

    def sequence(self, x, state):                            # x [T, B, F]
        h = tuple(s.transpose(0, 1).contiguous() for s in state)            # torch wants [layers, B, H]
        y, h = self.rnn(x, h if self.num_states > 1 else h[0])
        return y, tuple(s.transpose(0, 1) for s in (h if self.num_states > 1 else (h,)))

    def step(self, x, state):                                # x [B, F]
        # PERF: T = 1 is acting. torch's cell does it in a third of the time of its sequence kernel (README, Speed).
        layers = []
        for i, h in enumerate(zip(*(s.unbind(1) for s in state))):          # h: num_states x [B, H]
            weights = (getattr(self.rnn, f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h = self.cell(x, h if self.num_states > 1 else h[0], *weights)
            layers.append(h if self.num_states > 1 else (h,))
            x = layers[i][0]
        return x[None], tuple(torch.stack(s, dim=1) for s in zip(*layers))


class GRU(RNN):
    """Gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078)."""

    layer, cell, num_states = nn.GRU, staticmethod(torch.gru_cell), 1


class LSTM(RNN):
    """Long short-term memory (Hochreiter and Schmidhuber 1997). State: h and c."""

    layer, cell, num_states = nn.LSTM, staticmethod(torch.lstm_cell), 2


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


MEMORIES = {"gru": GRU, "lstm": LSTM, "none": NoMemory}

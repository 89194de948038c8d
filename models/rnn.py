"""GRU and LSTM as memories: torch's layers, which know no resets, with resets."""
import torch
import torch.nn as nn

from models.layers import SPAN, chrono


class RNN(nn.Module):
    """What GRU and LSTM share. Both define

        sequence(x, state)      x [T, B, F], several steps in which no episode starts
        step(x, state)          x [B, F], a single step
    """

    states = None                                           # tensors of state a layer

    def __init__(self, layers):
        super().__init__()
        self.rnn = layers
        self.hidden_size, self.num_layers = layers.hidden_size, layers.num_layers
        for name, p in self.rnn.named_parameters():         # orthogonal and zero, as recurrent-ppo
            if "weight" in name:
                nn.init.orthogonal_(p, 2**0.5)
            else:
                nn.init.zeros_(p)

    def initial_state(self, batch_size):
        # KNOWN BUG (recurrent-ppo readme): None as hidden state. torch takes it for zeros and says nothing.
        #   Symptom: the memory restarts at every call, the value function explodes. Here: a state is always
        #   given, None fails. Test: test_ppo.py::test_classic_bug_none_as_hidden_state.
        size, new_zeros = (batch_size, self.hidden_size), self.rnn.weight_hh_l0.new_zeros
        return tuple(new_zeros(size) for _ in range(self.states * self.num_layers))

    def forward(self, x, state, start):
        if len(x) == 1:
            y, state = self.step(x[0], forget(state, start[0]))
            return y[None], state
        # Cut where some row starts; between two cuts one fused call.
        cuts = [0, *(start[1:].any(dim=1).nonzero().flatten() + 1).tolist()]  # waits for the device
        lengths = [end - begin for begin, end in zip(cuts, [*cuts[1:], len(x)])]
        ys = []
        for begin, piece in zip(cuts, x.split(lengths)):
            y, state = self.sequence(piece, forget(state, start[begin]))
            ys.append(y)
        return torch.cat(ys) if len(ys) > 1 else y, state

    def input_biases(self):
        """The biases of all gates, one tensor a layer: [3 H] (GRU) or [4 H] (LSTM)."""
        return [getattr(self.rnn, f"bias_ih_l{layer}").data for layer in range(self.num_layers)]


def forget(state, start):
    """Zero in the rows that start.   state: tuple of [B, H]; start [B]"""
    return tuple(s.masked_fill(start[:, None], 0) for s in state)


class GRU(RNN):
    """Gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078), in torch's form.

    r = sigmoid(W_r x + U_r h),  z = sigmoid(W_z x + U_z h)      all with biases
    h' = (1 - z) tanh(W x + r (U h)) + z h
    State: one h [B, H] a layer.
    """

    states = 1

    def __init__(self, input_size, hidden_size, num_layers=1, span=SPAN):
        super().__init__(nn.GRU(input_size, hidden_size, num_layers))
        for bias in self.input_biases():
            reset_gate, update_gate, new = bias.chunk(3)
            update_gate[:] = chrono(hidden_size, span)

    def sequence(self, x, state):
        y, h = self.rnn(x, torch.stack(state))              # h [layers, B, H]
        return y, h.unbind()

    def step(self, x, state):
        # PERF: acting. For T = 1 torch's cells take half of the time of its sequence kernels.
        after = []
        for h, weights in zip(state, self.rnn.all_weights):
            x = torch.gru_cell(x, h, *weights)
            after.append(x)
        return x, tuple(after)


class LSTM(RNN):
    """Long short-term memory (Hochreiter and Schmidhuber 1997).

    i, f, o = sigmoid(W x + U h) each,  g = tanh(W_g x + U_g h)      all with biases
    c' = f c + i g,  h' = o tanh(c')
    State: one h [B, H] a layer, then one c [B, H] a layer.
    """

    states = 2

    def __init__(self, input_size, hidden_size, num_layers=1, span=SPAN):
        super().__init__(nn.LSTM(input_size, hidden_size, num_layers))
        for bias in self.input_biases():
            input_gate, forget_gate, new, output_gate = bias.chunk(4)
            forget_gate[:] = chrono(hidden_size, span)
            input_gate[:] = -forget_gate

    def sequence(self, x, state):
        h, c = torch.stack(state).split(self.num_layers)    # [layers, B, H] each
        y, (h, c) = self.rnn(x, (h, c))
        return y, h.unbind() + c.unbind()

    def step(self, x, state):
        # PERF: as in GRU, a third of the time.
        hs, cs = [], []
        layers = zip(state[: self.num_layers], state[self.num_layers :], self.rnn.all_weights)
        for h, c, weights in layers:
            x, c = torch.lstm_cell(x, (h, c), *weights)
            hs.append(x)
            cs.append(c)
        return x, (*hs, *cs)

"""Memory models: everything between the encoder and the heads.

One interface for acting (T = 1) and for training (T > 1), so what is trained is what acts:

    memory   = MEMORIES[name](input_size, hidden_size, num_layers, **kwargs)
    state    = memory.initial_state(B)
    y, state = memory(x, state, start)

    kwargs   of the memory's layers, as state_size=32
    state    flat tuple of tensors, every one [B, ...]; () if there is none
    x        [T, B, F]
    start    [T, B] bool: True says that x[t, b] is the first step of an episode.
             The memory forgets, then reads x[t, b].
    y        [T, B, hidden_size]

States are batch first, so tuple(s[rows] for s in state) picks environments or segments for every
memory.

    --memory              class                  file
    gru, lstm             GRU, LSTM              rnn.py
    gpt                   GPT                    gpt.py
    none                  NoMemory               memory.py
    mingru, minlstm       MinGRU, MinLSTM        linear_recurrences.py    } layers of a network,
    lru, s5, s6, ffm      LRU, S5, S6, FFM       linear_recurrences.py    } Stack in memory.py
    linear-attention      LinearAttention        matrix_memories.py       }
    deltanet              GatedDeltaNet          matrix_memories.py       }

To add a memory, add a layer to MONOIDS or such a class to MEMORIES (docs/memories.md): every script's
--memory and every law in tests/test_memory.py then include it.
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.gpt import GPT
from models.linear_recurrences import FFM, LRU, S5, S6, MinGRU, MinLSTM
from models.matrix_memories import GatedDeltaNet, LinearAttention
from models.rnn import GRU, LSTM
from models.scan import linear_scan


class NoMemory(nn.Module):
    """The memoryless baseline: every benchmark plot needs this curve."""

    def __init__(self, input_size, hidden_size, num_layers=1):
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = nn.Sequential()
        for _ in range(num_layers):
            self.layers.extend([nn.Linear(input_size, hidden_size), nn.Tanh()])
            input_size = hidden_size

    def initial_state(self, batch_size):
        return ()

    def forward(self, x, state, start):
        return self.layers(x), state


class Stack(nn.Module):
    """A network of memory layers, each [T, B, H] -> [T, B, H].

    x = W [x, new]; then for every layer  x = x + W_1 g * sigmoid(W_2 g),  g = gelu(layer(LN(x)))
    This is pre-norm, residual, with a gated linear unit, as S5 and the LRU are used.

    new_t = 1, 1/2, 1/4, ... from the start of the episode. What these layers store does not depend
    on their state, so nothing else tells them that a step is the first. Without `new` one layer
    cannot learn popgym-RepeatFirst. (A GRU sees its state of zeros.)

    State: 1 - new of the next step, then the states of all layers.
    """

    def __init__(self, layer, input_size, hidden_size, num_layers=1, **kwargs):
        super().__init__()
        self.hidden_size = hidden_size
        self.embed = nn.Linear(input_size + 1, hidden_size)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(num_layers))
        self.layers = nn.ModuleList(layer(hidden_size, **kwargs) for _ in range(num_layers))
        self.mixers = nn.ModuleList(nn.Linear(hidden_size, 2 * hidden_size) for _ in range(num_layers))

    def initial_state(self, batch_size):
        state = (self.embed.weight.new_zeros(batch_size, 1),)
        for layer in self.layers:
            state += layer.initial_state(batch_size)
        return state

    def forward(self, x, state, start):
        half = x.new_full((*x.shape[:2], 1), 0.5)           # [T, B, 1]
        old = linear_scan(half.masked_fill(start[..., None], 0), half, state[0])
        new = 2 - 2 * old                                   # old = 1/2, 3/4, 7/8, ...
        x = self.embed(torch.cat([x, new], dim=-1))
        after = (old[-1],)
        layers = zip(self.norms, self.layers, self.mixers, state[1:], strict=True)
        for norm, layer, mixer, before in layers:
            y, layer_state = layer(norm(x), (before,), start)
            x = x + F.glu(mixer(F.gelu(y)), dim=-1)
            after += layer_state
        return x, after


MONOIDS = {"mingru": MinGRU, "minlstm": MinLSTM, "lru": LRU, "s5": S5, "s6": S6, "ffm": FFM,
           "linear-attention": LinearAttention, "deltanet": GatedDeltaNet}
MEMORIES = {"gru": GRU, "lstm": LSTM, "gpt": GPT, "none": NoMemory}
MEMORIES |= {name: functools.partial(Stack, layer) for name, layer in MONOIDS.items()}

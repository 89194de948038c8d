"""The first weights of layers, and the two-layer network of policies and critics."""
import torch
import torch.nn as nn

SPAN = 32  # new gated memories, linear or not, have units that remember for 1 to SPAN steps


def init(layer, gain):
    """Orthogonal weights of this gain, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def chrono(size, span):
    """Biases [size] of a gate that keeps the state: the units remember for 1 to `span` steps."""
    # DEVIATION (recurrent-ppo model.py, zero biases: half of the state is gone after one step): chrono
    #   initialisation (Tallec and Ollivier 2018, https://arxiv.org/abs/1804.11188).
    #   Test: test_models.py::test_gates_remember_for_1_to_span_steps.
    return torch.empty(size).uniform_(1, span).log()


def mlp(in_size, hidden_size, out_size, gain):
    """[..., in_size] -> [..., out_size], one hidden layer with ReLU.   gain: of the output's weights"""
    hidden = init(nn.Linear(in_size, hidden_size), 2**0.5)
    output = init(nn.Linear(hidden_size, out_size), gain)
    return nn.Sequential(hidden, nn.ReLU(), output)

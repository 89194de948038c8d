"""The first weights of layers, and the two-layer network of policies and critics."""
import torch
import torch.nn as nn

SPAN = 32  # new gated memories, linear or not, have units that remember for 1 to SPAN steps


def check_sizes(**sizes):
    """Raises ValueError unless each is a whole number from 1 to 2^20, or None: the default."""
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or not 1 <= size <= 2**20):
            raise ValueError(f"{name} must be a whole number from 1 to {2**20}, not {size}")


def check_rising(**numbers):
    """Raises ValueError unless these are positive numbers, none less than the one before, and finite."""
    before = 0
    for name, number in numbers.items():
        if type(number) not in (int, float) or not (0 < number < 1e9 and number >= before):
            raise ValueError(f"{' and '.join(numbers)} must be positive and rise, but {name} is {number}")
        before = number


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
    if type(span) not in (int, float) or not 1 <= span < 1e9:
        raise ValueError(f"span must be a number of steps of 1 or more, not {span}")
    return torch.empty(size).uniform_(1, span).log()


def mlp(in_size, hidden_size, out_size, gain):
    """[..., in_size] -> [..., out_size], one hidden layer with ReLU.   gain: of the output's weights"""
    hidden = init(nn.Linear(in_size, hidden_size), 2**0.5)
    output = init(nn.Linear(hidden_size, out_size), gain)
    return nn.Sequential(hidden, nn.ReLU(), output)

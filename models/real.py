"""One step of an agent as a graph in real arithmetic, for formats that know no complex numbers.

torch.export makes the graph. It is run node by node, where what would be a complex tensor is a Pair; a trace
of that run is a graph of real tensors. The rules are what memories do with complex numbers: lru, s5, ffm, and
gpt where it rotates.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class Step(nn.Module):
    """agent.greedy() on states in real numbers."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent
        self.is_complex = [s.is_complex() for s in agent.memory.initial_state(1)]

    def forward(self, obs, start, state):
        """obs: leaves of [B, ...]; start [B] bool; state: of [B, ...]"""
        state = tuple(torch.view_as_complex(s) if c else s for s, c in zip(state, self.is_complex))
        action, state, numbers = self.agent.greedy(obs, state, start)
        return action, in_real(state), numbers


def in_real(state):
    return tuple(torch.view_as_real(s) if s.is_complex() else s for s in state)


def program_of(agent, obs):
    """Step as a program of torch.export, for any number of rows.   obs: leaves of two rows or more"""
    rows, batch = len(obs[0]), torch.export.Dim("batch", min=1)
    start, state = torch.ones(rows, dtype=torch.bool), in_real(agent.memory.initial_state(rows))
    inputs = obs, start, state
    shapes = pytree.tree_map(lambda x: {0: batch}, inputs)
    program = torch.export.export(Step(agent), inputs, dynamic_shapes=shapes)
    values = [node.meta.get("val") for node in program.graph.nodes]
    if any(isinstance(x, torch.Tensor) and x.is_complex() for x in values):
        graph = InReal(program.module(check_guards=False))
        program = torch.export.export(graph, inputs, dynamic_shapes=(shapes,))
    return program


class Pair(NamedTuple):
    real: torch.Tensor
    imag: torch.Tensor


def multiply(x, y):
    return Pair(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)


def add_product(x, y, z):
    product = multiply(y, z)
    return Pair(x.real + product.real, x.imag + product.imag)


def to(x, dtype):
    return Pair(x, torch.zeros_like(x)) if dtype.is_complex else x.to(dtype)


RULES = {
    aten.addcmul.default: add_product,
    aten.mul.Tensor: multiply,
    aten.to.dtype: to,
    aten.view_as_complex.default: lambda x: Pair(*x.unbind(-1)),
    aten.view_as_real.default: lambda x: torch.stack(x, dim=-1),
}
MAKE_PAIRS = aten.to.dtype, aten.view_as_complex.default


class Pairs(torch.fx.Interpreter):
    """Runs a graph. What has no rule, as to choose rows or to fill some with 0, is done to both parts."""

    def call_function(self, target, args, kwargs):
        if target not in MAKE_PAIRS and not any(isinstance(x, Pair) for x in args):
            return super().call_function(target, args, kwargs)
        if target in RULES:
            return RULES[target](*args)
        real, imag = ([x[part] if isinstance(x, Pair) else x for x in args] for part in (0, 1))
        return Pair(target(*real, **kwargs), target(*imag, **kwargs))


class InReal(nn.Module):
    """The module of an exported program, in real arithmetic."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.constants = {node: Pair(x.real.clone(), x.imag.clone())
                          for node, x in constants_of(module).items() if x.is_complex()}

    def forward(self, *inputs):
        return Pairs(self.module).run(*inputs, initial_env=dict(self.constants))


def constants_of(module):
    """The values, by node, that depend on the weights alone: as complex numbers, as exact as the agent's."""
    known, fetch = {}, torch.fx.Interpreter(module).fetch_attr
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = fetch(node.target)
        elif node.op == "call_function" and all(x in known for x in node.all_input_nodes):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.get)
            known[node] = node.target(*args, **kwargs)
    return {node: x for node, x in known.items() if isinstance(x, torch.Tensor)}

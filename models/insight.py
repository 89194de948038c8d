"""What goes on inside an agent while it acts, noted by hooks: no script knows that it is watched."""
import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F

from models.distributions import DiagonalGaussian
from models.gpt import Block
from models.heads import PolicyHead, QHead
from models.linear_recurrences import LinearRecurrence
from models.matrix_memories import GatedDeltaNet
from models.rnn import RNN, forget


@contextlib.contextmanager
def noting(agent):
    """Yields a list that grows by one dict a step, while the agent acts in one environment:

    obs         what it saw, leaves of [1, ...]
    age         how many steps of its episode came before
    empty       whether its memory holds nothing: so begins an episode, and so it is after a wipe
    state       [U] the memory's state after the step, complex numbers as two
    policy      [A] probabilities of the actions. PQN, DQN: their values. Box: the action
    sizes       how many actions each branch has; Box: none
    values      [1 or 2] the value (PPO) or the largest Q of each critic; of SAC and TD3 see critics_of
    kept        one [K] a layer with gates or decay: what each unit of the state was multiplied with
    attention   one [keys] a head of GPT: how much it looked at each step, the newest last
    """
    steps, act = [], agent.act

    def noted(obs, state, start):
        empty = all(torch.equal(s, e) for s, e in zip(state, agent.memory.initial_state(1)))
        age = steps[-1]["age"] + 1 if steps and not start else 0
        steps.append({"obs": obs, "age": age, "empty": age == 0 or empty, "sizes": [], "values": [],
                      "kept": [], "attention": []})
        action, state = act(obs, state, start)
        steps[-1]["state"] = numbers(state)
        return action, state

    agent.act = noted
    heard = [(part, note) for part in agent.modules()
             for kind, note in NOTED.items() if isinstance(part, kind)]
    if hasattr(agent, "value"):                             # PPO
        heard.append((agent.value, note_value))
    if hasattr(agent, "critics"):                           # SAC, TD3
        heard.append((agent.policy, functools.partial(note_action, len(agent.low))))
    hooks = [part.register_forward_hook(functools.partial(note, steps)) for part, note in heard]
    try:
        yield steps
    finally:
        del agent.act                                       # the class's own is back
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def critics_of(agent, steps):
    """[T] SAC, TD3: Q of the actions that were taken, the smaller one. Their critics do not act along."""
    obs = tuple(torch.stack(leaf) for leaf in zip(*(step["obs"] for step in steps)))        # of [T, 1, ...]
    device = obs[0].device
    start = torch.tensor([[step["empty"]] for step in steps], device=device)               # [T, 1]
    actions = torch.tensor(np.stack([step["policy"] for step in steps]), device=device)[:, None]
    h, _ = agent.critics.memory(obs, agent.critics.memory.initial_state(1), start)
    return torch.minimum(*agent.critics(h, actions)).squeeze(1).cpu().numpy()


def numbers(tensors):
    """All numbers of some tensors, as one array."""
    real = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    return torch.cat([torch.zeros(0), *(x.detach().cpu().float().flatten() for x in real)]).numpy()


# ------------------------------------------------ hooks: (steps, module, what it was given, what it gave)

def note_value(steps, head, args, value):
    steps[-1]["values"].append(value.item())


def note_action(size, steps, layers, args, out):
    steps[-1]["policy"] = numbers([out[..., :size].tanh()])  # SAC's log-stds come after the means


def note_policy(steps, head, args, dist):
    if isinstance(dist, DiagonalGaussian):
        steps[-1]["policy"] = numbers([dist.mode()])
    else:
        note_actions(steps, [branch.logp.exp() for branch in dist.branches])


def note_q(steps, head, args, q):
    steps[-1]["values"].append(q.of(q.greedy()).item())
    if "policy" not in steps[-1]:                           # SAC-Discrete's has come before
        note_actions(steps, q.branches)


def note_actions(steps, branches):
    steps[-1] |= {"policy": numbers(branches), "sizes": [branch.shape[-1] for branch in branches]}


def note_rnn(steps, memory, args, out):
    """GRU's update gate and LSTM's forget gate: the second of each."""
    x, state, start = args
    inputs = (x[0], *out[1])                                # of a layer: the layer's below
    for x, h, (w, u, b, c) in zip(inputs, forget(state, start[0]), memory.rnn.all_weights):
        gates = F.linear(x, w, b) + F.linear(h, u, c)
        gate = gates.unflatten(-1, (-1, memory.hidden_size))[..., 1, :].sigmoid()
        steps[-1]["kept"].append(numbers([gate]))


def note_recurrence(steps, layer, args, out):
    a, _ = layer.lift(args[0])
    steps[-1]["kept"].append(numbers([a.abs()]))


def note_deltanet(steps, layer, args, out):
    log_alpha = -F.softplus(layer.gates(args[0])[..., : layer.heads])
    steps[-1]["kept"].append(numbers([log_alpha.exp()]))


def note_attention(steps, block, args, out):
    x, *_, turns = args
    query, _, _ = block.qkv(block.norm(x)).chunk(3, dim=-1)
    query, keys = block.rotate(query, turns[-1:]), block.rotate(out[1][:, -len(turns) :], turns)
    scores = query @ keys.mT / query.shape[-1] ** 0.5       # [1, heads, 1, keys]
    steps[-1]["attention"].extend(scores.softmax(-1).flatten(0, 2).cpu().numpy())


NOTED = {
    PolicyHead: note_policy, QHead: note_q, RNN: note_rnn, LinearRecurrence: note_recurrence,
    GatedDeltaNet: note_deltanet, Block: note_attention}

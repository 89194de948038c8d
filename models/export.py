"""--export: one step of a trained agent as a file, to act with where this repository is not.

    policy.onnx    ONNX: onnxruntime runs it, without torch
    policy.pt2     torch.export: torch.export.load("policy.pt2").module() runs it, without our code

    inputs     obs, or obs_0, obs_1, ...   the leaves of an observation (models/encoder.py), [B, ...] each
               start                       [B] bool: the observation opens an episode
               state_0, state_1, ...       the memory's state, [B, ...] each, zeros at first
    outputs    action                      without exploring, as the environment takes it
               next_state_0, ...           the state for the next step
               value, probabilities, ...   what else the agent's greedy() gives

Any number B of environments. Complex numbers of a state are pairs of real ones, [B, ..., 2].
"""
import logging
import warnings
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from models.encoder import to_tensors
from models.files import write
from models.flags import fail, refused_in_one_sentence
from models.real import in_real, program_of

STEPS, ROWS = 100, 3  # of the check
TOLERANCE = 1e-5  # of it; of a tensor with numbers larger than 1 a share of the largest


@torch.no_grad()
def export(agent, envs, args):
    """Writes the file that --export names, if it acts as the agent does."""
    agent, path, what = agent.cpu(), Path(args.export), f"--export {args.export}"
    onnx = path.suffix == ".onnx"
    if onnx:
        refuse_without_onnx(what)
    obs = played(agent, envs, args.seed)                    # leaves of [STEPS, ...]

    def save(beside):
        with refused_in_one_sentence(what):
            program = program_of(agent, tuple(o[:ROWS] for o in obs))
            save_onnx(program, beside, agent, obs) if onnx else save_pt2(program, beside)
            run = run_onnx(beside) if onnx else run_pt2(beside)
            difference = largest_difference(agent, obs, run)
        if not difference < TOLERANCE:
            fail(f"{what} was not written: its steps would differ from the agent's by {difference:.1e}; "
                 "play with --model alone")
        print(f"{path} differs from the agent by at most {difference:.1e} in {STEPS} steps")

    write(path, save)


def refuse_without_onnx(what):
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        fail(f"{what} needs {e.name}, which is not installed: pip install onnx onnxruntime onnxscript")


def played(agent, envs, seed):
    """What the agent sees when it plays: leaves of [STEPS, ...]."""
    space, seen = envs.single_observation_space, []
    state, start = agent.memory.initial_state(1), torch.ones(1, dtype=torch.bool)
    obs, _ = envs.reset(seed=seed)
    for _ in range(STEPS):
        seen.append(to_tensors(space, obs, "cpu"))
        action, state = agent.act(seen[-1], state, start)
        obs, _, terminated, truncated, _ = envs.step(action)
        start = torch.as_tensor(terminated | truncated)
        if start:
            obs, _ = envs.reset()
    return tuple(torch.cat(leaf) for leaf in zip(*seen))


def save_onnx(program, path, agent, obs):
    leaves = ["obs"] if len(obs) == 1 else [f"obs_{i}" for i in range(len(obs))]
    first = tuple(o[:1] for o in obs), agent.memory.initial_state(1), torch.ones(1, dtype=torch.bool)
    _, state, numbers = agent.greedy(*first)
    states = [f"state_{i}" for i in range(len(state))]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)     # warns that there is no torchvision
    with warnings.catch_warnings(action="ignore"):          # of torch about torch
        torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[*leaves, "start", *states],
            output_names=["action", *(f"next_{name}" for name in states), *numbers]).save(path)


def run_onnx(path):
    """Step as the file computes it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*inputs):
        arrays = [x.numpy() for x in pytree.tree_leaves(inputs)]
        action, *rest = map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True))))
        states = len(inputs[2])
        return action, tuple(rest[:states]), rest[states:]

    return run


def save_pt2(program, path):
    with path.open("wb") as f:
        torch.export.save(program, f)


def run_pt2(path):
    with path.open("rb") as f:
        return torch.export.load(f).module()


def largest_difference(agent, obs, run):
    """Between the agent and `run`, in STEPS steps of ROWS environments: of actions, states and numbers.

    Each step begins with the agent's state, so that what differs is of one step.
    """
    starts = torch.rand(STEPS, ROWS, generator=torch.Generator().manual_seed(1)) < 0.1
    starts[0] = True
    first = torch.arange(ROWS) * (STEPS // ROWS)            # each row sees what was played from there on
    state, differences = agent.memory.initial_state(ROWS), []
    for t, start in enumerate(starts):
        seen = tuple(o[(first + t) % STEPS] for o in obs)
        there = run(seen, start, in_real(state))
        action, state, numbers = agent.greedy(seen, state, start)
        here = action, in_real(state), numbers
        for x, y in zip(pytree.tree_leaves(there), pytree.tree_leaves(here), strict=True):
            x, y = x.double(), y.double()
            differences.append((x - y).abs().max() / y.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()

"""A trained agent as a function of observations, in a program of your own.

    policy = load("runs/.../model.safetensors")
    policy.reset()
    action = policy(obs)                one environment: obs as gym.make(...) gives it
    action = policy(obs, start)         N environments: obs as a vector environment gives it, [N, ...];
                                        start [N] bool: the observation opens an episode

    policy(obs, reward=reward)          if it was trained with --prev-reward: what came with obs
    policy(obs, action_mask=mask)       if the task's infos hold masks: that of this info

It keeps the memory's state and the previous action, and chooses as --model does: without exploring.
"""
import contextlib
import importlib
import io
import sys
from pathlib import Path

import numpy as np
import torch

from envs.given import Given, batch_of_one
from envs.vector import make_envs, with_flags
from models import loading
from models.command_line import Refusal
from models.encoder import to_tensors
from models.files import read_model
from models.flags import args_of, refuse_what_is_out_of_range
from models.run_folder import make_agent

SCRIPTS = (  # what a file can name: nothing else is imported
    "ppo_recurrent_sbb", "ppo_recurrent_tbb", "ppo_recurrent_tbb_multigpu", "pqn_recurrent_tbb",
    "dqn_recurrent_sbb", "dqn_recurrent_tbb", "sac_discrete_sbb", "sac_gru", "td3_gru")


def load(path, device="cpu"):
    """The agent of a model file as a Policy.

    Raises FileNotFoundError, and ValueError for a file that is damaged or not ours. A stranger's file runs no
    code: it is numbers and text, and nothing that it names is imported, except SCRIPTS.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the model.safetensors in a run folder")
    try:
        name = read_model(path)["script"]
    except Exception as e:                                  # damaged files raise all kinds
        why = f"({type(e).__name__}): it is damaged or another program's"
        raise ValueError(f"{path} cannot be read {why}") from None
    if name not in SCRIPTS:
        raise ValueError(f"{path} was trained by {name}, which is no script of this project")
    with refusals_raised():
        script, saved = importlib.import_module(name), loading.load("the model", path, read_model, name)
        args = args_of(script.Args, saved, path)
        refuse_what_is_out_of_range(args)
    module, _, _ = args.env_id.rpartition(":")
    if module and module not in sys.modules:
        raise ValueError(f"{path} was trained on {args.env_id}: import {module} first")
    args.device = device
    with refusals_raised():
        envs = make_envs(args, 1, training=False)
        agent, _ = make_agent(script.Agent, args, envs, saved)
    envs.close()
    return Policy(agent, args, envs.unwrapped)


@contextlib.contextmanager
def refusals_raised():
    """What a script says before it leaves, a function raises."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Refusal as e:
        raise ValueError(e.message) from None


class Policy:
    """Observations -> actions. What can be read after a step, [N, ...], or without N of a single environment:

    value           the critic's, or the largest Q; None where the algorithm has none
    distribution    {"probabilities": ...}, {"action_values": ...}, or {"mean": ...} and of some "std",
                    which of a Box are in units of its bounds, and of SAC before the tanh
    state           the memory's: a tuple of tensors, always [N, ...]
    """

    def __init__(self, agent, args, like):
        """like: our own vector of the task that the agent was trained on"""
        self.agent, self.args, self.like = agent, args, like
        self.device = next(agent.parameters()).device
        self.wipe_every = getattr(agent, "wipe_state_every", 0)
        self.reset()

    def reset(self):
        """Forgets everything: the next observations open episodes."""
        self.state = self.envs = self.value = self.distribution = None

    @torch.no_grad()
    def __call__(self, obs, start=None, *, reward=None, action_mask=None):
        one, first = start is None, self.envs is None
        if one:
            obs, start = batch_of_one(obs), [first]
            action_mask = None if action_mask is None else [action_mask]
        start = np.array(start, bool) | first               # [N]
        if first:
            self.begin(len(start))
        if len(start) != len(self.lengths):
            raise ValueError(f"{len(start)} environments after {len(self.lengths)}: call reset() first")
        if reward is None and self.args.prev_reward and not start.all():
            raise ValueError("the agent was trained with --prev-reward: call policy(obs, reward=...)")
        with refusals_raised():
            self.given.show(obs, reward, action_mask)
        if not first:
            seen, *_ = self.envs.step(self.action)          # keeps the previous action and reward
        if start.any():
            seen, _ = self.envs.reset(options={"reset_mask": start})
        seen = to_tensors(self.envs.single_observation_space, seen, self.device)
        self.lengths[start] = 0
        forget = start | (self.lengths % self.wipe_every == 0) if self.wipe_every else start
        self.lengths += 1
        forget = torch.as_tensor(forget, device=self.device)
        action, self.state, numbers = self.agent.greedy(seen, self.state, forget)
        self.action = action.cpu().numpy()
        numbers = {name: x.cpu().numpy()[0 if one else ...] for name, x in numbers.items()}
        self.value, self.distribution = numbers.pop("value", None), numbers
        return self.action[0] if one else self.action

    def begin(self, N):
        self.given = Given(self.like, N)
        self.envs = with_flags(self.given, self.args)
        self.state, self.lengths = self.agent.memory.initial_state(N), np.zeros(N, int)

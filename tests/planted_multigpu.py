"""What test_distributed.py starts by torchrun:   python planted_multigpu.py PLANT flags...

The script with something planted. A plant sets attributes by `put`; tests give monkeypatch's setattr.
"""
import os
import sys

import torch

import ppo_recurrent_tbb_multigpu as ppo
from models.distributions import Categorical


def nothing(put=setattr):
    pass


def coin(put=setattr):
    """Actions that rounding cannot change: a coin tossed by the observation."""
    forward = ppo.Agent.forward

    def tossed(self, obs, state, start, prefix=0):
        dist, value, after = forward(self, obs, state, start, prefix)
        dist.sample = lambda: (1000 * obs[0][..., 0]).long() % 2
        return dist, value, after

    put(ppo.Agent, "forward", tossed)


def report(put=setattr):
    """The actions that every process trains on, a file an update: <runs-dir>/<update>-<rank>.pt."""
    log_prob, gae, updates = Categorical.log_prob, ppo.gae, []
    folder = sys.argv[sys.argv.index("--runs-dir") + 1]

    def count(*args, **kwargs):
        updates.append([])
        return gae(*args, **kwargs)

    def watched(self, action):
        if torch.is_grad_enabled():
            updates[-1].append(action)
            torch.save(torch.cat(updates[-1], dim=1), f"{folder}/{len(updates)}-{ppo.RANK}.pt")
        return log_prob(self, action)

    put(ppo, "gae", count)
    put(Categorical, "log_prob", watched)


def nan_on_the_second(put=setattr):
    """The second process's values become nan in training."""
    forward = ppo.Agent.forward

    def spoilt(self, obs, state, start, prefix=0):
        dist, value, after = forward(self, obs, state, start, prefix)
        return dist, value * torch.nan if ppo.RANK == 1 and torch.is_grad_enabled() else value, after

    put(ppo.Agent, "forward", spoilt)


if __name__ == "__main__":
    if os.environ.get("PLANT"):                             # what plant.py has planted in the test
        from tests.plant import plant_from_environment
        plant_from_environment()
    globals()[sys.argv.pop(1)]()
    ppo.main()

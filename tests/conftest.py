"""What tests of several files need: one thread, the scripts by family, a script started as a user does."""
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import envs.memory_gym

torch.set_num_threads(1)
if importlib.util.find_spec("memory_gym"):
    envs.memory_gym.load("environment", "the tests")        # imported by a test it would take our ids
ROOT = Path(__file__).parent.parent
PPO = "ppo_recurrent_sbb", "ppo_recurrent_tbb"
PQN = "pqn_recurrent_tbb",
DQN = "dqn_recurrent_sbb", "dqn_recurrent_tbb"
DISCRETE_OFF_POLICY = *DQN, "sac_discrete_sbb"
CONTINUOUS = "sac_gru", "td3_gru"
OFF_POLICY = *DISCRETE_OFF_POLICY, *CONTINUOUS
DISCRETE = *PQN, *DISCRETE_OFF_POLICY  # those that take no Box; of CONTINUOUS nothing else
SCRIPTS = *PPO, *PQN, *OFF_POLICY
needs_memory_gym = pytest.mark.skipif(                      # not importorskip: that import takes our names
    importlib.util.find_spec("memory_gym") is None,
    reason="Memory Gym is missing: pip install --no-deps memory-gym==1.0.2")


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module. A test for some of them parametrizes "script" with indirect."""
    return importlib.import_module(request.param)


@pytest.fixture
def run_script():
    """Start a script as a user does, from the repository's root. Returns the process."""
    def start(*command, **kwargs):
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    return start

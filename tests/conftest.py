import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_script():
    """Start a script as a user does, from the repository's root. Returns the process."""
    def start(*command, **kwargs):
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    return start

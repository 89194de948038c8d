"""Bad input to any script: one line that names the flag, exit code 2, and nothing is written."""
import itertools
import os

import pytest
import safetensors
import torch

from tests.conftest import CONTINUOUS, DISCRETE, DQN, OFF_POLICY, PPO, PQN, SCRIPTS
from tests.helpers import run

# flags: what the refusal says. It names one of the flags as well.
BAD = {
    "--env-id PocMemry-v0": "Did you mean: `PocMemory`",
    '--env-id MinigridMemory-v0 --env-kwargs {"size":8}': "--env-kwargs",
    '--env-kwargs {"colour":1}': "colour",
    '--env-kwargs {"max_steps":"ten"}': "--env-kwargs",
    "--env-kwargs [1": "--env-kwargs",
    '--reset-options {"size":1}': "no reset options",
    "--reset-options 3": "--reset-options",
    "--num-envs -1": "--num-envs",
    "--total-timesteps 10": "--total-timesteps",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--gamma 1.5": "--gamma",
    "--gamma nan": "--gamma",
    "--device warp": "--device",
    "--device meta": "--device",
    "--hidden-size 0": "--hidden-size",
    "--memory elephant": "--memory",
    '--memory gru --memory-kwargs {"state_size":3}': "--memory-kwargs",
    '--memory lru --memory-kwargs {"state_size":-3}': "--memory-kwargs",
    "--memory-kwargs 3": "--memory-kwargs",
    "--run-name taken": "--run-name",
    "--model nowhere.safetensors": "does not exist",
    "--model README.md": "cannot be read",
    "--resume nowhere": "does not exist",
    "--forget-at 12": "name one by --model",
    "--forget-at -1": "--forget-at",
    "--probe": "name one by --model",
    "--show-memory": "name one by --model",
}
BAD_LEARNING_RATE = {
    "--learning-rate 1 1 1 1 1": "--learning-rate",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate nan": "--learning-rate",
}
BAD_PPO = {
    "--ent-coef 1e-3 1e-4 1 0": "--ent-coef",
    "--ent-coef 1e-3 1e-4 -1": "--ent-coef",
    "--clip-coef -0.2": "--clip-coef",
}
BAD_ROLLOUT = {
    "--num-minibatches 1000": "do not fit",
    "--num-steps 100 --total-timesteps 99": "less than one rollout",
}
BAD_OFF_POLICY = {
    "--buffer-size 3": "--buffer-size",
    "--buffer-size 1000000000000": "GiB of memory",
    "--replay-ratio -1": "--replay-ratio",
    "--tau 2": "--tau",
}
BAD_DISCRETE = {
    "--env-id popgym-PositionOnlyPendulumEasy-v0": "action space",
}
BAD_EPSILON = {
    "--start-e 2": "--start-e",
    "--exploration-fraction 0": "--exploration-fraction",
}
BAD_DQN = {
    "--loss elephant": "--loss",
    "--n-step 0": "--n-step",
}
BAD_SEGMENTS = {
    "--seq-len 0": "--seq-len",
    "--burn-in -1": "--burn-in",
}
BAD_TAPE = {
    "--tape-len 0": "--tape-len",
}
BAD_SAC_DISCRETE = {
    "--alpha -1": "--alpha",
    "--target-entropy 2": "--target-entropy",
    "--target-entropy 0.5 --alpha 0": "--alpha",
    "--no-freeze-critic": "--shared-encoder",
    "--no-freeze-memory": "--shared-encoder",
    "--q-lambda 2": "--q-lambda",
}
BAD_CONTINUOUS = {
    "--burn-in -1": "--burn-in",
    "--burn-in 98 --buffer-size 1600 --num-envs 16": "(3 + --burn-in)",
    "--burn-in 5 --wipe-state-every 10": "--wipe-state-every",
    "--env-id PocMemory-v0": "action space",
    '--env-id CountInput-v0 --env-kwargs {"mode":"count"}': "count_input",
    "--policy-lr 1 1 1 1 1": "--policy-lr",
    "--q-lr -1": "--q-lr",
    "--q-lr nan": "--q-lr",
    "--seq-len 0": "--seq-len",
    "--nominal-seq-length-probability 2": "--nominal-seq-length-probability",
    "--wipe-state-every -1": "--wipe-state-every",
    "--policy-frequency 0": "--policy-frequency",
}
BAD_SAC = {
    "--alpha 0": "--alpha",
    "--alpha-lr -1": "--alpha-lr",
    "--target-entropy nan": "--target-entropy",
}
BAD_TD3 = {
    "--policy-noise -1": "--policy-noise",
    "--noise-clip nan": "--noise-clip",
    "--policy-tau 2": "--policy-tau",
}
WHO_REFUSES_WHAT = [
    (SCRIPTS, BAD),
    ([*PPO, *DISCRETE], BAD_LEARNING_RATE),
    (PPO, BAD_PPO),
    ([*PPO, *PQN], BAD_ROLLOUT),
    (OFF_POLICY, BAD_OFF_POLICY),
    (DISCRETE, BAD_DISCRETE),
    ([*PQN, *DQN], BAD_EPSILON),
    (DQN, BAD_DQN),
    (["dqn_recurrent_sbb", "sac_discrete_sbb"], BAD_SEGMENTS),
    (["dqn_recurrent_tbb"], BAD_TAPE),
    (["sac_discrete_sbb"], BAD_SAC_DISCRETE),
    (CONTINUOUS, BAD_CONTINUOUS),
    (["sac_gru"], BAD_SAC),
    (["td3_gru"], BAD_TD3),
]
QUICK = "--env-id PocMemry-v0", "--num-envs -1", "--resume nowhere"


def cases():
    found = []
    for scripts, bad in WHO_REFUSES_WHAT:
        for script, (flags, says) in itertools.product(scripts, bad.items()):
            marks = [pytest.mark.quick] if flags in QUICK else []
            found.append(pytest.param(script, flags, says, id=f"{script} {flags}", marks=marks))
    return found


def refusal(capsys, script, argv):
    """What a script says on stderr when it refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("script, flags, says", cases(), indirect=["script"])
def test_bad_input_is_one_sentence_and_leaves_nothing(script, tmp_path, capsys, flags, says):
    taken = tmp_path / "taken"                              # for --run-name
    taken.mkdir()
    argv = ["--runs-dir", str(tmp_path), *flags.split()]
    if "--env-id" not in flags:
        argv += ["--env-id", "PendulumMasked-v1" if script.SCRIPT in CONTINUOUS else "PocMemory-v0"]
    error = refusal(capsys, script, argv)
    assert says in error and "Traceback" not in error
    assert any(word in error for word in flags.split() if word.startswith("--"))
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [taken]
    assert not list(taken.iterdir())


# ---------------------------------------------------------------------- files that are not ours

def test_files_of_others_are_refused(script, tmp_path, capsys):
    _, folder = run(tmp_path, script)
    model, checkpoint = folder / "model.safetensors", folder / "checkpoint.pt"
    play, resume = ["--model", str(model)], ["--resume", str(folder)]
    capsys.readouterr()

    def refused(argv):
        error = refusal(capsys, script, argv)
        assert len(error.strip().splitlines()) == 1
        return error

    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])               # torn in transfer
    assert "cannot be read" in refused(play)
    for metadata in ({"script": script.SCRIPT}, {"script": script.SCRIPT, "args": "{"}, {}):
        safetensors.torch.save_file({"w": torch.zeros(2)}, model, metadata)
        assert "cannot be read" in refused(play)
    safetensors.torch.save_file({"w": torch.zeros(2)}, model, {"script": "ppo_gtrxl", "args": "{}"})
    assert "ppo_gtrxl" in refused(play)
    model.write_bytes(data)
    other_size = ["--hidden-size", "9"]
    for argv in [*play, *other_size], [*resume, *other_size, "--total-timesteps", "1000"]:
        error = refused(argv)
        assert "other sizes" in error and "leave out --hidden-size 9 (saved: 8)" in error

    it_ran = tmp_path / "it ran"
    torch.save({"script": script.SCRIPT, "args": "{}", "program": Program(it_ran)}, checkpoint)
    assert "cannot be read" in refused(resume)
    assert not it_ran.exists()
    torch.save([1, 2], checkpoint)
    assert "cannot be read" in refused(resume)


class Program:
    """Unpickling it makes a folder: a checkpoint that runs code."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)

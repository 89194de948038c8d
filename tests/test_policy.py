"""load: a trained agent in a program of one's own does what --model does, to the bit."""
import importlib
import json
import sys

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode

from envs.vector import has_batch, make_envs
from models import MEMORIES, to_tensors
from models.play import load
from models.policy import SCRIPTS
from tests.conftest import ROOT
from tests.helpers import model_of_new_agent, spy
from tests.test_masks import TASKS


class Everything(gym.Env):
    """A picture, numbers, integers and bits, in a Dict and a Tuple; episodes of 4 to 7 steps."""

    observation_space = Dict({
        "picture": Box(0, 255, (12, 16, 3), np.uint8), "bits": MultiBinary(2),
        "parts": Tuple([Box(-1, 1, (2,)), Discrete(3, start=1)])})

    def __init__(self, box=False, render_mode=None):
        low, high = np.array([[-2, 0], [6, 1]], np.float32)
        self.action_space = Box(low, high) if box else MultiDiscrete([3, 2], start=[1, 0])

    def observe(self):
        draw = self.np_random
        return {"picture": draw.integers(0, 256, (12, 16, 3), np.uint8),
                "bits": draw.integers(0, 2, 2, np.int8),
                "parts": (draw.uniform(-1, 1, 2).astype(np.float32), 1 + draw.integers(3))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, self.np_random.integers(4, 8)
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        return self.observe(), float(self.np_random.random()), bool(self.t == self.length), False, {}


gym.register("Everything-v0", Everything)
FEEDS = {"prev_action": True, "prev_reward": True}
EVERYTHING = {"env_id": "Everything-v0", "env_kwargs": {}, **FEEDS}
MASKS = {name: {"env_id": env_id, "env_kwargs": kwargs | {"sizes": [3, 2]}, **FEEDS}
         for name, (env_id, kwargs) in TASKS.items()}
PICTURES = {"env_id": "Masked-v0", "env_kwargs": {"sees": "views"}}
MINIGRID = {"env_id": "MiniGrid-MemoryS7-v0", "env_kwargs": {"max_steps": 9}}
CASES = {
    **{f"{memory}, 2 layers": ("sac_gru", {"memory": memory, "num_layers": 2}) for memory in MEMORIES},
    **{script: (script, FEEDS) for script in SCRIPTS},
    **{f"mask {name}": ("dqn_recurrent_sbb", flags) for name, flags in MASKS.items()},
    "no mask": ("pqn_recurrent_tbb", MASKS["shown"] | {"action_mask": False, "env_kwargs": {
        "shown": True, "sizes": [3, 2], "gives": "ones"}}),
    "everything": ("sac_discrete_sbb", EVERYTHING),
    "everything, smaller pictures": ("ppo_recurrent_tbb", EVERYTHING | {"shrink_images": 2}),
    "everything, Box": ("ppo_recurrent_sbb", EVERYTHING | {"env_kwargs": {"box": True}, "norm_obs": True}),
    "everything, bounded": ("sac_gru", EVERYTHING | {"env_kwargs": {"box": True}}),
    "views": ("dqn_recurrent_tbb", PICTURES | {"encoder_size": 8}),
    "whitened": ("pqn_recurrent_tbb", PICTURES | {"whiten_images": True, "shrink_images": 4}),
    "MiniGrid": ("ppo_recurrent_sbb", MINIGRID),
    "no reset": ("ppo_recurrent_tbb", EVERYTHING | {"reset_state": False}),
    "wiped": ("td3_gru", {"wipe_state_every": 4}),
}


@pytest.mark.parametrize("name, changes", CASES.values(), ids=CASES)
def test_it_acts_as_model_does_to_the_bit(tmp_path, monkeypatch, name, changes):
    script, path = importlib.import_module(name), tmp_path / "model.safetensors"
    args = model_of_new_agent(path, script, **changes)
    calls = spy(monkeypatch, script.Agent, "act")
    argv = ["--model", str(path), "--render-mode", "none", "--device", "cpu", "--seed", "7"]
    script.main([*argv, "--episodes", "2"])
    theirs, actions = [call.result[0][0] for call in calls], []

    policy = load(path)
    env = gym.make(args.env_id, **args.env_kwargs)
    for seed in 7, 8:
        policy.reset()
        obs, info = env.reset(seed=seed)
        reward, done = None, False
        while not done:
            actions.append(policy(obs, reward=reward, action_mask=info.get("action_mask")))
            obs, reward, terminated, truncated, info = env.step(actions[-1])
            done = terminated or truncated
    assert len(np.unique(theirs, axis=0)) > 1
    assert [a.tobytes() for a in actions] == [a.tobytes() for a in theirs]
    for ours, state in zip(policy.state, calls[-1].result[1], strict=True):
        assert torch.equal(ours, state)


@pytest.mark.parametrize("name, changes", [
    pytest.param("ppo_recurrent_tbb", MASKS["ours"] | {"memory": "lru"}, id="our batch"),
    pytest.param("dqn_recurrent_sbb", MASKS["info"], id="masks"),
    pytest.param("td3_gru", EVERYTHING | {"env_kwargs": {"box": True}, "wipe_state_every": 4}, id="wiped"),
    pytest.param("ppo_recurrent_sbb", EVERYTHING, id="everything"),
    pytest.param("ppo_recurrent_sbb", MINIGRID, id="MiniGrid")])
def test_many_environments_at_once(tmp_path, name, changes):
    """Their episodes end at other steps; the steps that open the next are in the same batch as others."""
    script, path = importlib.import_module(name), tmp_path / "model.safetensors"
    args = model_of_new_agent(path, script, **changes)
    policy = load(path)
    envs = make_envs(args, 3)
    obs, _ = envs.reset(seed=1)
    state, start, lengths, theirs = policy.agent.memory.initial_state(3), np.ones(3, bool), np.zeros(3), []
    for _ in range(30):
        leaves = to_tensors(envs.single_observation_space, obs, "cpu")
        wiped = lengths % changes.get("wipe_state_every", 1000) == 0
        action, state = policy.agent.act(leaves, state, torch.as_tensor(start | wiped))
        theirs.append(action)
        obs, _, terminated, truncated, _ = envs.step(action)
        start = terminated | truncated
        lengths = np.where(start, 0, lengths + 1)

    how = {"autoreset_mode": AutoresetMode.SAME_STEP}
    ours = has_batch(args.env_id)
    vector = how if ours else {"vectorization_mode": "sync", "vector_kwargs": how}
    envs = gym.make_vec(args.env_id, 3, **vector, **args.env_kwargs)
    obs, infos = envs.reset(seed=1)
    start, reward, actions, ends = np.ones(3, bool), None, [], 0
    for _ in range(30):
        actions.append(policy(obs, start, reward=reward, action_mask=infos.get("action_mask")))
        obs, reward, terminated, truncated, infos = envs.step(actions[-1])
        start = terminated | truncated
        ends += start.sum()
    assert np.array_equal(actions, theirs) and ends > 3
    assert all(torch.equal(ours, other) for ours, other in zip(policy.state, state, strict=True))
    assert len(np.unique(np.concatenate(actions), axis=0)) > 1


@pytest.mark.parametrize("name, numbers", [
    ("ppo_recurrent_tbb", {"probabilities": (2,)}), ("dqn_recurrent_tbb", {"action_values": (2,)}),
    ("sac_discrete_sbb", {"probabilities": (2,)}), ("sac_gru", {"mean": (1,), "std": (1,)}),
    ("td3_gru", {"mean": (1,)})])
def test_what_a_step_was_chosen_by(tmp_path, name, numbers):
    script, path = importlib.import_module(name), tmp_path / "model.safetensors"
    args = model_of_new_agent(path, script)
    policy = load(path)
    action = policy(gym.make(args.env_id, **args.env_kwargs).reset(seed=1)[0])
    assert {name: x.shape for name, x in policy.distribution.items()} == numbers
    assert (policy.value is None) == ("sac" in name or "td3" in name)
    if "action_values" in numbers:
        q = policy.distribution["action_values"]
        assert policy.value == q.max() and action == q.argmax()
    if "probabilities" in numbers:
        p = policy.distribution["probabilities"]
        assert p.sum() == pytest.approx(1) and action == p.argmax()


# ---------------------------------------------------------------------- bad input

def test_scripts_are_all_that_there_are():
    assert {path.stem for path in ROOT.glob("*.py") if "\nSCRIPT = " in path.read_text()} == set(SCRIPTS)


def save(path, **changes):
    """A model file of other metadata."""
    import ppo_recurrent_tbb

    model_of_new_agent(path, ppo_recurrent_tbb)
    with safetensors.safe_open(path, "pt") as f:
        metadata, weights = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
    args = json.loads(metadata["args"]) | changes.pop("args", {})
    metadata = metadata | {"args": json.dumps(args)} | changes
    safetensors.torch.save_file(weights, path, metadata)


@pytest.mark.parametrize("changes, says", [
    pytest.param({"script": "stranger"}, "stranger, which is no script of this project", id="script"),
    pytest.param({"args": {"env_id": "stranger:Task-v0"}}, "import stranger first", id="module"),
    pytest.param({"args": {"env_id": "PocMemry-v0"}}, "PocMemry", id="task"),
    pytest.param({"args": {"hidden_size": 9}}, "other sizes", id="sizes"),
    pytest.param({"args": {"gamma": 2.0}}, "--gamma", id="flag"),
    pytest.param({"args": {"memory": "elephant"}}, "--memory", id="word")])
def test_a_strangers_file_is_one_sentence_and_runs_nothing(tmp_path, monkeypatch, capsys, changes, says):
    it_ran = tmp_path / "it ran"
    (tmp_path / "stranger.py").write_text(f"open({str(it_ran)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model.safetensors"
    save(path, **changes)
    with pytest.raises(ValueError, match=says) as error:
        load(path)
    assert len(str(error.value).splitlines()) == 1
    assert not it_ran.exists() and "stranger" not in sys.modules
    assert capsys.readouterr() == ("", "")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="README.md cannot be read"):
        load(ROOT / "README.md")


def test_calls_that_lack_something(tmp_path):
    import ppo_recurrent_tbb

    path = tmp_path / "model.safetensors"
    model_of_new_agent(path, ppo_recurrent_tbb, prev_reward=True)
    policy = load(path)
    obs, _ = gym.make("PocMemory-v0").reset(seed=1)
    policy(obs)
    with pytest.raises(ValueError, match="reward="):
        policy(obs)
    with pytest.raises(ValueError, match="reset"):
        policy(np.stack([obs, obs]), [False, False], reward=[0, 0])
    policy.reset()
    with pytest.raises(ValueError, match="shape"):
        policy(np.stack([obs, obs]))
    model_of_new_agent(path, ppo_recurrent_tbb, **MASKS["info"])
    with pytest.raises(ValueError, match="action_mask="):
        load(path)(np.zeros(6, np.float32))

"""Making environments, as every script needs them: a vector of N that counts its episodes."""
import collections
import functools
import importlib
import json
import sys
import weakref

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from envs import wrappers
from envs.batch import BatchEnv
from models.action_mask import ActionMask
from models.encoder import leaves
from models.flags import fail, refused_in_one_sentence

PROBED = 1024  # episodes of --probe


def make_envs(args, num_envs, training=True, render_mode=None):
    """num_envs environments of the task that the flags name.

    training: they reset in the step that ends an episode; otherwise they wait for reset().
    """
    what = (f"--env-id {args.env_id} with --env-kwargs {json.dumps(args.env_kwargs)} and --reset-options "
            f"{json.dumps(reset_options(args, training))}")
    with refused_in_one_sentence(what):
        envs = with_flags(wrappers.Checked(make_vector(args, num_envs, training, render_mode)), args)
        envs = Episodes(envs, [args.env_id, args.env_kwargs, num_envs])
        weakref.finalize(envs, envs.env.close)              # once nobody uses them
        obs, _ = envs.reset(seed=args.seed)
        envs.step(any_actions(envs, obs))                   # wrong flags show before a run exists
    if training and args.eval_reset_options:
        make_envs(args, 1, training=False).close()
    return envs


def with_flags(envs, args):
    """What flags put around a vector of environments."""
    if not getattr(args, "action_mask", True):
        envs = wrappers.NoActionMask(envs)
    if args.shrink_images > 1:
        envs = wrappers.ShrunkImages(envs, args.shrink_images)
    if args.prev_action or args.prev_reward:
        envs = wrappers.PreviousActionReward(envs, args.prev_action, args.prev_reward)
    return envs


def any_actions(envs, obs):
    """Actions that no mask forbids, one for every environment."""
    space = envs.single_observation_space
    for part, leaf in zip(leaves(space), leaves(space, obs)):
        if isinstance(part, ActionMask):
            return part.first_allowed(leaf)
    return envs.action_space.sample()


def make_vector(args, num_envs, training, render_mode):
    # PITFALL: Gymnasium >= 1.0 resets on the *next* step by default, which puts a phantom transition (action
    #   ignored, reward 0) between episodes. Symptom: episodes one step too long.
    #   Test: test_envs.py::test_no_phantom_transition.
    # KNOWN BUG (recurrent-ppo worker.py): all workers inherit one random generator. Symptom: 16 workers begin
    #   with the same episode. Here: reset(seed) seeds every environment apart.
    #   Test: test_envs.py::test_environments_differ.
    autoreset = AutoresetMode.SAME_STEP if training else AutoresetMode.DISABLED
    kwargs, options = args.env_kwargs, reset_options(args, training)
    env_id = import_module_of(args.env_id)
    if render_mode and f"batch/{env_id}" in gym.registry:   # ours draws itself, POPGym's does not
        env_id = f"batch/{env_id}"
    ours = has_batch(env_id)
    if ours and not render_mode:
        envs = gym.make_vec(env_id, num_envs, autoreset_mode=autoreset, **kwargs)
        return wrappers.BatchResetOptions(envs, options) if options else envs
    if render_mode:
        kwargs = {**kwargs, "render_mode": render_mode}
    around = [] if ours else [wrappers.in_symbols]          # with Checked, not Gymnasium's own
    if options:
        around.append(functools.partial(wrappers.ResetOptions, options=options))
    if not ours and getattr(args, "action_mask", False):    # SAC and TD3 have no such flag
        around.append(wrappers.masked)
    if not ours:
        around.append(wrappers.Guest)                       # outermost: lets only success through
    envs = gym.make_vec(
        env_id, num_envs, "sync", {"autoreset_mode": autoreset}, around, disable_env_checker=True, **kwargs)
    return envs


def has_batch(env_id):
    """Whether the task is written as a batch of ours."""
    batch = gym.spec(env_id).vector_entry_point             # a class, a partial of one, or "module:class"
    batch = getattr(batch, "func", batch)
    return str(batch).startswith("envs.") or (isinstance(batch, type) and issubclass(batch, BatchEnv))


def reset_options(args, training):
    """Evaluations, films and --model may have others: the whole task where training has a curriculum."""
    return args.reset_options if training else args.reset_options | args.eval_reset_options


def import_module_of(env_id):
    """module:id -> id, as gym.make understands it; the module registers it."""
    module, _, name = env_id.rpartition(":")
    if module and "" not in sys.path:
        sys.path.append("")                                 # also one in the working directory
    if module:
        importlib.import_module(module)
    return name


def make_rendered(args, render_mode):
    """One environment that waits for reset() and draws itself.   render_mode "auto": text, if there is any

    With --probe many, which nobody sees.
    """
    envs = make_envs(args, 1, training=False)
    modes, to_remember = envs.metadata.get("render_modes", []), getattr(envs.unwrapped, "remembered", dict)()
    envs.close()
    if args.probe and not to_remember:
        fail(f"--probe finds nothing to read out: {args.env_id} does not name what is to be remembered; "
             "give it a remembered(), as envs/batch.py says, or take another --env-id")
    if args.probe:
        return make_envs(args, PROBED, training=False)
    if render_mode == "auto":
        render_mode = "ansi" if "ansi" in modes else "none"
    by_us = render_mode == "none" or (render_mode == "human" and "rgb_array" in modes)
    if render_mode not in modes and not by_us:
        for_films = "" if args.model else ", for --capture-video,"
        fail(f"--render-mode {render_mode}{for_films} is not one of {args.env_id}'s: "
             f"{', '.join(modes) or 'none'}")
    if render_mode == "none":
        render_mode = None
    return make_envs(args, 1, training=False, render_mode=render_mode)


class Episodes(gym.vector.VectorWrapper):
    """Counts return, length and success of every episode; `recent` holds those of the last 100 that ended.

    In a step that ends an episode infos["success"] is [N]: what the task says of it, nan for the others.
    task: which task this is; only the same one takes a saved state back
    """

    def __init__(self, envs, task):
        super().__init__(envs)
        self.task, self.recent = task, collections.deque(maxlen=100)
        self.returns, self.lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs)

    def reset(self, *, seed=None, options=None):
        begin = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self.returns[begin], self.lengths[begin] = 0, 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self.returns += rewards
        self.lengths += 1
        done = terminated | truncated
        if done.any():
            infos["success"] = success = success_of(infos, self.num_envs)
            ended = self.returns[done].tolist(), self.lengths[done].tolist(), success[done].tolist()
            self.recent.extend(zip(*ended))
            self.returns[done], self.lengths[done] = 0, 0
        return obs, rewards, terminated, truncated, infos

    def mean_of_episodes(self):
        """Means over the last 100 episodes, and over how many; nan, and 0, before one has ended."""
        episodic_return, length, success = np.mean(self.recent, axis=0) if self.recent else [np.nan] * 3
        return {"charts/episodic_return": episodic_return, "charts/episodic_length": length,
                "charts/success": success, "charts/episodes": len(self.recent)}

    def state_dict(self):
        """Empty in `batch` for other people's tasks: they cannot be saved."""
        batch = self.unwrapped.state_dict() if isinstance(self.unwrapped, BatchEnv) else {}
        return {
            "task": json.dumps(self.task), "recent": list(self.recent),
            "returns": torch.as_tensor(self.returns), "lengths": torch.as_tensor(self.lengths),
            "batch": {
                name: x if isinstance(x, str) else torch.as_tensor(x) for name, x in batch.items()}}

    def load_state_dict(self, saved):
        """Returns whether the running episodes continue; otherwise the caller begins new ones."""
        self.recent.extend(saved["recent"])
        if not saved["batch"] or saved["task"] != json.dumps(self.task):
            return False
        self.unwrapped.load_state_dict(saved["batch"])
        self.returns[:], self.lengths[:] = saved["returns"].numpy(), saved["lengths"].numpy()
        return True


def success_of(infos, num_envs):
    """[N] whether the episode that has just ended was a success; nan where the task does not say."""
    infos = infos.get("final_info", infos)
    if "_success" not in infos:
        return np.full(num_envs, np.nan)
    return np.where(infos["_success"], infos["success"], np.nan)

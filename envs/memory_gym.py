"""Memory Gym's tasks under their own names (https://github.com/MarcoMeter/endless-memory-gym).

They run without window and sound, their observations are copies, and errors are clear sentences.
The package is imported when one of its tasks is made, not before. Those of which we have a batch of our own
(envs/__init__.py) are called memory_gym/ID here, and ID is ours, unless a program imports memory_gym itself
later than envs.
"""
import importlib
import os

import gymnasium as gym

TASKS = {
    "SearingSpotlights-v0": "searing_spotlights:SearingSpotlightsEnv",
    "Endless-SearingSpotlights-v0": "endless_searing_spotlights:EndlessSearingSpotlightsEnv",
    "MortarMayhem-v0": "mortar_mayhem:MortarMayhemEnv",
    "Endless-MortarMayhem-v0": "endless_mortar_mayhem:EndlessMortarMayhemEnv",
    "memory_gym/MortarMayhem-Grid-v0": "mortar_mayhem_grid:GridMortarMayhemEnv",
    "MortarMayhemB-v0": "mortar_mayhem_b:MortarMayhemTaskBEnv",
    "memory_gym/MortarMayhemB-Grid-v0": "mortar_mayhem_b_grid:GridMortarMayhemTaskBEnv",
    "MysteryPath-v0": "mystery_path:MysteryPathEnv",
    "Endless-MysteryPath-v0": "endless_mystery_path:EndlessMysteryPathEnv",
    "memory_gym/MysteryPath-Grid-v0": "mystery_path_grid:GridMysteryPathEnv",
}


def register():
    forget_theirs()
    for env_id in TASKS:
        kwargs = {"task": env_id}
        gym.register(env_id, "envs.memory_gym:make", kwargs=kwargs, disable_env_checker=True)


def forget_theirs():
    for env_id in TASKS:
        gym.registry.pop(env_id.removeprefix("memory_gym/"), None)


def load(module, task):
    """This module of memory_gym. To import it registers its names anew: here they keep their meaning."""
    registered = dict(gym.registry)
    forget_theirs()                                         # else Gymnasium warns of each
    try:
        return importlib.import_module(f"memory_gym.{module}")
    except ModuleNotFoundError as e:
        raise gym.error.DependencyNotInstalled(
            f"{task} needs Memory Gym: pip install --no-deps memory-gym==1.0.2") from e
    finally:
        gym.registry.update(registered)


def make(task, render_mode=None):
    """The task of this id. All pygame programs of a process share one display."""
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")       # else ALSA may flood stderr
    if render_mode != "human":
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    elif os.environ.get("SDL_VIDEODRIVER") == "dummy":      # left by a task made without a window
        import pygame

        del os.environ["SDL_VIDEODRIVER"]
        pygame.display.quit()
    module, name = TASKS[task].split(":")
    env_class = getattr(load(module, task), name)
    return MemoryGym(env_class(render_mode=render_mode))


class MemoryGym(gym.Wrapper):
    """Copies observations and turns assertions into errors. (MortarMayhemB reuses its arrays.)"""

    def reset(self, *, seed=None, options=None):
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except AssertionError as e:                         # a misspelt or impossible reset option
            raise ValueError(str(e) or f"impossible reset options {options}") from e
        return self.copy(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.copy(obs), float(reward), terminated, truncated, info

    def close(self):
        """Closes its window only. Memory Gym's own close() quits pygame, for all tasks of the process."""
        if self.unwrapped.debug_window is not None:
            self.unwrapped.debug_window.destroy()

    @staticmethod
    def copy(obs):
        return {k: v.copy() for k, v in obs.items()} if isinstance(obs, dict) else obs.copy()

"""The tasks. `import envs` registers them, so gym.make and gym.make_vec know them.

Our own tasks are written once, as a batch (envs/batch.py): make_vec gives the batch, make a batch of
one. The tasks of POPGym, MiniGrid and Memory Gym keep their own names; where we have one of Memory Gym's
ourselves, its own is memory_gym/<name>. Of POPGym's, make_vec gives our batch and make POPGym's own task;
our batch of one is batch/<name>. No algorithm code lives here.
"""
import functools
import os

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # else pygame takes SIGTERM for itself

import gymnasium as gym  # noqa: E402
import minigrid  # noqa: E402, F401  (registers MiniGrid-*)
import popgym  # noqa: E402, F401  (registers popgym-*)

from envs import masked_mujoco, memory_gym, popgym_cards, popgym_control, popgym_games  # noqa: E402
from envs.batch import single  # noqa: E402

memory_gym.register()                                       # before ours, some of which take over a name

for env_id, module, name in [
    ("PocMemory-v0", "poc_memory", "PocMemory"),
    ("CartPoleMasked-v0", "cartpole_masked", "CartPoleMasked"),
    ("MinigridMemory-v0", "minigrid_memory", "MinigridMemory"),
    ("TMazePassive-v0", "tmaze", "TMazePassive"),
    ("TMazeActive-v0", "tmaze", "TMazeActive"),
    ("VisualMatchPassive-v0", "visual_match", "VisualMatchPassive"),
    ("VisualMatch-v0", "visual_match", "VisualMatch"),
    ("KeyToDoor-v0", "visual_match", "KeyToDoor"),
    ("CountInput-v0", "count_input", "CountInput"),
    ("PendulumMasked-v1", "pendulum", "PendulumMasked"),
    ("PendulumSignFlip-v1", "pendulum", "PendulumSignFlip"),
    ("TwoFlags-v0", "two_flags", "TwoFlags"),
    ("MortarMayhem-Grid-v0", "mortar_mayhem", "MortarMayhemGrid"),
    ("MortarMayhemB-Grid-v0", "mortar_mayhem", "MortarMayhemBGrid"),
    ("MysteryPath-Grid-v0", "mystery_path", "MysteryPathGrid"),
]:
    gym.register(env_id, f"envs.{module}:{name}", vector_entry_point=f"envs.{module}:{name}Batch")

POPGYM = popgym_cards.LEVELS | popgym_control.LEVELS | popgym_games.LEVELS
for env_id, (batch, kwargs) in POPGYM.items():
    gym.spec(env_id).vector_entry_point = functools.partial(batch, **kwargs)
    gym.register(f"batch/{env_id}", single(batch), kwargs=kwargs, vector_entry_point=batch)

for robot in masked_mujoco.ROBOTS:                          # Gymnasium's own, which need mujoco
    gym.register(f"Masked{robot}-v5", "envs.masked_mujoco:make", kwargs={"robot": robot})

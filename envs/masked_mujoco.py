"""MaskedHalfCheetah-v5, MaskedHopper-v5, MaskedWalker2d-v5, MaskedAnt-v5: MuJoCo's robots, seen by half.

Gymnasium's own environments with their rewards and ends. The observation is cut down to

    sees="positions"     heights, tilts and joint angles (P); the velocities are their changes
    sees="velocities"    their velocities (V); the positions are their sums since the episode began

Contact forces, which Ant shows besides, are left out. Ni et al. 2022 (https://arxiv.org/abs/2110.05038) have
such tasks in PyBullet. They need `pip install mujoco`.
"""
import gymnasium as gym

ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Ant")


class Masked(gym.ObservationWrapper):
    def __init__(self, env, sees):
        super().__init__(env)
        if sees not in ("positions", "velocities"):
            raise ValueError(f'sees must be "positions" or "velocities", not "{sees}"')
        sizes = env.unwrapped.observation_structure         # of its parts; the first two lie in this order
        positions = sizes["qpos"]
        self.seen = slice(positions) if sees == "positions" else slice(positions, positions + sizes["qvel"])
        low, high = env.observation_space.low[self.seen], env.observation_space.high[self.seen]
        self.observation_space = gym.spaces.Box(low, high, dtype=env.observation_space.dtype)

    def observation(self, obs):
        return obs[self.seen]


def make(robot, sees="positions", **kwargs):
    return Masked(gym.make(f"{robot}-v5", disable_env_checker=True, **kwargs), sees)

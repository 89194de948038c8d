"""PendulumMasked-v1 and PendulumSignFlip-v1: Gymnasium's Pendulum-v1 with something to remember.

Masked: the observation is [cos, sin]. The velocity is missing; two observations together tell it.
SignFlip: the observation is [cos, sin, velocity, last action]. In half of the episodes, chosen by a
coin toss, the torque acts the other way round. The agent must find out the sign and remember it.

Reward and return are those of Pendulum-v1; about -150 is good. Episodes have 200 steps.
"""
import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv

from envs.batch import BatchEnv, SingleEnv, check_whole


class PendulumMaskedBatch(BatchEnv):
    metadata = {**BatchEnv.metadata, "render_fps": 30}
    high = (1.0, 1.0)                                       # of the observation

    def __init__(self, num_envs=1, max_steps=200, **kwargs):
        self.pendulum = PendulumEnv(render_mode="rgb_array")                # for constants and drawing
        high = np.array(self.high, np.float32)
        observation_space = gym.spaces.Box(-high, high)
        super().__init__(observation_space, self.pendulum.action_space, num_envs, **kwargs)
        check_whole(max_steps=max_steps)
        self.max_steps = max_steps
        self.t = np.zeros(num_envs, int)                    # [N]
        self.sign = np.ones(num_envs, np.float32)           # [N] of the torque, 1 or -1
        self.theta = np.zeros(num_envs)                     # [N] rad, 0 is upright
        self.velocity = np.zeros(num_envs)                  # [N] rad/s
        self.action = np.zeros(num_envs)                    # [N] Nm, the last one

    def begin(self, rows):
        self.t[rows], self.action[rows] = 0, 0
        drawn = self.np_random.uniform([[-np.pi], [-1]], [[np.pi], [1]], (2, len(rows)))
        self.theta[rows], self.velocity[rows] = drawn

    def torque(self, actions):
        return actions[:, 0].astype(float).clip(-self.pendulum.max_torque, self.pendulum.max_torque)

    def move(self, actions):
        """Gymnasium's PendulumEnv.step with its constants: semi-implicit Euler, 50 ms."""
        p, torque = self.pendulum, self.torque(actions)
        angle = (self.theta + np.pi) % (2 * np.pi) - np.pi  # -pi ... pi
        reward = -(angle**2 + 0.1 * self.velocity**2 + 0.001 * torque**2)
        gravity = 3 * p.g / (2 * p.l) * np.sin(self.theta)
        acceleration = gravity + 3 / (p.m * p.l**2) * self.sign * torque
        self.velocity = (self.velocity + acceleration * p.dt).clip(-p.max_speed, p.max_speed)
        self.theta = self.theta + self.velocity * p.dt
        self.action[:] = torque
        self.t = self.t + 1
        truncated = self.t == self.max_steps
        return reward, np.zeros_like(truncated), truncated, None

    def observe(self):
        return np.array([np.cos(self.theta), np.sin(self.theta)], np.float32).T             # [N, 2]

    def text(self, i):
        degrees = np.degrees(self.theta[i]) % 360
        return f"step {self.t[i]:3d}   {degrees:5.1f} deg   torque {self.action[i]:+.2f} Nm"

    def picture(self, i):
        self.pendulum.state = self.theta[i], self.velocity[i]
        self.pendulum.last_u = self.action[i]
        return self.pendulum.render()


class PendulumSignFlipBatch(PendulumMaskedBatch):
    high = (1.0, 1.0, 8.0, 2.0)

    def begin(self, rows):
        super().begin(rows)
        self.sign[rows] = 2 * self.np_random.integers(2, size=len(rows)) - 1

    def observe(self):
        columns = [np.cos(self.theta), np.sin(self.theta), self.velocity, self.action]
        return np.array(columns, np.float32).T              # [N, 4]


class PendulumMasked(SingleEnv):
    batch_class = PendulumMaskedBatch


class PendulumSignFlip(PendulumMasked):
    batch_class = PendulumSignFlipBatch

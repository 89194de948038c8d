"""CartPoleMasked-v0: Gymnasium's CartPole with both velocities hidden. They read 0.

Balancing needs the velocities, and only a memory of earlier positions can give them.
Reward: 1 a step. An episode is truncated after `max_steps`. `success`: the pole stood until then.
"""
import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv

from envs.batch import BatchEnv, SingleEnv, check_whole


class CartPoleMaskedBatch(BatchEnv):
    metadata = {**BatchEnv.metadata, "render_fps": 50}

    def __init__(self, num_envs=1, max_steps=200, **kwargs):
        self.cartpole = CartPoleEnv(render_mode="rgb_array")                # for constants and drawing
        observation_space = self.cartpole.observation_space
        super().__init__(observation_space, gym.spaces.Discrete(2), num_envs, **kwargs)
        check_whole(max_steps=max_steps)
        self.max_steps = max_steps
        self.t = np.zeros(num_envs, int)                    # [N]
        self.state = np.zeros((num_envs, 4))                # [N, 4] x, x_dot, theta, theta_dot

    def begin(self, rows):
        self.t[rows] = 0
        self.state[rows] = self.np_random.uniform(-0.05, 0.05, size=(len(rows), 4))

    def move(self, actions):
        """Barto, Sutton and Anderson (1983) with Gymnasium's constants: explicit Euler, 20 ms."""
        c = self.cartpole
        x, x_dot, theta, theta_dot = self.state.T
        force = np.where(actions == 1, c.force_mag, -c.force_mag)
        cos, sin = np.cos(theta), np.sin(theta)
        temp = (force + c.polemass_length * theta_dot**2 * sin) / c.total_mass
        inertia = c.length * (4 / 3 - c.masspole * cos**2 / c.total_mass)
        theta_acc = (c.gravity * sin - cos * temp) / inertia
        x_acc = temp - c.polemass_length * theta_acc * cos / c.total_mass
        self.state = self.state + c.tau * np.stack([x_dot, x_acc, theta_dot, theta_acc], axis=1)
        self.t += 1
        x, _, theta, _ = np.abs(self.state.T)
        fell = (x > c.x_threshold) | (theta > c.theta_threshold_radians)
        truncated = self.t >= self.max_steps
        return np.ones(self.num_envs), fell, truncated, truncated & ~fell

    def observe(self):
        return (self.state * [1, 0, 1, 0]).astype(np.float32)

    def text(self, i):
        x, _, theta, _ = self.state[i]
        return f"step {self.t[i]:3d}   x {x:+.2f} m   pole {np.degrees(theta):+5.1f} deg"

    def picture(self, i):
        self.cartpole.state = self.state[i]
        return self.cartpole.render()


class CartPoleMasked(SingleEnv):
    batch_class = CartPoleMaskedBatch

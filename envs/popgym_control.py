"""POPGym's cart poles and pendulums as batches, equal to popgym 1.0.7 step by step, only faster.

Morad et al. 2023, https://arxiv.org/abs/2303.01859

They are Gymnasium's CartPole and Pendulum. The observation leaves something out; a memory can tell it.
The best return is 1. POPGym defines no success.
LEVELS at the end has the settings of POPGym's 15 ids.
"""
import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

from envs.batch import check_whole
from envs.cartpole_masked import CartPoleMaskedBatch
from envs.pendulum import PendulumMaskedBatch


class CartPoleBatch(CartPoleMaskedBatch):
    """What the cart poles share: keep the pole upright, the actions push the cart left and right.

    Reward: 1 / max_episode_length in every step, also in the one in which the pole falls.
    Length: until the pole falls (terminated), at most max_episode_length steps (truncated).
    """

    sees = 0, 2                                             # columns of the state

    def __init__(self, num_envs=1, max_episode_length=200, **kwargs):
        check_whole(max_episode_length=max_episode_length)
        super().__init__(num_envs, max_episode_length, **kwargs)
        high = self.cartpole.observation_space.high[[*self.sees]]
        self.single_observation_space = gym.spaces.Box(-high, high)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def move(self, actions):
        reward, fell, truncated, _ = super().move(actions)
        return reward / self.max_steps, fell, truncated, None

    def observe(self):
        return self.state[:, self.sees].astype(np.float32)  # [N, 2]

    def text(self, i):
        return f"{super().text(i)}   seen {self.observe()[i].round(2)}"


class PositionOnlyCartPoleBatch(CartPoleBatch):
    """Observation: the position of the cart in m and the angle of the pole in rad."""


class VelocityOnlyCartPoleBatch(CartPoleBatch):
    """Observation: the velocity of the cart in m/s and of the pole in rad/s.

    The first observation of an episode is the position and the angle, as in POPGym, maybe by mistake.
    """

    sees = 1, 3

    def observe(self):
        first = self.t[:, None] == 0                        # [N, 1]
        return np.where(first, self.state[:, ::2].astype(np.float32), super().observe())


class PositionOnlyPendulumBatch(PendulumMaskedBatch):
    """Swing the pendulum up and keep it there. Action: the torque, -2 ... 2 Nm.

    Reward: that of Pendulum-v1, -16.27 ... 0, mapped to -1 ... 1 and divided by max_episode_length.
    Length: max_episode_length steps. Observation: cos and sin of the angle; 0 is upright.
    """

    def __init__(self, num_envs=1, max_episode_length=200, **kwargs):
        check_whole(max_episode_length=max_episode_length)
        super().__init__(num_envs, max_episode_length, **kwargs)

    def torque(self, actions):
        """It stays a float32, as in Gymnasium."""
        return actions[:, 0].clip(-self.pendulum.max_torque, self.pendulum.max_torque)

    def move(self, actions):
        reward, terminated, truncated, _ = super().move(actions)
        middle = 16.2736044 / 2                             # of the costs
        return (middle + reward) / middle / self.max_steps, terminated, truncated, None

    def text(self, i):
        return f"{super().text(i)}   seen {self.observe()[i].round(2)}"


class Noise:
    """Goes in front of a task: normal noise on each number that it shows, drawn anew in every step.

    What leaves the observation space is clipped to it.
    """

    def __init__(self, num_envs=1, noise_sigma=0.1, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.noise_sigma = noise_sigma
        self.noise = np.zeros((num_envs, 2), np.float32)    # [N, 2] of the observation in view

    def draw_noise(self, rows):
        self.noise[rows] = self.np_random.normal(0, self.noise_sigma, (len(rows), 2))

    def begin(self, rows):
        super().begin(rows)
        self.draw_noise(rows)

    def move(self, actions):
        result = super().move(actions)
        self.draw_noise(np.arange(self.num_envs))
        return result

    def observe(self):
        space = self.single_observation_space
        return (super().observe() + self.noise).clip(space.low, space.high)


class NoisyPositionOnlyCartPoleBatch(Noise, PositionOnlyCartPoleBatch):
    """Observation: position and angle with noise, inside ±4.8 m and ±0.42 rad."""


class NoisyPositionOnlyPendulumBatch(Noise, PositionOnlyPendulumBatch):
    """Observation: cos and sin with noise, each inside ±1."""


LEVELS = {
    "popgym-PositionOnlyCartPoleEasy-v0": (PositionOnlyCartPoleBatch, {"max_episode_length": 200}),
    "popgym-PositionOnlyCartPoleMedium-v0": (PositionOnlyCartPoleBatch, {"max_episode_length": 400}),
    "popgym-PositionOnlyCartPoleHard-v0": (PositionOnlyCartPoleBatch, {"max_episode_length": 600}),
    "popgym-VelocityOnlyCartpoleEasy-v0": (VelocityOnlyCartPoleBatch, {"max_episode_length": 200}),
    "popgym-VelocityOnlyCartpoleMedium-v0": (VelocityOnlyCartPoleBatch, {"max_episode_length": 400}),
    "popgym-VelocityOnlyCartpoleHard-v0": (VelocityOnlyCartPoleBatch, {"max_episode_length": 600}),
    "popgym-NoisyPositionOnlyCartPoleEasy-v0": (NoisyPositionOnlyCartPoleBatch, {"noise_sigma": 0.1}),
    "popgym-NoisyPositionOnlyCartPoleMedium-v0": (NoisyPositionOnlyCartPoleBatch, {"noise_sigma": 0.2}),
    "popgym-NoisyPositionOnlyCartPoleHard-v0": (NoisyPositionOnlyCartPoleBatch, {"noise_sigma": 0.3}),
    "popgym-PositionOnlyPendulumEasy-v0": (PositionOnlyPendulumBatch, {"max_episode_length": 200}),
    "popgym-PositionOnlyPendulumMedium-v0": (PositionOnlyPendulumBatch, {"max_episode_length": 150}),
    "popgym-PositionOnlyPendulumHard-v0": (PositionOnlyPendulumBatch, {"max_episode_length": 100}),
    "popgym-NoisyPositionOnlyPendulumEasy-v0": (NoisyPositionOnlyPendulumBatch, {"noise_sigma": 0.1}),
    "popgym-NoisyPositionOnlyPendulumMedium-v0": (NoisyPositionOnlyPendulumBatch, {"noise_sigma": 0.2}),
    "popgym-NoisyPositionOnlyPendulumHard-v0": (NoisyPositionOnlyPendulumBatch, {"noise_sigma": 0.3}),
}

"""Wrappers that every script applies to its environments."""
import gymnasium as gym
import numpy as np


class ResetOptions(gym.Wrapper):
    """Gives the same options to every reset: a vector environment's own autoresets pass none."""

    def __init__(self, env, options):
        super().__init__(env)
        self.options = options

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={**self.options, **(options or {})})


class PreviousActionReward(gym.vector.VectorWrapper):
    """The observation becomes Tuple(observation[, previous action][, previous reward]).

    At the first step of an episode there is no action (integers: one below the space's start; Box: 0) and no reward (0).
    """

    def __init__(self, envs, action, reward):
        super().__init__(envs)
        space, parts = envs.single_action_space, [envs.single_observation_space]
        if action and isinstance(space, gym.spaces.Discrete):
            parts.append(gym.spaces.Discrete(space.n + 1, start=space.start - 1))
        elif action and isinstance(space, gym.spaces.MultiDiscrete):
            parts.append(gym.spaces.MultiDiscrete(space.nvec + 1, start=space.start - 1))
        elif action:
            parts.append(space)
        if reward:
            parts.append(gym.spaces.Box(-np.inf, np.inf, (), np.float32))
        self.action, self.reward = action, reward
        self.no_action = np.zeros(space.shape, space.dtype) if isinstance(space, gym.spaces.Box) else space.start - 1
        self.last_actions, self.last_rewards = np.stack([self.no_action] * self.num_envs), np.zeros(self.num_envs)
        self.single_observation_space = gym.spaces.Tuple(parts)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)

    def join(self, obs, action, reward):
        return (obs,) + (np.copy(action),) * self.action + (np.float32(reward),) * self.reward

    def reset(self, *, seed=None, options=None):
        begin = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        obs, infos = self.env.reset(seed=seed, options=options)
        self.last_actions[begin], self.last_rewards[begin] = self.no_action, 0
        return self.join(obs, self.last_actions, self.last_rewards), infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self.last_actions, self.last_rewards = np.array(actions), np.array(rewards)
        for i in np.flatnonzero(infos.get("_final_obs", [])):      # autoreset: obs[i] is already the next episode's first
            infos["final_obs"][i] = self.join(infos["final_obs"][i], self.last_actions[i].copy(), self.last_rewards[i])
            self.last_actions[i], self.last_rewards[i] = self.no_action, 0
        return self.join(obs, self.last_actions, self.last_rewards), rewards, terminated, truncated, infos

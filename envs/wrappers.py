"""Wrappers around tasks: fixed reset options; previous action and reward as observations."""
import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space


class ResetOptions(gym.Wrapper):
    """Gives the same options to every reset. (A vector environment's own autoresets pass none.)"""

    def __init__(self, env, options):
        super().__init__(env)
        self.options = options

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options={**self.options, **(options or {})})


class PreviousActionReward(gym.vector.VectorWrapper):
    """The observation becomes Tuple(observation[, previous action][, previous reward]).

    At the first step of an episode there is no previous action: integers then read one below the
    space's start, a Box reads 0. There is no previous reward either: it reads 0.
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
        if isinstance(space, gym.spaces.Box):
            self.no_action = np.zeros(space.shape, space.dtype)
        else:
            self.no_action = space.start - 1
        self.last_actions = np.stack([self.no_action] * self.num_envs)
        self.last_rewards = np.zeros(self.num_envs)
        self.single_observation_space = gym.spaces.Tuple(parts)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def join(self, obs, action, reward):
        parts = [obs]
        if self.action:
            parts.append(np.copy(action))
        if self.reward:
            parts.append(np.float32(reward))
        return tuple(parts)

    def reset(self, *, seed=None, options=None):
        begin = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        obs, infos = self.env.reset(seed=seed, options=options)
        self.last_actions[begin], self.last_rewards[begin] = self.no_action, 0
        return self.join(obs, self.last_actions, self.last_rewards), infos

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self.last_actions, self.last_rewards = np.array(actions), np.array(rewards)
        for i in np.flatnonzero(infos.get("_final_obs", [])):               # obs[i] opens an episode
            final_obs = infos["final_obs"][i]
            infos["final_obs"][i] = self.join(final_obs, self.last_actions[i], self.last_rewards[i])
            self.last_actions[i], self.last_rewards[i] = self.no_action, 0
        obs = self.join(obs, self.last_actions, self.last_rewards)
        return obs, rewards, terminated, truncated, infos

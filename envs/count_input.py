"""CountInput-v0: how many of the last `horizon` inputs were ones? Pure memory, with nothing to explore and nothing to plan.

Every step shows one bit, 1 with `input_probability` (default 2 / horizon, 0.5 up to a horizon of 4), and asks for a number of
which all those bits are remembered: `mode="count_input"`, the ones among the last `horizon` bits, this one included, or
`mode="count_steps_since_last_input"`, the steps since the newest one, 0 if it is this bit, `horizon` if there was none in that
time. Before the episode lie zeros. RLtools, where the task is from, declares the second mode and computes the first.

The action in [-1, 1] answers action * divisor. Reward: -|answer - number|: numbers above the divisor cannot be reached. The
best return is 0. Episodes end by truncation after `episode_length` steps. `success`: the share of the episode's answers that
were right when rounded.

Returns of 2000 steps with a horizon of 10: the best constant answer -1933, who knows but the last bit -1882.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

MODES = ("count_input", "count_steps_since_last_input")


class CountInputBatch(BatchEnv):
    def __init__(self, num_envs=1, mode="count_input", horizon=10, input_probability=None, episode_length=2000, divisor=10.0,
                 **kwargs):
        if mode not in MODES:
            raise ValueError(f'mode must be "{MODES[0]}" or "{MODES[1]}", not "{mode}"')
        check_whole(horizon=horizon, episode_length=episode_length)
        if divisor <= 0:
            raise ValueError(f"divisor must be positive, not {divisor}")
        self.p = input_probability if input_probability is not None else 0.5 if horizon <= 4 else 2 / horizon
        if not 0 <= self.p <= 1:
            raise ValueError(f"input_probability must be between 0 and 1, not {input_probability}")
        super().__init__(gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), num_envs, **kwargs)
        self.mode, self.horizon, self.episode_length, self.divisor = mode, horizon, episode_length, divisor
        self.bits = np.zeros((num_envs, episode_length + 1), bool)          # [N, episode_length + 1] of the whole episode
        self.numbers = np.zeros((num_envs, episode_length + 1), int)        # what is asked for at each
        self.t, self.hits = np.zeros(num_envs, int), np.zeros(num_envs, int)                           # [N] each
        self.answer = np.zeros(num_envs)                                    # [N] the last one

    def begin(self, rows):
        self.bits[rows] = bits = self.np_random.random((len(rows), self.episode_length + 1)) < self.p
        if self.mode == "count_input":
            ones = bits.cumsum(1)
            self.numbers[rows] = ones - np.pad(ones, ((0, 0), (self.horizon, 0)))[:, : -self.horizon]
        else:
            t = np.arange(self.episode_length + 1)
            newest = np.maximum.accumulate(np.where(bits, t, -self.horizon), axis=1)
            self.numbers[rows] = np.minimum(t - newest, self.horizon)
        self.t[rows], self.hits[rows] = 0, 0

    def move(self, actions):
        number = self.numbers[np.arange(self.num_envs), self.t]
        self.answer = self.divisor * actions[:, 0].astype(float).clip(-1, 1)
        self.hits = self.hits + (np.round(self.answer) == number)
        self.t = self.t + 1
        truncated = self.t == self.episode_length
        return -np.abs(self.answer - number), np.zeros_like(truncated), truncated, self.hits / self.t

    def observe(self):
        return self.bits[np.arange(self.num_envs), self.t].astype(np.float32)[:, None]                 # [N, 1]

    def text(self, i):
        if self.t[i] == 0:
            return "an answer to each bit:"
        number, misses = self.numbers[i, self.t[i] - 1], self.t[i] - self.hits[i]
        hit = "hit " if np.round(self.answer[i]) == number else "miss"
        return f"count {number}, prediction {self.answer[i]:.2f}  {hit}   {self.hits[i]} hits, {misses} misses"

    def picture(self, i, size=12):
        """The bits of the last question, the newest at the right; below the number asked for in green, the answer in blue."""
        last = max(0, self.t[i] - 1)
        bits = np.pad(self.bits[i], (self.horizon, 0))[last + 1 : last + 1 + self.horizon]
        cells = np.full((3, self.horizon + 1, 3), 60, np.uint8)
        cells[0, 1:] = np.where(bits[:, None], (240, 150, 0), (200, 200, 200))
        for row, number, colour in ((1, self.numbers[i, last], (0, 160, 0)), (2, np.round(self.answer[i]), (40, 80, 220))):
            cells[row, : int(np.clip(number, 0, self.horizon)) + 1] = colour
        return cells.repeat(size, 0).repeat(size, 1)


class CountInput(SingleEnv):
    batch_class = CountInputBatch

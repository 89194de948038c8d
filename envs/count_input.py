"""CountInput-v0: how many of the last `horizon` inputs were ones?

Pure memory: there is nothing to explore and nothing to plan.
Every step shows one bit. It is 1 with `input_probability`, by default 2 / horizon (0.5 up to a horizon
of 4). Every step asks for a number about the bits so far, this one included:

    mode="count_input"                     how many of the last `horizon` bits are ones
    mode="count_steps_since_last_input"    how many steps ago the newest 1 was, at most `horizon`

Before the episode all bits were 0. The task is from RLtools, which declares the second mode but computes
the first.

The action in [-1, 1] means the answer action * divisor; numbers above the divisor cannot be answered.
Reward: -|answer - number|, so the best return is 0. Episodes are truncated after `episode_length` steps.
`success`: the share of the episode's answers that were right when rounded.

Returns of 2000 steps with a horizon of 10: the best constant answer gets -1933, the best answer to the
last bit alone gets -1882.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole, newest

MODES = ("count_input", "count_steps_since_last_input")


class CountInputBatch(BatchEnv):
    def __init__(self, num_envs=1, mode="count_input", horizon=10, input_probability=None,
                 episode_length=2000, divisor=10.0, **kwargs):
        if mode not in MODES:
            raise ValueError(f'mode must be "{MODES[0]}" or "{MODES[1]}", not "{mode}"')
        check_whole(horizon=horizon, episode_length=episode_length)
        if divisor <= 0:
            raise ValueError(f"divisor must be positive, not {divisor}")
        if input_probability is None:
            input_probability = 0.5 if horizon <= 4 else 2 / horizon
        if not 0 <= input_probability <= 1:
            raise ValueError(f"input_probability must be between 0 and 1, not {input_probability}")
        self.p = input_probability
        bit, answer = gym.spaces.Box(0, 1, (1,)), gym.spaces.Box(-1, 1, (1,))
        super().__init__(bit, answer, num_envs, **kwargs)
        self.mode, self.horizon = mode, horizon
        self.episode_length, self.divisor = episode_length, divisor
        self.bits = np.zeros((num_envs, episode_length + 1), bool)          # of the whole episode
        self.numbers = np.zeros((num_envs, episode_length + 1), int)        # asked for at each bit
        self.t = np.zeros(num_envs, int)                    # [N]
        self.hits = np.zeros(num_envs, int)                 # [N] right answers so far
        self.answer = np.zeros(num_envs)                    # [N] the last one

    def begin(self, rows):
        bits = self.np_random.random((len(rows), self.episode_length + 1)) < self.p
        self.bits[rows] = bits
        if self.mode == "count_input":
            ones = bits.cumsum(1)                           # since the episode began
            earlier = np.pad(ones, ((0, 0), (self.horizon, 0)))             # `horizon` steps ago
            self.numbers[rows] = ones - earlier[:, : -self.horizon]
        else:
            t = np.arange(self.episode_length + 1)
            when_1 = np.where(bits, t, -self.horizon)
            newest = np.maximum.accumulate(when_1, axis=1)
            self.numbers[rows] = np.minimum(t - newest, self.horizon)
        self.t[rows], self.hits[rows] = 0, 0

    def move(self, actions):
        number = self.numbers[np.arange(self.num_envs), self.t]
        self.answer = self.divisor * actions[:, 0].astype(float).clip(-1, 1)
        self.hits = self.hits + (np.round(self.answer) == number)
        self.t = self.t + 1
        truncated = self.t == self.episode_length
        reward = -np.abs(self.answer - number)
        return reward, np.zeros_like(truncated), truncated, self.hits / self.t

    def observe(self):
        bits = self.bits[np.arange(self.num_envs), self.t]
        return bits.astype(np.float32)[:, None]             # [N, 1]

    def remembered(self):
        number = self.numbers[np.arange(self.num_envs), self.t]
        reach = min(8 * self.horizon, self.episode_length)
        return {"number": number, "bit": newest(self.bits, self.t, reach)}

    def text(self, i):
        if self.t[i] == 0:
            return "an answer to each bit:"
        number, misses = self.numbers[i, self.t[i] - 1], self.t[i] - self.hits[i]
        hit = "hit " if np.round(self.answer[i]) == number else "miss"
        tally = f"{self.hits[i]} hits, {misses} misses"
        return f"count {number}, prediction {self.answer[i]:.2f}  {hit}   {tally}"

    def picture(self, i, size=12):
        """The bits of the last question, the newest at the right.

        Below them the number that was asked for, in green, and the answer, in blue.
        """
        last = max(0, self.t[i] - 1)
        bits = np.pad(self.bits[i], (self.horizon, 0))[last + 1 : last + 1 + self.horizon]
        cells = np.full((3, self.horizon + 1, 3), 60, np.uint8)
        cells[0, 1:] = np.where(bits[:, None], (240, 150, 0), (200, 200, 200))
        number, answer = self.numbers[i, last], np.round(self.answer[i])
        for row, length, colour in ((1, number, (0, 160, 0)), (2, answer, (40, 80, 220))):
            cells[row, : int(np.clip(length, 0, self.horizon)) + 1] = colour
        return cells.repeat(size, 0).repeat(size, 1)


class CountInput(SingleEnv):
    batch_class = CountInputBatch

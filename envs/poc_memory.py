"""PocMemory-v0, the proof-of-concept task of recurrent-ppo (Pleines): does the memory work at all?

A line of 11 cells at the positions -1, -0.8, ..., 1. One end is good, the other one is bad. The agent
sees which one is good in the first three observations only.

Observation [3]: left goal, position, right goal. The goals read 0 once they are hidden.
Actions: 0 left, 1 right. In the first two steps nothing moves (`freeze`), and the reward is 0.
Reward: then -0.1 a move, 1.6 at the good end and -1.6 at the bad end; both end the episode.
The original has no time limit; here an episode is truncated after `max_steps`.

Without memory success can reach 0.7, and no more, because the first move is made with the goals in
view. After it, on the cells -1, 0 and 1 both goals are equally likely, whatever the policy is. On the
cells +-2 and +-3 (2 of 5 starts) the first move has given the goal away.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

SHOW_STEPS, STEP_PENALTY, GOAL_REWARD = 2, 0.1, 1.6
END = 5  # the outermost cell; cells are numbered -5 ... 5 and are 0.2 wide


class PocMemoryBatch(BatchEnv):
    def __init__(self, num_envs=1, freeze=True, max_steps=100, **kwargs):
        observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
        super().__init__(observation_space, gym.spaces.Discrete(2), num_envs, **kwargs)
        check_whole(max_steps=max_steps)
        self.freeze, self.max_steps = freeze, max_steps
        self.t = np.zeros(num_envs, int)                    # [N]
        self.cell = np.zeros(num_envs, int)                 # [N] -5 ... 5
        self.good_end = np.zeros(num_envs, int)             # [N] -1 left, 1 right

    def begin(self, rows):
        self.t[rows] = 0
        self.cell[rows] = self.np_random.integers(-2, 3, size=len(rows))
        self.good_end[rows] = 2 * self.np_random.integers(2, size=len(rows)) - 1

    def move(self, actions):
        moves = self.t >= SHOW_STEPS if self.freeze else 1  # whether the agent moves
        self.cell = self.cell + (2 * actions - 1) * moves
        self.t = self.t + 1
        terminated = np.abs(self.cell) == END
        side = self.cell * self.good_end                    # good end: END, bad end: -END
        reward = np.where(terminated, GOAL_REWARD / END * side, -STEP_PENALTY * moves)
        return reward, terminated, self.t >= self.max_steps, side == END

    def observe(self):
        goals = self.good_end * (self.t <= SHOW_STEPS)
        return np.array([-goals, self.cell / END, goals], np.float32).T     # [N, 3]

    def remembered(self):
        return {"good end": (self.good_end > 0).astype(int)}

    def text(self, i):
        line = ["."] * (2 * END + 1)
        line[0], line[-1] = ("+", "-") if self.good_end[i] < 0 else ("-", "+")
        line[self.cell[i] + END] = "A"
        return "".join(line) + ("   the agent sees the goals" if self.t[i] <= SHOW_STEPS else "")

    def picture(self, i, size=32):
        """The good goal is green, the bad one red, pale once they are hidden; the agent is blue."""
        cells = np.full((2 * END + 1, 3), 235, np.uint8)
        good, bad = (170, 222, 208), (242, 206, 176)
        if self.t[i] <= SHOW_STEPS:
            good, bad = (0, 158, 115), (213, 94, 0)         # Okabe and Ito's
        cells[0], cells[-1] = (good, bad) if self.good_end[i] < 0 else (bad, good)
        cells[self.cell[i] + END] = (40, 80, 220)
        frame = cells[None].repeat(size, 0).repeat(size, 1)
        frame[:, ::size] = frame[[0, -1]] = 255
        return frame


class PocMemory(SingleEnv):
    batch_class = PocMemoryBatch

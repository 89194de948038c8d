"""PocMemory-v0, the proof-of-concept task of recurrent-ppo (Pleines): does the memory work at all?

A line of 11 cells, positions -1, -.8, ... 1. One end is good (+1), the other bad (-1); the agent sees which in the
first three observations only. Observation (3): left goal, position, right goal; the goals read 0 once hidden.
Actions: 0 left, 1 right. Nothing moves during the two show steps (`freeze`), reward 0. Then each move costs .1, the good
end gives 1 + 6 * .1 = 1.6, the bad end -1.6, and both end the episode. The original has no time limit; here an episode is
truncated after `max_steps`.

The first move is still made with the goals in view, so even without memory success can reach 0.7, no more: from cells
-1, 0, 1 both goals are equally likely, whatever the policy; from +-2, +-3 (2 of 5 starts) the first move gave the goal away.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv

SHOW_STEPS, END, STEP_PENALTY, GOAL_REWARD = 2, 5, 0.1, 1.6      # END: the outermost cell, in steps of .2


class PocMemoryBatch(BatchEnv):
    def __init__(self, num_envs=1, freeze=True, max_steps=100, **kwargs):
        super().__init__(gym.spaces.Box(-1.0, 1.0, (3,), np.float32), gym.spaces.Discrete(2), num_envs, **kwargs)
        self.freeze, self.max_steps = freeze, max_steps
        self.t, self.cell, self.good_end = (np.zeros(num_envs, int) for _ in range(3))     # [N] each

    def begin(self, rows):
        self.t[rows] = 0
        self.cell[rows] = self.np_random.integers(-2, 3, size=len(rows))                   # -.4 ... .4
        self.good_end[rows] = 2 * self.np_random.integers(2, size=len(rows)) - 1           # -1 left, +1 right

    def move(self, actions):
        moves = 1 if not self.freeze else self.t >= SHOW_STEPS
        self.cell = self.cell + (2 * actions - 1) * moves
        self.t = self.t + 1
        terminated = np.abs(self.cell) == END
        side = self.cell * self.good_end                                                   # END: good end, -END: bad end
        reward = np.where(terminated, GOAL_REWARD / END * side, -STEP_PENALTY * moves)
        return reward, terminated, self.t >= self.max_steps, side == END

    def observe(self):
        goals = self.good_end * (self.t <= SHOW_STEPS)
        return np.array([-goals, self.cell / END, goals], np.float32).T                    # [N, 3]

    def text(self, i):
        line = ["."] * (2 * END + 1)
        line[0], line[-1] = ("+", "-") if self.good_end[i] < 0 else ("-", "+")
        line[self.cell[i] + END] = "A"
        return "".join(line) + ("   the agent sees the goals" if self.t[i] <= SHOW_STEPS else "")

    def picture(self, i, size=32):
        """The line of cells: goals green and red (pale once the agent cannot see them), the agent blue."""
        cells = np.full((2 * END + 1, 3), 235, np.uint8)
        good, bad = ((0, 160, 0), (200, 0, 0)) if self.t[i] <= SHOW_STEPS else ((170, 215, 170), (235, 175, 175))
        cells[0], cells[-1] = (good, bad) if self.good_end[i] < 0 else (bad, good)
        cells[self.cell[i] + END] = (40, 80, 220)
        frame = np.broadcast_to(cells[None, :, None], (size, 2 * END + 1, size, 3)).reshape(size, -1, 3).copy()
        frame[:, ::size] = frame[[0, -1]] = 255
        return frame


class PocMemory(SingleEnv):
    batch_class = PocMemoryBatch

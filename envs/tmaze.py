"""TMazePassive-v0 and TMazeActive-v0 (Ni et al. 2023, https://arxiv.org/abs/2307.03864): memory without and with credit.

A corridor of cells x = 0 ... o + L (L: `length`) along y = 0, and two goal cells at its right end, y = 1 and y = -1. The oracle
stands at x = 0 and shows, the first time it is seen, which of the two is right. The passive walker starts there (o = 0) and
must remember for L steps; the active one starts one cell beside it (o = 1) and must also find out that going back pays, L + 2
steps later. Actions: 0 right, 1 up, 2 left, 3 down; walls stop a move. An episode lasts L + 1 (active: L + 3) steps, no fewer.

Reward: in the last step 1 on the right goal cell, else 0. Before, -1/L for being late, behind the walker who goes straight on
(x < t - o): `penalty="pace"` charges every step that is late, so that one wrong move costs until the end;
`penalty="wrong_action"` only the steps in which one falls back further. `distract_reward` is added at x = 0. The best return is
1, without the cue 1/2; always right gives 0.

Observation: [seen, y]: at x = 0 [0, cue], in the corridor [0, 0], at its end [1, y], the cue only when first seen.
`ambiguous_position=False`: [x, y, cue]; with `expose_goal`, for agents without memory, the cue stays once it was seen.
`add_timestep` appends t.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

DX, DY = np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1])


class TMazePassiveBatch(BatchEnv):
    oracle = 0                                              # o: cells between the oracle and the start

    def __init__(self, num_envs=1, length=10, penalty="pace", goal_reward=1.0, distract_reward=0.0, ambiguous_position=True,
                 expose_goal=False, add_timestep=False, **kwargs):
        check_whole(length=length)
        if penalty not in ("pace", "wrong_action"):
            raise ValueError(f'penalty must be "pace" or "wrong_action", not "{penalty}"')
        if expose_goal and ambiguous_position:
            raise ValueError("expose_goal needs ambiguous_position=False")
        self.end, self.steps = self.oracle + length, length + 1 + 2 * self.oracle
        high = [1.0, 1.0] if ambiguous_position else [self.end, 1.0, 1.0]
        high = np.array(high + [self.steps] * add_timestep, np.float32)
        super().__init__(gym.spaces.Box(-high, high), gym.spaces.Discrete(4), num_envs, **kwargs)
        self.length, self.penalty, self.goal_reward, self.distract_reward = length, penalty, goal_reward, distract_reward
        self.ambiguous_position, self.expose_goal, self.add_timestep = ambiguous_position, expose_goal, add_timestep
        self.t, self.x, self.y, self.goal, self.cue = (np.zeros(num_envs, int) for _ in range(5))      # [N] each
        self.seen = np.zeros(num_envs, bool)                # whether the oracle was, and it shows the cue but once

    def begin(self, rows):
        self.t[rows], self.x[rows], self.y[rows] = 0, self.oracle, 0
        self.goal[rows] = 2 * self.np_random.integers(2, size=len(rows)) - 1
        self.seen[rows] = self.oracle == 0
        self.cue[rows] = self.goal[rows] * self.seen[rows]

    def move(self, actions):
        was_late = self.t - self.oracle - self.x            # steps behind who goes straight on
        self.t = self.t + 1
        x = (self.x + DX[actions] * (self.y == 0)).clip(0, self.end)
        self.x, self.y = x, (self.y + DY[actions] * (self.x == self.end)).clip(-1, 1)
        late, last = self.t - self.oracle - self.x, self.t == self.steps
        charged = late > (0 if self.penalty == "pace" else was_late.clip(0))
        reward = self.distract_reward * (self.x == 0) - charged / self.length
        self.cue = np.where((self.x == 0) & ~self.seen | self.expose_goal & self.seen, self.goal, 0)
        self.seen = self.seen | (self.x == 0)
        found = self.y == self.goal
        return np.where(last, self.goal_reward * found, reward), last, np.zeros_like(last), found

    def observe(self):
        at_end = self.x == self.end
        columns = [at_end, np.where(at_end, self.y, self.cue)] if self.ambiguous_position else [self.x, self.y, self.cue]
        return np.array(columns + [self.t] * self.add_timestep, np.float32).T                          # [N, 2 ... 4]

    def text(self, i):
        rows = [[" "] * self.end + ["G" if self.goal[i] == side else "."] for side in (1, -1)]
        rows.insert(1, ["O"] + ["."] * self.end)
        rows[1 - self.y[i]][self.x[i]] = "A"
        return "\n".join(map("".join, rows)) + f"\nthe agent sees {self.observe()[i].tolist()}"

    def picture(self, i, size=8):
        """White cells, the right goal green, the oracle orange while it shows the cue, the agent blue."""
        cells = np.full((3, self.end + 1, 3), 60, np.uint8)
        cells[1] = cells[:, -1] = 235
        cells[1 - self.goal[i], -1] = (0, 160, 0)
        cells[1, 0] = (240, 150, 0) if self.cue[i] else (200, 200, 200)
        cells[1 - self.y[i], self.x[i]] = (40, 80, 220)
        return cells.repeat(size, 0).repeat(size, 1)


class TMazeActiveBatch(TMazePassiveBatch):
    oracle = 1


class TMazePassive(SingleEnv):
    batch_class = TMazePassiveBatch


class TMazeActive(SingleEnv):
    batch_class = TMazeActiveBatch

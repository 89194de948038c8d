"""TMazePassive-v0 and TMazeActive-v0 (Ni et al. 2023, https://arxiv.org/abs/2307.03864).

                                                goal at y = 1
    oracle  .  .  .  corridor, y = 0  .  .  .  junction
    x = 0                             x = o + L goal at y = -1

A corridor leads from the oracle, at x = 0, to a junction between two goal cells, at x = o + L. L is
`length`. When the agent is at the oracle for the first time, it is shown the cue: which goal is right.

Passive (o = 0): the agent starts at the oracle and must remember the cue for L steps.
Active (o = 1): the agent starts one cell to the right of the oracle. It must also learn to go to the
oracle first, and this pays only L + 2 steps later.

Actions: 0 right, 1 up, 2 left, 3 down. Walls stop a move.
Every episode lasts exactly L + 1 steps (active: L + 3): to the oracle, along the corridor, one turn.

Reward of the last step: 1 on the right goal cell, else 0. Reward of a step before: -1/L if the agent is
charged for being late, else 0. It is late if an agent that visits the oracle and then always goes right
would be farther to the right by now (x < t - o).
    penalty="pace"            charges every step that ends late, so one wrong move costs until the end
    penalty="wrong_action"    charges only a step in which the agent falls back further
`distract_reward` is added in every step before the last that ends at x = 0.
The best return is 1, without the cue 1/2. An agent that always goes right gets 0.

Observation: [0, cue] in the corridor and [1, y] at its end. The cue is 1 or -1 when the agent is at the
oracle for the first time, else 0. With `ambiguous_position=False` the observation is [x, y, cue]; then
`expose_goal` keeps the cue in view, for agents without memory. `add_timestep` appends t.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

DX, DY = np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1])


class TMazePassiveBatch(BatchEnv):
    oracle = 0                                              # o: from the oracle to the start

    def __init__(self, num_envs=1, length=10, penalty="pace", goal_reward=1.0, distract_reward=0.0,
                 ambiguous_position=True, expose_goal=False, add_timestep=False, **kwargs):
        check_whole(length=length)
        if penalty not in ("pace", "wrong_action"):
            raise ValueError(f'penalty must be "pace" or "wrong_action", not "{penalty}"')
        if expose_goal and ambiguous_position:
            raise ValueError("expose_goal needs ambiguous_position=False")
        self.end = self.oracle + length                     # x of the junction
        self.steps = length + 1 + 2 * self.oracle           # of an episode
        high = [1.0, 1.0] if ambiguous_position else [self.end, 1.0, 1.0]
        high = np.array(high + [self.steps] * add_timestep, np.float32)
        super().__init__(gym.spaces.Box(-high, high), gym.spaces.Discrete(4), num_envs, **kwargs)
        self.length, self.penalty = length, penalty
        self.goal_reward, self.distract_reward = goal_reward, distract_reward
        self.ambiguous_position = ambiguous_position
        self.expose_goal, self.add_timestep = expose_goal, add_timestep
        self.t = np.zeros(num_envs, int)                    # [N]
        self.x = np.zeros(num_envs, int)                    # [N] 0 ... end
        self.y = np.zeros(num_envs, int)                    # [N] -1, 0, 1
        self.goal = np.zeros(num_envs, int)                 # [N] y of the right goal, -1 or 1
        self.cue = np.zeros(num_envs, int)                  # [N] what is shown of it; 0: nothing
        self.seen = np.zeros(num_envs, bool)                # [N] whether it was at the oracle

    def begin(self, rows):
        self.t[rows], self.x[rows], self.y[rows] = 0, self.oracle, 0
        self.goal[rows] = 2 * self.np_random.integers(2, size=len(rows)) - 1
        self.seen[rows] = self.oracle == 0
        self.cue[rows] = self.goal[rows] * self.seen[rows]

    def move(self, actions):
        was_late = self.t - self.oracle - self.x            # [N] steps; below 0: early
        self.t = self.t + 1
        can_move_along = self.y == 0
        can_turn = self.x == self.end
        self.x = (self.x + DX[actions] * can_move_along).clip(0, self.end)
        self.y = (self.y + DY[actions] * can_turn).clip(-1, 1)
        late = self.t - self.oracle - self.x
        last = self.t == self.steps
        charged = late > (0 if self.penalty == "pace" else was_late.clip(0))
        at_oracle = self.x == 0
        reward = self.distract_reward * at_oracle - charged / self.length
        shown = at_oracle & ~self.seen | self.expose_goal & self.seen
        self.cue = np.where(shown, self.goal, 0)
        self.seen = self.seen | at_oracle
        found = self.y == self.goal
        return np.where(last, self.goal_reward * found, reward), last, np.zeros_like(last), found

    def observe(self):
        at_end = self.x == self.end
        if self.ambiguous_position:
            columns = [at_end, np.where(at_end, self.y, self.cue)]
        else:
            columns = [self.x, self.y, self.cue]
        if self.add_timestep:
            columns.append(self.t)
        return np.array(columns, np.float32).T              # [N, 2 ... 4]

    def remembered(self):
        return {"cue": np.where(self.seen, self.goal > 0, -1)}

    def text(self, i):
        rows = [[" "] * self.end + ["G" if self.goal[i] == side else "."] for side in (1, -1)]
        rows.insert(1, ["O"] + ["."] * self.end)
        rows[1 - self.y[i]][self.x[i]] = "A"
        return "\n".join(map("".join, rows)) + f"\nthe agent sees {self.observe()[i].tolist()}"

    def picture(self, i, size=8):
        """The right goal is green, the agent blue, in the middle of its cell.

        While the oracle shows the cue it is orange, with a green edge on the side of the right goal.
        """
        cells = np.full((3, self.end + 1, 3), 60, np.uint8)
        cells[1] = cells[:, -1] = 235
        cells[1 - self.goal[i], -1] = (0, 160, 0)
        cells[1, 0] = (240, 150, 0) if self.cue[i] else (200, 200, 200)
        image, edge = cells.repeat(size, 0).repeat(size, 1), size // 4
        if self.cue[i]:
            top = size if self.cue[i] > 0 else 2 * size - edge
            image[top : top + edge, :size] = (0, 160, 0)
        top, left = (1 - self.y[i]) * size + edge, self.x[i] * size + edge
        image[top : top + size - 2 * edge, left : left + size - 2 * edge] = (40, 80, 220)
        return image


class TMazeActiveBatch(TMazePassiveBatch):
    oracle = 1


class TMazePassive(SingleEnv):
    batch_class = TMazePassiveBatch


class TMazeActive(SingleEnv):
    batch_class = TMazeActiveBatch

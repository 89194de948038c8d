"""TwoFlags-v0: visit the first flag, then the second. Where they stand is shown at the first step only.

A board of 10 x 10, on which flags and walker are put uniformly. The action in [-1, 1]^2 accelerates (50 at most, a speed of 5
at most along each axis); an episode's `max_steps` last 4 seconds. Within a distance of 1 a flag is visited: 1000 for the
first, 1000 for the second, if the first was, which ends the episode: `success`. Leaving the board costs 100 and ends it too.
`reward_scale` replaces the 1000; leaving costs a tenth of it.

Observation: position, velocity, stage (1 for what is true, -1 for what is not: no flag, the first, both visited), then the two
flags' positions, which read -1 after the first step. The task is RLtools' `flag`.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

BOARD, ACCELERATION, SPEED, RADIUS, SECONDS = 10.0, 50.0, 5.0, 1.0, 4.0


class TwoFlagsBatch(BatchEnv):
    def __init__(self, num_envs=1, max_steps=200, reward_scale=1000.0, **kwargs):
        low = np.array([0, 0, -SPEED, -SPEED, -1, -1, -1, -1, -1, -1, -1], np.float32)
        high = np.array([BOARD, BOARD, SPEED, SPEED, 1, 1, 1, BOARD, BOARD, BOARD, BOARD], np.float32)
        super().__init__(gym.spaces.Box(low, high), gym.spaces.Box(-1, 1, (2,)), num_envs, **kwargs)
        check_whole(max_steps=max_steps)
        self.max_steps, self.reward_scale = max_steps, reward_scale
        self.t, self.visited = np.zeros(num_envs, int), np.zeros(num_envs, int)                        # [N] each
        self.position, self.velocity = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))                # [N, 2] each
        self.flags = np.zeros((num_envs, 2, 2))                             # [N, first or second, 2]

    def begin(self, rows):
        self.t[rows], self.visited[rows], self.velocity[rows] = 0, 0, 0
        self.position[rows] = self.np_random.uniform(0, BOARD, (len(rows), 2))
        self.flags[rows] = self.np_random.uniform(0, BOARD, (len(rows), 2, 2))

    def move(self, actions):
        dt = SECONDS / self.max_steps
        self.position = self.position + self.velocity * dt
        self.velocity = (self.velocity + ACCELERATION * dt * actions.clip(-1, 1)).clip(-SPEED, SPEED)
        self.t = self.t + 1
        left = ((self.position < 0) | (self.position > BOARD)).any(1)
        self.position = self.position.clip(0, BOARD)
        wanted = self.flags[np.arange(self.num_envs), self.visited.clip(max=1)]                        # [N, 2]
        reached = ~left & (np.linalg.norm(self.position - wanted, axis=1) < RADIUS)
        self.visited = self.visited + reached
        success = self.visited == 2
        terminated = success | left
        return self.reward_scale * (reached - 0.1 * left), terminated, ~terminated & (self.t >= self.max_steps), success

    def observe(self):
        stage = 2.0 * (self.visited[:, None] == np.arange(3)) - 1
        flags = np.where(self.t[:, None] == 0, self.flags.reshape(-1, 4), -1)
        return np.concatenate([self.position, self.velocity, stage, flags], 1).astype(np.float32)      # [N, 11]

    def text(self, i):
        return "\n".join(map("".join, self.board(i, 1, "12", "A", "."))) + f"\n{self.visited[i]} flags visited"

    def picture(self, i, size=12):
        """The first flag green, the second orange, a visited one pale, the walker blue."""
        colours = np.array([(0, 160, 0), (240, 150, 0)], np.uint8)
        colours[: self.visited[i]] = 200
        return np.array(self.board(i, 2, colours, (40, 80, 220), (235, 235, 235)), np.uint8).repeat(size, 0).repeat(size, 1)

    def board(self, i, scale, flags, walker, empty):
        """Rows of cells, 1 / scale wide, the highest first: what stands where."""
        cells = [[empty] * int(BOARD * scale) for _ in range(int(BOARD * scale))]
        for (x, y), what in zip([*self.flags[i], self.position[i]], [*flags, walker]):
            cells[-1 - min(int(y * scale), len(cells) - 1)][min(int(x * scale), len(cells) - 1)] = what
        return cells


class TwoFlags(SingleEnv):
    metadata = {**SingleEnv.metadata, "render_fps": 50}
    batch_class = TwoFlagsBatch

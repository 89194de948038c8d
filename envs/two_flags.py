"""TwoFlags-v0: visit the first flag, then the second. Their positions are shown at the first step only.

A board of 10 x 10. Two flags and the agent are put on it uniformly at random.
The action in [-1, 1]^2 accelerates the agent: by 50 at most, up to a speed of 5 along each axis.
An episode lasts at most `max_steps`, which together are 4 seconds.

A flag is visited when the agent is within a distance of 1.
Reward: `reward_scale` for the first flag; as much for the second flag, if the first was visited before.
The second one ends the episode and is the `success`.
Leaving the board costs a tenth of `reward_scale` and ends the episode too.

Observation: position [2], velocity [2], stage [3], positions of both flags [4].
The stage is 1 for what is true and -1 for what is not: no flag visited, the first visited, both visited.
The flags' positions read -1 after the first step. RLtools calls this task `flag`.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv, check_whole

BOARD, ACCELERATION, SPEED, RADIUS, SECONDS = 10.0, 50.0, 5.0, 1.0, 4.0


class TwoFlagsBatch(BatchEnv):
    metadata = {**BatchEnv.metadata, "render_fps": 50}

    def __init__(self, num_envs=1, max_steps=200, reward_scale=1000.0, **kwargs):
        low = np.array([0, 0, -SPEED, -SPEED, -1, -1, -1, -1, -1, -1, -1], np.float32)
        high = np.array([BOARD, BOARD, SPEED, SPEED, 1, 1, 1] + 4 * [BOARD], np.float32)
        super().__init__(gym.spaces.Box(low, high), gym.spaces.Box(-1, 1, (2,)), num_envs, **kwargs)
        check_whole(max_steps=max_steps)
        self.max_steps, self.reward_scale = max_steps, reward_scale
        self.t = np.zeros(num_envs, int)                    # [N]
        self.visited = np.zeros(num_envs, int)              # [N] flags visited so far
        self.position = np.zeros((num_envs, 2))
        self.velocity = np.zeros((num_envs, 2))
        self.flags = np.zeros((num_envs, 2, 2))             # [N, first or second, 2]

    def begin(self, rows):
        self.t[rows], self.visited[rows], self.velocity[rows] = 0, 0, 0
        self.position[rows] = self.np_random.uniform(0, BOARD, (len(rows), 2))
        self.flags[rows] = self.np_random.uniform(0, BOARD, (len(rows), 2, 2))

    def move(self, actions):
        dt = SECONDS / self.max_steps
        self.position = self.position + self.velocity * dt
        velocity = self.velocity + ACCELERATION * dt * actions.clip(-1, 1)
        self.velocity = velocity.clip(-SPEED, SPEED)
        self.t = self.t + 1
        left = ((self.position < 0) | (self.position > BOARD)).any(1)
        self.position = self.position.clip(0, BOARD)
        wanted = self.flags[np.arange(self.num_envs), self.visited.clip(max=1)]             # [N, 2]
        reached = ~left & (np.linalg.norm(self.position - wanted, axis=1) < RADIUS)
        self.visited = self.visited + reached
        success = self.visited == 2
        reward = self.reward_scale * (reached - 0.1 * left)
        terminated = success | left
        truncated = ~terminated & (self.t >= self.max_steps)
        return reward, terminated, truncated, success

    def observe(self):
        stage = 2.0 * (self.visited[:, None] == np.arange(3)) - 1
        flags = np.where(self.t[:, None] == 0, self.flags.reshape(-1, 4), -1)
        columns = [self.position, self.velocity, stage, flags]
        return np.concatenate(columns, 1).astype(np.float32)                # [N, 11]

    def text(self, i):
        board = "\n".join(map("".join, self.board(i, 1, "12", "A", ".")))
        return f"{board}\n{self.visited[i]} flags visited"

    def picture(self, i, size=12):
        """The first flag is green, the second orange, a visited one pale, the agent blue."""
        colours = np.array([(0, 160, 0), (240, 150, 0)], np.uint8)
        colours[: self.visited[i]] = 200
        cells = self.board(i, 2, colours, (40, 80, 220), (235, 235, 235))
        return np.array(cells, np.uint8).repeat(size, 0).repeat(size, 1)

    def board(self, i, scale, flags, agent, empty):
        """Rows of cells, the highest first, with what stands there. A cell is 1 / scale wide."""
        n = int(BOARD * scale)
        cells = [[empty] * n for _ in range(n)]
        places = [*self.flags[i], self.position[i]]
        for (x, y), what in zip(places, [*flags, agent]):
            row, col = min(int(y * scale), n - 1), min(int(x * scale), n - 1)
            cells[-1 - row][col] = what
        return cells


class TwoFlags(SingleEnv):
    batch_class = TwoFlagsBatch

"""MysteryPath-Grid-v0, Memory Gym's task, for the batch: an unseen path that is learned by falling off it.

A path leads through 7 x 7 cells from one edge to the opposite one and is never shown. The agent starts at its
origin and looks up. An agent that leaves the path sees a red cross on itself; the next step, whatever the
action is, puts it back to the origin. It keeps its direction.

Actions: 0 nothing, 1 turn left, 2 turn right, 3 forward.
Reward: 1 at the goal, where the path and the episode end. The time limit ends it too, and as in Memory Gym
that is reported as an end of the task (terminated), not as a truncation.
Info of the last step: success, and num_fails, how often the agent fell.

Reset options, with Memory Gym's names and defaults:
    max_steps                the time limit; -1: none
    cardinal_origin_choice   the edges that the origin is drawn from: 0 left, 1 right, 2 top, 3 bottom
    show_origin, show_goal   the two cells are painted blue and green; with `views=False` only
    visual_feedback          whether there is a cross
    reward_goal              at the goal
    reward_fall_off          for every fall
    reward_path_progress     for every cell of the path reached first, but for origin and goal
    reward_step              in every step, on top
    agent_scale              without effect, as in Memory Gym

Observation: RGB uint8 [84, 84, 3], indexed [x, y]. What is seen depends on the agent's cell and direction and
on the cross: 392 pictures. So it is given as the number of the picture (`Views`), with `views=False` as the
picture itself. Origin and goal on show would make that 392 for each of 196 pairs, 1.6 GB, of which an agent
meets a small part: there it takes `views=False`, and the two cells are painted behind the agent.

Memory Gym's environment is asked once for each of the 392. Paths follow its rules and use up the same random
numbers, so that MysteryPath-Grid-v0 and memory_gym/MysteryPath-Grid-v0 with one seed play the same episodes.
Random play reaches the goal in 0.9 % of the episodes. Paths have 7 to 17 cells, 10 on average.

Source: https://github.com/MarcoMeter/endless-memory-gym (memory_gym 1.0.2, mystery_path_grid.py).
"""
import functools
import math

import gymnasium as gym
import numpy as np

from envs import memory_gym
from envs.batch import BatchEnv, SingleEnv
from models.views import Views

GRID, TILE = 7, 12  # cells a side, pixels a cell
FORWARD, TURN = 3, np.array([0, 1, 3, 0])  # actions; TURN: quarters to the left
UP, LEFT, DOWN, RIGHT = DIRECTIONS = (0, -1), (-1, 0), (0, 1), (1, 0)
BLUE, GREEN = (0, 0, 255), (0, 255, 0)  # origin, goal

CELLS = [(x, y) for x in range(GRID) for y in range(GRID)]  # cell number 7 x + y
EDGE = [7 * x + y for x, y in CELLS if x in (0, 6) or y in (0, 6)]
INNER = [7 * x + y for x, y in CELLS if 1 <= x <= 4 and 1 <= y <= 4]  # where walls are drawn one by one
DISTANCE = [[math.dist(a, b) for b in CELLS] for a in CELLS]


def near(cell, offsets):
    x, y = CELLS[cell]
    return [7 * (x + dx) + y + dy for dx, dy in offsets if (x + dx, y + dy) in CELLS]


BESIDE = [near(cell, (RIGHT, LEFT, DOWN, UP)) for cell in range(GRID**2)]
AROUND = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
TOUCHING = [near(cell, AROUND) for cell in range(GRID**2)]
AHEAD = np.array([[(*near(cell, [way]), cell)[0] for way in DIRECTIONS] for cell in range(GRID**2)])


def draw_episode(rng, edges):
    """Origin, goal and path of an episode, as GridMysteryPathEnv.reset draws them."""
    edge = edges[rng.integers(len(edges))]
    a, b = rng.integers(GRID, size=2).tolist()
    origin, goal = [(a, 42 + b), (42 + a, b), (7 * a, 7 * b + 6), (7 * a + 6, 7 * b)][edge]
    return origin, goal, draw_path(rng, origin, goal)


def draw_path(rng, origin, goal):
    """The cells from goal to origin that memory_gym.pygame_assets.MysteryPath finds, from the same numbers.

    It is an A* with noise between random walls. It differs from the textbook's: of the open cells it takes
    the first that looks better than the oldest one, and a cell reached more cheaply keeps its old cost.
    """
    percents = rng.integers(100, size=16).tolist()
    walls = {cell for cell, percent in zip(INNER, percents) if percent < 33}
    kept_free = {origin, goal, *BESIDE[origin], *BESIDE[goal]}
    edge = [cell for cell in EDGE if cell not in kept_free and walls.isdisjoint(TOUCHING[cell])]
    for _ in range(4 + 4 * rng.integers(2)):
        if edge:
            walls.add(edge.pop(rng.integers(len(edge))))

    before = rng.bit_generator.state
    noise = iter(rng.integers(1, 9, size=84).tolist())      # one for each pair of neighbours is enough
    to_goal = DISTANCE[goal]
    shut, queue = walls, [origin]                           # shut: walls, and cells that are done
    cost, estimate, came_from = {origin: 0}, {origin: 0}, {}
    used = 0
    while True:
        oldest = estimate[queue[0]]
        cell = next((c for c in queue if estimate[c] < oldest), queue[0])
        if cell == goal:
            break
        queue.remove(cell)
        shut.add(cell)
        for other in BESIDE[cell]:
            if other in shut:
                continue
            used += 1
            new_cost = cost[cell] + next(noise)
            if other not in cost:
                queue.append(other)
                cost[other] = new_cost
                estimate[other] = new_cost + to_goal[other]
            elif new_cost >= cost[other]:
                continue
            came_from[other] = cell
    rng.bit_generator.state = before                        # Memory Gym draws no number too many
    rng.integers(1, 9, size=used)

    path = [goal]
    while path[-1] != origin:
        path.append(came_from[path[-1]])
    return path


@functools.cache
def draw_pictures():
    """Memory Gym's pictures [cell, direction, fallen or not, 84, 84, 3], the first three in one."""
    world = memory_gym.make("memory_gym/MysteryPath-Grid-v0").unwrapped
    world.reset(seed=0)
    world.end, pictures = None, []                          # no goal in the way
    for x, y in CELLS:
        for direction in range(4):
            for path in ([world.mystery_path.grid[x][y]], []):
                world.mystery_path.path, world.is_off_path = path, False
                world.agent.reset_position((x, y))
                world.agent.rotation = 90 * direction
                pictures.append(world.step(0)[0])
    return np.stack(pictures)


def paint_under(pictures, cells, colour):
    """Fills the black pixels of picture n's cell cells[n]; changes the pictures [N, 84, 84, 3]."""
    tiles = pictures.reshape(-1, GRID, TILE, GRID, TILE, 3)                 # a view of them
    x, y = np.divmod(cells, GRID)
    at = np.arange(len(cells)), x, slice(None), y
    tile = tiles[at]                                        # [N, TILE, TILE, 3]
    tiles[at] = np.where(tile.any(-1, keepdims=True), tile, np.uint8(colour))


class MysteryPathGridBatch(BatchEnv):
    reset_options = {
        "max_steps": 128, "agent_scale": 0.25, "cardinal_origin_choice": [0, 1, 2, 3], "show_origin": False,
        "show_goal": False, "visual_feedback": True, "reward_goal": 1.0, "reward_fall_off": 0.0,
        "reward_path_progress": 0.0, "reward_step": 0.0}

    def __init__(self, num_envs=1, views=True, **kwargs):
        space = Views(draw_pictures())
        space = space if views else space.picture_space
        super().__init__(space, gym.spaces.Discrete(4), num_envs, **kwargs)
        self.numbered = views
        self.t = np.zeros(num_envs, int)                    # [N]
        self.num_fails = np.zeros(num_envs, int)            # [N]
        self.origin = np.zeros(num_envs, int)               # [N] a cell
        self.goal = np.zeros(num_envs, int)                 # [N] a cell
        self.path = np.zeros((num_envs, GRID**2), bool)     # [N, cell] which cells belong to it
        self.visited = np.zeros((num_envs, GRID**2), bool)  # [N, cell] where the agent has been, on or off it
        self.cell = np.zeros(num_envs, int)                 # [N]
        self.direction = np.zeros(num_envs, int)            # [N] 0 up, 1 left, 2 down, 3 right
        self.fallen = np.zeros(num_envs, bool)              # [N] off the path now

    def reset(self, *, seed=None, options=None):
        wanted = {**self.reset_options, **(options or {})}
        edges = wanted["cardinal_origin_choice"]
        if not isinstance(wanted["max_steps"], int):
            raise ValueError(f"max_steps must be a whole number, not {wanted['max_steps']}")
        if not isinstance(edges, (list, tuple)) or not edges or not set(edges) <= {0, 1, 2, 3}:
            raise ValueError(f"cardinal_origin_choice must be a list of numbers from 0 to 3, not {edges}")
        if self.numbered and (wanted["show_origin"] or wanted["show_goal"]):
            raise ValueError("show_origin and show_goal need views=False (--env-kwargs '{\"views\": false}')")
        return super().reset(seed=seed, options=options)

    def begin(self, rows):
        for i in rows:
            drawn = draw_episode(self.np_random, self.options["cardinal_origin_choice"])
            self.origin[i], self.goal[i], path = drawn
            self.path[i] = False
            self.path[i, path] = True
        self.t[rows], self.num_fails[rows] = 0, 0
        self.cell[rows], self.direction[rows], self.fallen[rows] = self.origin[rows], 0, False
        self.visited[rows] = False
        self.visited[rows, self.origin[rows]] = True

    def move(self, actions):
        rows, options = np.arange(self.num_envs), self.options
        actions = np.where(self.fallen, 0, actions)         # fallen: this step only brings the agent back
        cell = np.where(self.fallen, self.origin, self.cell)
        self.cell = np.where(actions == FORWARD, AHEAD[cell, self.direction], cell)
        self.direction = (self.direction + TURN[actions]) % 4
        self.t = self.t + 1

        at = rows, self.cell
        at_goal, on_path = self.cell == self.goal, self.path[at]
        progress = on_path & ~self.visited[at] & ~at_goal
        self.visited[at] = True
        self.fallen = ~on_path
        self.num_fails = self.num_fails + self.fallen
        reward = np.full(self.num_envs, options["reward_step"], float)
        reward += options["reward_goal"] * at_goal
        reward += options["reward_path_progress"] * progress
        reward += options["reward_fall_off"] * self.fallen
        return reward, at_goal | (self.t == options["max_steps"]), np.zeros_like(at_goal), at_goal

    def facts(self):
        return {"num_fails": self.num_fails.copy()}         # begin() is about to set it to 0

    def observe(self):
        cross = self.fallen if self.options["visual_feedback"] else 0
        seen = (self.cell * 4 + self.direction) * 2 + cross                 # [N]
        if self.numbered:
            return seen
        pictures = draw_pictures()[seen]                    # [N, 84, 84, 3], copies
        if self.options["show_origin"]:
            paint_under(pictures, self.origin, BLUE)
        if self.options["show_goal"]:
            paint_under(pictures, self.goal, GREEN)
        return pictures

    def text(self, i):
        """+ path, # fallen there, O origin, G goal, ^<v> the agent."""
        letters = np.where(self.path[i], "+", np.where(self.visited[i], "#", "."))
        letters[self.origin[i]], letters[self.goal[i]] = "O", "G"
        letters[self.cell[i]] = "^<v>"[self.direction[i]]
        grid = "\n".join("".join(line) for line in letters.reshape(GRID, GRID).T)
        return grid + ("\nfallen" if self.fallen[i] else "")

    def picture(self, i):
        """What the agent sees, four times as large."""
        seen = self.observe()[i]
        picture = draw_pictures()[seen] if self.numbered else seen
        return picture.transpose(1, 0, 2).repeat(4, 0).repeat(4, 1)


class MysteryPathGrid(SingleEnv):
    batch_class = MysteryPathGridBatch

"""MortarMayhem-Grid-v0 and MortarMayhemB-Grid-v0: Memory Gym's tasks for the batch.

The agent is shown a list of commands, one after the other. Then it must carry them out in this order by
walking over an arena of tiles. Some steps after each command all tiles but the right one explode. In task B
it sees the whole list all the time: the same without memory.

Actions: 0 stay, 1 turn left, 2 turn right, 3 forward. While commands are shown nothing moves.
Episode: a command is shown for `command_show_duration` steps, then nothing for `command_show_delay`. Tiles
explode in the step `explosion_delay` + 1 after that and in the `explosion_duration` - 1 that follow, and so
again after `explosion_delay` calm steps. Who then stands on a wrong tile has failed, and the episode ends. It
also ends with the last command.
Reward: 0.1 for every command done.
Observation: RGB uint8 [84, 84, 3], given as the number of the picture (`Views`); with `views=False` as the
picture itself. Task B adds the commands as 20 one-hots, [20 * 9], zeros where there is no command.
Infos: Memory Gym's. `success` says that the last command was reached: it is 1 also where that one failed.
`reward` and `length` are the episode's.

Reset options, with Memory Gym's defaults: `reset_options` below. Those that are lists are drawn from, episode
by episode. `agent_scale` changes nothing there either.

`arena_sizes` says for which arenas pictures are drawn: the option `arena_size` can be one of these, the
first is its default. The arena of 5 x 5 has 2,825 pictures, 60 MB, those of 2 x 2 to 6 x 6 would have 10,266.
Most of them are of an episode's last step, where the agent stands on any tile and any other one was right.

Source: memory_gym 1.0.2 (https://github.com/MarcoMeter/endless-memory-gym), mortar_mayhem_grid.py and
mortar_mayhem_b_grid.py, whose sprites draw the pictures here. 84 x 84 pixels; a tile is 14 wide.
"""
import functools

import gymnasium as gym
import numpy as np

from envs import memory_gym
from envs.batch import BatchEnv, SingleEnv
from models.views import Views

COMMANDS = {  # name: steps to the right and down
    "right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1), "stay": (0, 0),
    "right_down": (1, 1), "right_up": (1, -1), "left_down": (-1, 1), "left_up": (-1, -1)}
ONE_HOT = np.eye(9, dtype=np.float32)[[1, 4, 2, 3, 0, 5, 6, 7, 8]]  # task B's of each command
FACING = (0, -1), (-1, 0), (0, 1), (1, 0)  # up, left, down, right: after 0, 1, 2, 3 turns to the left
TURNS_LEFT = np.array([0, 1, 3, 0])  # of each action
FORWARD = 3
SIZES = range(2, 7)
MAX_COMMANDS = 100
SCREEN, SCALE = 84, 0.25  # pixels; Memory Gym's sprites are made for a screen of 336
PLAIN, WITH_COMMAND, EXPLODING = 0, 4, 13  # where each kind of pictures begins among those of a cell


def cells_of(size):
    """All (x, y) of an arena, in the order in which its cells are numbered."""
    return [(x, y) for x in range(size) for y in range(size)]


# The cells of all arenas are numbered together, so that a cell says which arena it is in.
CELLS = [(size, x, y) for size in SIZES for x, y in cells_of(size)]
NUMBER = {cell: i for i, cell in enumerate(CELLS)}
FIRST_CELL = {size: NUMBER[size, 0, 0] for size in SIZES}


def beside(directions):
    """[cells, directions] the cell that lies there, -1: outside of the arena."""
    return np.array([[NUMBER.get((size, x + dx, y + dy), -1) for dx, dy in directions]
                     for size, x, y in CELLS])


AFTER = beside(COMMANDS.values())                           # [cells, 9]
AHEAD = beside(FACING)                                      # [cells, 4]
AHEAD = np.where(AHEAD < 0, np.arange(len(CELLS))[:, None], AHEAD)  # a wall: the agent stays
POSSIBLE = np.argsort(AFTER < 0, axis=1, kind="stable")     # [cells, 9] the possible commands come first
NUM_POSSIBLE = np.cumsum(AFTER >= 0, axis=1)                # [cells, 9] among the first 1, 2, ..., 9
TILE = np.array([NUMBER[cell] - FIRST_CELL[cell[0]] for cell in CELLS])  # its number in its arena


@functools.cache
def draw_pictures(arena_sizes, env_id):
    """All pictures [K, 84, 84, 3] of these arenas, and where those of each cell begin, [cells].

    Of each cell that the agent may stand on: 4 that show where it looks, 9 with a command (it then looks
    up), and while all tiles but one explode, 4 for each of these ones.
    """
    assets = memory_gym.load("pygame_assets", env_id)
    controller = memory_gym.load("character_controller", env_id).GridCharacterController
    import pygame

    commands = [assets.Command(name, SCALE) for name in COMMANDS]
    screen = pygame.Surface((SCREEN, SCREEN))
    first, pictures = np.full(len(CELLS), -1), []

    def add_picture(arena, agent, rotation, command=None):
        screen.fill(0)
        screen.blit(arena.surface, arena.rect)
        screen.blit(*agent.get_rotated_sprite(90 * rotation))
        if command:
            corner = (SCREEN - command.rect_dim) // 2
            screen.blit(command.surface, (corner, corner))
        pictures.append(pygame.surfarray.array3d(screen))

    def make_arena(size):
        arena = assets.MortarArena(SCALE, size)
        arena.rect.center = SCREEN // 2, SCREEN // 2
        return arena

    for size in arena_sizes:
        calm = make_arena(size)
        exploding = [make_arena(size) for _ in cells_of(size)]
        for arena, tile in zip(exploding, cells_of(size)):
            arena.toggle_tiles(tile)
        for x, y in cells_of(size):
            first[NUMBER[size, x, y]] = len(pictures)
            agent = controller(SCALE, (x, y), calm.to_grid())
            for rotation in range(4):
                add_picture(calm, agent, rotation)
            for command in commands:
                add_picture(calm, agent, 0, command)
            for arena in exploding:
                for rotation in range(4):
                    add_picture(arena, agent, rotation)
    return np.stack(pictures), first


class MortarMayhemGridBatch(BatchEnv):
    env_id = "MortarMayhem-Grid-v0"
    max_commands = MAX_COMMANDS
    reset_options = {
        "agent_scale": 0.25, "arena_size": 5, "allowed_commands": 5, "command_count": [10],
        "command_show_duration": [3], "command_show_delay": [1],
        "explosion_duration": [2], "explosion_delay": [6], "visual_feedback": True,
        "reward_command_failure": 0.0, "reward_command_success": 0.1, "reward_episode_success": 0.0}

    def __init__(self, num_envs=1, arena_sizes=(5,), views=True, **kwargs):
        self.arena_sizes, self.numbered = tuple(arena_sizes), views
        if not self.arena_sizes or any(size not in SIZES for size in self.arena_sizes):
            raise ValueError(f"arena_sizes must be some of 2, 3, 4, 5, 6, not {arena_sizes}")
        self.reset_options = {**self.reset_options, "arena_size": self.arena_sizes[0]}
        self.tables = draw_pictures(self.arena_sizes, self.env_id)              # a tuple: constants
        seen = Views(self.tables[0])
        space = self.space_with(seen if views else seen.picture_space)
        super().__init__(space, gym.spaces.Discrete(4), num_envs, **kwargs)
        self.t = np.zeros(num_envs, int)                    # [N] as all that follow
        self.agent = np.zeros(num_envs, int)                # its cell
        self.rotation = np.zeros(num_envs, int)             # turns to the left
        self.target = np.zeros(num_envs, int)               # the cell where the command leads
        self.current = np.zeros(num_envs, int)              # how many commands have been judged
        self.exploding = np.zeros(num_envs, bool)
        self.calm_steps = np.zeros(num_envs, int)
        self.exploding_steps = np.zeros(num_envs, int)
        self.returns = np.zeros(num_envs)
        self.commands = np.zeros((num_envs, MAX_COMMANDS + 1), int)             # [N, 101]
        self.count = np.ones(num_envs, int)                 # this and the rest: the episode's options
        self.show_steps = np.zeros(num_envs, int)           # of one command
        self.show_every = np.ones(num_envs, int)
        self.explosion_delay = np.zeros(num_envs, int)
        self.explosion_duration = np.zeros(num_envs, int)
        self.visual_feedback = np.zeros(num_envs, bool)
        self.reward_failure = np.zeros(num_envs)
        self.reward_command = np.zeros(num_envs)
        self.reward_episode = np.zeros(num_envs)

    def space_with(self, seen):
        return seen

    def reset(self, *, seed=None, options=None):
        self.refuse_impossible({**self.reset_options, **(options or {})})
        return super().reset(seed=seed, options=options)

    def refuse_impossible(self, options):
        if options["arena_size"] not in self.arena_sizes:
            raise ValueError(f"arena_size must be one of the task's argument arena_sizes, which is "
                             f"{list(self.arena_sizes)}, not {options['arena_size']}")
        if options["allowed_commands"] not in range(4, 10):
            raise ValueError(f"allowed_commands must be 4 to 9, not {options['allowed_commands']}")
        for name in (name for name, default in self.reset_options.items() if isinstance(default, list)):
            least = 0 if name.startswith("command_show") else 1
            most = self.max_commands if name == "command_count" else np.inf
            values = options[name]
            is_list = isinstance(values, (list, tuple)) and len(values) > 0
            if not is_list or any(not isinstance(x, int) or not least <= x <= most for x in values):
                raise ValueError(
                    f"{name} must be a list of whole numbers from {least} to {most}, not {values}")
        if 0 == min(options.get("command_show_duration", [1])) == min(options.get("command_show_delay", [1])):
            raise ValueError("command_show_duration and command_show_delay must not both be 0")

    def begin(self, rows):
        options, n = self.options, len(rows)
        size, allowed = options["arena_size"], options["allowed_commands"]
        for array in (self.t, self.rotation, self.current, self.calm_steps, self.exploding_steps):
            array[rows] = 0
        self.exploding[rows], self.returns[rows] = False, 0
        self.visual_feedback[rows] = options["visual_feedback"]
        self.reward_failure[rows] = options["reward_command_failure"]
        self.reward_command[rows] = options["reward_command_success"]
        self.reward_episode[rows] = options["reward_episode_success"]

        self.agent[rows] = cell = FIRST_CELL[size] + self.np_random.integers(size**2, size=n)
        self.count[rows] = self.draw("command_count", n)
        longest = max(options["command_count"])
        lots = self.np_random.random((longest, n))
        for k in range(longest):                            # those after the last command are never shown
            which = (lots[k] * NUM_POSSIBLE[cell, allowed - 1]).astype(int)
            command = POSSIBLE[cell, which]
            self.commands[rows, k] = command
            cell = AFTER[cell, command]
        self.draw_times(rows)
        self.explosion_duration[rows] = self.draw("explosion_duration", n)
        self.explosion_delay[rows] = self.draw("explosion_delay", n)
        self.derive(rows)

    def draw_times(self, rows):
        self.show_steps[rows] = self.draw("command_show_duration", len(rows))
        self.show_every[rows] = self.show_steps[rows] + self.draw("command_show_delay", len(rows))

    def derive(self, rows):
        """What follows from what was drawn."""
        self.target[rows] = AFTER[self.agent[rows], self.commands[rows, 0]]

    def draw(self, name, n):
        values = np.array(self.options[name])
        return values[self.np_random.integers(len(values), size=n)]

    def move(self, actions):
        self.t = self.t + 1
        acting = self.t >= self.show_every * self.count     # all commands have been shown
        self.rotation = np.where(acting, self.rotation + TURNS_LEFT[actions], self.rotation) % 4
        goes = acting & (actions == FORWARD)
        self.agent = np.where(goes, AHEAD[self.agent, self.rotation], self.agent)
        at_target = self.agent == self.target

        begins = acting & ~self.exploding & (self.calm_steps == self.explosion_delay)
        self.current = self.current + begins
        exploding = self.exploding | begins
        ends = exploding & (self.exploding_steps == self.explosion_duration)
        failed = exploding & ~ends & ~at_target
        is_last = begins & (self.current == self.count)
        paid = self.reward_command * begins + self.reward_episode * is_last
        reward = np.where(failed, self.reward_failure, paid)
        self.returns = self.returns + reward

        calm_steps = self.calm_steps + (acting & ~exploding)
        self.calm_steps = np.where(begins, 1, calm_steps)
        self.exploding_steps = np.where(ends, 0, self.exploding_steps + exploding)
        self.exploding = exploding & ~ends
        rows = np.flatnonzero(ends)
        self.target[rows] = AFTER[self.target[rows], self.commands[rows, self.current[rows]]]
        return reward, failed | is_last, np.zeros(self.num_envs, bool), is_last

    def facts(self):
        completed = (self.current - (self.current < self.count)) / self.count
        return {"reward": self.returns.copy(), "length": self.t.copy(), "commands_completed": completed}

    def shown(self):
        """[N] the command that is shown; -1: none."""
        k = self.t // self.show_every
        is_shown = (k < self.count) & (self.t % self.show_every < self.show_steps)
        k = np.minimum(k, MAX_COMMANDS)
        return np.where(is_shown, self.commands[np.arange(self.num_envs), k], -1)

    def number(self):
        """[N] which picture is seen."""
        command = self.shown()
        seen = np.where(command >= 0, WITH_COMMAND + command, PLAIN + self.rotation)
        red = self.exploding & self.visual_feedback
        seen = np.where(red, EXPLODING + 4 * TILE[self.target] + self.rotation, seen)
        return self.tables[1][self.agent] + seen

    def observe(self):
        return self.number() if self.numbered else self.tables[0][self.number()]            # [N] or [N, ...]

    def text(self, i):
        """The agent is an arrow, o the right tile, # those that explode."""
        size, *agent = CELLS[self.agent[i]]
        tiles = np.full((size, size), "#" if self.exploding[i] else ".")
        _, *target = CELLS[self.target[i]]
        tiles[tuple(target)] = "o"
        tiles[tuple(agent)] = "^<v>"[self.rotation[i]]
        names, command = list(COMMANDS), self.shown()[i]
        k = min(self.current[i] - self.exploding[i], self.count[i] - 1)
        says = f"the agent sees: {names[command]}" if command >= 0 else \
            f"command {k + 1} of {self.count[i]}: {names[self.commands[i, k]]}"
        return "\n".join(" ".join(row) for row in tiles.T) + f"   {says}"

    def picture(self, i):
        picture = self.tables[0][self.number()[i]].swapaxes(0, 1)               # pygame's are [x, y]
        return picture.repeat(4, 0).repeat(4, 1)


class MortarMayhemGrid(SingleEnv):
    batch_class = MortarMayhemGridBatch


class MortarMayhemBGridBatch(MortarMayhemGridBatch):
    env_id = "MortarMayhemB-Grid-v0"
    max_commands = 20
    reset_options = {name: default for name, default in MortarMayhemGridBatch.reset_options.items()
                     if not name.startswith("command_show")}

    def __init__(self, num_envs=1, **kwargs):
        super().__init__(num_envs, **kwargs)
        self.vector = np.zeros((num_envs, self.max_commands, 9), np.float32)    # [N, 20, 9]

    def space_with(self, seen):
        vector = gym.spaces.Box(0, 1, (9 * self.max_commands,), np.float32)
        return gym.spaces.Dict({"visual_observation": seen, "vector_observation": vector})

    def derive(self, rows):
        super().derive(rows)
        is_given = np.arange(self.max_commands) < self.count[rows, None]        # [n, 20]
        self.vector[rows] = ONE_HOT[self.commands[rows, :self.max_commands]] * is_given[..., None]

    def draw_times(self, rows):
        self.show_steps[rows], self.show_every[rows] = 0, 0

    def shown(self):
        return np.full(self.num_envs, -1)

    def observe(self):
        vector = self.vector.reshape(self.num_envs, -1).copy()                  # [N, 180]
        return {"visual_observation": super().observe(), "vector_observation": vector}


class MortarMayhemBGrid(SingleEnv):
    batch_class = MortarMayhemBGridBatch

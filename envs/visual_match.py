"""VisualMatchPassive-v0, VisualMatch-v0 and KeyToDoor-v0: an early event decides what is right later.

An episode has three phases: explore, collect apples (a distraction), be paid. Hung et al. 2019,
https://arxiv.org/abs/1810.06721; lengths and rewards are those of Ni et al. 2023,
https://arxiv.org/abs/2307.03864. It lasts exactly explore_length + distractor_length + reward_length
steps.

Board: 7 x 11 cells. Observation: uint8 [3, 5, 5], the 5 x 5 cells around the player in colour, blank
outside the board. Actions: 0 north, 1 south, 2 west, 3 east. Blocked moves do nothing.

Visual Match: in the first phase a coloured cell is in view. In the last phase there are three doors of
different colours. The door of that colour pays 5; any choice removes all three.
    Passive: the player stands beside the coloured cell and cannot move.
    Active: the cell is somewhere in the walls of two rooms, and the player must find it.
Key-to-Door: in the first phase there is a key. In the last phase there is a door, which pays 5 and opens
only if the player has taken the key.
Apples: 10 of 22 places, 1 each. An apple is back 21 steps after it was taken.
`success`: the player was paid in the last phase.

The step that ends a phase returns the first view of the next one; its reward belongs to the old phase.
Doors get new colours in every episode; `colours_fixed=True` keeps those of the first reset.
Everything that is drawn at random is drawn when the episode begins.
"""
import gymnasium as gym
import numpy as np

from envs.batch import BatchEnv, SingleEnv

BLANK, WALL, PLAYER, KEY, DOOR, APPLE, INDICATOR, RED, GREEN, BLUE = range(10)
COLOURS = np.array([(204, 204, 204), (25, 25, 25), (228, 148, 109), (159, 81, 44), (134, 206, 235),
                    (140, 178, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)],
                   np.uint8)
SYMBOLS = np.array(list(" #+kdai123"))
NORTH_SOUTH, WEST_EAST = np.array([-1, 1, 0, 0]), np.array([0, 0, -1, 1])
RESPAWN, APPLES, APPLE_REWARD, FINAL_REWARD = 20, 10, 1.0, 5.0


def rooms(*rows):
    """Drawings side by side -> for each its cells, uint8 [7, 11], and {letter: positions [K, 2]}.

    # is a wall, everything else blank. The letters mark places that are used later.
    """
    for drawing in zip(*(row.split("|") for row in rows)):
        letters = np.array([list(row) for row in drawing])  # [7, 11]
        cells = np.where(letters == "#", WALL, BLANK).astype(np.uint8)
        yield cells, {letter: np.argwhere(letters == letter) for letter in np.unique(letters)}


# +: where the player may start    a: where apples may lie    p: where the coloured cell may be, else a wall
# b, c, e: the coloured doors      k: where the key may lie   d: the locked door
DISTRACTOR, PASSIVE, ACTIVE, DOORS, CHAMBERS, LOCKED = rooms(
    # distractor| passive   | active    | doors     | chambers  | locked
    "###########|           |  ppppppp  |###########|  #######  |           ",
    "#a a a a a#|    ppp    |  p     p  |# b  c  e #|  #kkkkk#  |   ##d##   ",
    "# a a a a #|    p+p    |  p     p  |#         #|  #kkkkk#  |   #   #   ",
    "#a a a a a#|    ppp    |  pp   pp  |#         #|  ##   ##  |   # + #   ",
    "# a a a a #|           |  p+++++p  |####   ####|  #+++++#  |   #   #   ",
    "#a a + a a#|           |  p+++++p  |   # + #   |  #+++++#  |   #####   ",
    "###########|           |  ppppppp  |   #####   |  #######  |           ")


class ThreePhases(BatchEnv):
    """What the games share. A game defines

        explore(rows), reward_room(rows)    begin the first and the last phase
        act(rows, phase)                    what a move does in these phases; returns rewards [K]
    """

    def __init__(self, num_envs, explore_length, distractor_length, reward_length, **kwargs):
        lengths = (explore_length, distractor_length, reward_length)
        if not all(isinstance(n, int) and n >= 1 for n in lengths):
            raise ValueError("explore_length, distractor_length and reward_length must be whole numbers "
                             f"of 1 or more, not {lengths}")
        observation_space = gym.spaces.Box(0, 255, (3, 5, 5), np.uint8)
        super().__init__(observation_space, gym.spaces.Discrete(4), num_envs, **kwargs)
        self.begins = [0, explore_length, explore_length + distractor_length]
        self.steps = sum(lengths)
        self.t = np.zeros(num_envs, int)                    # [N]
        self.row = np.zeros(num_envs, int)                  # [N] of the player
        self.col = np.zeros(num_envs, int)                  # [N]
        self.cells = np.zeros((num_envs, 7, 11), np.uint8)  # what is there, without the player
        self.apples = np.zeros((num_envs, 7, 11), bool)     # where they will lie in phase 2
        self.taken = np.zeros((num_envs, 7, 11), int)       # when one was taken here; 0: none was
        self.paid = np.zeros(num_envs, bool)                # [N]

    def draw(self, places, rows):
        """One of places [K, 2] for each of rows: row and column."""
        return places[self.np_random.integers(len(places), size=len(rows))].T

    def enter(self, rows, room):
        """Put these rows into a room, their player at its first +."""
        cells, places = room
        self.cells[rows] = cells
        self.row[rows], self.col[rows] = places["+"][0]

    def begin(self, rows):
        self.t[rows], self.paid[rows] = 0, False
        self.taken[rows], self.apples[rows] = 0, False
        _, places = DISTRACTOR
        places = places["a"]                                # [22, 2]
        order = self.np_random.random((len(rows), len(places))).argsort(1)
        chosen = order[:, :APPLES]                          # [K, 10]
        r, c = places[chosen].transpose(2, 0, 1)
        self.apples[rows[:, None], r, c] = True
        self.explore(rows)

    def distract(self, rows):
        self.enter(rows, DISTRACTOR)
        self.cells[rows] = np.where(self.apples[rows], APPLE, self.cells[rows])

    def passable(self, rows, cell):
        return cell != WALL

    def move(self, actions):
        N = np.arange(self.num_envs)
        phase = np.searchsorted(self.begins, self.t, side="right") - 1      # [N] 0, 1, 2
        reward = np.zeros(self.num_envs)
        self.t = self.t + 1
        row = (self.row + NORTH_SOUTH[actions]).clip(0, 6)
        col = (self.col + WEST_EAST[actions]).clip(0, 10)
        free = self.passable(N, self.cells[N, row, col])
        self.row, self.col = np.where(free, row, self.row), np.where(free, col, self.col)
        collecting = np.flatnonzero(phase == 1)
        if len(collecting):
            reward[collecting] = self.collect(collecting)
        for p in (0, 2):
            rows = np.flatnonzero(phase == p)
            if len(rows):
                reward[rows] = self.act(rows, p)
        for begin, enter in zip(self.begins[1:], (self.distract, self.reward_room)):
            rows = np.flatnonzero(self.t == begin)
            if len(rows):
                enter(rows)
        last = self.t == self.steps
        return reward, last, np.zeros_like(last), self.paid.copy()

    def collect(self, rows):
        """Take the apple under the player; put back those taken more than RESPAWN steps ago."""
        here = rows, self.row[rows], self.col[rows]
        reward = APPLE_REWARD * (self.cells[here] == APPLE)
        self.taken[here] = np.where(reward > 0, self.t[rows], self.taken[here])
        self.cells[here] = BLANK
        taken = self.taken[rows]
        back = (taken > 0) & (self.t[rows, None, None] > taken + RESPAWN)
        self.cells[rows] = np.where(back, APPLE, self.cells[rows])
        self.taken[rows] = np.where(self.cells[rows] == APPLE, 0, taken)
        return reward

    def seen(self):
        """The whole board with the player, and two blank cells around it.   [N, 11, 15]"""
        cells = np.pad(self.cells, ((0, 0), (2, 2), (2, 2)), constant_values=BLANK)
        cells[np.arange(self.num_envs), self.row + 2, self.col + 2] = PLAYER
        return cells

    def observe(self):
        N = np.arange(self.num_envs)[:, None, None]
        row = self.row[:, None, None] + np.arange(5)[:, None]               # [N, 5, 1]
        col = self.col[:, None, None] + np.arange(5)        # [N, 1, 5]
        view = self.seen()[N, row, col]                     # [N, 5, 5]
        return COLOURS[view].transpose(0, 3, 1, 2).copy()   # [N, 3, 5, 5]

    def text(self, i):
        return "\n".join("".join(SYMBOLS[row]) for row in self.seen()[i, 2:-2, 2:-2])

    def picture(self, i, size=16):
        """The board; what the agent does not see is paler."""
        frame = COLOURS[self.seen()[i]].astype(int)
        pale = np.ones(frame.shape[:2], bool)
        pale[self.row[i] : self.row[i] + 5, self.col[i] : self.col[i] + 5] = False
        frame[pale] = (frame[pale] + 2 * 255) // 3
        return frame[2:-2, 2:-2].astype(np.uint8).repeat(size, 0).repeat(size, 1)


class VisualMatchBatch(ThreePhases):
    room = ACTIVE

    def __init__(self, num_envs=1, explore_length=15, distractor_length=60, reward_length=15,
                 colours_fixed=False, **kwargs):
        super().__init__(num_envs, explore_length, distractor_length, reward_length, **kwargs)
        self.colours_fixed = colours_fixed
        self.target = np.zeros(num_envs, int)               # [N] the right door, 0, 1 or 2
        self.colours = np.zeros((num_envs, 3), np.uint8)    # of the doors

    def explore(self, rows):
        _, places = self.room
        self.enter(rows, self.room)
        self.row[rows], self.col[rows] = self.draw(places["+"], rows)
        for r, c in places["p"]:
            self.cells[rows, r, c] = WALL
        # DEVIATION (Memory-RL env.py): there the doors are coloured once per environment object,
        #   without the seed, so training and evaluation are different tasks.
        #   Test: test_credit_envs.py::test_doors_get_new_colours_in_every_episode.
        if not self.colours_fixed:
            self.colours[rows] = RED + self.np_random.random((len(rows), 3)).argsort(1)
        elif not self.colours.any():
            self.colours[:] = RED + self.np_random.permutation(3)
        self.target[rows] = self.np_random.integers(3, size=len(rows))
        r, c = self.draw(places["p"], rows)
        self.cells[rows, r, c] = self.colours[rows, self.target[rows]]

    def remembered(self):
        return {"colour": self.colours[np.arange(self.num_envs), self.target].astype(int) - RED}

    def reward_room(self, rows):
        _, places = DOORS
        self.enter(rows, DOORS)
        for k, door in enumerate("bce"):
            r, c = places[door][0]
            self.cells[rows, r, c] = self.colours[rows, k]

    def passable(self, rows, cell):
        is_door = self.t > self.begins[2]                   # earlier, a colour is part of a wall
        return (cell != WALL) & ((cell < RED) | is_door)

    def act(self, rows, phase):
        if phase == 0:
            return 0.0
        here = self.cells[rows, self.row[rows], self.col[rows]]
        chosen, right = here >= RED, here == self.colours[rows, self.target[rows]]
        cells = self.cells[rows[chosen]]
        self.cells[rows[chosen]] = np.where(cells >= RED, BLANK, cells)     # one choice only
        self.paid[rows] |= right
        return FINAL_REWARD * right


class VisualMatchPassiveBatch(VisualMatchBatch):
    room = PASSIVE


class KeyToDoorBatch(ThreePhases):
    def __init__(self, num_envs=1, explore_length=15, distractor_length=60, reward_length=10,
                 **kwargs):
        super().__init__(num_envs, explore_length, distractor_length, reward_length, **kwargs)
        self.has_key = np.zeros(num_envs, bool)             # [N]
        self.opened = np.zeros(num_envs, bool)              # [N] whether the door was
        self.opens = np.zeros(num_envs, bool)               # [N] in this step: the door covers the player
        self.indicator = np.zeros(num_envs, bool)           # [N] a white cell: the key was just taken

    def explore(self, rows):
        _, places = CHAMBERS
        self.enter(rows, CHAMBERS)
        self.row[rows], self.col[rows] = self.draw(places["+"], rows)
        r, c = self.draw(places["k"], rows)
        self.cells[rows, r, c] = KEY
        for flags in (self.has_key, self.opened, self.opens, self.indicator):
            flags[rows] = False

    def remembered(self):
        return {"key": self.has_key.astype(int)}

    def reward_room(self, rows):
        _, places = LOCKED
        self.enter(rows, LOCKED)
        r, c = places["d"][0]
        self.cells[rows, r, c] = DOOR
        self.indicator[rows] = False

    def distract(self, rows):
        super().distract(rows)
        self.indicator[rows] = False

    def passable(self, rows, cell):
        return (cell != WALL) & ((cell != DOOR) | self.has_key | self.opened)

    def act(self, rows, phase):
        here = self.cells[rows, self.row[rows], self.col[rows]]
        if phase == 0:
            self.indicator[rows] = here == KEY              # for one step, at the upper wall
            self.has_key[rows] |= here == KEY
            self.cells[rows, self.row[rows], self.col[rows]] = BLANK
            return 0.0
        opens = (here == DOOR) & self.has_key[rows]
        self.has_key[rows] &= ~opens                        # one reward an episode
        self.opened[rows] |= opens
        self.opens[rows] = opens
        self.paid[rows] |= opens
        return FINAL_REWARD * opens

    def seen(self):
        cells = super().seen()
        cells[self.indicator, 0 + 2, 5 + 2] = INDICATOR
        opens = np.flatnonzero(self.opens)                  # as Memory-RL draws it
        cells[opens, self.row[opens] + 2, self.col[opens] + 2] = DOOR
        return cells


class VisualMatch(SingleEnv):
    batch_class = VisualMatchBatch


class VisualMatchPassive(SingleEnv):
    batch_class = VisualMatchPassiveBatch


class KeyToDoor(SingleEnv):
    batch_class = KeyToDoorBatch

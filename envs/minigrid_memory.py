"""MinigridMemory-v0: MiniGrid's Memory task as recurrent-ppo uses it, at table-lookup speed.

The agent starts in a corridor. In the room on the left lies an object, a key or a ball. At the junction
on the right lie both, and the agent must turn to the one that it saw. It sees 3 x 3 cells.

Actions: 0 turn left, 1 turn right, 2 forward.
Reward: 1 - 0.9 * t / max_steps at the right object, else 0. Without memory success is 1/2.
Observation: RGB uint8 [3 * 28, 3 * 28, 3], given as the number of the picture (`Views`), since there are
few; with `views=False` as the picture itself. With `rgb=False`: MiniGrid's symbols [3, 3, 3], which are
object, colour and state of every cell in view. They are a MultiDiscrete, because as numbers a key (5)
and a ball (6) hardly differ.

MiniGrid's own engine is asked only once: for every state of the task, what follows after each action
and what the agent sees. There are a few hundred states: layout x position x direction. A step looks
this up, for all environments at once.
"""
import functools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.envs import MemoryEnv

from envs.batch import BatchEnv, SingleEnv, check_whole
from models.views import Views

SUCCESS, FAILURE = 1, 2  # outcome of a step; 0: the episode goes on


@functools.cache
def enumerate_states(size, view_size, tile_size, random_length, rgb):
    """Every reachable state of MiniGrid's MemoryEnv: K layouts, S states, O observations.

    worlds      K MemoryEnv objects, one a layout. Layouts differ in the length of the hallway, the
                object in the room, and which object lies where at the junction.
    objects     [K] the number of the object in the room, as MiniGrid counts them
    begins      K arrays: the states in which an episode of this layout may begin
    where       [S, 4] layout, x, y, direction
    next_state  [S, 3] the state after each action
    outcome     [S, 3] 0, SUCCESS or FAILURE
    seen        [S] the number of the observation that a state shows
    views       [O, ...] the observations
    """
    worlds = {}
    num_layouts = 4 * (size - 6 if random_length else 1)
    for seed in range(10_000):                              # the engine draws the layout
        world = MemoryEnv(size=size, random_length=random_length, agent_view_size=view_size)
        world.reset(seed=seed)
        worlds.setdefault(world.grid.encode().tobytes(), world)
        if len(worlds) == num_layouts:
            break
    worlds = list(worlds.values())

    where, index, views, view_index = [], {}, [], {}
    next_state, outcome, seen = [], [], []

    def number_of(layout):
        """The number of the state that this layout's world is in now; a new one if it is new."""
        world = worlds[layout]
        state = (layout, *(int(c) for c in world.agent_pos), int(world.agent_dir))
        if state not in index:
            index[state] = len(where)
            where.append(state)
            if rgb:
                view = world.get_frame(tile_size=tile_size, agent_pov=True)
            else:
                view = world.gen_obs()["image"].astype(int)
            seen.append(view_index.setdefault(view.tobytes(), len(views)))
            if seen[-1] == len(views):
                views.append(view)
        return index[state]

    def go_to(state):
        """Puts the world of the state's layout into this state; returns the layout."""
        layout, x, y, direction = where[state]
        world = worlds[layout]
        world.agent_pos, world.agent_dir, world.step_count = (x, y), direction, 0
        return layout

    begins = []
    for layout, world in enumerate(worlds):
        hallway_end = world.success_pos[0] - 1
        begins.append([])
        for x in range(1, hallway_end + 1):
            world.agent_pos, world.agent_dir = (x, size // 2), 0
            begins[layout].append(number_of(layout))
    while len(next_state) < len(where):                     # `where` grows while this goes on
        now, follows, ends = len(next_state), [], []
        for action in range(3):
            layout = go_to(now)
            world = worlds[layout]
            _, _, terminated, _, _ = world.step(action)
            at_goal = tuple(world.agent_pos) == world.success_pos
            follows.append(number_of(layout))
            ends.append(0 if not terminated else SUCCESS if at_goal else FAILURE)
        next_state.append(follows)
        outcome.append(ends)
    objects = [OBJECT_TO_IDX[world.grid.get(1, size // 2 - 1).type] for world in worlds]
    return SimpleNamespace(
        worlds=worlds, objects=np.array(objects), begins=[np.array(states) for states in begins],
        where=np.array(where), next_state=np.array(next_state),
        outcome=np.array(outcome), seen=np.array(seen), views=np.stack(views))


class MinigridMemoryBatch(BatchEnv):
    def __init__(self, num_envs=1, size=9, view_size=3, tile_size=28, rgb=True, views=True,
                 random_length=False, max_steps=None, **kwargs):
        check_whole(size=size, view_size=view_size, tile_size=tile_size)
        self.tables = enumerate_states(size, view_size, tile_size, random_length, rgb)
        self.numbered = rgb and views
        if rgb:
            observation_space = Views(self.tables.views)
            observation_space = observation_space if views else observation_space.picture_space
        else:
            symbols = [len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX)]
            nvec = np.broadcast_to(symbols, self.tables.views.shape[1:])
            observation_space = gym.spaces.MultiDiscrete(nvec)
        super().__init__(observation_space, gym.spaces.Discrete(3), num_envs, **kwargs)
        self.max_steps = 5 * size**2 if max_steps is None else max_steps
        check_whole(max_steps=self.max_steps)
        self.t = np.zeros(num_envs, int)                    # [N]
        self.state = np.zeros(num_envs, int)                # [N]

    def begin(self, rows):
        self.t[rows] = 0
        layouts = self.np_random.integers(len(self.tables.begins), size=len(rows))
        for i, layout in zip(rows, layouts):
            self.state[i] = self.np_random.choice(self.tables.begins[layout])

    def move(self, actions):
        at = self.state, actions
        outcome = self.tables.outcome[at]                   # [N]
        self.state = self.tables.next_state[at]
        self.t += 1
        success = outcome == SUCCESS
        reward = np.where(success, 1 - 0.9 * self.t / self.max_steps, 0.0)
        return reward, outcome > 0, self.t >= self.max_steps, success

    def remembered(self):
        return {"object": self.tables.objects[self.tables.where[self.state, 0]]}

    def observe(self):
        seen = self.tables.seen[self.state]                 # [N]
        return seen if self.numbered else self.tables.views[seen]           # [N] or [N, ...]

    def world(self, i):
        layout, x, y, direction = self.tables.where[self.state[i]]
        world = self.tables.worlds[layout]
        world.agent_pos, world.agent_dir = (x, y), direction
        return world

    def text(self, i):
        return self.world(i).pprint_grid()

    def picture(self, i):
        return self.world(i).get_frame(tile_size=32)


class MinigridMemory(SingleEnv):
    batch_class = MinigridMemoryBatch

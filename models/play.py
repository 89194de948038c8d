"""Playing with a trained agent: evaluation while training, films, and what --model does."""
from pathlib import Path

import imageio
import numpy as np
import torch
from tqdm import tqdm

from models.command_line import RUNNING
from models.encoder import to_tensors
from models.policy import load  # noqa: F401  (a part of what this file offers)
from models.run_folder import write

LIMIT = 100_000  # steps of an episode, where the task does not set a longer one


@torch.no_grad()
def play(agent, envs, episodes, seed, show=lambda: None, forget_at=0):
    """Plays without exploring. Returns [3, episodes]: return, length and success (nan: not defined) of each.

    agent: has memory.initial_state(N) and act(obs, state, start); with a `wipe_state_every` it also forgets
    after so many steps. Every environment plays its share: stopping at the first `episodes` to finish would
    favour short ones. An episode without an end counts as it stands after LIMIT steps, or after the
    task's own limit if that is longer. forget_at: a step of every episode, counted from 0, which the agent
    meets with an empty memory; 0: none
    """
    N, device = envs.num_envs, next(agent.parameters()).device
    left = np.bincount(np.arange(episodes) % N, minlength=N)    # [N] episodes to play
    wipe_every = getattr(agent, "wipe_state_every", 0)
    state, start = agent.memory.initial_state(N), np.ones(N, bool)
    returns, lengths, results = np.zeros(N), np.zeros(N), []
    limit = max(LIMIT, limit_of(envs))
    obs, _ = envs.reset(seed=seed)
    while left.any():
        show()
        if wipe_every:
            start = start | (lengths % wipe_every == 0)
        if forget_at:
            rows = torch.as_tensor(lengths == forget_at, device=device)
            state = wiped(state, agent.memory.initial_state(N), rows)
        obs = to_tensors(envs.single_observation_space, obs, device)
        action, state = agent.act(obs, state, torch.as_tensor(start, device=device))
        obs, reward, terminated, truncated, infos = envs.step(action)
        returns, lengths = returns + reward, lengths + 1
        start = terminated | truncated | (lengths == limit)
        if not (terminated | truncated)[lengths == limit].all():
            tqdm.write(f"an episode was cut after {limit:,} steps: give the task a limit of its own, as "
                       """--env-kwargs '{"max_episode_steps": 1000}'""")
        if start.any():
            show()
            success = infos.get("success", np.full(N, np.nan))
            for n in np.flatnonzero(start & (left > 0)):
                results.append((returns[n], lengths[n], success[n]))
            left = np.maximum(left - start, 0)
            returns[start], lengths[start] = 0, 0
            obs, _ = envs.reset(options={"reset_mask": start})
    return np.array(results).T                              # [3, episodes]


def wiped(state, empty, rows):
    """The state [N, ...], with these rows [N] of the empty one."""
    shapes = [(-1,) + (1,) * (s.dim() - 1) for s in state]
    return tuple(torch.where(rows.view(shape), e, s) for shape, e, s in zip(shapes, empty, state))


def limit_of(envs):
    """The time limit that Gymnasium puts on an episode; 0: none."""
    env, *_ = getattr(envs.unwrapped, "envs", [envs])
    return (env.spec and env.spec.max_episode_steps) or 0


def enjoy(agent, envs, args):
    """Plays --episodes of one environment; prints text frames, or writes a GIF beside the model.

    --export takes it away; --show-memory, --forget-at and --probe look inside. What they need is imported
    only then.
    """
    if args.export is not None:
        from models.export import export
        return export(agent, envs, args)
    if args.probe:
        from models.probe import probe
        return probe(agent, envs, args)
    if args.show_memory or args.forget_at:
        from models.watch import watch
        return watch(agent, envs, args)
    frames, results = [], []

    def show():
        if envs.render_mode == "ansi":
            print(envs.render()[0])
        elif envs.render_mode == "rgb_array":
            frames.append(envs.render()[0])

    for episode in range(args.episodes):
        results.append(play(agent, envs, 1, args.seed + episode, show)[:, 0])
        print(f"episode {episode + 1}: {summary(results[-1:])}")
    print(f"mean of {args.episodes}: {summary(results)}")
    if frames:
        path = Path(args.model).with_suffix(".gif")
        write_gif(path, frames, envs)
        print(f"wrote {path}")


def summary(results):
    """results: [return, length, success] of each episode"""
    returns, lengths, successes = np.array(results).T
    spread = f" +- {returns.std():.2f}" if len(results) > 1 else ""
    success = "" if np.isnan(successes).any() else f", success {successes.mean():.2f}"
    return f"return {returns.mean():.2f}{spread}, length {lengths.mean():.1f}{success}"


def film(agent, envs, path, seed):
    """A GIF of one episode, for Weights & Biases also."""
    frames = []
    play(agent, envs, 1, seed, lambda: frames.append(envs.render()[0]))
    path.parent.mkdir(exist_ok=True)
    write_gif(path, frames, envs)
    for run in RUNNING:
        run.send_film(path)


def write_gif(path, frames, envs):
    milliseconds = min(1000 / envs.metadata.get("render_fps", 10), 50_000 / len(frames))    # of a frame
    write(path, lambda beside: imageio.mimsave(beside, frames, "GIF", duration=milliseconds, loop=0))

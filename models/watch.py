"""--show-memory and --forget-at: films of what an agent remembers, and of its state being wiped."""
from pathlib import Path

import imageio
import numpy as np

from models.command_line import fail
from models.files import write
from models.insight import noting
from models.play import play, summary, write_gif
from models.strip import strip

WIDTH, HEIGHT = 640, 180  # of the task's picture in a film, at most
HALF = 450  # its width where two films are side by side
SHOTS = 200  # of a longer film every second is left out, and again


def watch(agent, envs, args):
    """Plays --episodes; with --forget-at each again with its state wiped. --show-memory films it."""
    parts = []                                              # (steps, shots, what is shown, return) of each
    for forget_at in (0, args.forget_at) if args.forget_at else (0,):
        steps, shots, results = witness(agent, envs, args, forget_at)
        what = f"state wiped at step {forget_at}" if forget_at else "state kept"
        print(f"{what}: {summary(results)}")
        last = max(step["age"] for step in steps)
        if args.forget_at > last:
            fail(f"--forget-at {args.forget_at}: no episode lasts so long; give at most {last}")
        shown = what if args.forget_at else f"{args.env_id}, {args.memory}"
        parts.append((steps, shots, shown, np.mean(results, axis=0)[0]))
    if args.forget_at:
        (*_, kept), (*_, wiped) = parts
        print(f"without what it remembered until step {args.forget_at} the return changes by "
              f"{wiped - kept:+.2f}")
    if args.show_memory:
        ending = f"-forget-{args.forget_at}" if args.forget_at else "-memory"
        save(Path(args.model).with_suffix("").as_posix() + ending, films_of(agent, parts, args), envs)


def witness(agent, envs, args, forget_at):
    """Returns the notes of all steps, shots of the task (steps so far, picture), and the results."""
    shots, results, shown, every = [], [], 0, 1

    def show():
        nonlocal shown, every
        if envs.render_mode == "rgb_array" and shown % every == 0:
            shots.append((len(steps), envs.render()[0]))
        if len(shots) == 2 * SHOTS:
            del shots[1::2]
            every *= 2
        shown += 1

    with noting(agent) as steps:
        for episode in range(args.episodes):
            results.append(play(agent, envs, 1, args.seed + episode, show, forget_at)[:, 0])
    if shots and shots[-1][0] < len(steps):                 # the end was left out
        shots.append((len(steps), envs.render()[0]))
    return steps, shots, results


def films_of(agent, parts, args):
    """[H, W, 3] frames: a film, or two side by side, the state kept and wiped."""
    everything, films = [step for steps, *_ in parts for step in steps], []
    begin, width = 0, HALF if args.forget_at else WIDTH
    for steps, shots, shown, mean in parts:
        part = slice(begin, begin + len(steps))
        wiped_at = [t for t, step in enumerate(steps) if begin and step["age"] == args.forget_at]
        below = strip(agent, everything, part, f"{shown}: return {mean:.2f}", width, wiped_at)
        films.append(film_of(shots, len(steps), *below))
        begin += len(steps)
    return side_by_side(films)


def film_of(shots, length, whole, place):
    """[H, width, 3] frames: the task above, below it the strip as far as time has come.

    length: steps; whole, place: what strip() returns
    """
    frames, (rows, columns) = [], place
    for so_far, picture in shots:
        now = columns.start + (columns.stop - columns.start) * so_far // length
        below = whole.copy()
        below[rows, now : columns.stop] = 245
        frames.append(np.concatenate([fitted(picture, whole.shape[1]), below]))
    return frames


def fitted(picture, width):
    """The picture as large as it fits into `width` and HEIGHT, on white, [h, width, 3].

    A long corridor would be a line: it is stretched to a third of HEIGHT.
    """
    h, w, _ = picture.shape
    scale = min((width - 20) / w, HEIGHT / h)
    sizes = max(int(h * scale), HEIGHT // 3), int(w * scale)
    rows, columns = (np.arange(size) * n // size for size, n in zip(sizes, (h, w)))
    canvas = np.full((len(rows) + 16, width, 3), 255, np.uint8)
    left = (width - len(columns)) // 2
    canvas[8 : 8 + len(rows), left : left + len(columns)] = picture[rows][:, columns]
    return canvas


def side_by_side(films):
    """The films as one; the shorter one waits at its end."""
    length = max(map(len, films))
    films = [film + film[-1:] * (length - len(film)) for film in films]
    return [np.concatenate(frames, axis=1) for frames in zip(*films)]


def save(name, frames, envs):
    """The film, and its last frame as a picture."""
    frames = [frame // 17 * 17 for frame in frames]         # fewer than 256 colours: nothing is dithered
    write_gif(Path(f"{name}.gif"), frames, envs)
    write(Path(f"{name}.png"), lambda beside: imageio.imwrite(beside, frames[-1], "PNG"))
    print(f"wrote {name}.gif and {name}.png")

"""What went on inside an agent as one picture whose x axis is time: the strip below a film."""
import matplotlib.pyplot as plt
import numpy as np

from models.insight import critics_of, numbers

plt.switch_backend("Agg")

UNITS = 40  # of the state, those that vary most
BLUE, VERMILLION = "#0072B2", "#D55E00"  # of Okabe and Ito, for every kind of colour vision
CIVIDIS = plt.get_cmap("cividis", 20)  # few colours make a small GIF
DPI = 100


def strip(agent, steps, part, title, width=640, wiped_at=()):
    """The picture [H, width, 3] uint8, and its (rows, columns), two slices, in which time runs.

    steps: what models/insight.py noted; part: the slice of them that is drawn, in the rows and on the scales
    of all, so that parts can be compared; wiped_at: its steps at which the state was wiped
    """
    panels, episodes = panels_of(agent, steps), [t for t, step in enumerate(steps[part]) if step["age"] == 0]
    heights = [height for _, height, _ in panels]
    size = width / DPI, (sum(heights) + 14 * len(panels) + 50) / DPI
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=size, dpi=DPI, height_ratios=heights)
    top, bottom = 24 / DPI / size[1], 34 / DPI / size[1]
    figure.subplots_adjust(left=95 / width, right=0.98, top=1 - top, bottom=bottom, hspace=0.3)
    for axis, (label, _, draw) in zip(axes[:, 0], panels):
        axis.tick_params(labelsize=7)
        draw(axis, part)
        axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for t in episodes[1:]:
            axis.axvline(t - 0.5, color="black", linewidth=0.9)
            axis.axvline(t - 0.5, color="white", linewidth=0.9, linestyle=(0, (3, 3)))      # seen on both
        for t in wiped_at:
            axis.axvline(t - 0.5, color=VERMILLION, linewidth=1.5, linestyle="--")
    axis.set_xlim(-0.5, len(steps[part]) - 0.5)
    axis.set_xlabel("step", fontsize=8, labelpad=1)
    axes[0, 0].set_title(title, fontsize=9, loc="left", pad=4)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    first, last = axes[0, 0].get_window_extent(), axis.get_window_extent()
    rows = slice(len(picture) - int(first.y1), len(picture) - int(last.y0))
    plt.close(figure)
    return picture, (rows, slice(round(last.x0) + 1, int(last.x1)))


def panels_of(agent, steps):
    """From top to bottom: what is said of a panel, its height in pixels, and draw(axis, part)."""
    policy = np.stack([step["policy"] for step in steps], axis=1)           # [A, T]
    state = np.stack([step["state"] for step in steps], axis=1)             # [U, T]
    box = hasattr(agent, "low")                             # SAC, TD3
    value = critics_of(agent, steps) if box else [min(step["values"]) for step in steps]
    of_values = not hasattr(agent, "policy")                # PQN, DQN
    actions = "action" if box else "values of\nthe actions" if of_values else "probability\nof actions"
    numbered = dict(enumerate(action for size in steps[0]["sizes"] for action in range(size)))
    panels = [("value", 50, line(value)), (actions, 10 + 8 * len(policy), heat(policy, names=numbered))]
    if len(numbers(steps[0]["obs"])) <= 16:
        seen = np.stack([numbers(step["obs"]) for step in steps], axis=1)   # [numbers, T]
        if seen.max() <= 16:                                # numbers of pictures say nothing
            panels.insert(0, ("sees", 10 + 7 * len(seen), heat(seen)))
    if len(state) and not steps[0]["attention"]:            # GPT's are notes of steps: see what it looks at
        units = state[np.argsort(-state.std(axis=1), kind="stable")[:UNITS]]
        low, high = units.min(axis=1, keepdims=True), units.max(axis=1, keepdims=True)
        units = (units - low) / (high - low + 1e-9)         # each in all colours
        numbered = {row - 1: row for row in range(5, len(units) + 1, 5)}
        panels.append((f"state:\n{len(units)} of {len(state)}\nnumbers", 120, heat(units, names=numbered)))
    if steps[0]["kept"]:
        kept = np.stack([np.concatenate(step["kept"]) for step in steps], axis=1)           # [K, T]
        panels.append(("forgets", 50, shares(1 - kept)))
    if steps[0]["attention"]:
        panels.append(("attends to\nepisode's\nstep", 120, heat(attended(steps), "lower", cut=1)))
    return panels


def attended(steps):
    """[steps of an episode, T] how much step t looked at each one of its episode: the head that did most."""
    looked = np.full((1 + max(step["age"] for step in steps), len(steps)), np.nan)
    for t, step in enumerate(steps):
        end = step["age"] + 1
        weights = np.max(step["attention"], axis=0)[-end:]                  # [keys] up to this step
        looked[end - len(weights) : end, t] = weights
    return looked


def line(values):
    def draw(axis, part):
        axis.plot(values[part], color=BLUE, linewidth=1.2)
        margin = 0.15 * np.ptp(values) + 1e-6
        axis.set_ylim(min(values) - margin, max(values) + margin)
    return draw


def heat(rows, origin="upper", names=None, cut=0):
    """names: {row: what is written beside it}; cut: so many percent of the numbers, at both ends, have the
    colours of the ends
    """
    def draw(axis, part):
        low, high = np.nanpercentile(rows, (cut, 100 - cut))
        axis.imshow(rows[:, part], aspect="auto", cmap=CIVIDIS, interpolation="nearest", origin=origin,
                    vmin=low, vmax=max(high, low + 1e-6))
        if origin == "lower":
            axis.set_ylim(-1.5)                             # room between the first row and the frame
        else:
            axis.set_yticks(list(names or {}), (names or {}).values(), fontsize=5)
    return draw


def shares(rows):
    """The mean over units, and between which shares nine tenths of them lie."""
    low, high = np.percentile(rows, (5, 95), axis=0)

    def draw(axis, part):
        t = np.arange(len(low[part]))
        axis.fill_between(t, low[part], high[part], color=BLUE, alpha=0.25, linewidth=0, step="mid")
        axis.plot(t, rows.mean(axis=0)[part], color=BLUE, linewidth=1.2)
        top = max(0.1, 1.05 * high.max())
        axis.set_ylim(-0.05 * top, top)
    return draw

"""The discounted return as a memory monoid: R_t = r_t + gamma R_{t+1}, cut where an episode ends.

    python benchmark/discounted_return.py                       checks it, times it, writes a table and a plot

Four ways to the same numbers: a Python loop over numbers, a loop over time of vector operations, the general
associative scan with resets, and the chunked linear scan. The monoid is

    (gamma, r) . (gamma', r') = (gamma gamma', r' + gamma' r),

read from the end of the tape to its beginning. A reset makes an episode's last step forget what comes after.
"""
import csv
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from models.command_line import command_line, fail  # noqa: E402
from models.files import make_out  # noqa: E402
from models.scan import associative_scan, linear_scan, resettable  # noqa: E402

GAMMA = 0.99


@dataclass
class Args:
    lengths: tuple[int, ...] = (100, 1_000, 10_000, 100_000, 1_000_000)  # tape lengths
    columns: int = 1  # tapes side by side
    repeats: int = 5  # timed runs of each, after one to warm up; the median counts
    max_seconds: float = 20.0  # a way that takes longer is not tried on longer tapes
    out: str = str(ROOT / "benchmark/results")  # where discounted_return.csv and .png go


def numbers(rewards, ends):
    """Step by step, number by number.   rewards [T, B], ends [T, B] bool: the episode's last step"""
    out = rewards.T.tolist()                                # B lists of T
    for column, end in zip(out, ends.T.tolist()):
        total = 0.0
        for t in range(len(column) - 1, -1, -1):
            total = column[t] + GAMMA * total * (not end[t])
            column[t] = total
    return rewards.new_tensor(out).T


def vectors(rewards, ends):
    """Step by step, all columns at once."""
    total, out = torch.zeros_like(rewards[0]), []
    discounts = GAMMA * (~ends).to(rewards)
    for reward, discount in zip(rewards.flip(0).unbind(), discounts.flip(0).unbind()):
        total = reward + discount * total
        out.append(total)
    return torch.stack(out[::-1])


def monoid(rewards, ends):
    """The associative scan: flags and (gamma, r), backwards in time."""
    def op(left, right):
        (gamma, r), (gamma2, r2) = left, right
        return gamma * gamma2, r2 + gamma2 * r

    elements = ends.flip(0), (torch.full_like(rewards, GAMMA), rewards.flip(0))
    return associative_scan(resettable(op), elements)[1][1].flip(0)


def chunks(rewards, ends):
    """The linear scan: a reset is a zero."""
    discounts = GAMMA * (~ends).to(rewards)
    nothing = torch.zeros_like(rewards[0])
    return linear_scan(discounts.flip(0), rewards.flip(0), nothing).flip(0)


WAYS = {
    "loop of numbers": numbers, "loop of vectors": vectors, "associative scan": monoid, "linear scan": chunks}


def check():
    """Every way gives what the first one gives, with and without resets."""
    for T, p_end in ((1, 0.5), (2, 0.5), (1_000, 0.0), (1_000, 0.02), (4_097, 0.3)):
        torch.manual_seed(T)
        rewards, ends = torch.randn(T, 3, dtype=torch.float64), torch.rand(T, 3) < p_end
        for name, way in WAYS.items():
            if not torch.allclose(way(rewards, ends), numbers(rewards, ends), rtol=1e-9, atol=1e-9):
                sys.exit(f"{name} differs from the loop of numbers at T = {T}, "
                         f"{p_end} of the steps ending an episode")


def measure(args):
    """One row a length: seconds of every way, None where it was not tried."""
    rows, slow = [], set()
    for T in args.lengths:
        torch.manual_seed(0)
        rewards, ends = torch.randn(T, args.columns), torch.rand(T, args.columns) < 0.01
        seconds = {}
        for name, way in WAYS.items():
            times = []
            for _ in range(args.repeats + 1):
                if name not in slow:
                    begin = time.perf_counter()
                    way(rewards, ends)
                    times.append(time.perf_counter() - begin)
                    if times[-1] > args.max_seconds:
                        slow.add(name)
            seconds[name] = statistics.median(times[1:] or times) if times else None
        rows.append({"length": T} | seconds)
        said = (f"{name} {1000 * s:.2f} ms" if s else f"{name} -" for name, s in seconds.items())
        print(f"length {T:,}  {'  '.join(said)}", flush=True)
    return rows


def write(rows, out):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "discounted_return.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{v:.3g}" if isinstance(v, float) else v for v in row.values())
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name in WAYS:
        done = [row for row in rows if row[name]]
        axis.loglog([row["length"] for row in done], [row[name] for row in done], marker=".", label=name)
    axis.set(title="discounted return of one tape", xlabel="length", ylabel="seconds")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out / "discounted_return.png", dpi=120)


def main(argv=None):
    args = command_line(Args, argv)
    for length in args.lengths:
        if not 1 <= length <= 2**30:
            fail(f"--lengths {length} must be at least 1 and at most {2**30}")
    for name, high in {"columns": 2**16, "repeats": 1000, "max_seconds": 1e9}.items():
        low = 0 if name == "max_seconds" else 1
        if not low <= getattr(args, name) <= high:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            fail(f"{flag} must be at least {low} and at most {high}")
    if not args.lengths:
        fail("--lengths needs a tape length, such as 1000")
    make_out(args.out)
    torch.set_num_threads(1)
    check()
    write(measure(args), Path(args.out))


if __name__ == "__main__":
    main()

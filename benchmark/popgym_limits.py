"""What a player who knows the rules has in three of POPGym's families.   python benchmark/popgym_limits.py

The player learns nothing: it counts cards, filters noise or keeps a table, and knows how the task works.
Writes popgym-limits.csv into --out: the mean return of --episodes episodes and its standard error.

HigherLower                the choice that wins more often, all cards counted: the optimum
NoisyPositionOnlyCartPole  a Kalman filter and a linear controller: no optimum, but a good player
MultiarmedBandit           upper confidence bounds that fall to 0 at the end: the same
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from entries import ROOT
from plot import write_csv
from run import command_line

sys.path.insert(0, str(ROOT))
from envs.popgym_cards import HigherLowerBatch  # noqa: E402
from envs.popgym_control import NoisyPositionOnlyCartPoleBatch  # noqa: E402
from envs.popgym_games import MultiarmedBanditBatch  # noqa: E402

LEVELS = "Easy", "Medium", "Hard"
# of x, its velocity, the angle, its velocity: push right where their weighted sum is positive. Found by a
# random search from the linear-quadratic regulator's, 1,024 episodes a try.
GAINS = ((0.075, 0.319, 6.11, 0.927), (0.033, 0.074, 5.17, 0.722), (0.055, 0.213, 6.00, 1.381))


@dataclass
class Args:
    out: str = "runs/figures"  # where popgym-limits.csv goes
    episodes: int = 16_384  # of every level


def play(batch, player):
    """The returns of one episode in each environment.   player(obs, t) -> actions [N]"""
    obs, _ = batch.reset(seed=1)
    returns, going = np.zeros(batch.num_envs), np.ones(batch.num_envs, bool)
    t = 0
    while going.any():
        obs, reward, terminated, truncated, _ = batch.step(player(obs, t))
        returns += going * reward
        going &= ~(terminated | truncated)
        t += 1
    return returns


def count_cards(batch):
    """HigherLower: higher if more of the cards that are left are higher."""
    N, kinds = batch.num_envs, batch.kinds
    left = np.full((N, kinds), batch.num_cards // kinds)    # [N, kinds]

    def player(obs, t):
        left[np.arange(N), obs] -= 1
        higher = left * (np.arange(kinds) > obs[:, None])
        lower = left * (np.arange(kinds) < obs[:, None])
        return np.where(higher.sum(1) >= lower.sum(1), 0, 1)

    return player


def filter_and_control(batch, gain):
    """NoisyPositionOnlyCartPole: an extended Kalman filter, and a push to where its estimate leans."""
    N, sees = batch.num_envs, np.eye(4)[[0, 2]]             # [2, 4]
    model = NoisyPositionOnlyCartPoleBatch(N)               # the same cart, moved by what is believed
    believed = np.zeros((N, 4))
    uncertain = np.eye(4) * 0.05**2 / 3                     # variance of the first state
    moves = step_matrix(model)

    def player(obs, t):
        nonlocal believed, uncertain
        seen = sees @ uncertain @ sees.T + np.eye(2) * batch.noise_sigma**2             # variance of obs
        trust = uncertain @ sees.T @ np.linalg.inv(seen)    # [4, 2] the Kalman gain
        believed = believed + (obs - believed @ sees.T) @ trust.T
        actions = (believed @ gain > 0).astype(int)
        believed = moved(model, believed, actions)
        uncertain = moves @ (np.eye(4) - trust @ sees) @ uncertain @ moves.T + np.eye(4) * 1e-7
        return actions

    return player


def moved(model, state, actions):
    """The state after a step of the cart pole."""
    model.state = state
    model.move(actions)
    return model.state


def step_matrix(model):
    """[4, 4] The derivative of a step by the state, upright and at rest."""
    small, N = 1e-5, model.num_envs
    push = np.zeros(N, int)
    columns = [
        (moved(model, np.tile(e * small, (N, 1)), push) - moved(model, np.zeros((N, 4)), push))[0] / small
        for e in np.eye(4)]
    return np.stack(columns, axis=1)


def upper_confidence(batch):
    """MultiarmedBandit: the greatest posterior mean plus 1.5 deviations, which fall to 0 at the end."""
    N, K = batch.bandits.shape
    paid, tried = np.zeros((2, N, K))
    last = None

    def player(obs, t):
        nonlocal last
        if last is not None:
            paid[np.arange(N), last] += obs
            tried[np.arange(N), last] += 1
        mean = (paid + 1) / (tried + 2)
        deviation = np.sqrt(mean * (1 - mean) / (tried + 3))
        last = (mean + 1.5 * np.sqrt(1 - t / batch.steps) * deviation).argmax(1)
        return last

    return player


def limits(episodes):
    """{task: returns [episodes]}"""
    out = {}
    for i, level in enumerate(LEVELS):
        cards = HigherLowerBatch(episodes, num_decks=i + 1)
        out[f"HigherLower{level}"] = play(cards, count_cards(cards))
    for i, level in enumerate(LEVELS):
        bandit = MultiarmedBanditBatch(episodes, 10 * (i + 1), 200 * (i + 1))
        out[f"MultiarmedBandit{level}"] = play(bandit, upper_confidence(bandit))
    for i, level in enumerate(LEVELS):
        cart = NoisyPositionOnlyCartPoleBatch(episodes, noise_sigma=0.1 * (i + 1))
        out[f"NoisyPositionOnlyCartPole{level}"] = play(cart, filter_and_control(cart, np.array(GAINS[i])))
    return out


def main(argv=None):
    args = command_line(Args, argv)
    rows = []
    for task, returns in limits(args.episodes).items():
        error = returns.std() / args.episodes**0.5
        rows.append({"task": task, "return": f"{returns.mean():.4f}", "standard_error": f"{error:.4f}",
                     "episodes": args.episodes})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_csv(Path(args.out) / "popgym-limits.csv", rows)
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    main()

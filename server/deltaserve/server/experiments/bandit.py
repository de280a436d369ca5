"""Thompson sampling: shares of the arms by how probable each is the best."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltaserve.server.experiments.errors import InvalidExperiment, at_least
from deltaserve.server.experiments.samples import Numbers, Sample


def rate_shares(
    arms: Mapping[str, tuple[int, int]], seed: int, floor: float = 0.0, draws: int = 10_000
) -> dict[str, float]:
    """arms: successes and users of each, of outcomes 0 or 1. The rate of an arm is drawn from
    Beta(1 + successes, 1 + failures). An arm's share is the part of the draws in which it is the
    best, shrunk so that none has less than `floor`: floor + (1 - arms * floor) * part. One seed
    gives the same shares with one version of NumPy. Raises InvalidExperiment."""
    _check(arms, floor, draws)
    for name, (successes, n) in arms.items():
        if not 0 <= successes <= n:
            raise InvalidExperiment(f"arms[{name!r}]", f"{successes} of {n} is not a part of it")
    s, n = np.array(list(arms.values()), np.float64).T
    drawn = np.random.default_rng(seed).beta(1 + s, 1 + n - s, (draws, len(arms)))
    return _shares(arms, drawn, floor)


def mean_shares(
    arms: Mapping[str, Sample], seed: int, floor: float = 0.0, draws: int = 10_000
) -> dict[str, float]:
    """The same for real rewards. The mean of an arm is drawn from its posterior under a flat prior
    for the mean and one prior observation of the variance, that of all arms pooled: mean + s t_n /
    sqrt(n) with s^2 = ((n - 1) variance + pooled) / n. Equal shares while an arm has no user or no
    two users of an arm differ. Raises InvalidExperiment."""
    _check(arms, floor, draws)
    n = np.array([arm.n for arm in arms.values()], np.float64)
    variance = np.array([arm.variance for arm in arms.values()])
    freedom = np.maximum(n - 1, 0)
    pooled = float((freedom * variance).sum() / max(freedom.sum(), 1))
    if not n.all() or pooled == 0:
        return {name: 1 / len(arms) for name in arms}
    spread = np.sqrt((freedom * variance + pooled) / n / n)
    t = np.random.default_rng(seed).standard_t(n, (draws, len(arms)))
    return _shares(arms, np.array([arm.mean for arm in arms.values()]) + spread * t, floor)


def _check(arms: Mapping[str, object], floor: float, draws: int) -> None:
    if not arms:
        raise InvalidExperiment("arms", "there is no arm; give at least one")
    if not 0 <= floor <= 1 / len(arms):
        raise InvalidExperiment(
            "floor", f"{floor!r} is not between 0 and {1 / len(arms):g} for {len(arms)} arms"
        )
    at_least("draws", draws, 1)


def _shares(arms: Mapping[str, object], drawn: Numbers, floor: float) -> dict[str, float]:
    """drawn: (draws, arms)."""
    wins = np.bincount(drawn.argmax(1), minlength=len(arms)) / len(drawn)
    return {
        name: floor + (1 - len(arms) * floor) * float(part)
        for name, part in zip(arms, wins, strict=True)
    }

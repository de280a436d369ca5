"""Sums of what users did, which can be added to and merged; one value, or one pair, per user."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltaserve.server.experiments.errors import InvalidExperiment, at_least

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """n users; variance is the unbiased estimate of one user's. Raises InvalidExperiment."""

    n: int
    mean: float
    variance: float

    def __post_init__(self) -> None:
        at_least("n", self.n, 0)
        at_least("variance", self.variance, 0)
        if not np.isfinite(self.mean):
            raise InvalidExperiment("mean", f"{self.mean!r} is not finite")


@dataclass(frozen=True)
class Pairs:
    """n users with x and y each: means, and sums of products of the deviations from them."""

    n: int
    mean_x: float
    mean_y: float
    xx: float
    yy: float
    xy: float

    @classmethod
    def of(cls, x: npt.ArrayLike, y: npt.ArrayLike) -> Pairs:
        """x, y: (n,), n at least 1. Raises InvalidExperiment for others and what is not finite."""
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if a.shape != b.shape or a.ndim != 1 or not a.size:
            raise InvalidExperiment("x, y", f"shapes {a.shape} and {b.shape}; both must be (n,)")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InvalidExperiment("x, y", "a value is not finite")
        u, v = a - a.mean(), b - b.mean()
        return cls(a.size, float(a.mean()), float(b.mean()), *map(float, (u @ u, v @ v, u @ v)))

    def merged(self, other: Pairs) -> Pairs:
        """Of the users of both (Chan, Golub & LeVeque 1979)."""
        n = self.n + other.n
        u, v = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        w = self.n * other.n / n
        return Pairs(
            n,
            self.mean_x + u * other.n / n,
            self.mean_y + v * other.n / n,
            self.xx + other.xx + u * u * w,
            self.yy + other.yy + v * v * w,
            self.xy + other.xy + u * v * w,
        )

    def y(self) -> Sample:
        """y alone."""
        return Sample(self.n, self.mean_y, self.yy / max(self.n - 1, 1))


def ratio(pairs: Pairs) -> Sample:
    """The ratio of the sums of y and x over all users, as time per token, by the delta method: the
    variance is that of (y - r x) / mean(x) (Deng, Knoblich & Lu 2018). Raises InvalidExperiment."""
    if pairs.mean_x == 0:
        raise InvalidExperiment("x", "its mean is 0; a ratio needs a denominator other than 0")
    r = pairs.mean_y / pairs.mean_x
    spread = max(pairs.yy - 2 * r * pairs.xy + r * r * pairs.xx, 0.0)
    return Sample(pairs.n, r, spread / max(pairs.n - 1, 1) / pairs.mean_x**2)

"""A thousand experiments at a time, looked at again and again: what is promised holds, and the
usual method for one look breaks its promise on the same data."""

import numpy as np
import pytest
from scipy import stats

from deltaserve.server.experiments import srm
from deltaserve.server.experiments.cuped import adjust
from deltaserve.server.experiments.rates import bounds, log_evidence
from deltaserve.server.experiments.samples import Pairs
from deltaserve.server.experiments.sequences import difference_radius, radius

RUNS = 1000
LEVEL = 0.05
MOST = LEVEL + 4 * np.sqrt(LEVEL * (1 - LEVEL) / RUNS)  # four standard errors above the level
NAIVE = 0.2  # what a test for one look exceeds when it is looked at so often
RNG = np.random.default_rng(7)


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values: (runs, users). n, mean and variance after each user from the 100th on."""
    n = np.arange(1, values.shape[1] + 1)
    mean = values.cumsum(1) / n
    variance = ((values**2).cumsum(1) - n * mean**2) / np.maximum(n - 1, 1)
    return n[99:], mean[:, 99:], variance[:, 99:]


DRAWS = {
    "skewed": (lambda size: RNG.exponential(1.0, size), 1.0),
    "0 or 1": (lambda size: (RNG.random(size) < 0.2).astype(float), 0.2),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_mean_is_covered_at_all_looks(kind: str) -> None:
    draw, true = DRAWS[kind]
    n, mean, variance = moments(draw((RUNS, 2000)))
    missed = np.abs(mean - true) > radius(n, variance, LEVEL, 1000)
    assert missed.any(1).mean() <= MOST
    naive = np.abs(mean - true) > stats.t.isf(LEVEL / 2, n - 1) * np.sqrt(variance / n)
    assert naive.any(1).mean() > NAIVE
    assert naive[:, -1].mean() <= MOST


def test_a_difference_is_covered_at_all_looks() -> None:
    """Arms of other sizes, variances and means: the effect is 1."""
    n_a, mean_a, variance_a = moments(RNG.exponential(1.0, (RUNS, 2000)))
    n_b, mean_b, variance_b = moments(RNG.normal(2.0, 3.0, (RUNS, 2000)))
    pick = (n_a // 2)[100:] - 100  # the second arm has half as many users
    a = n_a[100:], mean_a[:, 100:], variance_a[:, 100:]
    b = n_b[pick], mean_b[:, pick], variance_b[:, pick]
    off = np.abs(b[1] - a[1] - 1.0)
    missed = off > difference_radius(a[0], a[2], b[0], b[2], LEVEL, 2000)
    assert missed.any(1).mean() <= MOST
    naive = off > stats.norm.isf(LEVEL / 2) * np.sqrt(a[2] / a[0] + b[2] / b[0])
    assert naive.any(1).mean() > NAIVE


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_a_rate_is_covered_at_all_looks(rate: float) -> None:
    n = np.arange(1, 3001)
    s = (RNG.random((RUNS, len(n))) < rate).cumsum(1)
    missed = log_evidence(s, n, rate) >= -np.log(LEVEL)
    assert missed.any(1).mean() <= MOST
    wilson = np.abs(s - n * rate) > stats.norm.isf(LEVEL / 2) * np.sqrt(n * rate * (1 - rate))
    assert wilson.any(1).mean() > NAIVE
    low, high = bounds(s[:, ::100], n[::100], LEVEL)
    assert (((low > rate) | (high < rate)) == missed[:, ::100]).all()


def test_guardrails_raise_few_false_alarms() -> None:
    """Two arms of one error rate, by the bounds that comparisons of rates are made of."""
    n = np.arange(50, 3001, 50)
    a, b = ((RNG.random((RUNS, 3000)) < 0.05).cumsum(1)[:, n - 1] for _ in range(2))
    alarms = bounds(b, n, LEVEL / 2)[0] > bounds(a, n, LEVEL / 2)[1]
    assert alarms.any(1).mean() <= MOST
    pooled = (a + b) / (2 * n)
    naive = b - a > stats.norm.isf(LEVEL) * np.sqrt(2 * n * pooled * (1 - pooled))
    assert naive.any(1).mean() > NAIVE
    worse = (RNG.random((RUNS, 3000)) < 0.12).cumsum(1)[:, n - 1]
    found = bounds(worse, n, LEVEL / 2)[0] > bounds(a, n, LEVEL / 2)[1]
    assert found.any(1).mean() > 0.95


def test_sample_ratios_raise_few_false_alarms() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    users = np.arange(10, 3001, 10)

    def counts(shares: list[float]) -> np.ndarray:
        return RNG.multinomial(10, shares, (RUNS, len(users))).cumsum(1)

    right, wrong = counts([0.5, 0.3, 0.2]), counts([0.42, 0.34, 0.24])
    alarms = srm.log_evidence(right, weights) >= -np.log(LEVEL)
    assert alarms.any(1).mean() <= MOST
    wanted = users[:, None] * weights
    naive = stats.chi2.sf(((right - wanted) ** 2 / wanted).sum(-1), 2) < LEVEL
    assert naive.any(1).mean() > NAIVE
    assert naive[:, -1].mean() <= MOST
    assert (srm.log_evidence(wrong, weights) >= -np.log(0.001)).any(1).mean() > 0.95


def test_cuped_takes_variance_and_adds_no_bias() -> None:
    users, effect, slope = 200, 0.5, 0.8
    before = RNG.normal(10, 1, (RUNS, 2, users))
    y = slope * before + RNG.normal(0, 0.6, before.shape)  # correlation 0.8, variance 1
    y[:, 1] += effect
    during = before + RNG.normal(0, 0.1, before.shape)
    during[:, 1] += effect  # what the experiment has touched

    def differences(x: np.ndarray) -> np.ndarray:
        found = []
        for xs, ys in zip(x, y, strict=True):
            arms = adjust({"a": Pairs.of(xs[0], ys[0]), "b": Pairs.of(xs[1], ys[1])})
            variance = (arms["a"].variance + arms["b"].variance) / users
            found.append((arms["b"].mean - arms["a"].mean, variance))
        return np.array(found)

    plain = y[:, 1].mean(1) - y[:, 0].mean(1)
    means, variances = differences(before).T
    error = means.std() / np.sqrt(RUNS)
    assert abs(means.mean() - effect) < 4 * error
    assert means.var() / plain.var() == pytest.approx(1 - 0.8**2, abs=0.08)
    assert variances.mean() == pytest.approx(means.var(), rel=0.2)
    missed = np.abs(means - effect) > stats.norm.isf(LEVEL / 2) * np.sqrt(variances)
    assert missed.mean() <= MOST
    assert abs(differences(during)[:, 0].mean() - effect) > 20 * error

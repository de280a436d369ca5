"""Closed forms against scipy and against sums done otherwise; refusals."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from deltaserve.server.experiments import power, srm
from deltaserve.server.experiments.bandit import mean_shares, rate_shares
from deltaserve.server.experiments.cuped import adjust
from deltaserve.server.experiments.errors import InvalidExperiment
from deltaserve.server.experiments.guardrails import Loss, Rate, judge
from deltaserve.server.experiments.intervals import (
    UNKNOWN,
    difference_interval,
    mean_interval,
    rate_interval,
)
from deltaserve.server.experiments.rates import log_evidence, rate_sequence
from deltaserve.server.experiments.samples import Pairs, Sample, ratio
from deltaserve.server.experiments.sequences import difference_sequence, mean_sequence, radius

RNG = np.random.default_rng()
SEED = int(RNG.integers(2**32))


def sample(values: np.ndarray) -> Sample:
    return Sample(len(values), float(values.mean()), float(values.var(ddof=1)))


def test_intervals_are_those_of_scipy() -> None:
    a, b = RNG.normal(1, 2, 7), RNG.exponential(3, 19)
    level = RNG.uniform(0.01, 0.4)
    welch = stats.ttest_ind(b, a, equal_var=False).confidence_interval(1 - level)
    assert difference_interval(sample(a), sample(b), level) == pytest.approx(tuple(welch))
    student = stats.ttest_1samp(a, 0).confidence_interval(1 - level)
    assert mean_interval(sample(a), level) == pytest.approx(tuple(student))
    wilson = stats.binomtest(3, 40).proportion_ci(1 - level, method="wilson")
    assert rate_interval(3, 40, level) == pytest.approx(tuple(wilson))


def test_sums_merge() -> None:
    x, y = RNG.normal(5, 1, (2, 50))
    merged = (
        Pairs.of(x[:1], y[:1]).merged(Pairs.of(x[1:20], y[1:20])).merged(Pairs.of(x[20:], y[20:]))
    )
    whole = Pairs.of(x, y)
    for name in ("n", "mean_x", "mean_y", "xx", "yy", "xy"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name))
    assert whole.xy == pytest.approx(np.cov(x, y)[0, 1] * 49)


def test_a_ratio_has_the_variance_of_its_repetitions() -> None:
    """2,000 samples of 500 users, whose x and y hang together."""
    rng = np.random.default_rng(1)
    x = rng.gamma(4, 10, (2000, 500))
    y = x * rng.normal(0.3, 0.1, x.shape) + rng.gamma(1, 2, x.shape)
    true = (y.mean(1) / x.mean(1)).var()
    pairs = [Pairs.of(*both) for both in zip(x[:50], y[:50], strict=True)]
    found = np.mean([ratio(pair).variance / 500 for pair in pairs])
    assert found == pytest.approx(true, rel=0.15)
    constant = np.mean([pair.y().variance / pair.mean_x**2 / 500 for pair in pairs])
    assert constant > 2 * true  # as if x were known


def test_adjustment_is_regression() -> None:
    x, y = RNG.normal(size=(2, 400))
    y += 0.8 * x
    arms = {"a": Pairs.of(x[:150], y[:150]), "b": Pairs.of(x[150:], y[150:])}
    found = adjust(arms)
    design = np.stack([np.arange(400) < 150, np.arange(400) >= 150, x], 1).astype(float)
    (one, two, _), rest, *_ = np.linalg.lstsq(design, y, rcond=None)
    assert found["b"].mean - found["a"].mean == pytest.approx(two - one)
    assert found["a"].variance * 149 + found["b"].variance * 249 == pytest.approx(rest[0])
    constant = adjust({"a": Pairs.of(np.ones(3), y[:3])})["a"]
    assert constant.mean == pytest.approx(y[:3].mean())


def test_evidence_is_the_integral_it_should_be() -> None:
    s, n, p = 3, 17, 0.4
    mixture, _ = integrate.quad(lambda q: q**s * (1 - q) ** (n - s), 0, 1)
    assert log_evidence(s, n, p) == pytest.approx(math.log(mixture / (p**s * (1 - p) ** (n - s))))
    two, _ = integrate.quad(lambda q: q**s * (1 - q) ** (n - s) * stats.beta.pdf(q, 4, 6), 0, 1)
    found = srm.log_evidence([s, n - s], [0.4, 0.6], 10)
    assert found == pytest.approx(math.log(two / (0.4**s * 0.6 ** (n - s))))
    low, high = rate_sequence(s, n, 0.1)
    assert log_evidence(s, n, [low, high]) == pytest.approx(math.log(10))
    assert rate_sequence(0, 0) == (0, 1)
    assert rate_sequence(0, 1000)[0] == 0 and rate_sequence(0, 1000)[1] < 0.02


def test_sample_ratios() -> None:
    counts = {"a": 520, "b": 300, "c": 180}
    weights = {"a": 5, "b": 3, "c": 2, "off": 0}
    expected = stats.chisquare([520, 300, 180], [500, 300, 200]).pvalue
    assert srm.chi_square(counts, weights) == pytest.approx(expected)
    assert srm.chi_square({}, weights) == srm.sequential({}, weights) == 1
    assert srm.sequential({"a": 5000, "b": 4400}, {"a": 1, "b": 1}) < 0.001
    with pytest.raises(InvalidExperiment, match=r"counts\['off'\]: 1 users in an arm without"):
        srm.chi_square({"off": 1}, weights)


def test_a_radius_is_about_least_where_it_is_tuned() -> None:
    found = {tuned: float(radius(2000, 1, tuned_for=tuned)) for tuned in (200, 2000, 20_000)}
    assert min(found, key=found.get) == 2000
    # theorem 2.2 written out for sigma = 1, rho = 0.1, n = 400, level = exp(-2)
    rho2 = (4 + math.log(5)) / 561
    expected = math.sqrt(
        2 * (400 * rho2 + 1) / (400**2 * rho2) * (math.log(400 * rho2 + 1) / 2 + 2)
    )
    assert radius(400, 1, math.exp(-2), 561) == pytest.approx(expected)


def test_nothing_is_said_too_early() -> None:
    few, many, same = Sample(99, 1, 1), Sample(100, 1, 1), Sample(100, 1, 0)
    assert mean_sequence(few) == difference_sequence(few, many) == mean_sequence(same) == UNKNOWN
    assert mean_sequence(many) != UNKNOWN
    assert mean_interval(Sample(1, 1, 0)) == UNKNOWN


def test_power_is_that_of_repetitions() -> None:
    rng = np.random.default_rng(2)
    effect = power.detectable(300, 600, 4.0)
    a, b = rng.normal(0, 2, (2000, 300)), rng.normal(effect, 2, (2000, 600))
    p = stats.ttest_ind(a, b, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.04)
    effect = power.detectable_anytime(300, 600, 4.0, tuned_for=900)
    pairs = zip(a, b - power.detectable(300, 600, 4.0) + effect, strict=True)
    found = [difference_sequence(sample(u), sample(v), tuned_for=900).low > 0 for u, v in pairs]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_thompson_shares_are_the_probabilities_of_being_best() -> None:
    a, b = stats.beta(11, 91), stats.beta(16, 86)
    best, _ = integrate.quad(lambda p: b.pdf(p) * a.cdf(p), 0, 1)
    found = rate_shares({"a": (10, 100), "b": (15, 100)}, SEED, draws=100_000)
    assert found["b"] == pytest.approx(best, abs=0.01)
    assert rate_shares({"a": (10, 100), "b": (15, 100)}, SEED, draws=100_000) == found
    kept = rate_shares({"a": (0, 1000), "b": (900, 1000)}, SEED, floor=0.1)
    assert kept == pytest.approx({"a": 0.1, "b": 0.9})
    arms = {"a": Sample(4000, 1.0, 1.0), "b": Sample(4000, 1.03, 1.0)}
    best = stats.norm.cdf(0.03 / math.sqrt(2 / 4000))
    assert mean_shares(arms, SEED, draws=100_000)["b"] == pytest.approx(best, abs=0.01)
    assert mean_shares({**arms, "new": Sample(0, 0, 0)}, SEED)["new"] == pytest.approx(1 / 3)
    assert mean_shares({**arms, "one": Sample(1, 1, 0)}, SEED)["one"] > 0.3


def test_guardrails_say_why() -> None:
    errors = Rate("errors", 90, 1000, 0.02, control=(10, 1000))
    slow = Rate("p99", 2, 3000, 0.01)
    worse = Loss("score", Sample(2000, 0.5, 1), Sample(2000, 1.0, 1), 0.1)
    found = judge([errors, slow, worse])
    assert found.verdict == "roll back"
    assert [f.verdict for f in found.findings] == ["harm", "safe", "harm"]
    assert "all above the tolerated 0.02" in found.findings[0].why
    assert judge([slow]).verdict == "proceed"
    assert judge([slow, Rate("empty", 1, 20, 0.01)]).verdict == "hold"
    alike = judge([Rate("errors", 30, 1000, 0.0, control=(20, 1000))]).findings[0]
    assert alike.verdict == "unknown" and "on both sides of the tolerated 0" in alike.why
    better = Loss("score", Sample(2000, 1.0, 1), Sample(2000, 0.5, 1), 0.1)
    assert judge([better]).verdict == "proceed"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Sample(3, math.nan, 1), "mean: nan is not finite"),
        (lambda: Sample(3, 0, -1), "variance: -1 is not a finite number of at least 0"),
        (lambda: Pairs.of([1, 2], [1]), "x, y: shapes (2,) and (1,)"),
        (lambda: Pairs.of([1, math.inf], [1, 1]), "x, y: a value is not finite"),
        (lambda: ratio(Pairs.of([0, 0], [1, 1])), "x: its mean is 0"),
        (lambda: mean_interval(Sample(3, 0, 1), 0), "level: 0 is not between 0 and 1"),
        (lambda: mean_sequence(Sample(3, 0, 1), 1.5), "level: 1.5 is not between"),
        (lambda: rate_interval(5, 4), "successes: 5 of 4"),
        (lambda: rate_sequence(5, 4), "successes: 5 of 4"),
        (lambda: adjust({}), "arms: there is no arm"),
        (lambda: rate_shares({"a": (0, 1)}, 0, floor=2), "floor: 2 is not between 0 and 1"),
        (lambda: rate_shares({"a": (2, 1)}, 0), "arms['a']: 2 of 1"),
        (lambda: power.detectable(0, 1, 1), "n_a: 0 is not a finite number of at least 1"),
        (lambda: judge([]), "guardrails: there is none"),
        (lambda: judge([Rate("e", 0, 1, -1)]), "guardrails['e'].most: -1 is not"),
    ],
)
def test_refusals_say_why(call, said: str) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        call()
    assert str(caught.value).startswith(said)

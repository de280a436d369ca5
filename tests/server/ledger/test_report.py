"""Reports, from recorded trials and feedback on them: against the same numbers computed from the
raw records in another way, and a thousand experiments that are looked at again and again."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats
from trials import START, trial

from deltaserve.server.experiments.assignment import assign
from deltaserve.server.ledger.feedback import Feedback
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.ledger.trial import Ended
from deltaserve.server.routes.route import Arm, Bandit, Guardrail, Metric, Route, Standing, State
from deltaserve.server.service.caveats import caveats
from deltaserve.server.service.report import Asked, fill, ratio, see, totals
from deltaserve.v1 import generation_pb2, route_pb2

LEVEL = 0.05
DEFAULT = Asked()


def standing(arms: str = "ab", *rails: Guardrail, **fields: object) -> Standing:
    """Of route r, epoch 1; s is a shadow, the first arm the control."""
    nothing = generation_pb2.SamplingParams(), generation_pb2.StopParams()
    made = {
        name: Arm(name, "", (), float(name != "s"), *nothing, 0.5 * (name == "s"), ())
        for name in arms
    }
    given = {"coverage": 1.0, "layer": None, "ramp": None, "bandit": None, **fields}
    guardrails = {rail.metric: rail for rail in rails}
    route = Route("r", made, arms[0], "r", guardrails=guardrails, given=None, **given)  # type: ignore[arg-type]
    return Standing(route, 1, "e", 0.0, 0.0)


async def reported(
    ledger: Ledger, of: Standing, asked: Asked = DEFAULT
) -> route_pb2.GetReportResponse:
    book, crossed = ledger.book("r", 1), 0
    response = route_pb2.GetReportResponse(arms=totals(of.route, book))
    if book is not None:
        response.sample_ratio.CopyFrom(ratio(book))
        seen = await see(book, asked.points, START + 1e6)
        crossed = seen.crossed
        fill(response, of.route, seen, asked)
    response.warnings.extend(caveats(response, of, book, asked.cuped, crossed))
    return response


def asymptotic(variance: float, n: float, level: float, tuned_for: float) -> float:
    """Half a width, from the paper's theorem 2.2, with its equation for rho."""
    rho2 = (-2 * math.log(level) + math.log(-2 * math.log(level) + 1)) / tuned_for
    inside = 2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / level)
    return math.sqrt(variance * inside)


async def test_the_numbers_are_those_of_the_raw_records() -> None:
    rng = np.random.default_rng()
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    ledger, of = Ledger(), standing("abcs", Guardrail(Metric.SLOW, 0.1, False, seconds=3.0))
    x, y, arms, slow = {}, {}, {}, {}
    for i in range(900):
        user, base = f"u{i}", rng.normal()
        arm = arms[user] = assign("r", weights, user)
        if rng.random() < 0.6:  # seen before the experiment
            early = trial(user, "a", weights={"a": 1.0, "b": 0.0})
            ledger.record(early)
            x[user] = base + rng.normal() / 2
            await ledger.feedback(Feedback("t", START, early.request_id, reward=x[user]))
        times = rng.exponential(1.5, rng.integers(1, 4))
        said = rng.normal(base + (arm == "b"), 0.5, len(times))
        for seconds, reward in zip(times, said, strict=True):
            t = trial(user, arm, weights=weights, seconds=float(seconds))
            ledger.record(t)
            ledger.record(replace(t, arm="s", shadow=True, ended=Ended.ERROR))
            await ledger.feedback(Feedback("t", START, t.request_id, reward=float(reward)))
        slow[user], y[user] = times.max() > 3, said.mean()
    values = {a: np.array([y[u] for u in y if arms[u] == a]) for a in weights}
    found = await reported(ledger, of, Asked(tuned_for=200))
    assert [a.arm for a in found.arms] == ["a", "b", "c", "s"]
    for report in found.arms[:3]:
        mine, control = values[report.arm], values["a"]
        assert report.users == report.rewarded_users == len(mine)
        half = asymptotic(mine.var(ddof=1), len(mine), LEVEL, 200)
        got = report.reward
        assert (got.value, got.low) == pytest.approx((mine.mean(), mine.mean() - half))
        lates = sum(slow[u] for u in arms if arms[u] == report.arm)
        share = report.shares["slow"]
        assert share.value == pytest.approx(lates / len(mine))
        for edge in (share.low, share.high):  # where the mixture's likelihood is 20 times as large
            mixture = special.betaln(lates + 1, len(mine) - lates + 1)
            under = stats.binom.logpmf(lates, len(mine), edge) - math.log(
                math.comb(len(mine), lates)
            )
            assert mixture - under == pytest.approx(-math.log(LEVEL), abs=1e-6)
        if report.arm == "a":
            assert not report.HasField("difference")
            continue
        welch = stats.ttest_ind(mine, control, equal_var=False).confidence_interval(1 - LEVEL / 2)
        one = report.difference_one_look
        assert (one.low, one.high) == pytest.approx((welch.low, welch.high))
        n, m = len(mine), len(control)
        variance = (n + m) * (mine.var(ddof=1) / n + control.var(ddof=1) / m)
        half = asymptotic(variance, n + m, LEVEL / 2, 400)
        diff = mine.mean() - control.mean()
        got = report.difference
        assert (got.value, got.high) == pytest.approx((diff, diff + half))
        pooled = ((n - 1) * mine.var(ddof=1) + (m - 1) * control.var(ddof=1)) / (n + m - 2)
        half = asymptotic(pooled * (n + m) * (1 / n + 1 / m), n + m, LEVEL / 2, 400)
        power = stats.norm.ppf(0.8) * math.sqrt(pooled * (1 / n + 1 / m))
        assert report.detectable == pytest.approx(half + power)
    shadow = found.arms[3]
    assert shadow.shadow and shadow.users == 900 and shadow.shares["error"].value == 1
    counts = [len(v) for v in values.values()]
    expected = [900 * w for w in weights.values()]
    assert found.sample_ratio.p_value == pytest.approx(stats.chisquare(counts, expected).pvalue)
    assert dict(found.sample_ratio.expected) == pytest.approx(
        dict(zip(weights, expected, strict=True))
    )
    assert not found.warnings

    # CUPED is the regression of y on the arms and x, those without x having the mean
    cuped = await reported(ledger, of, Asked(cuped=True, tuned_for=200))
    mean = np.mean([x[u] for u in x])
    covariate = np.array([x.get(u, mean) for u in y])
    dummies = np.array([[arms[u] == a for a in weights] for u in y], float)
    outcome = np.array(list(y.values()))
    theta = np.linalg.lstsq(np.c_[dummies, covariate], outcome, rcond=None)[0][-1]
    adjusted = outcome - theta * (covariate - covariate.mean())
    for i, report in enumerate(cuped.arms[:3]):
        mine = adjusted[dummies[:, i] == 1]
        half = asymptotic(mine.var(ddof=1), len(mine), LEVEL, 200)
        assert report.reward.value == pytest.approx(mine.mean())
        assert report.reward.high == pytest.approx(mine.mean() + half)
        plain = values[report.arm].var(ddof=1)
        assert report.variance_reduction == pytest.approx(1 - mine.var(ddof=1) / plain)
        assert 0.2 < report.variance_reduction < 0.8


async def test_a_thousand_experiments_under_continuous_peeking() -> None:
    """Half of them with an effect of 0.5, on skewed rewards: each is read after every 20 users, by
    the history of the report. Intervals of differences and of means miss in 5 % or less (four
    standard errors allowed) and find the effect; Welch's, at the same looks, miss more often."""
    rng, runs, users, of = np.random.default_rng(5), 1000, 320, standing()
    missed, mean_missed, naive, found, alarms = [], [], [], [], []
    for run in range(runs):
        effect = 0.5 * (run % 2)
        ledger = Ledger()
        arms = rng.integers(0, 2, users)
        rewards = rng.exponential(1.0, users) + effect * arms
        for i, (arm, reward) in enumerate(zip(arms.tolist(), rewards.tolist(), strict=True)):
            t = trial(f"u{i}", "ab"[arm], at=START + 3 * i)
            ledger.record(t)
            await ledger.feedback(Feedback("t", t.at, t.request_id, reward=reward))
        report = await reported(ledger, of, Asked(points=200, tuned_for=130))
        b = [p for p in report.history if p.arm == "b" and math.isfinite(p.difference.low)]
        assert len(report.history) == 2 * (users / 20 + 1)
        missed.append(any(not p.difference.low <= effect <= p.difference.high for p in b))
        mean_missed.append(any(not p.reward.low <= 1 + effect <= p.reward.high for p in b))
        found.append(any(p.difference.low > 0 for p in b))
        alarms.append(report.sample_ratio.anytime_p_value <= LEVEL)
        looks = [round((p.time.seconds - START) / 3) + 1 for p in b[:-1]] + [users]
        naive.append(any(_welch_misses(arms[:n], rewards[:n], effect) for n in looks))
    most = LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / runs)
    for kind in (missed, mean_missed, alarms):
        assert np.mean(kind) <= most
    assert np.mean(naive) > most
    assert np.mean(found[0::2]) <= LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / runs * 2)
    assert np.mean(found[1::2]) > 0.7


def _welch_misses(arms: np.ndarray, rewards: np.ndarray, effect: float) -> bool:
    a, b = rewards[arms == 0], rewards[arms == 1]
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return bool(abs(b.mean() - a.mean() - effect) > stats.norm.isf(LEVEL / 2) * error)


async def test_the_history_says_what_reports_said() -> None:
    ledger, of = Ledger(), standing()
    said = []
    for i in range(260):
        t = trial(f"u{i}", "ab"[i % 2], at=START + 61 * i)
        ledger.record(t)
        await ledger.feedback(Feedback("t", t.at, t.request_id, reward=(i * 7919 % 101) / 10))
        report = await reported(ledger, of)
        said.append((report.arms[1].difference, report.arms[1].reward))
    drawn = await reported(ledger, of, Asked(points=200))
    history = [p for p in drawn.history if p.arm == "b"]
    assert len(history) == 200 and history[-1].rewarded_users == 130
    assert math.isinf(history[0].difference.low) and math.isfinite(history[-1].difference.low)
    by_time = {round(START + 61 * i): one for i, one in enumerate(said)}
    for point in history[:-1]:
        assert (point.difference, point.reward) == by_time[point.time.seconds]


async def test_warnings() -> None:
    of = standing()

    async def warned(ledger: Ledger, of: Standing = of, asked: Asked = DEFAULT) -> str:
        return "\n".join((await reported(ledger, of, asked)).warnings)

    ledger = Ledger()
    assert await warned(ledger) == "nothing was recorded since counting began"
    ledger.record(trial("u", "a", weights={"a": 1.0}))
    assert "no user was assigned at random" in await warned(ledger)
    ledger.record(trial("u", "b"))
    text = await warned(ledger, asked=Asked(cuped=True))
    assert "'b' has 0 users with a reward" in text and "no rewards were adjusted" in text
    assert "no user was" not in text and "changed" not in text and "outside" not in text
    ledger.record(trial("u", "a"))
    ledger.record(trial("", "a", weights={}))
    ledger.record(trial("v", "a", weights={"a": 0.9, "b": 0.1}))
    text = await warned(ledger)
    assert "1 users were answered by more than one arm" in text and "weights changed while" in text
    assert "1 of 5 requests had no user" in text and "mismatch" not in text
    for i in range(60):
        ledger.record(trial(f"w{i}", "a"))
    report = await reported(ledger, of)
    assert report.sample_ratio.mismatch and "sample_ratio" in report.warnings[0]
    bandit = standing(bandit=Bandit(0.05, 60.0, 20))
    assert "follow the rewards" in await warned(ledger, bandit)
    rolled = replace(of, state=State.ROLLED_BACK, reason="it harms")
    assert "rolled back: it harms" in await warned(ledger, rolled)

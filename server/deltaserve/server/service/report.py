"""What a route's book says of its arms, as a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.server.experiments.cuped import adjust
from deltaserve.server.experiments.intervals import Interval, difference_interval
from deltaserve.server.experiments.power import detectable_anytime
from deltaserve.server.experiments.rates import bounds
from deltaserve.server.experiments.samples import Pairs, Sample
from deltaserve.server.experiments.sequences import difference_sequence, mean_sequence
from deltaserve.server.ledger.book import Book, Totals, drawn, met, sample, values
from deltaserve.server.ledger.histogram import Histogram
from deltaserve.server.ledger.looks import Look
from deltaserve.server.ledger.users import Met, Rows
from deltaserve.server.routes.route import Metric, Route
from deltaserve.v1 import route_pb2 as pb

MISMATCH = 0.001
"""The customary alarm for sample ratios."""

ALWAYS = ("error", "refusal", "empty", "negative_feedback")
"""Shares that need no limit."""


@dataclass(frozen=True, slots=True)
class Asked:
    """As in GetReportRequest; tuned_for: users per arm."""

    level: float = 0.05
    cuped: bool = False
    points: int = 0
    tuned_for: int = 5000


@dataclass(frozen=True, slots=True)
class Seen:
    """What a report is made of, which does not change any more. rows: of all users. random: some
    were assigned at random, so the others do not count. crossed: users that several arms answered.
    looks: for the history, the last of now."""

    arms: Sequence[str]
    rows: Rows
    random: bool
    crossed: int
    looks: Sequence[Look]

    def of(self, arm: str) -> Rows:
        """The users of an arm that count."""
        if arm not in self.arms:
            return self.rows[:0]
        found: Rows = self.rows[self.rows["arm"] == self.arms.index(arm)]
        return drawn(found) if self.random else found


async def see(book: Book, points: int, now: float) -> Seen:
    """In the event loop of the book. now: `time.time()`."""
    looks = book.looks.chosen(points, Look(now, await book.samples())) if points else []
    random, crossed = book.randomized(), 0
    rows = np.empty_like(book.users.rows)
    filled = 0
    async for page in book.users.pages():
        rows[filled : filled + len(page)] = page[: len(rows) - filled]
        filled += len(page)
        crossed += int(np.count_nonzero(page["met"] & Met.CROSSED))
    return Seen(list(book.arms), rows, random, crossed, looks)


def totals(route: Route, book: Book | None) -> list[pb.ArmReport]:
    """What does not depend on users, of each arm, the control first."""
    found = dict(zip(book.arms, book.totals, strict=True)) if book is not None else {}
    ordered = sorted(route.arms.values(), key=lambda arm: arm.name != route.control)
    reports = []
    for arm in ordered:
        t = found.get(arm.name, Totals())
        reports.append(
            pb.ArmReport(
                arm=arm.name,
                shadow=bool(arm.shadow),
                requests=t.requests,
                anonymous_requests=t.anonymous,
                first_token_seconds=_quantiles(t.first_token),
                seconds=_quantiles(t.seconds),
                prompt_tokens=t.prompt_tokens,
                completion_tokens=t.completion_tokens,
            )
        )
    return reports


def ratio(book: Book) -> pb.SampleRatio:
    """Whether the arms have the users that the weights said when each came."""
    anytime = book.balance.anytime_p_value
    return pb.SampleRatio(
        mismatch=anytime < MISMATCH,
        p_value=book.balance.p_value(),
        anytime_p_value=anytime,
        expected=book.balance.expected,
    )


def fill(response: pb.GetReportResponse, route: Route, seen: Seen, asked: Asked) -> None:
    """Put in what depends on users. May take a while: not for an event loop. Differences share the
    level (Bonferroni): the chance of a wrong one among them is at most that."""
    rows = {arm.arm: seen.of(arm.arm) for arm in response.arms}
    answering = [arm.arm for arm in response.arms if not arm.shadow]
    plain = {arm: sample(values(rows[arm])) for arm in answering}
    samples = plain
    if asked.cuped:
        samples = adjusted({arm: rows[arm] for arm in answering}) or plain
    control, each = route.control, asked.level / max(len(answering) - 1, 1)
    for arm in response.arms:
        arm.users = len(rows[arm.arm])
        if arm.shadow:
            continue
        mine, other = samples[arm.arm], samples[control]
        arm.rewarded_users = mine.n
        arm.reward.CopyFrom(_mean(mine, asked))
        if samples is not plain and plain[arm.arm].variance:
            arm.variance_reduction = 1 - mine.variance / plain[arm.arm].variance
        if arm.arm == control:
            continue
        arm.difference.CopyFrom(_difference(other, mine, each, asked))
        found = difference_interval(other, mine, each)
        arm.difference_one_look.CopyFrom(_estimate(mine.mean - other.mean, found))
        arm.detectable = _detectable(other, mine, each, asked)
    _shares(response, route, rows, asked.level)
    for look in seen.looks:
        of = {arm: look.arms.get(arm, Sample(0, 0.0, 0.0)) for arm in answering}
        for name, then in of.items():
            point = response.history.add(time=stamp(look.at), arm=name, rewarded_users=then.n)
            point.reward.CopyFrom(_mean(then, asked))
            if name != control:
                point.difference.CopyFrom(_difference(of[control], then, each, asked))


def adjusted(arms: Mapping[str, Rows]) -> dict[str, Sample] | None:
    """CUPED by each user's mean reward from before it was assigned at random; those without one get
    the mean of those with one. None if nobody has one."""
    rewarded = {arm: rows[rows["n"] > 0] for arm, rows in arms.items()}
    known = [rows[rows["before_n"] > 0] for rows in rewarded.values()]
    before = np.concatenate([rows["before_sum"] / rows["before_n"] for rows in known])
    if not len(before):
        return None
    pairs = {}
    for arm, rows in rewarded.items():
        if len(rows):
            own = rows["before_sum"] / np.maximum(rows["before_n"], 1)
            x = np.where(rows["before_n"] > 0, own, before.mean())
            pairs[arm] = Pairs.of(x, values(rows))
    return {arm: Sample(0, 0.0, 0.0) for arm in arms} | adjust(pairs)


def stamp(seconds: float) -> Timestamp:
    """Of `time.time()`."""
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def _mean(mine: Sample, asked: Asked) -> pb.Estimate:
    return _estimate(mine.mean, mean_sequence(mine, asked.level, asked.tuned_for))


def _difference(control: Sample, mine: Sample, level: float, asked: Asked) -> pb.Estimate:
    interval = difference_sequence(control, mine, level, 2 * asked.tuned_for)
    return _estimate(mine.mean - control.mean, interval)


def _detectable(control: Sample, mine: Sample, level: float, asked: Asked) -> float:
    if min(control.n, mine.n) < 2:
        return float("inf")
    freedom = control.n + mine.n - 2
    pooled = ((control.n - 1) * control.variance + (mine.n - 1) * mine.variance) / freedom
    users = control.n, mine.n
    return detectable_anytime(*users, pooled, level, tuned_for=2 * asked.tuned_for)


def _shares(
    response: pb.GetReportResponse, route: Route, rows: Mapping[str, Rows], level: float
) -> None:
    limits = {
        metric.value: float(rail.tokens if metric is Metric.LONG else rail.seconds)
        for metric, rail in route.guardrails.items()
        if metric in (Metric.SLOW, Metric.SLOW_FIRST_TOKEN, Metric.LONG)
    }
    names = [*ALWAYS, *limits]
    happened = [met(rows[arm.arm], limits) for arm in response.arms]
    counts = np.array([[found[name] for name in names] for found in happened], np.float64)
    users = np.array([len(rows[arm.arm]) for arm in response.arms], np.float64)[:, None]
    low, high = bounds(counts, users, level)
    for i, arm in enumerate(response.arms):
        for j, name in enumerate(names):
            rate = counts[i, j] / max(users[i, 0], 1)
            arm.shares[name].CopyFrom(_estimate(rate, Interval(low[i, j], high[i, j])))


def _estimate(value: float, interval: Interval) -> pb.Estimate:
    return pb.Estimate(value=value, low=interval.low, high=interval.high)


def _quantiles(of: Histogram) -> pb.Quantiles:
    p50, p90, p99 = (of.quantile(q) for q in (0.5, 0.9, 0.99))
    return pb.Quantiles(p50=p50, p90=p90, p99=p99, mean=of.mean())

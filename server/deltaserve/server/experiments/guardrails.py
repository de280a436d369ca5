"""Whether an arm does harm: tests that may be looked at continuously and say why they decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltaserve.server.experiments.errors import InvalidExperiment, at_least
from deltaserve.server.experiments.intervals import Interval
from deltaserve.server.experiments.rates import rate_sequence
from deltaserve.server.experiments.samples import Sample
from deltaserve.server.experiments.sequences import START, difference_sequence


@dataclass(frozen=True)
class Rate:
    """Of `n` users (or other independent units), `bad` had what the guardrail counts: an error, a
    refusal, an empty or over-long answer, a thumb down, an answer slower than a limit.

    A quantile is a rate: the p99 is above L if more than 0.01 are slower than L."""

    name: str
    bad: int
    n: int
    most: float
    """The most that is tolerated: of the rate itself, or of its excess over the control's."""
    control: tuple[int, int] | None = None
    """bad and n of the control; None to hold the rate itself to `most`."""


@dataclass(frozen=True)
class Loss:
    """Real values of which more is better, as scores: how much less the treatment's mean is than
    the control's, of which `most` is tolerated."""

    name: str
    treatment: Sample
    control: Sample
    most: float


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: Literal["harm", "safe", "unknown"]
    why: str


@dataclass(frozen=True)
class Decision:
    """`roll back` if a guardrail finds harm, `proceed` if all are safe, else `hold`."""

    verdict: Literal["roll back", "proceed", "hold"]
    findings: tuple[Finding, ...]


def judge(
    guardrails: Sequence[Rate | Loss],
    level: float = 0.05,
    tuned_for: int = 5000,
    start: int = START,
) -> Decision:
    """The probability that any guardrail ever finds harm where there is none, or safety where there
    is harm, is `level` at most, however often one looks: each guardrail has level / guardrails
    (Bonferroni), a comparison of rates half of it per arm. Rates are exact, losses asymptotic from
    `start` users per arm on. Raises InvalidExperiment."""
    if not guardrails:
        raise InvalidExperiment("guardrails", "there is none; give at least one")
    each = level / len(guardrails)
    findings = []
    for guardrail in guardrails:
        at_least(f"guardrails[{guardrail.name!r}].most", guardrail.most, 0)
        if isinstance(guardrail, Rate):
            interval = _excess(guardrail, each)
            what = "rate" if guardrail.control is None else "excess over the control's rate"
        else:
            interval = difference_sequence(
                guardrail.treatment, guardrail.control, each, tuned_for, start
            )
            what = "loss against the control's mean"
        findings.append(_find(guardrail.name, what, interval, guardrail.most, each))
    verdicts = {finding.verdict for finding in findings}
    if "harm" in verdicts:
        return Decision("roll back", tuple(findings))
    return Decision("hold" if "unknown" in verdicts else "proceed", tuple(findings))


def _excess(guardrail: Rate, level: float) -> Interval:
    if guardrail.control is None:
        return rate_sequence(guardrail.bad, guardrail.n, level)
    one = rate_sequence(guardrail.bad, guardrail.n, level / 2)
    two = rate_sequence(*guardrail.control, level / 2)
    return Interval(one.low - two.high, one.high - two.low)


def _find(name: str, what: str, interval: Interval, most: float, level: float) -> Finding:
    said = f"{what} in [{interval.low:.4g}, {interval.high:.4g}] at level {level:g}, "
    if interval.low > most:
        return Finding(name, "harm", said + f"all above the tolerated {most:g}")
    if interval.high <= most:
        return Finding(name, "safe", said + f"within the tolerated {most:g}")
    return Finding(name, "unknown", said + f"on both sides of the tolerated {most:g}")

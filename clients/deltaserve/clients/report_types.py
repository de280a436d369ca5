"""What a report on a route holds. Durations are seconds, times `time.time()` seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaserve.clients.route_types import Route


@dataclass(frozen=True, slots=True)
class FeedbackTarget:
    """What feedback counts for."""

    route: str
    arm: str


@dataclass(frozen=True, slots=True)
class Erased:
    """What was known of a user and is not any more. counts: one for each route and each change of
    what its arms are; requests that were kept one by one; pieces of feedback."""

    counts: int
    requests: int
    feedback: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval, from -inf to inf while it is not known at all."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of durations of answers; within 1 %."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm. difference: from the control, which has none, at all looks together;
    difference_one_look: at one. detectable: least difference that would probably be found with the
    users there are. shares: of users who met with an error and so on. variance_reduction: by CUPED,
    None without."""

    arm: str
    shadow: bool
    requests: int
    anonymous_requests: int
    users: int
    rewarded_users: int
    reward: Estimate | None
    difference: Estimate | None
    difference_one_look: Estimate | None
    detectable: float
    shares: Mapping[str, Estimate]
    first_token_seconds: Quantiles
    seconds: Quantiles
    prompt_tokens: int
    completion_tokens: int
    variance_reduction: float | None = None


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """mismatch: the arms do not have the users they should have, and differences mean nothing.
    p_value: at one look; anytime_p_value: at all of them. expected: users by arm."""

    mismatch: bool = False
    p_value: float = 1.0
    anytime_p_value: float = 1.0
    expected: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportPoint:
    """An arm's estimates as they were at one time."""

    time: float
    arm: str
    rewarded_users: int
    reward: Estimate
    difference: Estimate | None


@dataclass(frozen=True, slots=True)
class Report:
    """The arms of a route compared; `warnings` are to be read first."""

    route: Route
    start_time: float
    arms: tuple[ArmReport, ...]
    sample_ratio: SampleRatio
    history: tuple[ReportPoint, ...]
    warnings: tuple[str, ...]

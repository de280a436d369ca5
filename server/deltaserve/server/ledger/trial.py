"""Trial: one request that a route gave to an arm, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Ended(StrEnum):
    """How a trial ended."""

    ANSWERED = "answered"
    ERROR = "error"  # through no fault of the client's
    REFUSED = "refused"  # what was asked for is not possible
    CANCELLED = "cancelled"  # the client went away


@dataclass(frozen=True, slots=True)
class Trial:
    """epoch: of the route; it changes with what an arm is, and outcomes are counted within one.
    user: the key that the assignment was made by, empty for an anonymous request, which is counted
    in durations and tokens alone. shadow: the answer was not returned. at: `time.time()`, of its
    end. first_token, seconds: from arrival, 0 where there was none. refusal: the text looks like
    one. slow, slow_first_token, long: more than the route's guardrail of that metric tolerates;
    False without such a guardrail. longest: tokens of the longest of its choices. weights: of the
    arms that could have been its, as they were at the assignment, adding up to 1; empty where
    `user` is."""

    request_id: str
    route: str
    epoch: int
    arm: str
    tenant: str
    user: str
    shadow: bool
    at: float
    ended: Ended
    first_token: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    empty: bool = False
    refusal: bool = False
    slow: bool = False
    slow_first_token: bool = False
    long: bool = False
    longest: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)

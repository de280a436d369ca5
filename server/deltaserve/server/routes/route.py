"""Route: a name for several arms, as it was put; Standing: what it does now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import regex
from google.protobuf.message import Message

from deltaserve.server.experiments.assignment import shares
from deltaserve.server.experiments.layers import Slice
from deltaserve.server.experiments.ramp import Point, weights_at
from deltaserve.v1 import generation_pb2
from deltaserve.v1 import route_pb2 as pb

WAITS = "the ramp waits: "
"""Begins the reason of what will go on by itself."""


class Metric(StrEnum):
    """What a guardrail looks at; the names of `Tally.met`."""

    ERROR = "error"
    SLOW = "slow"
    SLOW_FIRST_TOKEN = "slow_first_token"
    REFUSAL = "refusal"
    EMPTY = "empty"
    LONG = "long"
    NEGATIVE_FEEDBACK = "negative_feedback"
    REWARD = "reward"


class State(StrEnum):
    """What a route does."""

    ACTIVE = "active"
    HELD = "held"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"  # it could not be brought back at the start


@dataclass(frozen=True, slots=True)
class Arm:
    """model: ``name@digest``, or empty for the base or where there are adapters, each of which is
    called so. sampling, stop: what they set replaces a request's. shadow: share of the requests
    that it runs beside the answer; its weight is 0 then. digests: of its adapters."""

    name: str
    model: str
    adapters: tuple[generation_pb2.WeightedAdapter, ...]
    weight: float
    sampling: generation_pb2.SamplingParams
    stop: generation_pb2.StopParams
    shadow: float
    digests: tuple[str, ...]

    @property
    def called(self) -> list[str]:
        """Its adapters, each as ``name@digest``."""
        return [self.model] if self.model else [adapter.name for adapter in self.adapters]


@dataclass(frozen=True, slots=True)
class Guardrail:
    """As in route.proto. refusals: patterns; none for the default ones."""

    metric: Metric
    tolerated: float
    versus_control: bool
    seconds: float = 0.0
    tokens: int = 0
    refusals: tuple[regex.Pattern[str], ...] = ()


@dataclass(frozen=True, slots=True)
class Ramp:
    """points: seconds since the ramp began."""

    points: tuple[Point, ...]
    shape: Literal["step", "linear"]
    gated: bool


@dataclass(frozen=True, slots=True)
class Bandit:
    """interval: seconds."""

    floor: float
    interval: float
    least_users: int


@dataclass(frozen=True, slots=True)
class Route:
    """given: the message that it was made from, with defaults filled in and digests; not to be
    changed."""

    name: str
    arms: Mapping[str, Arm]
    control: str
    salt: str
    coverage: float
    layer: tuple[str, Slice] | None
    ramp: Ramp | None
    guardrails: Mapping[Metric, Guardrail]
    bandit: Bandit | None
    given: pb.Route

    @property
    def live(self) -> dict[str, float]:
        """The weights of the arms that answer, as they were put."""
        return {arm.name: arm.weight for arm in self.arms.values() if not arm.shadow}

    @property
    def counted(self) -> tuple[object, ...]:
        """What outcomes depend on: where it is another, they are counted anew."""
        arms = [
            (a.name, a.model, a.shadow > 0, *map(_bytes, (*a.adapters, a.sampling, a.stop)))
            for a in self.arms.values()
        ]
        refusal = self.guardrails.get(Metric.REFUSAL)
        patterns = refusal.refusals if refusal is not None else ()
        return self.salt, frozenset(arms), tuple(pattern.pattern for pattern in patterns)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


@dataclass(frozen=True, slots=True)
class Lost:
    """A route that could not be brought back, and why."""

    tenant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """A route and what has become of it. epoch: milliseconds of `time.time()` when counting began;
    never the same twice for one name. began: of its ramp, moved on by what it stood still; both
    times and `changed` are `time.time()`. weights: where they are not those that were put, the
    bandit's or those that are held. bandit_at: when they were drawn last. owner: who put it.
    tenant: whose it is; one of none is everybody's to use."""

    route: Route
    epoch: int
    etag: str
    began: float
    changed: float
    owner: str = ""
    tenant: str = ""
    state: State = State.ACTIVE
    reason: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    bandit_at: float = 0.0

    @property
    def waits(self) -> bool:
        """Held by a gated ramp, until its guardrails are known to be safe."""
        return self.state is State.HELD and self.reason.startswith(WAITS)

    def shares(self, now: float) -> dict[str, float]:
        """Of the arms that answer, at `time.time()` now; they add up to 1."""
        route = self.route
        if self.state is State.ROLLED_BACK:
            return {arm: float(arm == route.control) for arm in route.live}
        if self.weights:
            return dict(self.weights)
        if route.ramp is not None:
            return weights_at(route.ramp.points, now - self.began, route.ramp.shape)
        return shares(route.live)

"""Routes, as they are put and as they come back. Durations are seconds, times `time.time()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Required, TypedDict

from deltaserve.clients.requests import Weighted


class RouteArm(TypedDict, total=False):
    """One arm; `route.proto` explains each field. sampling, stop: the names of `SamplingParams` and
    `StopParams`."""

    name: Required[str]
    model: str
    adapters: Sequence[Weighted]
    weight: float
    sampling: Mapping[str, Any]
    stop: Mapping[str, Any]
    shadow: float


class Layer(TypedDict):
    """A route's part of the users of a layer: from `start` to below `end`, in [0, 1]."""

    name: str
    start: float
    end: float


class RampPoint(TypedDict):
    """after: seconds since the route was put with this ramp."""

    after: float
    weights: Mapping[str, float]


class Ramp(TypedDict, total=False):
    """Weights that change with time."""

    points: Required[Sequence[RampPoint]]
    shape: Literal["step", "linear"]
    gated: bool


Metric = Literal[
    "error",
    "slow",
    "slow_first_token",
    "refusal",
    "empty",
    "long",
    "negative_feedback",
    "reward",
]


class Guardrail(TypedDict, total=False):
    """A bound on harm."""

    metric: Required[Metric]
    tolerated: Required[float]
    versus_control: bool
    seconds: float
    tokens: int
    refusals: Sequence[str]


class Bandit(TypedDict, total=False):
    """Weights that follow rewards. interval: seconds."""

    floor: float
    interval: float
    least_users: int


class RouteOptions(TypedDict, total=False):
    """What else a route has; `route.proto` explains each field."""

    control: str
    salt: str
    coverage: float
    layer: Layer
    ramp: Ramp
    guardrails: Sequence[Guardrail]
    bandit: Bandit
    etag: str


@dataclass(frozen=True, slots=True)
class Arm:
    """model: an adapter, empty for the base or where there are adapters. digests: of its
    adapters, in their order."""

    name: str
    model: str = ""
    adapters: tuple[Mapping[str, Any], ...] = ()
    weight: float = 0.0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: Mapping[str, Any] = field(default_factory=dict)
    shadow: float = 0.0
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """state: ``active``, ``held``, ``rolled_back`` or ``failed``, with the reason. weights: that
    hold now, adding up to 1. etag: for `put_route`, to change just this."""

    name: str
    arms: tuple[Arm, ...]
    control: str
    salt: str
    coverage: float
    layer: Mapping[str, Any] | None
    ramp: Mapping[str, Any] | None
    guardrails: tuple[Mapping[str, Any], ...]
    bandit: Mapping[str, Any] | None
    etag: str
    state: str
    reason: str
    weights: Mapping[str, float]
    start_time: float
    update_time: float

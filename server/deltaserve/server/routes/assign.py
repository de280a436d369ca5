"""Which arm a request gets."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from deltaserve.server.experiments.assignment import assign, covered
from deltaserve.server.experiments.layers import route_of
from deltaserve.server.routes.route import Arm, Route, Standing, State


class Assignment(StrEnum):
    """How a request came to its arm; the names of route.proto."""

    STICKY = "sticky"
    RANDOM = "random"
    OUTSIDE = "outside"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Placement:
    """A request's arm, and the standing of the route by which it got it. weights: that it was
    assigned by, if it was by its user's key."""

    standing: Standing
    arm: Arm
    assignment: Assignment
    weights: Mapping[str, float]


def key_of(tenant: str, user: str) -> str:
    """What users are told apart by: tenants share none. Neither text has a NUL."""
    return f"{tenant}\0{user}" if tenant else user


def place(standing: Standing, tenant: str, user: str, now: float) -> Placement:
    """The arm of a request at `time.time()` now. Without a user, one is drawn for it."""
    route = standing.route
    if standing.state is State.ROLLED_BACK:
        return _control(standing, Assignment.ROLLED_BACK)
    key = key_of(tenant, user) if user else secrets.token_hex(16)
    if not _takes_part(route, key):
        return _control(standing, Assignment.OUTSIDE)
    weights = standing.shares(now)
    arm = route.arms[assign(route.salt, weights, key)]
    if not user:
        return Placement(standing, arm, Assignment.RANDOM, {})
    return Placement(standing, arm, Assignment.STICKY, weights)


def _takes_part(route: Route, key: str) -> bool:
    if route.layer is not None:
        layer, part = route.layer
        if route_of(layer, [part], key) is None:
            return False
    return covered(route.salt, route.coverage, key)


def _control(standing: Standing, assignment: Assignment) -> Placement:
    return Placement(standing, standing.route.arms[standing.route.control], assignment, {})

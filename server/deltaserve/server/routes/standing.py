"""How a route's standing changes."""

from __future__ import annotations

import secrets
from dataclasses import replace

from deltaserve.server.identity.caller import Caller
from deltaserve.server.routes.route import Lost, Route, Standing, State


def made(route: Route, before: Standing | Lost | None, caller: Caller, now: float) -> Standing:
    """What becomes of a route that is put at `time.time()` now, in place of what is there."""
    tenant = "" if caller.operator else caller.tenant
    if before is not None:
        tenant = before.tenant
    new = Standing(route, int(now * 1000), etag(), now, now, caller.name, tenant)
    if not isinstance(before, Standing):
        return new
    ended = before.state is not State.ACTIVE and not before.waits
    if ended or route.counted != before.route.counted:
        return replace(new, epoch=max(new.epoch, before.epoch + 1))
    new = replace(new, epoch=before.epoch)
    if route.given.ramp == before.route.given.ramp:
        new = replace(new, began=resumed(before, now).began)
    if route.bandit is not None and before.route.bandit is not None:
        new = replace(new, weights=before.weights, bandit_at=before.bandit_at)
    return new


def resumed(standing: Standing, now: float) -> Standing:
    """Active, its ramp's clock moved on by the time that it stood still."""
    if standing.state is not State.HELD:
        return standing
    began = standing.began + now - standing.changed
    weights = standing.weights if standing.route.bandit is not None else {}
    return replace(standing, state=State.ACTIVE, reason="", began=began, weights=weights)


def stamped(standing: Standing, now: float) -> Standing:
    """Changed now."""
    return replace(standing, etag=etag(), changed=now)


def etag() -> str:
    """Of one state of one route."""
    return secrets.token_hex(8)

"""Shelf: routes as the state's database keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from deltaserve.server.experiments.assignment import check_weights
from deltaserve.server.routes.check import check
from deltaserve.server.routes.route import Lost, Standing, State
from deltaserve.server.state import routes
from deltaserve.server.state.records import Entry
from deltaserve.server.state.routes import RouteRecord
from deltaserve.server.state.store import Store, note
from deltaserve.v1 import route_pb2 as pb


class Shelf:
    """What a method has returned from is durable; every one raises StateUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, standing: Standing, entry: Entry) -> None:
        """In place of the one of that name."""
        await routes.put(self._store, record(standing), entry)

    async def remove(self, name: str, entry: Entry) -> None:
        """One that may be there."""
        await routes.remove(self._store, name, entry)

    async def note(self, entry: Entry) -> None:
        """Of something that changed nothing."""
        async with self._store.transaction() as connection:
            await note(connection, entry)

    async def all(self, base: tuple[str, ...]) -> tuple[list[Standing], dict[str, Lost]]:
        """Those that can be read, and why the others cannot, by name."""
        found: list[Standing] = []
        failed: dict[str, Lost] = {}
        for row in await routes.routes(self._store):
            try:
                found.append(standing(row, base))
            except Exception as error:  # whatever a row may hold, the others are served
                why = f"what is kept of it is no route: {error}"
                failed[row.name] = Lost(row.tenant, why)
        return found, failed


def record(of: Standing) -> RouteRecord:
    """A row."""
    return RouteRecord(
        of.route.name,
        json_format.MessageToJson(of.route.given, indent=None, preserving_proto_field_name=True),
        of.epoch,
        of.etag,
        of.began,
        of.changed,
        of.owner,
        of.tenant,
        of.state.value,
        of.reason,
        json.dumps(dict(of.weights), sort_keys=True),
        of.bandit_at,
    )


def standing(row: RouteRecord, base: tuple[str, ...]) -> Standing:
    """`record` back; its arms have the digests that are written down. Raises whatever its texts
    lead to if it is not that."""
    given = json_format.Parse(row.spec, pb.Route())
    digests = iter([digest for arm in given.arms for digest in arm.digests])

    def pin(called: str, field: str) -> tuple[str, str]:
        digest = next(digests, "")
        if not digest:
            raise ValueError(f"{field}: {called!r} has no digest")
        return f"{called.partition('@')[0]}@{digest}", digest

    route = check(given, base, pin)
    if route.name != row.name:
        raise ValueError(f"it is called {route.name!r}")
    if not all(map(math.isfinite, (row.began, row.changed, row.bandit_at))):
        raise ValueError("a time is not finite")
    state = State(row.state)
    weights = _weights(json.loads(row.weights), route.live)
    if state is State.FAILED or (state is State.HELD and not weights):
        raise ValueError(f"state {row.state!r} without weights")
    return Standing(
        route,
        row.epoch,
        row.etag,
        row.began,
        row.changed,
        row.owner,
        row.tenant,
        state,
        row.reason,
        weights,
        row.bandit_at,
    )


def _weights(given: Any, live: Mapping[str, float]) -> dict[str, float]:
    if not given:
        return {}
    if set(given) != set(live):
        raise ValueError(f"weights of {sorted(given)}, and the arms are {sorted(live)}")
    found = {name: float(given[name]) for name in given}
    check_weights(found)
    return found

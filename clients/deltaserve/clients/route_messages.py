"""Routes as Python values <-> messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc
from google.protobuf import json_format

from deltaserve.clients.errors import InvalidArgument
from deltaserve.clients.route_types import Arm, Route, RouteArm, RouteOptions
from deltaserve.v1 import route_pb2 as pb

_STATE, _SHAPE, _METRIC = "ROUTE_STATE_", "RAMP_SHAPE_", "GUARDRAIL_METRIC_"


def put(name: str, arms: Sequence[RouteArm], options: RouteOptions) -> pb.PutRouteRequest:
    """A PutRouteRequest."""
    unknown = set(options) - set(RouteOptions.__annotations__)
    if unknown:
        known = sorted(RouteOptions.__annotations__)
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; known: {known}")
    given: dict[str, Any] = {**options, "name": name, "arms": [dict(arm) for arm in arms]}
    given = {key: value for key, value in given.items() if value is not None}
    if "ramp" in given:
        ramp = dict(given["ramp"])
        ramp["points"] = [{**p, "after": _duration(p["after"])} for p in ramp.get("points", ())]
        ramp["shape"] = _SHAPE + str(ramp.get("shape", "step")).upper()
        given["ramp"] = ramp
    given["guardrails"] = [
        {**rail, "metric": _METRIC + str(rail.get("metric", "")).upper()}
        for rail in given.get("guardrails", ())
    ]
    if "interval" in given.get("bandit", {}):
        given["bandit"] = {**given["bandit"], "interval": _duration(given["bandit"]["interval"])}
    try:
        return pb.PutRouteRequest(route=json_format.ParseDict(given, pb.Route()))
    except json_format.ParseError as error:
        code = grpc.StatusCode.INVALID_ARGUMENT
        raise InvalidArgument(f"put_route: {error}", code) from error


def _duration(seconds: float) -> str:
    return f"{seconds:.9f}s"


def route(message: pb.Route) -> Route:
    """One route."""
    found = json_format.MessageToDict(message, preserving_proto_field_name=True)
    ramp, bandit = found.get("ramp"), found.get("bandit")
    if ramp is not None:
        ramp["shape"] = str(ramp.get("shape", _SHAPE + "STEP")).removeprefix(_SHAPE).lower()
        ramp["points"] = [
            {"after": p.after.ToTimedelta().total_seconds(), "weights": dict(p.weights)}
            for p in message.ramp.points
        ]
    if bandit is not None:
        bandit["interval"] = message.bandit.interval.ToTimedelta().total_seconds()
    return Route(
        name=message.name,
        arms=tuple(map(_arm, message.arms)),
        control=message.control,
        salt=message.salt,
        coverage=message.coverage,
        layer=_layer(message),
        ramp=ramp,
        guardrails=tuple(
            {**rail, "metric": rail["metric"].removeprefix(_METRIC).lower()}
            for rail in found.get("guardrails", ())
        ),
        bandit=bandit,
        etag=message.etag,
        state=pb.RouteState.Name(message.state).removeprefix(_STATE).lower(),
        reason=message.reason,
        weights=dict(message.weights),
        start_time=message.start_time.ToNanoseconds() / 1e9,
        update_time=message.update_time.ToNanoseconds() / 1e9,
    )


def _arm(message: pb.Arm) -> Arm:
    found = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return Arm(
        name=message.name,
        model=message.model,
        adapters=tuple(found.get("adapters", ())),
        weight=message.weight,
        sampling=found.get("sampling", {}),
        stop=found.get("stop", {}),
        shadow=message.shadow,
        digests=tuple(message.digests),
    )


def _layer(message: pb.Route) -> Mapping[str, Any] | None:
    if not message.HasField("layer"):
        return None
    return {f: getattr(message.layer, f) for f in ("name", "start", "end")}


def again(found: Route) -> tuple[list[RouteArm], RouteOptions]:
    """What `put` needs to put a route as it is, its etag included."""
    arms: list[RouteArm] = []
    for arm in found.arms:
        given: dict[str, Any] = {"name": arm.name, "weight": arm.weight}
        for field in ("model", "adapters", "sampling", "stop", "shadow"):
            if value := getattr(arm, field):
                given[field] = value
        arms.append(cast(RouteArm, given))
    options = {field: getattr(found, field) for field in RouteOptions.__annotations__}
    return arms, cast(RouteOptions, {k: v for k, v in options.items() if v})

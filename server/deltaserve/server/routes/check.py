"""What a route must be. Every refusal names the field, what it holds, and what would be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NoReturn

import regex
from google.protobuf.message import Message

from deltaserve.server.config import ADAPTER_NAME, NAME_RULE
from deltaserve.server.errors import InvalidRequest
from deltaserve.server.experiments.errors import InvalidExperiment
from deltaserve.server.experiments.layers import Slice, check_slices
from deltaserve.server.experiments.ramp import Point, check_ramp
from deltaserve.server.routes.route import Arm, Bandit, Guardrail, Metric, Ramp, Route
from deltaserve.v1 import generation_pb2
from deltaserve.v1 import route_pb2 as pb

MAX_ARMS = 16
MAX_ADAPTERS = 16
MAX_POINTS = 64
MAX_PATTERNS = 32
MAX_TEXT = 256
MAX_SECONDS = 10 * 366 * 86400
MIN_INTERVAL = 1.0
BANDIT_FLOOR, BANDIT_INTERVAL, BANDIT_USERS = 0.05, 3600.0, 20
_NAME = regex.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ARM_RULE = "a letter or digit and at most 63 more letters, digits and . _ - signs"
_OUTPUT = ("etag", "state", "reason", "weights", "start_time", "update_time")

Pin = Callable[[str, str], tuple[str, str]]
"""What an arm calls an adapter, and the field -> ``name@digest`` and the digest. It refuses."""


def refuse(field: str, found: str, right: str) -> NoReturn:
    """Raise InvalidRequest."""
    raise InvalidRequest(f"{field}: {found} is not possible; it must be {right}", field=field)


def check(given: pb.Route, base: tuple[str, ...], pin: Pin) -> Route:
    """The route that the message describes. base: what the base is called. pin: looks up an arm's
    adapters."""
    message = pb.Route()
    message.CopyFrom(given)
    for name in _OUTPUT:
        message.ClearField(name)
    if not ADAPTER_NAME.fullmatch(message.name):
        found = repr(message.name[:64])
        raise InvalidRequest(
            f"route.name: {found} is not possible; {NAME_RULE}", field="route.name"
        )
    if message.name in base:
        refuse("route.name", repr(message.name), "another than the base model's")
    if not 1 <= len(message.arms) <= MAX_ARMS:
        refuse("route.arms", f"{len(message.arms)} arms", f"1 to {MAX_ARMS}")
    arms: dict[str, Arm] = {}
    for i, one in enumerate(message.arms):
        arm = _arm(f"route.arms[{i}]", one, base, pin)
        if arm.name in arms:
            refuse(f"route.arms[{i}].name", repr(arm.name), "another than the other arms'")
        arms[arm.name] = arm
    live = [arm.name for arm in arms.values() if not arm.shadow]
    if not live:
        refuse("route.arms", "shadows alone", "at least one arm that answers")
    message.control = message.control or live[0]
    if message.control not in live:
        refuse("route.control", _shown(message.control), f"one of {', '.join(live)}")
    message.salt = message.salt or message.name
    _text("route.salt", message.salt)
    if not message.HasField("coverage"):
        message.coverage = 1.0
    if not 0 < message.coverage <= 1:
        refuse("route.coverage", f"{message.coverage:g}", "above 0 and at most 1")
    if not math.fsum(arms[name].weight for name in live) > 0:
        refuse("route.arms", "weights of 0 alone", "of which one is positive")
    if message.HasField("ramp") and message.HasField("bandit"):
        refuse("route.bandit", "one beside a ramp", "left out, or the ramp must be")
    return Route(
        message.name,
        arms,
        message.control,
        message.salt,
        message.coverage,
        _layer(message) if message.HasField("layer") else None,
        _ramp(message.ramp, live) if message.HasField("ramp") else None,
        _guardrails(message.guardrails),
        _bandit(message.bandit, live) if message.HasField("bandit") else None,
        message,
    )


def check_layer(name: str, part: Slice, others: Iterable[tuple[str, Slice] | None]) -> None:
    """Refuse a slice that overlaps one of the others of its layer."""
    slices = [other[1] for other in others if other is not None and other[0] == name]
    try:
        check_slices([*slices, part])
    except InvalidExperiment as error:
        text = f"route.layer: in layer {name!r}, {error}"
        raise InvalidRequest(text, field="route.layer") from None


def _arm(field: str, given: pb.Arm, base: tuple[str, ...], pin: Pin) -> Arm:
    if not _NAME.fullmatch(given.name):
        refuse(f"{field}.name", _shown(given.name), _ARM_RULE)
    if given.model in base:
        given.model = ""
    if given.model and given.adapters:
        refuse(f"{field}.adapters", f"a list beside model {_shown(given.model)}", "empty")
    if len(given.adapters) > MAX_ADAPTERS:
        refuse(f"{field}.adapters", f"{len(given.adapters)} of them", f"at most {MAX_ADAPTERS}")
    digests: list[str] = []
    model = ""
    if given.model:
        model, digest = pin(given.model, f"{field}.model")
        digests.append(digest)
    adapters = []
    for i, one in enumerate(given.adapters):
        if one.HasField("strength") and not math.isfinite(one.strength):
            refuse(f"{field}.adapters[{i}].strength", f"{one.strength:g}", "a finite number")
        pinned = generation_pb2.WeightedAdapter()
        pinned.CopyFrom(one)
        pinned.name, digest = pin(one.name, f"{field}.adapters[{i}].name")
        digests.append(digest)
        adapters.append(pinned)
    if not given.HasField("weight"):
        given.weight = 0.0 if given.shadow else 1.0
    if not (math.isfinite(given.weight) and 0 <= given.weight <= 1e9):
        refuse(f"{field}.weight", f"{given.weight:g}", "from 0 to 1e9")
    if given.HasField("shadow") and not 0 <= given.shadow <= 1:
        refuse(f"{field}.shadow", f"{given.shadow:g}", "from 0 to 1")
    if given.shadow and given.weight:
        refuse(f"{field}.weight", f"{given.weight:g} of a shadow", "0: it never answers")
    del given.digests[:]
    given.digests.extend(digests)
    return Arm(
        given.name,
        model,
        tuple(adapters),
        given.weight,
        given.sampling,
        given.stop,
        given.shadow,
        tuple(digests),
    )


def _layer(message: pb.Route) -> tuple[str, Slice]:
    _text("route.layer.name", message.layer.name)
    part = Slice(message.name, message.layer.start, message.layer.end)
    try:
        check_slices([part])
    except InvalidExperiment:
        found = f"[{part.start:g}, {part.end:g})"
        refuse("route.layer", found, "a range with 0 <= start < end <= 1")
    return message.layer.name, part


def _ramp(given: pb.Ramp, live: Sequence[str]) -> Ramp:
    if not 2 <= len(given.points) <= MAX_POINTS:
        refuse("route.ramp.points", f"{len(given.points)} points", f"2 to {MAX_POINTS}")
    shapes: dict[int, Literal["step", "linear"]] = {
        pb.RAMP_SHAPE_UNSPECIFIED: "step",
        pb.RAMP_SHAPE_STEP: "step",
        pb.RAMP_SHAPE_LINEAR: "linear",
    }
    if given.shape not in shapes:
        refuse("route.ramp.shape", str(given.shape), "RAMP_SHAPE_STEP or RAMP_SHAPE_LINEAR")
    points = []
    for i, one in enumerate(given.points):
        if set(one.weights) != set(live):
            found = f"arms {', '.join(map(repr, sorted(one.weights))) or 'none'}"
            refuse(f"route.ramp.points[{i}].weights", found, f"all of {', '.join(live)}")
        after = _seconds(f"route.ramp.points[{i}].after", one.after)
        points.append(Point(after, dict(one.weights)))
    try:
        check_ramp(points)
    except InvalidExperiment as error:
        raise InvalidRequest(f"route.ramp.points: {error}", field="route.ramp.points") from None
    return Ramp(tuple(points), shapes[given.shape], given.gated)


def _guardrails(given: Sequence[pb.Guardrail]) -> dict[Metric, Guardrail]:
    found: dict[Metric, Guardrail] = {}
    for i, one in enumerate(given):
        field = f"route.guardrails[{i}]"
        name = _metric(field, one)
        metric = Metric(name)
        if metric in found:
            refuse(
                f"{field}.metric",
                pb.GuardrailMetric.Name(one.metric),
                "another than the other guardrails'",
            )
        most = math.inf if metric is Metric.REWARD else 1.0
        if not (math.isfinite(one.tolerated) and 0 <= one.tolerated <= most):
            right = "a number from 0" + ("" if metric is Metric.REWARD else " to 1")
            refuse(f"{field}.tolerated", f"{one.tolerated:g}", right)
        timed = metric in (Metric.SLOW, Metric.SLOW_FIRST_TOKEN)
        if timed != (one.seconds > 0) or not math.isfinite(one.seconds):
            right = "a positive, finite number" if timed else f"left out for {name}"
            refuse(f"{field}.seconds", f"{one.seconds:g}", right)
        if (metric is Metric.LONG) != (one.tokens > 0):
            right = "at least 1" if metric is Metric.LONG else f"left out for {name}"
            refuse(f"{field}.tokens", str(one.tokens), right)
        if one.refusals and metric is not Metric.REFUSAL:
            refuse(f"{field}.refusals", f"{len(one.refusals)} of them", f"left out for {name}")
        if len(one.refusals) > MAX_PATTERNS:
            refuse(f"{field}.refusals", f"{len(one.refusals)} of them", f"at most {MAX_PATTERNS}")
        found[metric] = Guardrail(
            metric,
            one.tolerated,
            one.versus_control or metric is Metric.REWARD,
            one.seconds,
            one.tokens,
            tuple(_pattern(f"{field}.refusals[{k}]", text) for k, text in enumerate(one.refusals)),
        )
    return found


def _metric(field: str, given: pb.Guardrail) -> str:
    names = {value: name for name, value in pb.GuardrailMetric.items()}
    name = names.get(given.metric)
    if name is None or given.metric == pb.GUARDRAIL_METRIC_UNSPECIFIED:
        right = "one of " + ", ".join(n for v, n in names.items() if v)
        refuse(f"{field}.metric", str(given.metric), right)
    return name.removeprefix("GUARDRAIL_METRIC_").lower()


def _pattern(field: str, text: str) -> regex.Pattern[str]:
    if not 1 <= len(text) <= MAX_TEXT:
        refuse(field, f"{len(text)} characters", f"1 to {MAX_TEXT}")
    try:
        return regex.compile(text)
    except regex.error as error:
        refuse(field, _shown(text), f"a regular expression: {error}")


def _bandit(given: pb.Bandit, live: Sequence[str]) -> Bandit:
    most = 1 / len(live)
    if not given.HasField("floor"):
        given.floor = min(BANDIT_FLOOR, most)
    if not 0 <= given.floor <= most:
        refuse("route.bandit.floor", f"{given.floor:g}", f"from 0 to {most:g} for {len(live)} arms")
    if not given.HasField("interval"):
        given.interval.seconds = int(BANDIT_INTERVAL)
    interval = _seconds("route.bandit.interval", given.interval)
    if interval < MIN_INTERVAL:
        refuse("route.bandit.interval", f"{interval:g} s", f"at least {MIN_INTERVAL:g} s")
    if not given.HasField("least_users"):
        given.least_users = BANDIT_USERS
    if given.least_users < 2:
        refuse("route.bandit.least_users", str(given.least_users), "at least 2")
    return Bandit(given.floor, interval, given.least_users)


def _seconds(field: str, given: Message) -> float:
    """Of a Duration."""
    seconds: float = given.seconds + given.nanos / 1e9  # type: ignore[attr-defined]
    if not 0 <= seconds <= MAX_SECONDS:
        refuse(field, f"{seconds:g} s", f"from 0 to {MAX_SECONDS} s")
    return seconds


def _text(field: str, text: str) -> None:
    if not (1 <= len(text) <= MAX_TEXT and text.isprintable()):
        right = f"1 to {MAX_TEXT} characters, none of them a control character"
        refuse(field, _shown(text), right)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:63] + "…")

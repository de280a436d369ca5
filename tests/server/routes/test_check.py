"""What is wrong with a route is said by field, value and what would be right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_engine import FakeAdapters
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.clients import route_messages
from deltaserve.server.errors import InvalidRequest, RequestError
from deltaserve.server.routes import refusals
from deltaserve.server.routes.assign import key_of, place
from deltaserve.server.routes.check import check
from deltaserve.server.routes.pins import Pins
from deltaserve.server.routes.refusals import OPENING, SECONDS, refuses
from deltaserve.server.routes.route import Standing, State
from deltaserve.v1 import route_pb2 as pb

TWO = [{"name": "x"}, {"name": "y", "weight": 3}]
RAMP = {"points": [{"after": t, "weights": {"x": 1, "y": t}} for t in (0, 60)]}


def points(first: Any) -> Any:
    return {"points": [first, RAMP["points"][1]]}


def rails(metric: str, tolerated: float, **more: Any) -> Any:
    return [{"metric": metric, "tolerated": tolerated, **more}]


def pin(called: str, field: str) -> tuple[str, str]:
    return f"{called}@d", "d"


def made(arms: Any = TWO, name: str = "r", **options: Any) -> Any:
    return check(route_messages.put(name, arms, options).route, ("the-base",), pin)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("route.name", {"name": "a@b"}),
        ("route.name", {"name": "the-base"}),
        ("route.arms", {"arms": []}),
        ("route.arms", {"arms": [{"name": f"a{i}"} for i in range(17)]}),
        ("route.arms", {"arms": [{"name": "x", "shadow": 0.5}]}),
        ("route.arms", {"arms": [{"name": "x", "weight": 0}]}),
        ("route.arms[1].name", {"arms": [{"name": "x"}, {"name": "x"}]}),
        ("route.arms[0].name", {"arms": [{"name": "x/y"}]}),
        ("route.arms[0].weight", {"arms": [{"name": "x", "weight": -1}]}),
        ("route.arms[0].weight", {"arms": [{"name": "x", "weight": "Infinity"}]}),
        (
            "route.arms[1].weight",
            {"arms": [TWO[0], {"name": "s", "shadow": 1, "weight": 1}]},
        ),
        ("route.arms[1].shadow", {"arms": [{"name": "x"}, {"name": "s", "shadow": 1.5}]}),
        ("route.arms[0].adapters", {"arms": [{"name": "x", "model": "a", "adapters": [{}]}]}),
        (
            "route.arms[0].adapters[0].strength",
            {"arms": [{"name": "x", "adapters": [{"name": "a", "strength": "NaN"}]}]},
        ),
        ("route.control", {"control": "z"}),
        ("route.control", {"arms": [*TWO, {"name": "s", "shadow": 1}], "control": "s"}),
        ("route.salt", {"salt": "a\nb"}),
        ("route.coverage", {"coverage": 0}),
        ("route.coverage", {"coverage": "NaN"}),
        ("route.layer", {"layer": {"name": "l", "start": 0.5, "end": 0.5}}),
        ("route.layer.name", {"layer": {"name": "", "start": 0, "end": 1}}),
        ("route.ramp.points", {"ramp": {"points": RAMP["points"][:1]}}),
        ("route.ramp.points", {"ramp": {"points": RAMP["points"][::-1]}}),
        (
            "route.ramp.points[0].after",
            {"ramp": points({"after": -1, "weights": dict(x=1, y=1)})},
        ),
        ("route.ramp.points[0].weights", {"ramp": points({"after": 0, "weights": {"x": 1}})}),
        ("route.bandit", {"ramp": RAMP, "bandit": {}}),
        ("route.bandit.floor", {"bandit": {"floor": 0.6}}),
        ("route.bandit.interval", {"bandit": {"interval": 0.5}}),
        ("route.bandit.least_users", {"bandit": {"least_users": 1}}),
        ("route.guardrails[0].metric", {"guardrails": rails("unspecified", 0)}),
        ("route.guardrails[1].metric", {"guardrails": rails("empty", 0) * 2}),
        ("route.guardrails[0].tolerated", {"guardrails": rails("error", 1.5)}),
        ("route.guardrails[0].seconds", {"guardrails": rails("slow", 0.1)}),
        ("route.guardrails[0].seconds", {"guardrails": rails("error", 0, seconds=1)}),
        ("route.guardrails[0].tokens", {"guardrails": rails("long", 0)}),
        ("route.guardrails[0].refusals[0]", {"guardrails": rails("refusal", 0, refusals=["("])}),
        ("route.guardrails[0].refusals", {"guardrails": rails("refusal", 0, refusals=["x"] * 33)}),
    ],
)
def test_refusals_name_the_field(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        made(**options)
    assert raised.value.field == field and str(raised.value).startswith(field)
    assert (
        " must " in str(raised.value) or "name starts with" in str(raised.value) or "ramp" in field
    )


def test_defaults() -> None:
    rail = {"metric": "reward", "tolerated": 9}
    route = made([*TWO, {"name": "s", "shadow": 0.5}], bandit={}, guardrails=[rail])
    assert (route.control, route.salt, route.coverage) == ("x", "r", 1.0)
    assert route.live == {"x": 1.0, "y": 3.0} and route.arms["s"].weight == 0
    bandit = route.bandit
    assert (bandit.floor, bandit.interval, bandit.least_users) == (0.05, 3600.0, 20)
    assert next(iter(route.guardrails.values())).versus_control


texts = st.text(max_size=6) | st.sampled_from(["x", "y", "the-base", "a@b", "r"])
numbers = st.floats() | st.sampled_from([0.0, 0.5, 1.0, 2.0])
named = st.builds(lambda n, s: {"name": n, "strength": s}, texts, numbers)
arm = st.builds(
    lambda **k: k,
    name=texts,
    model=texts,
    adapters=st.lists(
        st.builds(lambda n, s: {"name": n, "strength": s}, texts, numbers), max_size=2
    ),
    weight=numbers,
    shadow=numbers,
)


@settings(max_examples=150, deadline=None)
@given(
    name=texts,
    arms=st.lists(arm, max_size=3),
    control=texts,
    coverage=numbers,
    tolerated=numbers,
    metric=st.integers(0, 9),
    floor=numbers,
)
def test_whatever_is_put_is_a_route_or_refused(
    name: str, arms: Any, control: str, coverage: float, tolerated: float, metric: int, floor: float
) -> None:
    """And a route can be written down, read back, and gives every user one of its live arms."""
    message = pb.Route(name=name, arms=arms, control=control, coverage=coverage)
    message.guardrails.add(metric=metric, tolerated=tolerated)  # type: ignore[arg-type]
    if floor < 0.4:
        message.bandit.floor = floor
    try:
        route = check(message, ("the-base",), pin)
    except InvalidRequest as error:
        assert error.field.startswith("route.") and str(error).startswith(error.field)
        return
    written = json_format.MessageToJson(route.given, preserving_proto_field_name=True)
    again = check(json_format.Parse(written, pb.Route()), ("the-base",), pin)
    assert again.given == route.given and again.counted == route.counted
    placed = place(Standing(route, 1, "e", 0.0, 0.0), "t", "u", 0.0)
    assert placed.arm.name in route.live and route.live[placed.arm.name] >= 0


def test_what_begins_a_new_epoch() -> None:
    first = made().counted
    rail = {"metric": "slow", "tolerated": 0.1, "seconds": 3}
    same: list[dict[str, Any]] = [
        {"arms": TWO[::-1]},
        {"arms": [{"name": "x", "weight": 9}, TWO[1]]},
        {"coverage": 0.5, "control": "y", "ramp": RAMP, "guardrails": [rail]},
    ]
    for options in same:
        assert made(**options).counted == first
    other: list[dict[str, Any]] = [
        {"salt": "s"},
        {"arms": [*TWO, {"name": "z"}]},
        {"arms": [{"name": "x", "model": "a"}, TWO[1]]},
        {"arms": [{"name": "x", "sampling": {"temperature": 0}}, TWO[1]]},
        {"arms": [{"name": "x", "stop": {"max_tokens": 5}}, TWO[1]]},
        {"guardrails": rails("refusal", 0.1, refusals=["No"])},
        {"arms": [TWO[0], {**TWO[1], "weight": 0, "shadow": 0.5}]},
    ]
    for options in other:
        assert made(**options).counted != first


def test_who_takes_part() -> None:
    """Layers and coverage leave users out, whoever they are, and routes of one layer share none."""
    users = [f"user-{i}" for i in range(400)]

    def inside(**options: Any) -> set[str]:
        standing = Standing(made(**options), 1, "e", 0.0, 0.0)
        placed = {u: place(standing, "", u, 0.0) for u in users}
        for one in placed.values():
            if one.assignment != "sticky":
                assert (one.assignment, one.arm.name) == ("outside", "x") and not one.weights
        return {u for u, one in placed.items() if one.assignment == "sticky"}

    half = inside(coverage=0.5)
    assert 140 < len(half) < 260 and half < inside(coverage=0.9)
    one = inside(layer={"name": "l", "start": 0, "end": 0.4})
    two = inside(name="q", layer={"name": "l", "start": 0.4, "end": 1})
    assert one | two == set(users) and not one & two and 100 < len(one) < 220
    assert key_of("", "u") == "u" and key_of("t", "u") == "t\0u"
    rolled = Standing(made(), 1, "e", 0.0, 0.0, state=State.ROLLED_BACK)
    assert {place(rolled, "", u, 0.0).arm.name for u in users} == {"x"}


def test_answers_that_refuse() -> None:
    for text in (
        "I'm sorry, but I can't help with that.",
        "\n I\u2019m very sorry",
        "I cannot assist",
        "Sorry, I will not",
        "As an AI model, I",
        "I am unable to say",
    ):
        assert refuses([text], ())
    for text in ("", "Here you are. I'm sorry.", "I can do that", "Sorry about the rain, it is"):
        assert not refuses([text], ())
    rail = made(guardrails=[{"metric": "refusal", "tolerated": 0, "refusals": ["Nein", "(a+)+$"]}])
    patterns = next(iter(rail.guardrails.values())).refusals
    assert refuses(["-", "Nein!"], patterns) and not refuses(["I cannot"], patterns)
    slow = "a" * (OPENING - 1) + "b"
    assert not refuses([slow], patterns), "it takes too long"


def test_all_patterns_and_texts_share_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tried = 0.0, []

    class Slow:
        pattern = "slow"

        def match(self, text: str, timeout: float) -> None:
            nonlocal now
            tried.append(timeout)
            now += min(timeout, 0.6 * SECONDS)
            if timeout < 0.6 * SECONDS:
                raise TimeoutError

    monkeypatch.setattr(refusals, "time", SimpleNamespace(monotonic=lambda: now))
    assert not refuses(["a"] * 9, [cast(Any, Slow())] * 9)
    assert tried == pytest.approx([SECONDS, 0.4 * SECONDS])


def test_what_is_pinned() -> None:
    adapters = FakeAdapters()
    adapters.load("a", "/a").result(5)
    pins = Pins(adapters, {"r"}.__contains__)
    assert pins.pin("a@digest-of", "f") == ("a@digest-of-/a", "digest-of-/a")
    for called in ("a@other", "a@", "none", "r"):
        with pytest.raises(RequestError) as raised:
            pins.pin(called, "f")
        assert raised.value.field == "f" and str(raised.value).startswith("f: ")

"""Assignment is fixed by documented vectors, has the shares that were asked for, and moves no more
users than its formula says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve.server.experiments.assignment import assign, covered, moved_share
from deltaserve.server.experiments.errors import InvalidExperiment
from deltaserve.server.experiments.hashing import fraction
from deltaserve.server.experiments.layers import Slice, route_of
from deltaserve.server.experiments.ramp import Point, weights_at

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
DOCS = Path(__file__).parents[3] / "docs" / "experiments.md"
USERS = [f"user-{i}" for i in range(10_000)]
ERROR = 5 * 0.5 / math.sqrt(len(USERS))  # five standard errors of a share


@pytest.mark.parametrize("case", VECTORS["fraction"], ids=repr)
def test_hashes_are_those_of_the_vectors(case: dict) -> None:
    assert fraction(*case["texts"]) == case["is"]
    assert json.dumps(case) in DOCS.read_text()


@pytest.mark.parametrize("case", VECTORS["assign"], ids=repr)
def test_arms_are_those_of_the_vectors(case: dict) -> None:
    assert assign(case["salt"], case["weights"], case["key"]) == case["is"]
    assert json.dumps(case) in DOCS.read_text()


def test_another_process_assigns_alike() -> None:
    code = (
        "from deltaserve.server.experiments.assignment import assign;"
        "print(*(assign('r', {'a': 2, 'b': 1, 'é': 1}, f'user-{i}') for i in range(200)))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        said = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        ).stdout.decode()
        assert said.split() == [assign("r", {"é": 1, "b": 1, "a": 2}, u) for u in USERS[:200]]


CHANGES = [
    ({"a": 50, "b": 30, "c": 20}, {"a": 40, "b": 30, "c": 30}),
    ({"a": 50, "b": 50}, {"a": 90, "b": 10}),
    ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}),
    ({"a": 40, "b": 30, "c": 30}, {"b": 30, "c": 30}),
    ({"a": 40, "b": 30, "c": 30}, {"new": 40, "b": 30, "c": 30}),
    ({"a": 1, "b": 0}, {"a": 0, "b": 1}),
]


def least(before: dict[str, float], after: dict[str, float]) -> float:
    p, q = sum(before.values()), sum(after.values())
    arms = before.keys() | after.keys()
    return sum(abs(before.get(a, 0) / p - after.get(a, 0) / q) for a in arms) / 2


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_shares_and_moves(before: dict[str, float], after: dict[str, float]) -> None:
    one = [assign("route", before, user) for user in USERS]
    two = [assign("route", after, user) for user in USERS]
    for weights, arms in ((before, one), (after, two)):
        for arm, weight in weights.items():
            assert abs(arms.count(arm) / len(USERS) - weight / sum(weights.values())) < ERROR
    moved = sum(a != b for a, b in zip(one, two, strict=True)) / len(USERS)
    assert abs(moved - moved_share(before, after)) < ERROR
    t = least(before, after)
    assert t - 1e-12 <= moved_share(before, after) <= 2 * t / (1 + t) + 1e-12


@pytest.mark.parametrize(("before", "after"), CHANGES[1:4])
def test_one_changed_weight_moves_only_who_must(
    before: dict[str, float], after: dict[str, float]
) -> None:
    assert moved_share(before, after) == pytest.approx(least(before, after), abs=1e-12)


def test_an_arm_that_gains_takes_and_gives_nobody() -> None:
    for user in USERS[:2000]:
        one = assign("r", {"a": 2, "b": 1, "c": 1}, user)
        two = assign("r", {"a": 2, "b": 1, "c": 3}, user)
        assert two in (one, "c")


def test_salts_are_independent() -> None:
    weights = {"a": 1, "b": 1}
    same = sum(assign("one", weights, u) == assign("two", weights, u) for u in USERS)
    assert abs(same / len(USERS) - 0.5) < ERROR
    within = [u for u in USERS if covered("one", 0.3, u)]
    assert abs(len(within) / len(USERS) - 0.3) < ERROR
    assert all(covered("one", 0.4, u) for u in within)
    half = sum(assign("one", weights, u) == "a" for u in within) / len(within)
    assert abs(half - 0.5) < 5 * 0.5 / math.sqrt(len(within))


def test_a_layer_gives_one_route() -> None:
    slices = [Slice("x", 0, 0.2), Slice("y", 0.2, 0.7), Slice("x", 0.9, 1)]
    wider = [Slice("x", 0, 0.2), Slice("y", 0.2, 0.8)]
    found = [route_of("layer", slices, user) for user in USERS]
    for route, share in (("x", 0.3), ("y", 0.5), (None, 0.2)):
        assert abs(found.count(route) / len(USERS) - share) < ERROR
    assert all(
        route_of("layer", wider, user) == "y"
        for user, route in zip(USERS, found, strict=True)
        if route == "y"
    )


def test_ramps() -> None:
    points = [Point(0, {"old": 1}), Point(10, {"old": 9, "new": 1}), Point(20, {"new": 3})]
    assert weights_at(points, -5) == {"old": 1, "new": 0}
    assert weights_at(points, 9.9) == {"old": 1, "new": 0}
    assert weights_at(points, 10) == {"old": 0.9, "new": 0.1}
    assert weights_at(points, 99) == {"old": 0, "new": 1}
    assert weights_at(points, 5, "linear") == pytest.approx({"old": 0.95, "new": 0.05})
    assert weights_at(points, 15, "linear") == pytest.approx({"old": 0.45, "new": 0.55})
    assert weights_at(points, -5, "linear") == {"old": 1, "new": 0}
    assert weights_at(points, 20, "linear") == {"old": 0, "new": 1}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: assign("r", {}, "u"), "weights: there is no arm"),
        (lambda: assign("r", {"a": -1}, "u"), "weights['a']: -1 is not a finite number"),
        (lambda: assign("r", {"a": math.nan}, "u"), "weights['a']: nan is not"),
        (lambda: assign("r", {"a": 0}, "u"), "weights: they have no positive"),
        (lambda: assign("r", {"a": 1}, "\ud800"), "key: '\\ud800' has an unpaired surrogate"),
        (lambda: covered("r", 1.5, "u"), "share: 1.5 is not between 0 and 1"),
        (lambda: route_of("l", [Slice("x", 0.5, 0.5)], "u"), "slices['x']: [0.5, 0.5) is not"),
        (
            lambda: route_of("l", [Slice("x", 0, 0.5), Slice("y", 0.4, 1)], "u"),
            "slices['y']: [0.4, 1) overlaps [0, 0.5) of 'x'; start at 0.5",
        ),
        (lambda: weights_at([], 0), "ramp: it has no point"),
        (
            lambda: weights_at([Point(1, {"a": 1}), Point(1, {"a": 1})], 0),
            "ramp[1].at: 1 is not later than 1",
        ),
        (lambda: weights_at([Point(0, {"a": 0})], 0), "ramp[0].weights: they have no positive"),
    ],
)
def test_refusals_say_why(call, said: str) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        call()
    assert str(caught.value).startswith(said)

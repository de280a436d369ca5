"""What a ledger counts, against the same counted from the raw records."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from trials import HALVES, START, trial

from deltaserve.server.experiments import srm
from deltaserve.server.experiments.assignment import assign
from deltaserve.server.ledger import histogram, looks
from deltaserve.server.ledger import users as users_module
from deltaserve.server.ledger.balance import Balance
from deltaserve.server.ledger.book import Totals
from deltaserve.server.ledger.histogram import Histogram
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.ledger.looks import Look, Looks
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.service.report import see


async def test_random_traffic_is_counted_as_the_raw_records_are() -> None:
    rng = np.random.default_rng()
    ledger, kept = Ledger(), []
    for _ in range(1500):
        user = f"u{rng.integers(300)}"
        seconds, tokens = float(rng.exponential(2)), int(rng.integers(1, 400))
        ended = list(Ended)[rng.choice(4, p=[0.85, 0.05, 0.05, 0.05])]
        said = {"refusal": rng.random() < 0.03, "empty": rng.random() < 0.03}
        shadow = rng.random() < 0.1
        kept.append(
            trial(
                user if rng.random() < 0.9 else "",
                "s" if shadow else assign("r", HALVES, user),
                shadow=shadow,
                ended=ended,
                seconds=seconds,
                first_token=seconds / 10,
                completion_tokens=2 * tokens,
                longest=tokens,
                weights=HALVES,
                **said,
            )
        )
        ledger.record(kept[-1])
    limits = {"slow": 5.0, "slow_first_token": 0.3, "long": 350.0}
    found = await ledger.tallies("r", 1, limits)
    by_arm: dict[str, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for t in kept:
        if t.user:
            by_arm[t.arm][t.user].append(t)
    tests = {
        "error": lambda t: t.ended is Ended.ERROR,
        "refusal": lambda t: t.refusal,
        "empty": lambda t: t.empty,
        "slow": lambda t: t.ended is Ended.ANSWERED and t.seconds > 5,
        "slow_first_token": lambda t: t.ended is Ended.ANSWERED and t.first_token > 0.3,
        "long": lambda t: t.ended is Ended.ANSWERED and t.longest > 350,
        "negative_feedback": lambda t: False,
    }
    assert set(found.arms) == {"a", "b", "s"} == set(by_arm)
    for arm, users in by_arm.items():
        assert found.arms[arm].users == len(users)
        assert found.arms[arm].met == {
            name: sum(any(map(test, ts)) for ts in users.values()) for name, test in tests.items()
        }
    counts = {arm: len(by_arm[arm]) for arm in HALVES}
    assert found.mismatch == pytest.approx(srm.sequential(counts, HALVES), rel=1e-9)
    book = ledger.book("r", 1)
    assert book is not None
    for arm, totals in zip(book.arms, book.totals, strict=True):
        mine = [t for t in kept if t.arm == arm]
        answered = [t for t in mine if t.ended is Ended.ANSWERED]
        assert totals.requests == len(mine)
        assert totals.anonymous == sum(not t.user for t in mine)
        assert totals.completion_tokens == sum(t.completion_tokens for t in mine)
        exact = np.quantile([t.seconds for t in answered], 0.9, method="inverted_cdf")
        assert totals.seconds.quantile(0.9) == pytest.approx(exact, rel=histogram.ERROR)
        assert Totals.load(totals.dump()).dump() == totals.dump()


async def test_a_user_counts_for_the_first_arm_that_was_drawn() -> None:
    ledger = Ledger()
    alone = {"a": 1.0, "b": 0.0}
    ledger.record(trial("u", "a", weights=alone, ended=Ended.ERROR))  # before the experiment
    assert (await ledger.tallies("r", 1)).arms["a"].met["error"] == 1
    ledger.record(trial("u", "b", at=5.0))  # drawn
    ledger.record(trial("u", "a", ended=Ended.ERROR))  # the weights have moved: nobody's error
    found = (await ledger.tallies("r", 1)).arms
    assert (found["a"].users, found["b"].users) == (0, 1)
    assert found["a"].met["error"] == found["b"].met["error"] == 0
    ledger.record(trial("u", "b", ended=Ended.ERROR))
    assert (await ledger.tallies("r", 1)).arms["b"].met["error"] == 1
    book = ledger.book("r", 1)
    assert book is not None and book.totals[0].requests == 2 and book.totals[1].requests == 2
    assert book.balance.found == {"b": 1}


async def test_only_users_that_were_drawn_are_compared() -> None:
    """Those of before are of another time, with errors of its own."""
    ledger = Ledger()
    for i in range(4):
        ledger.record(trial(f"early{i}", "a", weights={"a": 1.0, "b": 0.0}))
    assert (await ledger.tallies("r", 1)).arms["a"].users == 4
    ledger.record(trial("s", "s", shadow=True))
    for arm in "ab":
        ledger.record(trial(f"late-{arm}", arm, ended=Ended.ERROR))
    found = (await ledger.tallies("r", 1)).arms
    assert {a: (t.users, t.met["error"]) for a, t in found.items()} == {
        "a": (1, 1),
        "b": (1, 1),
        "s": (1, 0),
    }


async def test_a_route_that_is_forgotten_makes_room() -> None:
    ledger = Ledger(max_users=2)
    for user in "xy":
        ledger.record(trial(user, "a"))
    ledger.forget("r")
    ledger.record(trial("x", "a"))  # it was under way when the route was deleted
    assert ledger.book("r", 1) is None
    ledger.record(trial("z", "a", route="q"))
    book = ledger.book("q", 1)
    assert book is not None and (len(book.users), book.uncounted) == (1, 0)
    ledger.record(trial("x", "a", epoch=2))
    assert (await ledger.tallies("r", 2)).arms["a"].users == 1


async def test_epochs_and_limits_of_memory() -> None:
    ledger = Ledger(max_users=2)
    for user in "xyzx":
        ledger.record(trial(user, "a"))
    book = ledger.book("r", 1)
    assert book is not None and (len(book.users), book.uncounted) == (2, 1)
    ledger.record(replace(trial("x", "b"), epoch=2))
    ledger.record(trial("y", "a"))  # it was under way when the route was changed
    assert (await ledger.tallies("r", 1)).arms == {}
    found = await ledger.tallies("r", 2)
    assert {arm: t.users for arm, t in found.arms.items()} == {"b": 1}


async def test_a_limit_of_another_value_is_counted_anew() -> None:
    ledger = Ledger()
    for seconds in (1.0, 2.0, 3.0):
        ledger.record(trial(f"u{seconds}", "a", seconds=seconds, slow=seconds > 2.5))
    for limit, slow in ((0.5, 3), (1.0, 2), (2.9, 1), (3.0, 0)):
        assert (await ledger.tallies("r", 1, {"slow": limit})).arms["a"].met["slow"] == slow
    assert (await ledger.tallies("r", 1)).arms["a"].met["slow"] == 1


def test_balance_with_weights_that_move() -> None:
    """Against scipy on each user's own shares; a right assignment is not alarming, a wrong is."""
    rng = np.random.default_rng(11)
    right, wrong = Balance(), Balance()
    ps = []
    for i in range(4000):
        b = 0.05 + 0.6 * i / 4000
        shares = {"a": 1 - b, "b": b}
        ps.append(b)
        right.add("b" if rng.random() < b else "a", shares)
        wrong.add("b" if rng.random() < 0.8 * b else "a", shares)
    assert right.expected["b"] == pytest.approx(sum(ps))
    z = (right.found["b"] - sum(ps)) / math.sqrt(sum(p * (1 - p) for p in ps))
    assert right.p_value() == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert right.anytime_p_value > 0.05
    assert max(wrong.p_value(), wrong.anytime_p_value) < 1e-3
    assert Balance.load(wrong.dump()).dump() == wrong.dump()
    wrong.add("c", {"a": 1.0, "c": 0.0})
    assert (wrong.p_value(), wrong.anytime_p_value) == (0, 0)
    assert Balance.load(wrong.dump()).anytime_p_value == 0


def test_balance_with_weights_that_do_not_move() -> None:
    rng = np.random.default_rng()
    shares = {"a": 0.5, "b": 0.3, "c": 0.2, "none": 0.0}
    balance, counts = Balance(), dict.fromkeys("abc", 0)
    assert balance.p_value() == balance.anytime_p_value == 1
    for arm in rng.choice(list("abc"), 700, p=[0.5, 0.3, 0.2]):
        balance.add(arm, shares)
        counts[arm] += 1
    assert balance.p_value() == pytest.approx(srm.chi_square(counts, shares))
    assert balance.anytime_p_value == pytest.approx(srm.sequential(counts, shares))


def test_balance_raises_few_false_alarms_at_all_looks() -> None:
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(300):
        balance = Balance()
        least = 1.0
        for i in range(200):
            b = 0.1 + 0.7 * (i // 50) / 3
            balance.add("b" if rng.random() < b else "a", {"a": 1 - b, "b": b})
            least = min(least, balance.anytime_p_value)
        alarms += least <= 0.05
    assert alarms / 300 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_quantiles() -> None:
    rng = np.random.default_rng()
    values = np.exp(rng.normal(-1, 2, 3000))
    found = Histogram()
    assert found.quantile(0.5) == found.mean() == 0
    for value in values:
        found.add(float(value))
    for q in (0.001, 0.5, 0.9, 0.99, 1.0):
        exact = np.quantile(values, q, method="inverted_cdf")
        assert found.quantile(q) == pytest.approx(exact, rel=histogram.ERROR)
    assert found.mean() == pytest.approx(values.mean()) and found.n == 3000
    found.add(0.0)
    found.add(1e9)
    assert len(found.buckets) < 1500


async def test_others_have_their_turn_while_users_are_gone_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, turns = Ledger(), 0
    for i in range(100):
        ledger.record(trial(f"u{i}", "ab"[i % 2], ended=Ended.ERROR if i % 5 else Ended.ANSWERED))
    whole = await ledger.tallies("r", 1)
    book = ledger.book("r", 1)
    assert book is not None

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(users_module, "PAGE", 9)
    other = asyncio.create_task(take_turns())
    assert await ledger.tallies("r", 1) == whole and whole.arms["a"].met["error"] == 40
    assert turns >= 11
    seen = await see(book, 2, START)
    assert seen.rows.tolist() == book.users.rows.tolist() and turns >= 33
    other.cancel()


def test_looks_are_thinned() -> None:
    kept = Looks()
    for minute in range(3000):
        for second in (0, 30):
            if kept.begin(60.0 * minute + second):
                kept.keep(60.0 * minute + second, {})
                kept.begun = False
    assert len(kept.kept) <= looks.MOST and kept.seconds > looks.SECONDS
    times = [look.at for look in kept.kept]
    assert times == sorted(times) and times[0] < 60 * 100 and times[-1] > 60 * 2900
    now = Look(60.0 * 3000, {})
    for points in (1, 7, 200, 10_000):
        chosen = kept.chosen(points, now)
        assert chosen[-1] is now and len(chosen) == min(points, len(kept.kept) + 1)
        assert [look.at for look in chosen] == sorted({look.at for look in chosen})

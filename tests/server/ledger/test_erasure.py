"""A user who is erased leaves no trace, and everybody else counts as if it had never come."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest
from trials import START, trial

from deltaserve.server.errors import AnswerUnknown, StateUnavailable, UserNotExposed
from deltaserve.server.ledger import keep, writer
from deltaserve.server.ledger import ledger as module
from deltaserve.server.ledger.book import Book
from deltaserve.server.ledger.erased import Erased, Keys
from deltaserve.server.ledger.feedback import Answer, Feedback
from deltaserve.server.ledger.keep import Keeper
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.ledger.names import user_key
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.service.report import see
from deltaserve.server.state.records import Entry
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

GONE = "the one"
USERS = [GONE, *(f"user {i}" for i in range(6))]
ENTRY = Entry("me", "EraseUser", "t")
TABLES = ("trials", "exposures", "feedback")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OVERTAKEN_SECONDS", 0.02)
    monkeypatch.setattr(writer, "EACH_SECONDS", 0.02)


async def opened(path: Path | None) -> Ledger:
    ledger = Ledger(None if path is None else Keeper(await Store.open(parse(str(path)))))
    await ledger.open()
    return ledger


def traffic(seed: int, late: bool = True) -> list[tuple[Trial, float | None]]:
    """Trials, some with a reward: two routes, the first before and after it has a second arm, each
    with a shadow; another tenant's user of the same name. late: the one comes to the end."""
    rng, found = random.Random(seed), []
    for route, epoch, weights in (
        ("r", 1, {"a": 1.0}),
        ("q", 1, {"a": 0.5, "b": 0.5}),
        ("r", 2, {"a": 0.3, "b": 0.7}),
    ):
        for _ in range(40):
            user = rng.choice(USERS if late or epoch == 1 else USERS[1:])
            common = {"route": route, "epoch": epoch, "at": START + len(found), "tenant": "t"}
            if rng.random() < 0.1:
                common["tenant"] = "other"
            ended = Ended.ERROR if rng.random() < 0.2 else Ended.ANSWERED
            arm = rng.choice(sorted(weights))
            one = trial(user, arm, weights=weights, ended=ended, **common)
            found.append((one, rng.gauss(0, 1) if rng.random() < 0.6 else None))
            if rng.random() < 0.3:
                name = one.request_id
                shadow = trial(user, "s", shadow=True, weights={}, request_id=name, **common)
                found.append((shadow, None))
    return found


async def play(ledger: Ledger, given: Iterable[tuple[Trial, float | None]]) -> None:
    for one, reward in given:
        ledger.record(one)
        if reward is not None:
            await ledger.feedback(Feedback(one.tenant, one.at, one.request_id, reward=reward))


async def counted(ledger: Ledger) -> list[object]:
    """All that is counted of users, in no order."""
    found: list[object] = []
    for route, epoch in (("r", 2), ("q", 1)):
        book = ledger.book(route, epoch)
        assert book is not None
        seen = await see(book, 0, START)
        live = seen.rows[seen.rows["arm"] >= 0]
        live.sort(order="user")
        arms = [book.arms[i] for i in live["arm"]]  # which are in order of their first request
        live["arm"] = 0
        rows = [(a, *(round(v, 9) for v in r.tolist())) for a, r in zip(arms, live, strict=True)]
        tallies = await ledger.tallies(route, epoch)
        of = {
            arm: (t.users, dict(t.met), t.rewards.n, pytest.approx(t.rewards.mean, abs=1e-12))
            for arm, t in tallies.arms.items()
            if t.users
        }
        found.append((rows, of, {k: v for k, v in past(book).items() if v[1]}, len(book.users)))
    return found


def past(book: Book) -> dict[int, tuple[float, int]]:
    return {user: (round(total, 9), n) for user, (total, n) in book.before_next().items()}


def without(given: list[tuple[Trial, float | None]]) -> list[tuple[Trial, float | None]]:
    return [(t, r) for t, r in given if (t.tenant, t.user) != ("t", GONE)]


def rows(path: Path, table: str) -> int:
    keys = [user_key(route, "t", GONE, arm) for route in "rq" for arm in ("", "a", "b", "s")]
    marks = ", ".join("?" * len(keys))
    with sqlite3.connect(path) as file:
        query = f'SELECT count(*) FROM {table} WHERE "user" IN ({marks})'
        return int(file.execute(query, keys).fetchone()[0])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stored", [False, True])
async def test_the_others_count_as_if_it_had_never_come(
    stored: bool, late: bool, tmp_path: Path
) -> None:
    path = tmp_path / "s.db" if stored else None
    given = traffic(random.randrange(2**32), late)
    mine = [(t, r) for t, r in given if (t.tenant, t.user) == ("t", GONE)]
    other = await opened(None)
    await play(other, without(given))
    wanted = await counted(other)

    ledger = await opened(path)
    await play(ledger, given)
    assert await counted(ledger) != wanted
    erased = await ledger.erase("t", GONE, ENTRY)
    assert await counted(ledger) == wanted
    said = sum(r is not None for _, r in mine)
    spoken = [t for t, _ in mine if not t.shadow]
    assert (erased.requests, erased.feedback) == (len(mine if stored else spoken), said)
    again = await ledger.erase("t", GONE, ENTRY)
    assert (len(again.counts), again.requests, again.feedback) == (0, 0, 0)
    with pytest.raises(AnswerUnknown):
        await ledger.feedback(Feedback("t", START, spoken[0].request_id, reward=1.0))
    with pytest.raises(UserNotExposed):
        await ledger.feedback(Feedback("t", START, route="r", user=GONE, reward=1.0))
    if path is not None:
        assert [rows(path, table) for table in TABLES] == [0, 0, 0]
        await ledger.close()
        ledger = await opened(path)
        assert await counted(ledger) == wanted
        with sqlite3.connect(path) as file:
            found = file.execute(
                "SELECT who, name, outcome, detail FROM audit WHERE verb != 'Start'"
            )
            assert found.fetchall() == [("me", "t", "OK", "")] * 2

    more = [(trial(u, "a", route="r", epoch=2, at=2 * START), 1.0) for u in (GONE, "new", *USERS)]
    for one in (ledger, other):
        await play(one, more)
    assert await counted(ledger) == await counted(other), "it comes anew"
    book = ledger.book("r", 2)
    assert book is not None and len(book.users.rows) == len(book.users), "its place is another's"
    assert ledger._users == other._users
    await ledger.close()


async def test_what_waits_for_the_database_is_erased_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "EACH_SECONDS", 1e6)
    ledger = await opened(tmp_path / "s.db")
    for one in (trial(GONE, "a"), trial("another", "a"), trial(GONE, "a", epoch=2)):
        ledger.record(one)
    said = []
    erase = keep.Keeper.erase

    async def meanwhile(self: Keeper, keys: Keys, entry: Entry) -> Erased:
        ledger.record(trial(GONE, "a", epoch=2, request_id="late"))
        feedback = ledger.feedback(Feedback("t", START, "late", reward=1.0))
        said.append(asyncio.create_task(feedback))
        await asyncio.sleep(0.01)
        return await erase(self, keys, entry)

    monkeypatch.setattr(keep.Keeper, "erase", meanwhile)
    erased = await ledger.erase("t", GONE, ENTRY)
    assert (len(erased.counts), erased.requests, erased.feedback) == (2, 3, 1)
    with pytest.raises(AnswerUnknown, match="erased meanwhile"):
        await said[0]
    await ledger.close()
    with sqlite3.connect(tmp_path / "s.db") as file:
        assert file.execute("SELECT count(*) FROM exposures").fetchone() == (1,), "the other's"
    assert [rows(tmp_path / "s.db", table) for table in TABLES] == [0, 0, 0]


async def test_feedback_that_looks_up_its_answer_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await opened(tmp_path / "s.db")
    ledger.record(trial(GONE, "a", request_id="mine"))
    await ledger.feedback(Feedback("t", START, "mine", reward=1.0))
    ledger._answers.clear()  # only the database knows it by now
    known, erased = keep.Keeper.answer, []

    async def slowly(self: Keeper, key: bytes) -> Answer | None:
        found = await known(self, key)
        if not erased:
            erased.append(await ledger.erase("t", GONE, ENTRY))
        return found

    monkeypatch.setattr(keep.Keeper, "answer", slowly)
    with pytest.raises(AnswerUnknown):
        await ledger.feedback(Feedback("t", START, "mine", reward=0.0))
    assert (erased[0].requests, erased[0].feedback) == (1, 1)
    await ledger.close()
    assert [rows(tmp_path / "s.db", table) for table in TABLES] == [0, 0, 0]


async def test_without_the_database_nothing_is_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await opened(tmp_path / "s.db")
    given = traffic(3)
    await play(ledger, given)
    before = await counted(ledger)

    async def gone(*given: object) -> None:
        raise StateUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(keep, "note", gone)  # in the transaction
        with pytest.raises(StateUnavailable, match="gone"):
            await ledger.erase("t", GONE, ENTRY)
    assert await counted(ledger) == before and rows(tmp_path / "s.db", "feedback")
    await ledger.close()
    ledger = await opened(tmp_path / "s.db")
    assert await counted(ledger) == before
    await ledger.close()

"""What feedback counts for, with and without a database, and across restarts."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from postgres import running_postgres
from trials import HALVES, START, trial

from deltaserve.server.errors import AnswerUnknown, StateUnavailable, UserNotExposed
from deltaserve.server.experiments.assignment import assign
from deltaserve.server.ledger import keep, writer
from deltaserve.server.ledger import ledger as module
from deltaserve.server.ledger.batch import Batch
from deltaserve.server.ledger.feedback import Feedback, Given
from deltaserve.server.ledger.keep import Keeper
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.ledger.tally import Tallies
from deltaserve.server.ledger.trial import Ended, Trial
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

ALONE = {"a": 1.0}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OVERTAKEN_SECONDS", 0.02)
    monkeypatch.setattr(writer, "EACH_SECONDS", 0.02)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return str(tmp_path / "state.db")


@asynccontextmanager
async def kept(url: object) -> AsyncIterator[Ledger]:
    store = await Store.open(parse(str(url)))
    ledger = Ledger(Keeper(store))
    await ledger.open()
    try:
        yield ledger
    finally:
        await ledger.close()


def on(t: Trial, reward: float | None, **fields: object) -> Feedback:
    return Feedback("t", START, t.request_id, reward=reward, **fields)  # type: ignore[arg-type]


def of(user: str, reward: float, **fields: object) -> Feedback:
    given = {"route": "r", "user": user, "reward": reward, **fields}
    return Feedback("t", START, **given)  # type: ignore[arg-type]


async def rewards(ledger: Ledger) -> dict[str, tuple[int, float, int]]:
    """By arm: users with a reward, their mean, users with a negative one."""
    found = (await ledger.tallies("r", 1)).arms
    return {a: (t.rewards.n, t.rewards.mean, t.met["negative_feedback"]) for a, t in found.items()}


@pytest.mark.parametrize("stored", [False, True])
async def test_what_it_counts_for(stored: bool, tmp_path: Path) -> None:
    async with kept(tmp_path / "s.db") if stored else _memory() as ledger:
        u, v, nobody = trial("u", "a"), trial("v", "b"), trial("", "a")
        shadow = replace(u, arm="s", shadow=True, weights={})
        for t in (u, shadow, v, nobody):
            ledger.record(t)
        answer = await ledger.feedback(on(u, 1.0))
        assert (answer.route, answer.arm) == ("r", "a"), "not the shadow, of the same request"
        await ledger.feedback(of("u", 0.0))
        await ledger.feedback(on(v, -1.0, id="mine"))
        assert (await ledger.feedback(on(nobody, 5.0))).arm == "a"
        assert await rewards(ledger) == {"a": (1, 0.5, 0), "s": (0, 0, 0), "b": (1, -1, 1)}

        await ledger.feedback(on(u, 0.5))  # the answer has one feedback, the last
        await ledger.feedback(of("u", 0.25))
        await ledger.feedback(on(v, 2.0, id="mine"))
        assert await rewards(ledger) == {"a": (1, 0.375, 0), "s": (0, 0, 0), "b": (1, 2, 0)}
        await ledger.feedback(on(v, 4.0, id="another"))
        assert (await rewards(ledger))["b"] == (1, 3.0, 0)
        await ledger.feedback(on(v, None, id="another", labels={"edited": "true"}))
        assert (await rewards(ledger))["b"] == (1, 2.0, 0)

        for tenant in ("other", ""):
            with pytest.raises(AnswerUnknown, match=f"'{u.request_id}': no route gave"):
                await ledger.feedback(replace(on(u, 1.0), tenant=tenant))
            with pytest.raises(UserNotExposed):
                await ledger.feedback(replace(of("u", 1.0), tenant=tenant))
        with pytest.raises(AnswerUnknown):
            await ledger.feedback(on(trial("u", "a"), 1.0))
        with pytest.raises(UserNotExposed, match="user 'w': route 'r'"):
            await ledger.feedback(of("w", 1.0))
        with pytest.raises(UserNotExposed, match="route 'q'"):
            await ledger.feedback(of("u", 1.0, route="q"))
        assert (await rewards(ledger))["b"] == (1, 2.0, 0)


@asynccontextmanager
async def _memory() -> AsyncIterator[Ledger]:
    yield Ledger()


async def test_feedback_may_overtake_its_answer() -> None:
    ledger, t = Ledger(), trial("u", "a")
    waiting = asyncio.create_task(ledger.feedback(on(t, 1.0)))
    await asyncio.sleep(0)
    ledger.record(t)
    assert (await waiting).arm == "a"


async def test_rewards_from_before_the_user_was_drawn() -> None:
    """They are what a report adjusts by; what is said later of an earlier answer is not."""
    ledger = Ledger()
    early, late = trial("u", "a", weights=ALONE), trial("u", "a", weights=ALONE)
    for t in (early, late):
        ledger.record(t)
    await ledger.feedback(on(early, 3.0))
    assert (await rewards(ledger))["a"] == (1, 3, 0)
    ledger.record(trial("u", "b"))
    assert await rewards(ledger) == {"a": (0, 0, 0), "b": (0, 0, 0)}
    await ledger.feedback(on(late, -7.0))
    await ledger.feedback(of("u", 1.0))
    assert (await rewards(ledger))["b"] == (1, 1, 0)
    book = ledger.book("r", 1)
    assert book is not None
    assert [(r["before_sum"], r["before_n"]) for r in book.users.rows] == [(3, 1)]
    ledger.record(trial("u", "a", epoch=2))
    book = ledger.book("r", 2)
    assert book is not None
    assert [(r["before_sum"], r["before_n"]) for r in book.users.rows] == [(3, 1)]
    assert (await ledger.feedback(on(early, 9.0))).arm == "a", "of an earlier epoch: kept alone"
    assert (await ledger.tallies("r", 2)).arms["a"].rewards.n == 0


def seen(ledger: Ledger, route: str, epoch: int) -> object:
    """Everything that a report is made of."""
    book = ledger.book(route, epoch)
    assert book is not None
    rows = np.sort(book.users.rows, order="user")
    totals = {a: t.dump() for a, t in zip(book.arms, book.totals, strict=True)}
    kept_looks = [(k.at, {a: asdict(s) for a, s in k.arms.items()}) for k in book.looks.kept]
    past = {user: before for user, before in book.past.items() if before[1]}
    return rows.tolist(), totals, book.balance.dump(), past, kept_looks, book.start


async def test_restarts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tallies are what they were, and feedback on old answers goes on."""
    monkeypatch.setattr(keep, "PAGE", 7)
    rng = np.random.default_rng()
    given: list[Trial] = []
    async with kept(url) as ledger:
        for epoch, weights in ((1, ALONE), (2, HALVES)):
            for i in range(60):
                user = f"u{rng.integers(20)}" if rng.random() < 0.9 else ""
                arm = assign("r", weights, user)
                ended = Ended.ERROR if rng.random() < 0.1 else Ended.ANSWERED
                fields = {"weights": weights, "ended": ended, "epoch": epoch, "at": START + 60 * i}
                t = trial(user, arm, seconds=float(rng.random()), **fields)
                ledger.record(t)
                if i == 40 and epoch == 1:
                    await asyncio.sleep(0.1)  # some of it is written by itself
                given.append(t)
                if rng.random() < 0.5:
                    about = given[rng.integers(len(given))]
                    await ledger.feedback(
                        replace(on(about, float(rng.normal())), at=START + 60 * i)
                    )
        before = seen(ledger, "r", 2)
        tallies = await ledger.tallies("r", 2)
    async with kept(url) as ledger:
        after = seen(ledger, "r", 2)
        assert repr(_rounded(after)) == repr(_rounded(before))
        again = await ledger.tallies("r", 2)
        assert _plain(again) == pytest.approx(_plain(tallies))
        assert (await ledger.feedback(on(given[0], 1.0))).arm == given[0].arm
        with pytest.raises(AnswerUnknown, match="in 30 days"):
            await ledger.feedback(replace(on(given[0], 1.0), tenant="other"))
        ledger.record(trial("new", "a", epoch=3))
        assert len((await ledger.tallies("r", 3)).arms) == 1


def _rounded(value: object) -> object:
    """Sums may have been made in another order."""
    if isinstance(value, float):
        return float(f"{value:.12g}") + 0.0
    if isinstance(value, dict):
        return {key: _rounded(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return value


def _plain(tallies: Tallies) -> dict[str, float]:
    found = {"mismatch": tallies.mismatch}
    for arm, tally in tallies.arms.items():
        found |= {f"{arm} {k}": v for k, v in tally.met.items()}
        found |= {f"{arm} {k}": v for k, v in asdict(tally.rewards).items()}
        found[arm] = tally.users
    return found


async def test_a_database_that_goes_away(tmp_path: Path) -> None:
    """Requests are counted, feedback is refused; all of it is kept once the database is back."""
    path, away = tmp_path / "s.db", tmp_path / "away.db"
    async with kept(path) as ledger:
        t = trial("secret user", "a", request_id="secret id")
        ledger.record(t)
        await ledger.feedback(on(t, 1.0))
        path.rename(away)
        later = trial("secret user", "a", ended=Ended.ERROR)
        ledger.record(later)
        with pytest.raises(StateUnavailable, match="unable to open"):
            await ledger.feedback(on(later, 0.0))
        found = (await ledger.tallies("r", 1)).arms["a"]
        assert (found.met["error"], found.rewards.mean) == (1, 1.0)
        away.rename(path)
        many = [ledger.feedback(on(later, 0.0)), ledger.feedback(of("secret user", 2.0))]
        await asyncio.gather(*many)
        assert (await rewards(ledger))["a"] == (1, 1.0, 0)
    async with kept(path) as ledger:
        found = (await ledger.tallies("r", 1)).arms["a"]
        assert (found.met["error"], found.rewards.mean) == (1, 1.0)
    with sqlite3.connect(path) as file:
        assert file.execute("SELECT count(*) FROM trials").fetchone() == (2,)
    assert all(b"secret" not in p.read_bytes() for p in tmp_path.glob("s.db*"))


async def test_one_failure_answers_all_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each would wait for the database by itself, one after the other."""
    monkeypatch.setattr(writer, "CHUNK", 2)
    monkeypatch.setattr(writer, "EACH_SECONDS", 60.0)
    async with kept(tmp_path / "s.db") as ledger:
        ts, tries = [trial(f"u{i}", "a") for i in range(9)], 0
        assert ledger._keeper is not None
        write = ledger._keeper.write

        async def gone(batch: Batch) -> list[Given | None]:
            nonlocal tries
            tries += 1
            await asyncio.sleep(0.01)
            raise StateUnavailable("it hangs")

        monkeypatch.setattr(ledger._keeper, "write", gone)
        for t in ts:
            ledger.record(t)
        said = await asyncio.gather(
            *(ledger.feedback(on(t, 1.0)) for t in ts), return_exceptions=True
        )
        assert all(isinstance(one, StateUnavailable) for one in said) and tries == 1
        monkeypatch.setattr(ledger._keeper, "write", write)
        await ledger.feedback(on(ts[0], 1.0))
        assert await rewards(ledger) == {"a": (1, 1.0, 0)}


async def test_forgotten_routes_are_not_read_back(tmp_path: Path) -> None:
    async with kept(tmp_path / "s.db") as ledger:
        ledger.record(trial("u", "a"))
        ledger.record(trial("u", "a", route="q"))
    ledger = Ledger(Keeper(await Store.open(parse(str(tmp_path / "s.db")))))
    await ledger.open({"q"})
    assert ledger.book("q", 1) is not None and ledger.book("r", 1) is None
    ledger.record(trial("v", "a", epoch=2))
    await ledger.close()


async def test_old_requests_are_forgotten(tmp_path: Path) -> None:
    async with kept(tmp_path / "s.db") as ledger:
        old, new = trial("u", "a", at=START - 9), trial("u", "a")
        ledger.record(old)
        ledger.record(new)
        await ledger.feedback(on(old, 1.0))
    async with kept(tmp_path / "s.db") as ledger:
        assert ledger._keeper is not None
        await ledger._keeper.prune(START - 5)
        await ledger.feedback(on(new, 1.0))
        with pytest.raises(AnswerUnknown):
            await ledger.feedback(on(old, 1.0))
        assert (await rewards(ledger))["a"] == (1, 1, 0)


async def test_without_a_database_the_latest_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECENT", 2)
    ledger, ts = Ledger(), [trial("u", "a") for _ in range(3)]
    for t in ts:
        ledger.record(t)
    for t in ts[1:]:
        await ledger.feedback(on(t, 1.0))
    with pytest.raises(AnswerUnknown, match="still known"):
        await ledger.feedback(on(ts[0], 1.0))

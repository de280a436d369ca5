"""Keeper: the ledger's rooms in the database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from typing import Any

from sqlalchemy import RowMapping, Table, and_, case, delete, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from deltaserve.server.ledger.balance import Balance
from deltaserve.server.ledger.batch import Batch, Waiting, fill, repay
from deltaserve.server.ledger.book import Book, Counts, Totals
from deltaserve.server.ledger.erased import Erased, Keys
from deltaserve.server.ledger.feedback import Answer, Given
from deltaserve.server.ledger.looks import Looks
from deltaserve.server.ledger.tables import BOOKS, EXPOSURES, FEEDBACK, LOOKS, TRIALS
from deltaserve.server.state.records import Entry
from deltaserve.server.state.store import Store, note

PAGE = 20_000
"""Rows that are read at once: a transaction is not to take long."""

PRUNE = 5_000


class Keeper:
    """Every method raises StateUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def write(self, batch: Batch) -> list[Given | None]:
        """All of it, or nothing. -> for each piece of feedback, the one that it replaces."""
        async with self._store.transaction() as connection:
            await _put(connection, BOOKS, batch.books)
            await _put(connection, LOOKS, batch.looks)
            await _put(connection, EXPOSURES, batch.users)
            await _put(connection, TRIALS, [_trial(waiting) for waiting in batch.trials])
            earlier = await self._given(connection, [given.key for given in batch.given])
            replaced = []
            for given in batch.given:
                replaced.append(earlier.get(given.key))
                earlier[given.key] = given
            await _put(connection, FEEDBACK, [_feedback(g) for g in earlier.values()])
        return replaced

    async def answer(self, key: bytes) -> Answer | None:
        """Of the trial of that key."""
        columns = (TRIALS.c.book, BOOKS.c.route, TRIALS.c.arm, TRIALS.c.user, TRIALS.c.counts)
        query = select(*columns).join(BOOKS, BOOKS.c.id == TRIALS.c.book)
        async with self._store.transaction() as connection:
            row = (await connection.execute(query.where(TRIALS.c.id == key))).first()
        if row is None:
            return None
        book, route, arm, user, counts = row
        return Answer(book, route, arm, user, Counts(counts), key)

    async def books(self, routes: Collection[str] | None = None) -> tuple[list[Book], int]:
        """The newest of each of the routes, or of all, and the largest id of all."""
        newest = select(BOOKS.c.route, func.max(BOOKS.c.epoch)).group_by(BOOKS.c.route)
        both = BOOKS.outerjoin(LOOKS, LOOKS.c.book == BOOKS.c.id)
        query = select(*BOOKS.columns, LOOKS.c.looks).select_from(both)
        query = query.where(tuple_(BOOKS.c.route, BOOKS.c.epoch).in_(newest))
        async with self._store.transaction() as connection:
            found = (await connection.execute(query)).mappings().all()
            last = (await connection.execute(select(func.max(BOOKS.c.id)))).scalar()
        rows = [row for row in found if routes is None or row["route"] in routes]
        return [await self._book(row) for row in rows], last or 0

    async def shadows(self) -> dict[str, set[str]]:
        """The arms that ever ran in the shadow of answers, of each route that was ever counted."""
        found: dict[str, set[str]] = {}
        for route, totals in await self._rows(select(BOOKS.c.route, BOOKS.c.totals)):
            arms = json.loads(totals)["arms"].items()
            shadows = found.setdefault(route, set())
            shadows.update(arm for arm, dumped in arms if dumped["shadow"])
        return found

    async def erase(self, keys: Keys, entry: Entry) -> Erased:
        """All rows of a user."""
        counts: set[tuple[int, int]] = set()
        requests = feedback = 0
        async with self._store.transaction() as connection:
            for route, users in keys.items():
                books = select(BOOKS.c.id).where(BOOKS.c.route == route)
                exposed, given = (
                    and_(table.c.book.in_(books), table.c.user.in_(users))
                    for table in (EXPOSURES, FEEDBACK)
                )
                query = select(EXPOSURES.c.book, EXPOSURES.c.user).where(exposed)
                counts.update(map(tuple, await connection.execute(query)))
                await connection.execute(delete(EXPOSURES).where(exposed))
                feedback += (await connection.execute(delete(FEEDBACK).where(given))).rowcount
                theirs = TRIALS.c.user.in_(users)
                requests += (await connection.execute(delete(TRIALS).where(theirs))).rowcount
            await note(connection, entry)
        return Erased(counts, requests, feedback)

    async def prune(self, before: float) -> None:
        """Forget the trials that ended earlier; what they counted for stays."""
        old = select(TRIALS.c.id).where(TRIALS.c.at < before).limit(PRUNE)
        while True:
            async with self._store.transaction() as connection:
                gone = await connection.execute(delete(TRIALS).where(TRIALS.c.id.in_(old)))
            if gone.rowcount < PRUNE:
                return

    async def _book(self, row: RowMapping) -> Book:
        book = Book(row["route"], row["epoch"], row["start"], row["id"])
        totals = json.loads(row["totals"])
        book.arms = list(totals["arms"])
        book.totals = [Totals.load(dumped) for dumped in totals["arms"].values()]
        book.balance, book.moved = Balance.load(totals["balance"]), totals["moved"]
        book.uncounted, book.weights = totals["uncounted"], totals["weights"]
        book.looks = Looks.load(json.loads(row["looks"])) if row["looks"] else Looks()
        columns = [c for c in EXPOSURES.columns if c.name != "book"]
        users = select(*columns).where(EXPOSURES.c.book == book.id)
        async for rows in self._pages(users, EXPOSURES.c.user):
            fill(book, rows)
        async for rewards in self._rewards(book.id):
            repay(book, rewards)
        earlier = select(BOOKS.c.id).where(
            and_(BOOKS.c.route == book.route, BOOKS.c.epoch < book.epoch)
        )
        for (number,) in await self._rows(earlier):
            async for rewards in self._rewards(number, FEEDBACK.c.counts == Counts.BEFORE):
                book.remember({user: (total, n) for user, _, total, n, _ in rewards})
        return book

    def _rewards(self, book: int, *where: Any) -> AsyncIterator[list[Any]]:
        """By user and what they count for: sum, number, number below 0."""
        reward = FEEDBACK.c.reward
        negative = func.sum(case((reward < 0, 1), else_=0))
        groups = (FEEDBACK.c.user, FEEDBACK.c.counts)
        query = select(*groups, func.sum(reward), func.count(), negative)
        some = (FEEDBACK.c.user.is_not(None), reward.is_not(None), FEEDBACK.c.book == book)
        query = query.where(and_(*some, *where)).group_by(*groups)
        return self._pages(query, FEEDBACK.c.user)

    async def _pages(self, query: Any, user: Any) -> AsyncIterator[list[Any]]:
        """The rows by user, which is their first column, all of a user on one page; a transaction
        each, since none is to take long."""
        rows = await self._rows(query.order_by(user).limit(PAGE))
        while len(rows) == PAGE:
            last = rows[-1][0]
            yield [row for row in rows if row[0] < last]
            rows = await self._rows(query.where(user >= last).order_by(user).limit(PAGE))
        yield rows

    async def _rows(self, query: Any) -> list[Any]:
        async with self._store.transaction() as connection:
            return list(map(tuple, await connection.execute(query)))

    async def _given(
        self, connection: AsyncConnection, keys: Iterable[bytes]
    ) -> dict[bytes, Given]:
        columns = [c for c in FEEDBACK.columns if c.name != "labels"]
        query = select(*columns, BOOKS.c.route).join(BOOKS, BOOKS.c.id == FEEDBACK.c.book)
        found = {}
        for row in await connection.execute(query.where(FEEDBACK.c.id.in_(list(keys)))):
            counts = Counts(row.counts)
            answer = Answer(row.book, row.route, row.arm, row.user, counts, row.request)
            found[row.id] = Given(row.id, row.at, answer, row.reward, {})
        return found


async def _put(
    connection: AsyncConnection, table: Table, rows: Iterable[Mapping[str, Any]]
) -> None:
    """Insert them, or replace those of the same key."""
    rows = list(rows)
    if not rows:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    new = dialect.insert(table)
    keys = [column.name for column in table.primary_key]
    rest = {c.name: new.excluded[c.name] for c in table.columns if c.name not in keys}
    await connection.execute(new.on_conflict_do_update(index_elements=keys, set_=rest), rows)


def row(book: Book) -> dict[str, Any]:
    """Of `BOOKS`."""
    arms = {arm: totals.dump() for arm, totals in zip(book.arms, book.totals, strict=True)}
    totals = {
        "arms": arms,
        "balance": book.balance.dump(),
        "moved": book.moved,
        "uncounted": book.uncounted,
        "weights": dict(book.weights),
    }
    return {
        "id": book.id,
        "route": book.route,
        "epoch": book.epoch,
        "start": book.start,
        "totals": json.dumps(totals),
    }


def looks(book: Book) -> dict[str, Any]:
    """Of `LOOKS`."""
    return {"book": book.id, "looks": json.dumps(book.looks.dump())}


def _trial(waiting: Waiting) -> dict[str, Any]:
    key, book, trial, user, counts = waiting
    names = ("at", "arm", "shadow", "first_token", "seconds", "prompt_tokens", "completion_tokens")
    own = {name: getattr(trial, name) for name in (*names, "empty", "refusal")}
    more = {"ended": trial.ended.value, "counts": counts.value}
    return {"id": key, "book": book, "user": user, **own, **more}


def _feedback(given: Given) -> dict[str, Any]:
    answer = given.answer
    return {
        "id": given.key,
        "at": given.at,
        "book": answer.book,
        "arm": answer.arm,
        "user": answer.user,
        "counts": answer.counts.value,
        "request": answer.request,
        "reward": given.reward,
        "labels": json.dumps(dict(given.labels)),
    }

"""Writer: brings what the ledger learns to the database, off the way of requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from deltaserve.server.errors import AnswerUnknown, RequestError, StateUnavailable
from deltaserve.server.ledger.batch import Batch, Waiting, exposures
from deltaserve.server.ledger.book import Book
from deltaserve.server.ledger.erased import Erased, Keys
from deltaserve.server.ledger.feedback import Given

if TYPE_CHECKING:
    from deltaserve.server.ledger.keep import Keeper
    from deltaserve.server.state.records import Entry

log = logging.getLogger(__name__)

KEPT_DAYS = 30
"""For which the database knows a request."""

EACH_SECONDS = 1.0
PRUNE_SECONDS = 3600.0

CHUNK = 1000
"""Trials, users and pieces of feedback, each, that are written in one transaction."""

MOST = 100_000
"""Trials, and pieces of feedback, that wait for a database that does not answer."""


Place: TypeAlias = tuple[int, int, int]
"""Where a user was: a book's id, the user's key, its index there."""


class Writer:
    """settle: what feedback counts for when it is written. apply: feedback that is written, and
    what it replaces, to the tallies; gives the book that it has changed."""

    def __init__(
        self,
        keeper: Keeper,
        settle: Callable[[Given], Given],
        apply: Callable[[Given, Given | None], Book | None],
    ) -> None:
        self._keeper, self._settle, self._apply = keeper, settle, apply
        self._trials: deque[Waiting] = deque()
        self._books: dict[int, Book] = {}
        self._users: dict[tuple[int, int], None] = {}
        """By book and index, in order of their change."""
        self._given: deque[tuple[Given, asyncio.Future[None]]] = deque()
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._lost = 0

    def start(self) -> None:
        """Write once a second, from now on."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write what is left, as far as the database takes it."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        try:
            await self._write()
        except StateUnavailable as error:
            log.warning("what the ledger learned last is not kept: %s", error)

    def note(self, waiting: Waiting, book: Book | None, user: int) -> None:
        """A trial, the book that it has changed and the index of its user, -1 for nobody."""
        if book is not None:
            self._books[book.id] = book
            if user >= 0:
                self._users[book.id, user] = None
        self._trials.append(waiting)
        if len(self._trials) > MOST:
            self._trials.popleft()
            self._lost += 1

    async def put(self, given: Given) -> None:
        """Returns when it is durable; several at once share a transaction. StateUnavailable."""
        done = asyncio.get_running_loop().create_future()
        self._given.append((given, done))
        writing = asyncio.ensure_future(self._write_until(done))
        writing.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(writing)

    @property
    def books(self) -> list[Book]:
        """Those that have changed since they were written."""
        return list(self._books.values())

    async def erase(
        self, keys: Keys, entry: Entry, forget: Callable[[Keys, Iterable[Book]], Sequence[Place]]
    ) -> Erased:
        """Returns when it is durable. forget: takes the user out of these books and of all else
        that is in memory, once it has gone from the database; gives where it was.
        StateUnavailable, after which nothing is erased."""
        async with self._writing:
            erased = await self._keeper.erase(keys, entry)
            users = {user for each in keys.values() for user in each}
            pending = len(self._trials)
            self._trials = deque(one for one in self._trials if one.user not in users)
            pending -= len(self._trials)
            said = [pair for pair in self._given if pair[0].answer.user in users]
            self._given = deque(pair for pair in self._given if pair[0].answer.user not in users)
            _refuse(said, AnswerUnknown("the user was erased meanwhile"))
            places = forget(keys, self.books)
            for book, _, index in places:
                self._users.pop((book, index), None)
        counts = [(book, user) for book, user, _ in places]
        return erased + Erased(counts, pending, len(said))

    async def _run(self) -> None:
        pruned = -PRUNE_SECONDS
        while True:
            await asyncio.sleep(EACH_SECONDS)
            try:
                await self._write()
                if time.monotonic() > pruned + PRUNE_SECONDS:
                    await self._keeper.prune(time.time() - KEPT_DAYS * 86400)
                    pruned = time.monotonic()
            except StateUnavailable as error:
                log.warning("the ledger is not written: %s", error)
            except Exception:
                log.exception("the ledger is not written")

    async def _write(self) -> None:
        async with self._writing:
            while self._trials or self._users or self._books or self._given:
                await self._write_some()

    async def _write_until(self, done: asyncio.Future[None]) -> None:
        try:
            async with self._writing:
                while not done.done():
                    await self._write_some()
        except BaseException:
            self._given = deque(pair for pair in self._given if pair[1] is not done)
            raise
        done.result()

    async def _write_some(self) -> None:
        """Feedback goes after the trials before it, so that what it is of is known when it is."""
        trials = list(islice(self._trials, CHUNK))
        users = list(islice(self._users, CHUNK))
        last = len(trials) == len(self._trials) and len(users) == len(self._users)
        queue = list(islice(self._given, CHUNK)) if last else []
        given = [self._settle(one) for one, _ in queue]
        books = list(self._books.values())
        looked = [book for book in books if book.looks.fresh]
        batch = self._batch(books, looked, users, trials, given)
        for _ in trials:
            self._trials.popleft()
        for user in users:
            del self._users[user]
        for _ in queue:
            self._given.popleft()
        if last:
            self._books = {}
        try:
            replaced = await self._keeper.write(batch)
        except BaseException as error:
            self._trials.extendleft(reversed(trials))
            self._users.update(dict.fromkeys(users))
            self._books.update({book.id: book for book in books})
            for book in looked:
                book.looks.fresh = True
            refused = queue
            if isinstance(error, StateUnavailable):  # each would wait for as long again
                refused, self._given = [*queue, *self._given], deque()
            _refuse(refused, error)
            raise
        changed = [self._apply(one, old) for one, old in zip(given, replaced, strict=True)]
        try:
            for one, in_book in zip(given, changed, strict=True):
                if in_book is not None:
                    await in_book.look(one.at)
                    if in_book.looks.fresh:
                        self._books[in_book.id] = in_book
        finally:  # it is kept, whatever comes of the history
            for _, done in queue:
                if not done.done():
                    done.set_result(None)
        if self._lost:
            log.warning("%d requests are counted, but not kept one by one", self._lost)
            self._lost = 0

    def _batch(
        self,
        books: list[Book],
        looked: list[Book],
        users: list[tuple[int, int]],
        trials: list[Waiting],
        given: list[Given],
    ) -> Batch:
        from deltaserve.server.ledger import keep  # SQLAlchemy: not without --state

        for book in looked:
            book.looks.fresh = False
        rows = [
            row
            for book in books
            for row in exposures(book, [user for number, user in users if number == book.id])
        ]
        return Batch(
            [keep.row(book) for book in books],
            [keep.looks(book) for book in looked],
            rows,
            trials,
            given,
        )


def _refuse(queue: list[tuple[Given, asyncio.Future[None]]], error: BaseException) -> None:
    said = error if isinstance(error, RequestError) else StateUnavailable("the server stops")
    for _, done in queue:
        if not done.done():
            done.set_exception(said)
            done.exception()  # it is seen, also when its client has gone

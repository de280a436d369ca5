"""Ledger: what came of the requests that routes gave to their arms."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltaserve.server.errors import AnswerUnknown, UserNotExposed
from deltaserve.server.ledger.batch import Waiting
from deltaserve.server.ledger.book import Book, Counts
from deltaserve.server.ledger.erased import Erased, Keys
from deltaserve.server.ledger.feedback import Answer, Feedback, Given
from deltaserve.server.ledger.names import request_key, user_key
from deltaserve.server.ledger.tally import Tallies
from deltaserve.server.ledger.trial import Trial
from deltaserve.server.ledger.writer import KEPT_DAYS, Place, Writer

if TYPE_CHECKING:
    from deltaserve.server.ledger.keep import Keeper
    from deltaserve.server.state.records import Entry

MAX_USERS = 2_000_000
"""Of all books together, about 400 MB."""

RECENT = 100_000
"""Requests, and pieces of feedback, that are known without a database; about 30 MB each."""

OVERTAKEN_SECONDS = 1.0
"""That feedback waits for the record of its answer, which a client may hear of first."""


class Ledger:
    """Belongs to one event loop. Keeps the book of each route's newest epoch in memory. max_users:
    later ones are not counted, which their book says; those that came before are as good a sample
    of all as any. keeper: writes it down, once `open` was called; without one all is forgotten."""

    def __init__(self, keeper: Keeper | None = None, max_users: int = MAX_USERS) -> None:
        self._max_users = max_users
        self._users = 0
        self._books: dict[str, Book] = {}
        self._ids: dict[tuple[str, int], int] = {}
        self._last = 0
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._given: OrderedDict[bytes, Given] = OrderedDict()
        self._erasures = 0
        self._keeper = keeper
        self._writer = None if keeper is None else Writer(keeper, self._settled, self._apply)

    async def open(self, routes: Collection[str] | None = None) -> None:
        """Bring back what was kept of the routes, or of all, and keep what comes.
        StateUnavailable."""
        if self._keeper is None or self._writer is None:
            return
        books, self._last = await self._keeper.books(routes)
        for book in books:
            self._books[book.route] = book
            self._ids[book.route, book.epoch] = book.id
            self._users += len(book.users)
        self._writer.start()

    async def close(self) -> None:
        """Write what is left, as far as the database takes it."""
        if self._writer is not None:
            await self._writer.close()

    def record(self, trial: Trial) -> None:
        """A request has ended. At once."""
        book = self._current(trial)
        current = book is not None and book.epoch == trial.epoch
        number = self._ids.get((trial.route, trial.epoch))
        if number is None:
            return  # of an epoch that nothing is known of any more
        shadow = trial.arm if trial.shadow else ""
        key = request_key(trial.tenant, trial.request_id, shadow)
        user, i, counts = None, -1, Counts.NOTHING
        if trial.user:
            user = user_key(trial.route, trial.tenant, trial.user, shadow)
        if book is not None and current:
            before = len(book.users)
            counts, i = book.add(trial, user, room=self._users < self._max_users)
            self._users += len(book.users) - before
        if not trial.shadow:
            answer = Answer(number, trial.route, trial.arm, user, counts, key)
            _remember(self._answers, key, answer)
        if self._writer is not None:
            waiting = Waiting(key, number, trial, user, counts)
            self._writer.note(waiting, book if current else None, i)

    async def feedback(self, feedback: Feedback) -> Answer:
        """Kept when it returns. -> what it counts for. AnswerUnknown, UserNotExposed, and
        StateUnavailable, after which it is unknown whether it is kept."""
        erasures = self._erasures
        answer = await self._answer(feedback)
        while self._erasures != erasures:  # it may be of one who was erased while it was looked up
            erasures, answer = self._erasures, await self._answer(feedback)
        labels = dict(feedback.labels)
        given = Given(feedback.key(), feedback.at, answer, feedback.reward, labels)
        if self._writer is None:
            given = self._settled(given)
            changed = self._apply(given, self._given.pop(given.key, None))
            _remember(self._given, given.key, given)
            if changed is not None:
                await changed.look(given.at)
        else:
            await self._writer.put(given)
        return answer

    async def erase(self, tenant: str, user: str, entry: Entry) -> Erased:
        """Forget what came of the user's requests and what was said of them, on every route: in
        the database and in memory. Durable when it returns, with the entry in the audit log, which
        must not name the user. StateUnavailable, after which nothing is erased."""
        shadows = await self._keeper.shadows() if self._keeper is not None else {}
        for route, _ in self._ids:
            shadows.setdefault(route, set())
        changed = self._writer.books if self._writer is not None else []
        for book in (*self._books.values(), *changed):
            shadows.setdefault(book.route, set()).update(book.shadows())
        keys = {
            route: [user_key(route, tenant, user, shadow) for shadow in ("", *arms)]
            for route, arms in shadows.items()
        }
        if self._writer is not None:
            return await self._writer.erase(keys, entry, self._forget)
        requests, said = len(self._answers), len(self._given)
        counts = [(book, key) for book, key, _ in self._forget(keys, ())]
        return Erased(counts, requests - len(self._answers), said - len(self._given))

    def _forget(self, keys: Keys, changed: Iterable[Book]) -> list[Place]:
        """Of a user, in the books that there are and in those that have changed."""
        users = {user for each in keys.values() for user in each}
        places = []
        current = {book.id: book for book in self._books.values()}
        for book in ({book.id: book for book in changed} | current).values():
            for user in keys.get(book.route, ()):
                if (i := book.erase(user)) >= 0:
                    places.append((book.id, user, i))
                    self._users -= book.id in current
        for key in [k for k, answer in self._answers.items() if answer.user in users]:
            del self._answers[key]
        for key in [k for k, given in self._given.items() if given.answer.user in users]:
            del self._given[key]
        self._erasures += 1
        return places

    async def tallies(
        self, route: str, epoch: int, limits: Mapping[str, float] | None = None
    ) -> Tallies:
        """What came of one epoch of a route so far, nothing unless it is the newest. limits: of
        ``slow`` and ``slow_first_token`` in seconds, of ``long`` in tokens; without one, what the
        trials said of their own limit counts, whatever that was when they ended."""
        book = self.book(route, epoch)
        return Tallies() if book is None else await book.tallies(limits or {})

    def book(self, route: str, epoch: int) -> Book | None:
        """Of the newest epoch; None for others and where nothing was recorded."""
        book = self._books.get(route)
        return book if book is not None and book.epoch == epoch else None

    def forget(self, route: str) -> None:
        """It was deleted: there is room for others' users. What was kept of it stays."""
        book = self._books.pop(route, None)
        if book is not None:
            self._users -= len(book.users)

    def _current(self, trial: Trial) -> Book | None:
        """Of the route's newest epoch, which is not the trial's if that is an older one. None if
        the route was forgotten meanwhile."""
        book = self._books.get(trial.route)
        if book is None and (trial.route, trial.epoch) in self._ids:
            return None
        if book is not None and book.epoch >= trial.epoch:
            return book
        past = None if book is None else book.before_next()
        if book is not None:
            self._users -= len(book.users)
        self._last += 1
        new = Book(trial.route, trial.epoch, trial.at, self._last, past)
        self._books[trial.route] = new
        self._ids[trial.route, trial.epoch] = new.id
        return new

    async def _answer(self, feedback: Feedback) -> Answer:
        if not feedback.request_id:
            return self._exposed(feedback)
        key = request_key(feedback.tenant, feedback.request_id)
        answer = await self._known(key)
        late = asyncio.get_running_loop().time() + OVERTAKEN_SECONDS
        while answer is None and asyncio.get_running_loop().time() < late:
            await asyncio.sleep(OVERTAKEN_SECONDS / 20)
            answer = self._answers.get(key)
        if answer is None:
            raise AnswerUnknown(
                f"request_id {feedback.request_id!r}: no route gave an answer of that id"
                + (f" in {KEPT_DAYS} days" if self._keeper else " that is still known"),
                field="request_id",
            )
        return answer

    async def _known(self, key: bytes) -> Answer | None:
        answer = self._answers.get(key)
        if answer is None and self._keeper is not None:
            answer = await self._keeper.answer(key)
        return answer

    def _exposed(self, feedback: Feedback) -> Answer:
        book = self._books.get(feedback.route)
        user = user_key(feedback.route, feedback.tenant, feedback.user)
        i = -1 if book is None else book.users.index.get(user, -1)
        if book is None or i < 0:
            raise UserNotExposed(
                f"user {feedback.user!r}: route {feedback.route!r} has answered none of its "
                "requests since it was last changed; give feedback after an answer",
                field="user",
            )
        arm = book.arms[book.users.row(i)["arm"]]
        return Answer(book.id, book.route, arm, user, book.counts_for(user))

    def _counted(self, answer: Answer) -> Book | None:
        """The book that it counts in, if it does."""
        book = self._books.get(answer.route)
        if book is None or book.id != answer.book or answer.user not in book.users.index:
            return None
        return book

    def _settled(self, given: Given) -> Given:
        """What it counts for by now: of an answer from before its user was assigned at random, or
        of an earlier epoch, for nothing, since the experiment may have touched what is said."""
        answer = given.answer
        book, user = self._counted(answer), answer.user
        if book is not None and user is not None and book.counts_for(user) is answer.counts:
            return given
        return replace(given, answer=replace(answer, counts=Counts.NOTHING))

    def _apply(self, given: Given, replaced: Given | None) -> Book | None:
        """To the tallies. -> what has changed."""
        changed = None
        for one, times in ((replaced, -1), (given, 1)):
            if one is None or one.reward is None or one.answer.counts is Counts.NOTHING:
                continue
            book, user = self._counted(one.answer), one.answer.user
            if book is not None and user is not None:
                book.reward(user, one.answer.counts, one.reward, times)
                changed = book
            elif one.answer.counts is Counts.BEFORE and user is not None:
                newest = self._books.get(one.answer.route)
                if newest is not None:
                    newest.remember({user: (times * one.reward, times)})
        return changed


def _remember(known: OrderedDict[bytes, Any], key: bytes, value: object) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > RECENT:
        known.popitem(last=False)

"""Ledger: what came of the requests that routes gave to their arms."""

from __future__ import annotations

from collections.abc import Mapping

from deltaserve.server.ledger.book import Book
from deltaserve.server.ledger.names import user_key
from deltaserve.server.ledger.tally import Tallies
from deltaserve.server.ledger.trial import Trial

MAX_USERS = 2_000_000
"""Of all books together, about 400 MB."""


class Ledger:
    """Belongs to one event loop. Keeps the book of each route's newest epoch in memory. max_users:
    later ones are not counted, which their book says; those that came before are as good a sample
    of all as any."""

    def __init__(self, max_users: int = MAX_USERS) -> None:
        self._books: dict[str, Book] = {}
        self._max_users = max_users

    def record(self, trial: Trial) -> None:
        """A request has ended. At once."""
        book = self._current(trial)
        if book is None:
            return
        user = None
        if trial.user:
            shadow = trial.arm if trial.shadow else ""
            user = user_key(trial.route, trial.tenant, trial.user, shadow)
        book.add(trial, user, room=self._users() < self._max_users)

    async def tallies(
        self, route: str, epoch: int, limits: Mapping[str, float] | None = None
    ) -> Tallies:
        """What came of one epoch of a route so far, nothing unless it is the newest. limits: of
        ``slow`` and ``slow_first_token`` in seconds, of ``long`` in tokens; without one, what the
        trials said of their own limit counts, whatever that was when they ended."""
        book = self.book(route, epoch)
        return Tallies() if book is None else book.tallies(limits or {})

    def book(self, route: str, epoch: int) -> Book | None:
        """Of the newest epoch; None for others and where nothing was recorded."""
        book = self._books.get(route)
        return book if book is not None and book.epoch == epoch else None

    def _current(self, trial: Trial) -> Book | None:
        book = self._books.get(trial.route)
        if book is None or book.epoch < trial.epoch:
            book = self._books[trial.route] = Book(trial.route, trial.epoch, trial.at)
        return book if book.epoch == trial.epoch else None

    def _users(self) -> int:
        return sum(len(book.users) for book in self._books.values())

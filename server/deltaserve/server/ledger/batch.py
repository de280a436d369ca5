"""Batch: what the database does not have yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltaserve.server.ledger.book import Book, Counts
from deltaserve.server.ledger.feedback import Given
from deltaserve.server.ledger.trial import Trial
from deltaserve.server.ledger.users import Met, Rows


class Waiting(NamedTuple):
    """A trial for the database. key: of its request. user: key."""

    key: bytes
    book: int
    trial: Trial
    user: int | None
    counts: Counts


@dataclass
class Batch:
    """Rows of the tables, as they were when it was made, of what changed."""

    books: Sequence[dict[str, Any]] = ()
    looks: Sequence[dict[str, Any]] = ()
    users: Sequence[dict[str, Any]] = ()
    trials: Sequence[Waiting] = ()
    given: Sequence[Given] = ()


def exposures(book: Book, users: Sequence[int]) -> list[dict[str, Any]]:
    """Rows for the database, of users by index."""
    rows: Rows = book.users.rows[list(users)]
    names = ("user", "arm", "met", "first", "requests", "seconds", "first_token", "tokens")
    columns = [rows[name].tolist() for name in names]
    return [
        {"book": book.id, **dict(zip(names, values, strict=True))}
        for values in zip(*columns, strict=True)
    ]


def fill(book: Book, rows: Sequence[Sequence[Any]]) -> None:
    """Put the users of the database, (user, arm, met, ...) as above, into an empty book."""
    for user, arm, met, first, requests, seconds, first_token, tokens in rows:
        row = book.users.row(book.users.add(user))
        row["arm"], row["met"], row["first"], row["requests"] = arm, met, first, requests
        row["seconds"], row["first_token"], row["tokens"] = seconds, first_token, tokens


def repay(book: Book, rows: Sequence[tuple[int, int, float, int, int]]) -> None:
    """Put the rewards of the database, (user, counts, sum, number, number below 0), into their
    users' rows."""
    for user, counts, total, n, negative in rows:
        i = book.users.index.get(user, -1)
        if i < 0:
            continue
        row = book.users.row(i)
        if counts == Counts.BEFORE and row["met"] & Met.RANDOMIZED:
            row["before_sum"] += total
            row["before_n"] += n
        elif counts != Counts.NOTHING:
            row["sum"], row["n"], row["negative"] = total, n, negative

"""Store: adapters and the audit log, in a database. What a method has returned from is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from deltaserve.server.errors import StateUnavailable
from deltaserve.server.state.database import NewerDatabase, connect, migrate
from deltaserve.server.state.records import MAX_DETAIL, AdapterRecord, Entry
from deltaserve.server.state.tables import ADAPTERS, AUDIT

SECONDS = 5.0
"""A change that takes longer is refused."""


class StateError(Exception):
    """The database cannot be used; the message says why."""


class Store:
    """One writer: changes are made one after the other, in the order in which they were asked for.
    Belongs to one event loop. Every method raises StateUnavailable when the database is gone, full,
    read-only or slow; nothing of that change is kept then, but for one that took too long, of which
    that is unknown."""

    def __init__(self, engine: AsyncEngine, seconds: float = SECONDS) -> None:
        self._engine = engine
        self._seconds = seconds
        self._writer = asyncio.Lock()

    @classmethod
    async def open(cls, url: URL, seconds: float = SECONDS) -> Store:
        """Make the tables, or bring them up to date, and see that they can be written to.
        StateError."""
        try:
            store = cls(connect(url), seconds)
            async with asyncio.timeout(60), store._engine.begin() as connection:
                await connection.run_sync(migrate)
                await note(connection, Entry("server", "Start"))
        except NewerDatabase as error:
            raise StateError(str(error)) from error
        except ImportError as error:
            raise StateError(
                f"{error}; PostgreSQL needs asyncpg: pip install 'deltaserve[postgres]'"
            ) from error
        except (SQLAlchemyError, OSError) as error:
            raise StateError(_plain(error)) from error
        return store

    async def adapters(self) -> list[AdapterRecord]:
        """All of them, by name."""
        async with self.transaction() as connection:
            found = await connection.execute(select(ADAPTERS).order_by(ADAPTERS.c.name))
            return [AdapterRecord(**row) for row in found.mappings()]

    async def audit(self) -> list[Entry]:
        """All of it, oldest first."""
        columns = [AUDIT.c[n] for n in ("who", "verb", "name", "outcome", "detail")]
        async with self.transaction() as connection:
            found = await connection.execute(select(*columns).order_by(AUDIT.c.id))
            return [Entry(**row) for row in found.mappings()]

    async def note(self, entry: Entry) -> None:
        """Of something that changed nothing."""
        async with self.transaction() as connection:
            await note(connection, entry)

    async def begin(self, record: AdapterRecord, entry: Entry) -> None:
        """Its load has begun. One that is served under that name stays what it is."""
        async with self.transaction() as connection:
            known = await _find(connection, record.name)
            if known is None or known.error:
                await _put(connection, record)
            await note(connection, entry)

    async def keep(self, make: Callable[[], AdapterRecord | None], entry: Entry) -> None:
        """It is served. make: called when it is this change's turn; None for one that is not
        registered any more. A second load of the same content does not change how it is read."""
        async with self.transaction() as connection:
            record = make()
            if record is not None:
                known = await _find(connection, record.name)
                if known is not None and known.digest == record.digest and not known.error:
                    both = known.register_only and record.register_only
                    shared = known.shared or record.shared
                    record = replace(known, pinned=record.pinned, register_only=both, shared=shared)
                await _put(connection, record)
            await note(connection, entry)

    async def fail(self, name: str, error: str, entry: Entry) -> None:
        """It is not served, and this is why."""
        change = update(ADAPTERS).where(ADAPTERS.c.name == name).values(error=error)
        async with self.transaction() as connection:
            await connection.execute(change)
            await note(connection, entry)

    async def pin(self, name: str, pinned: bool, entry: Entry) -> None:
        """Nothing but a line in the audit log for one that is not kept here."""
        change = update(ADAPTERS).where(ADAPTERS.c.name == name).values(pinned=pinned)
        async with self.transaction() as connection:
            await connection.execute(change)
            await note(connection, entry)

    async def remove(self, name: str, entry: Entry, *, begun: bool = False) -> bool:
        """begun: only if its first load is not done. -> whether it was there; else nothing is
        written."""
        async with self.transaction() as connection:
            known = await _find(connection, name)
            if known is None or (begun and known.digest):
                return False
            await connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == name))
            await note(connection, entry)
        return True

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A change, durable after its end. For the tables of other rooms as well."""
        try:
            async with asyncio.timeout(self._seconds), self._writer, self._engine.begin() as begun:
                yield begun
        except TimeoutError as error:
            raise StateUnavailable(f"the database took more than {self._seconds:g} s") from error
        except (SQLAlchemyError, OSError) as error:
            raise StateUnavailable(_plain(error)) from error


async def _find(connection: AsyncConnection, name: str) -> AdapterRecord | None:
    found = await connection.execute(select(ADAPTERS).where(ADAPTERS.c.name == _text(name)))
    row = found.mappings().first()
    return None if row is None else AdapterRecord(**row)


async def _put(connection: AsyncConnection, record: AdapterRecord) -> None:
    await connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == record.name))
    await connection.execute(insert(ADAPTERS).values(**asdict(record)))


async def note(connection: AsyncConnection, entry: Entry) -> None:
    """A line in the audit log, in the transaction of the change."""
    texts: dict[str, Any] = {k: _text(v[:MAX_DETAIL]) for k, v in asdict(entry).items()}
    await connection.execute(insert(AUDIT).values(at=datetime.now(UTC), **texts))


def _text(text: str) -> str:
    """PostgreSQL takes every character but one, which no name has."""
    return text.replace("\0", "\ufffd")


def _plain(error: Exception) -> str:
    """Without the statement and its values."""
    return f"the database does not answer: {getattr(error, 'orig', None) or error}"

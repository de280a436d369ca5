"""Routes, as the state keeps them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sqlalchemy import BigInteger, Column, Float, String, Table, Text, delete, insert, select

from deltaserve.server.state.records import Entry
from deltaserve.server.state.store import Store, note
from deltaserve.server.state.tables import METADATA

ROUTES = Table(
    "routes",
    METADATA,
    Column("name", String(128), primary_key=True),
    Column("spec", Text, nullable=False),  # JSON of a deltaserve.v1.Route, digests included
    Column("epoch", BigInteger, nullable=False),  # milliseconds
    Column("etag", String(64), nullable=False),
    Column("began", Float, nullable=False),  # seconds, as the other times
    Column("changed", Float, nullable=False),
    Column("owner", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("state", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("weights", Text, nullable=False),  # JSON
    Column("bandit_at", Float, nullable=False),
)


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """One row."""

    name: str
    spec: str
    epoch: int
    etag: str
    began: float
    changed: float
    owner: str
    tenant: str
    state: str
    reason: str
    weights: str
    bandit_at: float


async def routes(store: Store) -> list[RouteRecord]:
    """All of them, by name."""
    async with store.transaction() as connection:
        found = await connection.execute(select(ROUTES).order_by(ROUTES.c.name))
        return [RouteRecord(**row) for row in found.mappings()]


async def put(store: Store, record: RouteRecord, entry: Entry) -> None:
    """In place of the one of that name."""
    async with store.transaction() as connection:
        await connection.execute(delete(ROUTES).where(ROUTES.c.name == record.name))
        await connection.execute(insert(ROUTES).values(**asdict(record)))
        await note(connection, entry)


async def remove(store: Store, name: str, entry: Entry) -> None:
    """Nothing but a line in the audit log if it is not there."""
    async with store.transaction() as connection:
        await connection.execute(delete(ROUTES).where(ROUTES.c.name == name))
        await note(connection, entry)

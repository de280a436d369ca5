"""KeyStore: keys and tenants in the state's database."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import RowMapping, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.records import Key, Tenant
from deltaserve.server.state.key_tables import KEYS, TENANTS
from deltaserve.server.state.records import Entry
from deltaserve.server.state.store import Store, note


class KeyStore:
    """What a method has returned from is durable, with a line in the audit log. Every method raises
    StateUnavailable when the database does not take it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> tuple[list[Key], list[Tenant]]:
        """Keys, those that were revoked as well, and tenants."""
        async with self._store.transaction() as connection:
            keys = [_key(row) for row in (await connection.execute(select(KEYS))).mappings()]
            found = await connection.execute(select(TENANTS))
            return keys, [Tenant(**row) for row in found.mappings()]

    async def create(self, key: Key, entry: Entry) -> None:
        """Its tenant as well, if there is none."""
        async with self._store.transaction() as connection:
            if not await _has_tenant(connection, key.tenant):
                await connection.execute(insert(TENANTS).values(**asdict(Tenant(key.tenant))))
            await connection.execute(insert(KEYS).values(**_row(key)))
            await note(connection, entry)

    async def revoke(self, key: Key, entry: Entry) -> None:
        """revoked is when."""
        change = update(KEYS).where(KEYS.c.id == key.id).values(revoked=key.revoked)
        async with self._store.transaction() as connection:
            await connection.execute(change)
            await note(connection, entry)

    async def put_tenant(self, tenant: Tenant, entry: Entry) -> None:
        """Make it or change it."""
        async with self._store.transaction() as connection:
            await connection.execute(delete(TENANTS).where(TENANTS.c.name == tenant.name))
            await connection.execute(insert(TENANTS).values(**asdict(tenant)))
            await note(connection, entry)

    async def delete_tenant(self, name: str, entry: Entry) -> None:
        """Its keys are kept, revoked or expired as they are."""
        async with self._store.transaction() as connection:
            await connection.execute(delete(TENANTS).where(TENANTS.c.name == name))
            await note(connection, entry)

    async def note(self, entry: Entry) -> None:
        """Of something that changed nothing."""
        await self._store.note(entry)


async def _has_tenant(connection: AsyncConnection, name: str) -> bool:
    found = await connection.execute(select(TENANTS.c.name).where(TENANTS.c.name == name))
    return found.first() is not None


def _row(key: Key) -> dict[str, Any]:
    return {**asdict(replace(key, roles=frozenset())), "roles": " ".join(sorted(key.roles))}


def _key(row: RowMapping) -> Key:
    """Roles that this version does not know are left out."""
    roles = frozenset(Role(role) for role in row["roles"].split() if role in set(Role))
    return Key(**{**row, "roles": roles})

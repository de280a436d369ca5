"""Book: the keys and tenants that the server knows, in memory."""

from __future__ import annotations

from collections.abc import Iterable

from deltaserve.server.identity.records import Key, Tenant


class Book:
    """Belongs to one event loop. closed: nobody is let in without a key. Once there was a key it
    stays so: a server whose keys have all been revoked is not open to everybody."""

    def __init__(
        self, keys: Iterable[Key] = (), tenants: Iterable[Tenant] = (), *, closed: bool = False
    ) -> None:
        self.closed = closed
        self._keys: dict[str, Key] = {}
        self._by_subject: dict[str, str] = {}
        self._tenants = {tenant.name: tenant for tenant in tenants}
        for key in keys:
            self.put(key)

    def put(self, key: Key) -> None:
        """In place of the one of that id, if there is one."""
        self.closed = True
        self._keys[key.id] = key
        if key.subject and not key.revoked:
            self._by_subject[key.subject] = key.id
        elif self._by_subject.get(key.subject) == key.id:
            del self._by_subject[key.subject]
        self._tenants.setdefault(key.tenant, Tenant(key.tenant))

    def find(self, key: str) -> Key | None:
        return self._keys.get(key)

    def of_subjects(self, subjects: Iterable[str]) -> list[Key]:
        """Those that a certificate with these names stands for."""
        found = {self._by_subject[s] for s in subjects if s in self._by_subject}
        return [self._keys[key] for key in sorted(found)]

    def every_key(self) -> list[Key]:
        """All of them, oldest first."""
        return sorted(self._keys.values(), key=lambda k: (k.created, k.id))

    def forget(self, keys: Iterable[str]) -> None:
        """Take these out. The book stays closed."""
        for name in keys:
            key = self._keys.pop(name)
            if self._by_subject.get(key.subject) == name:
                del self._by_subject[key.subject]

    def tenant(self, name: str) -> Tenant | None:
        return self._tenants.get(name)

    def tenants(self) -> list[Tenant]:
        """By name."""
        return [self._tenants[name] for name in sorted(self._tenants)]

    def put_tenant(self, tenant: Tenant) -> None:
        self._tenants[tenant.name] = tenant

    def forget_tenant(self, name: str) -> None:
        self._tenants.pop(name, None)

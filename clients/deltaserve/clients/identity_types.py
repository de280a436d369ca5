"""Keys and tenants. Times are `time.time()`; 0 is never."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Key:
    """Without its token. roles: ``generate``, ``feedback``, ``adapters``, ``routes``, ``admin``.
    subject: the name in a client certificate that it stands for, in place of a token."""

    id: str
    tenant: str
    roles: tuple[str, ...]
    subject: str = ""
    label: str = ""
    created: float = 0.0
    expires: float = 0.0
    revoked: float = 0.0


@dataclass(frozen=True, slots=True)
class NewKey:
    """token: told this once; empty for a key with a subject."""

    key: Key
    token: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """Its quotas; 0 is no limit."""

    name: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_requests: int = 0

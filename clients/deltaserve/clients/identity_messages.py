"""Keys and tenants <-> messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.clients.identity_types import Key, NewKey, Tenant
from deltaserve.v1 import identity_pb2 as pb

ROLES: dict[str, Any] = {
    name.removeprefix("ROLE_").lower(): number for name, number in pb.Role.items() if number
}
_NAMES = {number: name for name, number in ROLES.items()}


def create(
    tenant: str, roles: Sequence[str], subject: str, label: str, expires: float
) -> pb.CreateKeyRequest:
    """A CreateKeyRequest. TypeError for a role that there is not."""
    for role in roles:
        if role not in ROLES:
            raise TypeError(f"roles: {role!r} is not one of {', '.join(ROLES)}")
    made = pb.CreateKeyRequest(
        tenant=tenant, roles=[ROLES[role] for role in roles], subject=subject, label=label
    )
    if expires:
        made.expire_time.CopyFrom(Timestamp(seconds=int(expires), nanos=int(expires % 1 * 1e9)))
    return made


def created(m: pb.CreateKeyResponse) -> NewKey:
    """A key and its token."""
    return NewKey(key(m.key), m.token)


def key(m: pb.Key) -> Key:
    """One key."""
    return Key(
        m.id,
        m.tenant,
        tuple(_NAMES.get(role, str(role)) for role in m.roles),
        m.subject,
        m.label,
        _seconds(m.create_time),
        _seconds(m.expire_time),
        _seconds(m.revoke_time),
    )


def tenant(m: pb.Tenant) -> Tenant:
    """One tenant."""
    return Tenant(m.name, m.requests_per_minute, m.tokens_per_minute, m.concurrent_requests)


def put(given: Tenant) -> pb.PutTenantRequest:
    """A PutTenantRequest."""
    return pb.PutTenantRequest(
        tenant=pb.Tenant(
            name=given.name,
            requests_per_minute=given.requests_per_minute,
            tokens_per_minute=given.tokens_per_minute,
            concurrent_requests=given.concurrent_requests,
        )
    )


def _seconds(when: Timestamp) -> float:
    return when.seconds + when.nanos / 1e9

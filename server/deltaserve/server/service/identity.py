"""IdentityService: keys and tenants, made and taken away while the server runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from deltaserve.server.errors import IdentityConflict, IdentityUnknown, StateUnavailable
from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.certificate import FORM, is_subject
from deltaserve.server.identity.key_file import KeyFile
from deltaserve.server.identity.records import (
    MAX_QUOTA,
    QUOTAS,
    TENANT_NAME,
    TENANT_RULE,
    Key,
    Tenant,
)
from deltaserve.server.identity.sight import Sight
from deltaserve.server.service import convert
from deltaserve.server.service.call import Call
from deltaserve.server.service.status import reason
from deltaserve.server.state.records import Entry
from deltaserve.v1 import identity_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.server.service.key_store import KeyStore
    from deltaserve.server.state.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

_TO_WIRE: dict[Role, Any] = {role: pb.Role.Value(f"ROLE_{role.name}") for role in Role}
_FROM_WIRE = {number: role for role, number in _TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class Identity:
    """What the server knows of its callers. keys: None without a state. file: of --keys.
    sight: whose adapters are."""

    book: Book
    keys: KeyStore | None = None
    file: KeyFile | None = None
    sight: Sight = field(default_factory=Sight)

    @classmethod
    async def open(
        cls, store: Store | None, path: Path | None, sight: Sight | None = None
    ) -> Identity:
        """With what the state and the file have. ConfigError, StateUnavailable."""
        keys, book = None, Book()
        if store is not None:
            from deltaserve.server.service.key_store import KeyStore  # SQLAlchemy

            keys = KeyStore(store)
            book = Book(*await keys.all())
        file = KeyFile(path) if path is not None else None
        if file is not None:
            file.load(book)
        return cls(book, keys, file, sight or Sight())

    def refresh(self) -> None:
        """Look whether the file has changed."""
        if self.file is not None:
            self.file.refresh(self.book)


class IdentityService:
    """A change is durable before it holds, and holds before it is acknowledged. A client that goes
    away does not undo what it began."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._book = identity.book
        self._turn = asyncio.Lock()

    async def CreateKey(self, request: pb.CreateKeyRequest, call: Call) -> pb.CreateKeyResponse:
        name, shown = token.make()
        digest = "" if request.subject else token.digest(shown)
        key = Key(
            name,
            _tenant_name("tenant", request.tenant),
            _roles(request),
            digest,
            _subject(request.subject),
            convert.label("label", request.label),
            time.time(),
            _expiry(request),
        )

        async def create(keys: KeyStore, entry: Entry) -> None:
            if not self._book.closed and Role.ADMIN not in key.roles:
                raise IdentityConflict(
                    "roles: the first key must have ROLE_ADMIN: once there is one, nobody could "
                    "make another",
                    field="roles",
                )
            for other in self._book.of_subjects([key.subject]):
                raise IdentityConflict(
                    f"subject: the key {other.id} stands for {key.subject!r}: revoke it first",
                    field="subject",
                )
            await keys.create(key, entry)
            self._book.put(key)

        await self._changed(call, "CreateKey", f"{key.tenant}/{key.id}", create)
        return pb.CreateKeyResponse(key=_shown(key), token="" if request.subject else shown)

    async def ListKeys(self, request: pb.ListKeysRequest, call: Call) -> pb.ListKeysResponse:
        keys = (k for k in self._book.every_key() if request.tenant in ("", k.tenant))
        return pb.ListKeysResponse(keys=map(_shown, keys))

    async def RevokeKey(self, request: pb.RevokeKeyRequest, call: Call) -> pb.RevokeKeyResponse:
        async def revoke(keys: KeyStore, entry: Entry) -> Key:
            key = self._book.find(request.id)
            if key is None:
                raise IdentityUnknown(f"id: no key has the id {request.id[:64]!r}", field="id")
            if self._identity.file is not None and key.id in self._identity.file.ids:
                raise _in_file(f"id: the key {key.id}", "id", self._identity.file)
            if not key.revoked:
                key = replace(key, revoked=time.time())
                await keys.revoke(key, entry)
                self._book.put(key)
            return key

        key = await self._changed(call, "RevokeKey", request.id, revoke)
        return pb.RevokeKeyResponse(key=_shown(key))

    async def PutTenant(self, request: pb.PutTenantRequest, call: Call) -> pb.PutTenantResponse:
        given = request.tenant
        name = _tenant_name("tenant.name", given.name)
        for quota in QUOTAS:
            if getattr(given, quota) > MAX_QUOTA:
                right = f"at most {MAX_QUOTA}; 0 is no limit"
                convert.refuse(f"tenant.{quota}", str(getattr(given, quota)), right)
        tenant = Tenant(name, *(getattr(given, quota) for quota in QUOTAS))

        async def put(keys: KeyStore, entry: Entry) -> None:
            self._check_not_in_file(name, "tenant.name")
            await keys.put_tenant(tenant, entry)
            self._book.put_tenant(tenant)

        await self._changed(call, "PutTenant", name, put)
        return pb.PutTenantResponse(tenant=_shown_tenant(tenant))

    async def GetTenant(self, request: pb.GetTenantRequest, call: Call) -> pb.GetTenantResponse:
        return pb.GetTenantResponse(tenant=_shown_tenant(self._tenant(request.name)))

    async def ListTenants(
        self, request: pb.ListTenantsRequest, call: Call
    ) -> pb.ListTenantsResponse:
        return pb.ListTenantsResponse(tenants=map(_shown_tenant, self._book.tenants()))

    async def DeleteTenant(
        self, request: pb.DeleteTenantRequest, call: Call
    ) -> pb.DeleteTenantResponse:
        name = request.name

        async def remove(keys: KeyStore, entry: Entry) -> None:
            self._tenant(name)
            self._check_not_in_file(name, "name")
            now = time.time()
            valid = [k.id for k in self._book.every_key() if k.tenant == name and not k.ended(now)]
            if valid:
                raise IdentityConflict(
                    f"name: the tenant {name!r} has the keys {', '.join(valid[:8])}: revoke them "
                    "first",
                    field="name",
                )
            if owned := self._identity.sight.of(name):
                raise IdentityConflict(
                    f"name: the tenant {name!r} has the adapters {', '.join(owned[:8])}: unload "
                    "them first",
                    field="name",
                )
            await keys.delete_tenant(name, entry)
            self._book.forget_tenant(name)

        await self._changed(call, "DeleteTenant", name, remove)
        return pb.DeleteTenantResponse()

    def _tenant(self, name: str) -> Tenant:
        found = self._book.tenant(name)
        if found is None:
            raise IdentityUnknown(f"name: there is no tenant {name[:64]!r}", field="name")
        return found

    def _check_not_in_file(self, tenant: str, field: str) -> None:
        file = self._identity.file
        if file is not None and tenant in file.tenants:
            raise _in_file(f"{field}: the tenant {tenant!r}", field, file)

    async def _changed(self, call: Call, verb: str, name: str, change: Any) -> Any:
        """change: (KeyStore, Entry) -> awaitable. One after the other; what is refused is noted."""
        keys = self._identity.keys
        if keys is None:
            raise IdentityConflict(
                "this server keeps nothing: start it with --state, or put keys into --keys FILE"
            )
        entry = Entry(call.caller.name, verb, name)

        async def whole() -> Any:
            async with self._turn:
                try:
                    return await change(keys, entry)
                except StateUnavailable:
                    raise
                except Exception as error:
                    await _noted(keys, replace(entry, outcome=reason(error), detail=str(error)))
                    raise

        return await _to_its_end(whole())


async def _noted(keys: KeyStore, entry: Entry) -> None:
    try:
        await keys.note(entry)
    except StateUnavailable as unavailable:
        log.warning("--state: %s was refused: %s", entry.verb, unavailable)


_running: set[asyncio.Task[Any]] = set()


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Also when the client goes away."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)


def _in_file(what: str, field: str, file: KeyFile) -> IdentityConflict:
    return IdentityConflict(f"{what} is in {file.path}: change it there", field=field)


def _tenant_name(field: str, name: str) -> str:
    if not TENANT_NAME.fullmatch(name):
        convert.refuse(field, repr(name[:64]), f"a name; {TENANT_RULE}")
    return name


def _roles(request: pb.CreateKeyRequest) -> frozenset[Role]:
    wrong = [role for role in request.roles if role not in _FROM_WIRE]
    if wrong or not request.roles:
        found = ", ".join(map(str, wrong)) or "none"
        convert.refuse("roles", found, f"some of {', '.join(pb.Role.keys()[1:])}")
    return frozenset(_FROM_WIRE[role] for role in request.roles)


def _subject(text: str) -> str:
    if text and not is_subject(text):
        convert.refuse("subject", repr(text[:64]), FORM)
    return text


def _expiry(request: pb.CreateKeyRequest) -> float:
    if not request.HasField("expire_time"):
        return 0.0
    when = request.expire_time.seconds + request.expire_time.nanos / 1e9
    if when <= time.time():
        convert.refuse("expire_time", f"{when:.0f} s of Unix time", "in the future")
    return when


def _shown(key: Key) -> pb.Key:
    shown = pb.Key(
        id=key.id,
        tenant=key.tenant,
        roles=[_TO_WIRE[role] for role in Role if role in key.roles],
        subject=key.subject,
        label=key.label,
    )
    for time_of, when in (
        (shown.create_time, key.created),
        (shown.expire_time, key.expires),
        (shown.revoke_time, key.revoked),
    ):
        if when:
            time_of.CopyFrom(Timestamp(seconds=int(when), nanos=int(when % 1 * 1e9)))
    return shown


def _shown_tenant(tenant: Tenant) -> pb.Tenant:
    return pb.Tenant(name=tenant.name, **{quota: getattr(tenant, quota) for quota in QUOTAS})

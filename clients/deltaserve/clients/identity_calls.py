"""What both clients can do with keys and tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaserve.clients import identity_messages
from deltaserve.clients.errors import typed
from deltaserve.clients.identity_types import Key, NewKey, Tenant
from deltaserve.v1 import identity_pb2 as pb


class IdentityCalls:
    """Of the blocking client. All need the role ``admin``."""

    _identity: Any
    _timeout: float | None

    def create_key(
        self,
        tenant: str,
        roles: Sequence[str],
        *,
        subject: str = "",
        label: str = "",
        expires: float = 0.0,
        timeout: float | None = None,
    ) -> NewKey:
        """Make a key; its token is told this once. subject: `KIND:NAME` of a name in a client
        certificate, in place of a token. expires: `time.time()`, 0 for never."""
        request = identity_messages.create(tenant, roles, subject, label, expires)
        with typed():
            return identity_messages.created(
                self._identity.CreateKey(request, timeout=timeout or self._timeout)
            )

    def list_keys(self, tenant: str = "", *, timeout: float | None = None) -> list[Key]:
        """Those of a tenant, or all, oldest first."""
        request = pb.ListKeysRequest(tenant=tenant)
        with typed():
            response = self._identity.ListKeys(request, timeout=timeout or self._timeout)
        return [identity_messages.key(key) for key in response.keys]

    def revoke_key(self, key: str, *, timeout: float | None = None) -> Key:
        """Let nobody in with the key of that id any more."""
        request = pb.RevokeKeyRequest(id=key)
        with typed():
            response = self._identity.RevokeKey(request, timeout=timeout or self._timeout)
        return identity_messages.key(response.key)

    def put_tenant(self, tenant: Tenant, *, timeout: float | None = None) -> Tenant:
        """Make a tenant, or set its quotas."""
        request = identity_messages.put(tenant)
        with typed():
            response = self._identity.PutTenant(request, timeout=timeout or self._timeout)
        return identity_messages.tenant(response.tenant)

    def get_tenant(self, name: str, *, timeout: float | None = None) -> Tenant:
        """One tenant as it is now."""
        request = pb.GetTenantRequest(name=name)
        with typed():
            response = self._identity.GetTenant(request, timeout=timeout or self._timeout)
        return identity_messages.tenant(response.tenant)

    def list_tenants(self, *, timeout: float | None = None) -> list[Tenant]:
        """All tenants, ordered by name."""
        request = pb.ListTenantsRequest()
        with typed():
            response = self._identity.ListTenants(request, timeout=timeout or self._timeout)
        return [identity_messages.tenant(tenant) for tenant in response.tenants]

    def delete_tenant(self, name: str, *, timeout: float | None = None) -> None:
        """Take a tenant away; `FailedPrecondition` while it has keys or adapters."""
        request = pb.DeleteTenantRequest(name=name)
        with typed():
            self._identity.DeleteTenant(request, timeout=timeout or self._timeout)


class AsyncIdentityCalls:
    """Of the asynchronous client; the twin of `IdentityCalls`."""

    _identity: Any
    _timeout: float | None

    async def create_key(
        self,
        tenant: str,
        roles: Sequence[str],
        *,
        subject: str = "",
        label: str = "",
        expires: float = 0.0,
        timeout: float | None = None,
    ) -> NewKey:
        """Make a key; its token is told this once. subject: `KIND:NAME` of a name in a client
        certificate, in place of a token. expires: `time.time()`, 0 for never."""
        request = identity_messages.create(tenant, roles, subject, label, expires)
        with typed():
            return identity_messages.created(
                await self._identity.CreateKey(request, timeout=timeout or self._timeout)
            )

    async def list_keys(self, tenant: str = "", *, timeout: float | None = None) -> list[Key]:
        """Those of a tenant, or all, oldest first."""
        request = pb.ListKeysRequest(tenant=tenant)
        with typed():
            response = await self._identity.ListKeys(request, timeout=timeout or self._timeout)
        return [identity_messages.key(key) for key in response.keys]

    async def revoke_key(self, key: str, *, timeout: float | None = None) -> Key:
        """Let nobody in with the key of that id any more."""
        request = pb.RevokeKeyRequest(id=key)
        with typed():
            response = await self._identity.RevokeKey(request, timeout=timeout or self._timeout)
        return identity_messages.key(response.key)

    async def put_tenant(self, tenant: Tenant, *, timeout: float | None = None) -> Tenant:
        """Make a tenant, or set its quotas."""
        request = identity_messages.put(tenant)
        with typed():
            response = await self._identity.PutTenant(request, timeout=timeout or self._timeout)
        return identity_messages.tenant(response.tenant)

    async def get_tenant(self, name: str, *, timeout: float | None = None) -> Tenant:
        """One tenant as it is now."""
        request = pb.GetTenantRequest(name=name)
        with typed():
            response = await self._identity.GetTenant(request, timeout=timeout or self._timeout)
        return identity_messages.tenant(response.tenant)

    async def list_tenants(self, *, timeout: float | None = None) -> list[Tenant]:
        """All tenants, ordered by name."""
        request = pb.ListTenantsRequest()
        with typed():
            response = await self._identity.ListTenants(request, timeout=timeout or self._timeout)
        return [identity_messages.tenant(tenant) for tenant in response.tenants]

    async def delete_tenant(self, name: str, *, timeout: float | None = None) -> None:
        """Take a tenant away; `FailedPrecondition` while it has keys or adapters."""
        request = pb.DeleteTenantRequest(name=name)
        with typed():
            await self._identity.DeleteTenant(request, timeout=timeout or self._timeout)

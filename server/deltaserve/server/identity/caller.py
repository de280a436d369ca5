"""Who asks, and what they may."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a caller may do. `ADMIN` does not include the others: a role is what was given."""

    GENERATE = "generate"  # generate, score, tokenize; see what can be asked for
    FEEDBACK = "feedback"  # record feedback, read reports
    ADAPTERS = "adapters"  # load, unload, pin
    ROUTES = "routes"  # put and delete routes
    ADMIN = "admin"  # keys and tenants; with another role: in every tenant


EVERY_ROLE = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller shows. peer: address. token: of ``authorization: Bearer …``. subjects: the
    names in the client certificate that the connection was made with, as `certificate.py` writes
    them."""

    peer: str
    token: str = ""
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """name: for the audit log and the server's log. tenant: whose adapters, routes and quotas;
    empty on a server without keys. key: id of what it showed."""

    name: str
    tenant: str = ""
    roles: frozenset[Role] = EVERY_ROLE
    key: str = ""

    def salted(self, salt: str) -> str:
        """Of the prefix cache: tenants share nothing, whatever they say. Neither a tenant nor a
        client's salt has control characters."""
        return f"{self.tenant}\0{salt}" if self.tenant else salt

    def behalf(self, user: str) -> tuple[str, str]:
        """(who shares the machine with others equally, which part of it)."""
        return (self.tenant, user) if self.tenant else (user, "")

    @property
    def operator(self) -> bool:
        """What others have is its as well."""
        return Role.ADMIN in self.roles

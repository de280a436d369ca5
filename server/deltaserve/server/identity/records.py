"""Keys and tenants, as they are passed around."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltaserve.server.identity.caller import Role

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TENANT_RULE = "a tenant's name starts with a letter or digit and has at most 64 of those and . _ -"
MAX_QUOTA = 1 << 40


@dataclass(frozen=True, slots=True)
class Key:
    """What lets a caller in: a token, of which `digest` is kept, or, with an empty digest, a client
    certificate with the name `subject`. label: for people. created, expires, revoked: Unix time;
    0 is never."""

    id: str
    tenant: str
    roles: frozenset[Role]
    digest: str = ""
    subject: str = ""
    label: str = ""
    created: float = 0.0
    expires: float = 0.0
    revoked: float = 0.0

    def ended(self, now: float) -> str:
        """Why it lets nobody in any more; empty while it does."""
        if self.revoked:
            return "was revoked"
        return "has expired" if self.expires and now >= self.expires else ""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Its quotas, of all its keys together; 0 is no limit. tokens: of prompts and answers.
    concurrent: requests that wait or run."""

    name: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_requests: int = 0


QUOTAS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")

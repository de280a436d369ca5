"""``--keys FILE``: keys and tenants in TOML, with digests in place of tokens.

[tenants.acme]
tokens_per_minute = 100000

[keys.0123456789abcdef]
tenant = "acme"
roles = ["generate", "adapters"]
sha256 = "…"                            # or subject = "uri:spiffe://example/agent"
expires = 2030-01-01T00:00:00Z          # may be left out
"""

from __future__ import annotations

import json
import logging
import re
import time
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltaserve.server.config import ConfigError
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.certificate import FORM, is_subject
from deltaserve.server.identity.records import (
    MAX_QUOTA,
    QUOTAS,
    TENANT_NAME,
    TENANT_RULE,
    Key,
    Tenant,
)

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks whether the file has changed."""
KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class KeyFile:
    """Read again when it has changed; if what it says then is wrong, what it said before holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: frozenset[str] = frozenset()
        self.tenants: frozenset[str] = frozenset()
        self._seen: tuple[int, int, int] | None = None
        self._looked = time.monotonic()

    def load(self, book: Book) -> None:
        """Into the book. ConfigError, and the book is as it was."""
        try:
            seen = self._stamp()
            keys, tenants = parse(self.path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--keys {self.path}: {error}") from error
        for name in self.ids - {key.id for key in keys}:
            book.forget([name])
        for name in self.tenants - {tenant.name for tenant in tenants}:
            book.put_tenant(Tenant(name))
        for tenant in tenants:
            book.put_tenant(tenant)
        for key in keys:
            book.put(key)
        book.closed = True
        self.ids = frozenset(key.id for key in keys)
        self.tenants = frozenset(tenant.name for tenant in tenants)
        self._seen = seen

    def refresh(self, book: Book) -> None:
        """Load it again if it has changed."""
        now = time.monotonic()
        if now < self._looked + LOOK_SECONDS:
            return
        self._looked = now
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self.load(book)
                log.info("--keys %s: read again, %d keys", self.path, len(self.ids))
        except (OSError, ConfigError) as error:
            log.error("what --keys %s said before still holds: %s", self.path, error)

    def _stamp(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino


def parse(text: str) -> tuple[list[Key], list[Tenant]]:
    """The keys and the tenants of a file. ValueError."""
    given = tomllib.loads(text)
    _known("the file", given, ("keys", "tenants"))
    tenants = [_tenant(name, table) for name, table in _tables(given, "tenants")]
    keys = [_key(name, table) for name, table in _tables(given, "keys")]
    for kind, values in (
        ("sha256", [k.digest for k in keys if k.digest]),
        ("subject", [k.subject for k in keys if k.subject]),
    ):
        if twice := {v for v in values if values.count(v) > 1}:
            raise ValueError(f"two keys have the {kind} {min(twice)!r}")
    return keys, tenants


def section(key: Key) -> str:
    """The file's lines for a key."""
    lines = [f"[keys.{key.id}]", f"tenant = {json.dumps(key.tenant)}"]
    lines.append(f"roles = {json.dumps(sorted(key.roles))}")
    kept = ("sha256", key.digest) if key.digest else ("subject", key.subject)
    lines.append(f"{kept[0]} = {json.dumps(kept[1])}")
    if key.label:
        lines.append(f"label = {json.dumps(key.label)}")
    if key.expires:
        lines.append(f"expires = {datetime.fromtimestamp(key.expires, UTC):%Y-%m-%dT%H:%M:%SZ}")
    return "\n".join(lines) + "\n"


def _tables(given: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    found = given.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(t, dict) for t in found.values()):
        raise ValueError(f"{name} must be tables, as [{name}.NAME]")
    return list(found.items())


def _known(where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    if wrong := sorted(set(table) - set(names)):
        raise ValueError(f"{where}: {wrong[0]!r} is not one of {', '.join(names)}")


def _tenant(name: str, table: dict[str, Any]) -> Tenant:
    where = f"[tenants.{name}]"
    if not TENANT_NAME.fullmatch(name):
        raise ValueError(f"{where}: {TENANT_RULE}")
    _known(where, table, QUOTAS)
    for quota, value in table.items():
        if type(value) is not int or not 0 <= value <= MAX_QUOTA:
            raise ValueError(f"{where}: {quota} {value!r} must be a whole number; 0 is no limit")
    return Tenant(name, **table)


def _key(name: str, table: dict[str, Any]) -> Key:
    where = f"[keys.{name}]"
    if not KEY_ID.fullmatch(name):
        raise ValueError(f"{where}: a key's id has at most 64 letters, digits, _ and -")
    _known(where, table, ("tenant", "roles", "sha256", "subject", "label", "expires"))
    tenant, roles = table.get("tenant", ""), table.get("roles", [])
    if not isinstance(tenant, str) or not TENANT_NAME.fullmatch(tenant):
        raise ValueError(f"{where}: tenant {tenant!r}: {TENANT_RULE}")
    every = ", ".join(Role)
    if not isinstance(roles, list) or not roles or not set(map(str, roles)) <= set(Role):
        raise ValueError(f"{where}: roles {roles!r} must be some of {every}")
    digest, subject = table.get("sha256", ""), table.get("subject", "")
    if bool(digest) == bool(subject):
        raise ValueError(f"{where}: give one of sha256 and subject")
    if digest and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"{where}: sha256 must be 64 hexadecimal digits, of the whole token")
    if subject and not (isinstance(subject, str) and is_subject(subject)):
        raise ValueError(f"{where}: subject {subject!r} must be {FORM}")
    expires = table.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
        raise ValueError(f"{where}: expires {expires} must be a time with a zone, as …T00:00:00Z")
    return Key(
        name,
        tenant,
        frozenset(map(Role, roles)),
        digest,
        subject,
        str(table.get("label", "")),
        expires=expires.timestamp() if expires is not None else 0.0,
    )

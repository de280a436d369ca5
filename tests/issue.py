"""Keys for tests."""

from __future__ import annotations

from typing import Any

from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.records import Key


def issue(book: Book, *roles: Role, tenant: str = "acme", **fields: Any) -> tuple[Key, str]:
    """A new key in the book, and its token."""
    name, shown = token.make()
    key = Key(name, tenant, frozenset(roles), token.digest(shown), **fields)
    book.put(key)
    return key, shown

"""Doorman: from what a caller shows to who it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from deltaserve.server.errors import Forbidden, Unauthenticated
from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Caller, Credentials, Role
from deltaserve.server.identity.records import Key

NOBODY = Key("", "", frozenset(), token.NO_DIGEST)


class Doorman:
    """Without keys it lets everybody in who reaches the server. refresh: called before each look
    at the book."""

    def __init__(
        self, book: Book | None = None, refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._book = book or Book()
        self._refresh = refresh

    def admit(self, shown: Credentials, role: Role) -> Caller:
        """The caller, if it has the role. Unauthenticated, Forbidden."""
        self._refresh()
        if not self._book.closed:
            return Caller(shown.subjects[0] if shown.subjects else shown.peer)
        key = self._by_token(shown.token) if shown.token else self._by_certificate(shown)
        if ended := key.ended(time.time()):
            _unknown(f"the key {key.id} {ended}")
        if role not in key.roles:
            has = ", ".join(sorted(key.roles)) or "none"
            raise Forbidden(f"this needs the role {role}; the key {key.id} has {has}")
        return Caller(f"{key.tenant}/{key.id}", key.tenant, key.roles, key.id)

    def confirm(self, caller: Caller) -> None:
        """For what goes on: Unauthenticated once the caller's key has been revoked or expired."""
        if caller.key:
            self._refresh()
            key = self._book.find(caller.key)
            ended = "was revoked" if key is None else key.ended(time.time())
            if ended:
                _unknown(f"the key {caller.key} {ended}")

    def _by_token(self, shown: str) -> Key:
        """The same is computed for an id that nobody has."""
        key = self._book.find(token.id_of(shown)) or NOBODY
        if not token.same(key.digest or token.NO_DIGEST, token.digest(shown)):
            _unknown("the API key is not valid")
        return key

    def _by_certificate(self, shown: Credentials) -> Key:
        found = self._book.of_subjects(shown.subjects)
        if len(found) == 1:
            return found[0]
        if found:
            ids = " and ".join(key.id for key in found)
            _unknown(f"the client certificate has the names of several keys, {ids}")
        has = "the client certificate has no name that is known here" if shown.subjects else ""
        _unknown(has or "there is no API key; send it as `authorization: Bearer ds_…`")


def _unknown(why: str) -> NoReturn:
    raise Unauthenticated(why)

"""Doorman: from what a caller shows to who it is."""

from __future__ import annotations

from deltaserve.server.identity.caller import Caller, Credentials, Role


class Doorman:
    """Lets everybody in who reaches the server, which listens on the loopback by default."""

    def admit(self, shown: Credentials, role: Role) -> Caller:
        """The caller, if it has the role."""
        return Caller(shown.peer)

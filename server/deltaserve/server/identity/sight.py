"""Sight: whose each adapter is, and who may see it.

Names are the server's, so one that another tenant has is taken; beside that, to those who may not
see an adapter it is as if there was none of that name.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.server.called import parse
from deltaserve.server.errors import AdapterConflict, AdapterUnknown, Forbidden
from deltaserve.server.identity.caller import Caller


@dataclass(frozen=True, slots=True)
class Owner:
    """tenant: empty for the operator. shared: every tenant may use it."""

    tenant: str = ""
    shared: bool = True


OPERATOR = Owner()
"""Of the command line's adapters, and of what is loaded on a server without keys."""


class Sight:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}

    def owner(self, name: str) -> Owner:
        return self._owners.get(name, OPERATOR)

    def put(self, name: str, owner: Owner) -> None:
        """Make it the owner's, whoever had it."""
        self._owners[name] = owner

    def forget(self, name: str) -> None:
        """It is gone."""
        self._owners.pop(name, None)

    def of(self, tenant: str) -> list[str]:
        """Names of what it owns, sorted."""
        return sorted(name for name, owner in self._owners.items() if owner.tenant == tenant)

    def sees(self, caller: Caller, name: str) -> bool:
        owner = self.owner(name)
        return caller.operator or owner.shared or owner.tenant == caller.tenant

    def check(self, caller: Caller, called: str, field: str) -> None:
        """AdapterUnknown, as of a name that nobody has, if the caller may not see it. called: a
        name, or ``name@digest-prefix``; InvalidRequest for what is neither."""
        name, _ = parse(called, field)
        self.check_name(caller, name, field)

    def check_name(self, caller: Caller, name: str, field: str = "name") -> None:
        """The same, where a digest is no part of a name."""
        if not self.sees(caller, name):
            raise unknown(name, field)

    def check_owner(self, caller: Caller, name: str, *, taken: bool) -> None:
        """For what changes it. taken: it is registered. AdapterUnknown if it is not, or the caller
        may not see it; Forbidden for another's that is shared."""
        self.check_name(caller, name)
        if not self.owns(caller, name):
            if not taken:
                raise unknown(name, "name")
            raise Forbidden(
                f"adapter {name!r} is shared by its owner: it can be used, but not changed, by the "
                f"tenant {caller.tenant!r}",
                field="name",
            )

    def claim(self, caller: Caller, name: str, *, shared: bool, taken: bool) -> Owner:
        """Before it is loaded. taken: it is registered. -> whose it is then. AdapterConflict for
        the name of another's. What an operator loads is shared; a repeated load can share, and does
        not take anything back."""
        if not taken:
            owner = Owner(caller.tenant, shared or caller.operator)
        elif self.owns(caller, name):
            known = self.owner(name)
            owner = Owner(known.tenant, known.shared or shared)
        else:
            raise AdapterConflict(f"name: {name!r} is taken; choose another", field="name")
        self._owners[name] = owner
        return owner

    def owns(self, caller: Caller, name: str) -> bool:
        """Whether the caller may change it."""
        return caller.operator or self.owner(name).tenant == caller.tenant


def unknown(name: str, field: str) -> AdapterUnknown:
    """What is said of a name that nobody has. The message has the field if it is one of many."""
    where = f"{field}: " if "[" in field else ""
    return AdapterUnknown(f"{where}no adapter named {name!r} is registered", field=field)

"""Who may see and change a route: those of its tenant, and operators. One of no tenant, which an
operator put, is everybody's to use."""

from __future__ import annotations

from deltaserve.server.errors import Forbidden, RouteUnknown
from deltaserve.server.identity.caller import Caller
from deltaserve.server.routes.route import Lost, Standing


def unknown(name: str, field: str = "name") -> RouteUnknown:
    """What is said of a name that nobody has, or none that the caller may see."""
    return RouteUnknown(f"no route named {name!r}", field=field)


def sees(caller: Caller, known: Standing | Lost) -> bool:
    return caller.operator or known.tenant in ("", caller.tenant)


def check_owned(
    caller: Caller, name: str, known: Standing | Lost | None, field: str = "name"
) -> None:
    """RouteUnknown, or Forbidden for one that the caller can use but not change."""
    if known is None or not sees(caller, known):
        raise unknown(name, field)
    if not caller.operator and known.tenant != caller.tenant:
        raise Forbidden(
            f"route {name!r} is the operator's: it can be used, but not changed, by the tenant "
            f"{caller.tenant!r}",
            field=field,
        )

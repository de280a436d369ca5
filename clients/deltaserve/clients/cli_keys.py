"""The commands for keys and tenants."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from deltaserve.clients.cli_common import LOCAL, Address, AsJson, Ca, connected, print_json
from deltaserve.clients.identity_messages import ROLES
from deltaserve.clients.identity_types import Tenant

keys_app = typer.Typer(no_args_is_help=True, help="API keys: who may call.")
tenants_app = typer.Typer(no_args_is_help=True, help="Tenants and their quotas.")

Roles = Annotated[
    list[str], typer.Option("--role", help=f"What it allows: {', '.join(ROLES)}; repeatable.")
]
Subject = Annotated[
    str,
    typer.Option(metavar="KIND:NAME", help="A name in a client certificate, in place of a token."),
]
Label = Annotated[str, typer.Option(help="For people.")]
Lasts = Annotated[str, typer.Option("--expires", help="After so long: 90d, 12h, 30m; never.")]
OfTenant = Annotated[str, typer.Option(help="Whose it is.")]


def end(lasts: str) -> float:
    """When a key that lasts so long expires, as `time.time()`; 0 for never."""
    if lasts in ("", "never"):
        return 0.0
    found = re.fullmatch(r"([1-9][0-9]{0,6})([dhm])", lasts)
    if not found:
        raise typer.BadParameter(f"--expires {lasts}: write 90d, 12h or 30m")
    return time.time() + int(found[1]) * {"d": 86400, "h": 3600, "m": 60}[found[2]]


def known(roles: list[str]) -> list[str]:
    """The same."""
    for role in roles:
        if role not in ROLES:
            raise typer.BadParameter(f"--role {role}: must be one of {', '.join(ROLES)}")
    return roles


def told(key: str, token: str) -> None:
    """Print a new key: the token alone on stdout, for scripts."""
    if token:
        Console(stderr=True).print(f"key {key}; its token is told this once:", markup=False)
    print(token or key)


@keys_app.command("create")
def create_key(
    tenant: OfTenant,
    role: Roles,
    subject: Subject = "",
    label: Label = "",
    expires: Lasts = "never",
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Make a key, over the API. Prints its token, which is told this once."""
    roles, when = known(role), end(expires)
    with connected(address, ca) as client:
        made = client.create_key(tenant, roles, subject=subject, label=label, expires=when)
    if as_json:
        print_json(made)
    else:
        told(made.key.id, made.token)


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str, typer.Option(help="Of this one alone.")] = "",
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """All keys, without their tokens."""
    with connected(address, ca) as client:
        found = client.list_keys(tenant)
    if as_json:
        for key in found:
            print_json(key)
        return
    table = Table(
        Column("id", no_wrap=True, min_width=16),
        "tenant",
        "roles",
        "subject",
        "label",
        "made",
        "expires",
        "revoked",
    )
    for k in found:
        times = (_time(when) for when in (k.created, k.expires, k.revoked))
        table.add_row(k.id, k.tenant, ", ".join(k.roles), k.subject, k.label, *times)
    Console().print(table)


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="ID", help="Its id.")],
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Let nobody in with a key any more."""
    with connected(address, ca) as client:
        revoked = client.revoke_key(key)
    print(f"{revoked.id} of {revoked.tenant} is revoked")


@tenants_app.command("put")
def put_tenant(
    name: Annotated[str, typer.Argument(help="Its name.")],
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0 is no limit.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Of prompts and answers.")] = 0,
    concurrent_requests: Annotated[int, typer.Option(min=0, help="That wait or run.")] = 0,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Make a tenant, or set all its quotas; one that is left out is no limit."""
    given = Tenant(name, requests_per_minute, tokens_per_minute, concurrent_requests)
    with connected(address, ca) as client:
        print_json(client.put_tenant(given))


@tenants_app.command("list")
def list_tenants(address: Address = LOCAL, ca: Ca = None) -> None:
    """All tenants, as JSON, one a line."""
    with connected(address, ca) as client:
        for tenant in client.list_tenants():
            print_json(tenant)


@tenants_app.command("delete")
def delete_tenant(
    name: Annotated[str, typer.Argument(help="Its name.")], address: Address = LOCAL, ca: Ca = None
) -> None:
    """Take a tenant away that has neither keys nor adapters."""
    with connected(address, ca) as client:
        client.delete_tenant(name)
    print(f"{name} is gone")


def _time(when: float) -> str:
    return f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M}" if when else "-"

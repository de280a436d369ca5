"""`deltaserve keys create`: over the API, or offline, where the first key comes from."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.clients import cli_keys
from deltaserve.clients.cli_common import LOCAL, Address, AsJson, Ca
from deltaserve.server.cli.common import fail
from deltaserve.server.config import ConfigError
from deltaserve.server.identity import token
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.certificate import FORM, is_subject
from deltaserve.server.identity.key_file import parse, section
from deltaserve.server.identity.records import TENANT_NAME, TENANT_RULE, Key


def create(
    tenant: cli_keys.OfTenant,
    role: cli_keys.Roles,
    subject: cli_keys.Subject = "",
    label: cli_keys.Label = "",
    expires: cli_keys.Lasts = "never",
    state: Annotated[
        str, typer.Option(metavar="PATH|URL", help="Offline: into the database of `serve`.")
    ] = "",
    keys: Annotated[
        Path | None, typer.Option(help="Offline: added to the file of `serve --keys`.")
    ] = None,
    as_json: AsJson = False,
    address: Address = LOCAL,
    ca: Ca = None,
) -> None:
    """Make a key; prints its token, which is told this once.

    Over the API, or offline with --state or --keys: the first key of a server. A running server
    learns of a key in its database when it starts again, of one in its file within a second.
    """
    if not state and keys is None:
        cli_keys.create_key(tenant, role, subject, label, expires, as_json, address, ca)
        return
    roles, when = cli_keys.known(role), cli_keys.end(expires)
    if not TENANT_NAME.fullmatch(tenant):
        fail(f"--tenant {tenant}: {TENANT_RULE}")
    if subject and not is_subject(subject):
        fail(f"--subject {subject}: must be {FORM}")
    name, shown = token.make()
    digest = "" if subject else token.digest(shown)
    given = frozenset(map(Role, roles))
    key = Key(name, tenant, given, digest, subject, label, time.time(), when)
    try:
        if state:
            asyncio.run(_into_state(state, key))
        if keys is not None:
            _into_file(keys, key)
    except (ConfigError, OSError, ValueError) as error:
        fail(str(error))
    cli_keys.told(name, "" if subject else shown)


async def _into_state(given: str, key: Key) -> None:
    from deltaserve.server.errors import StateUnavailable
    from deltaserve.server.service.key_store import KeyStore
    from deltaserve.server.state.records import Entry
    from deltaserve.server.state.store import StateError, Store
    from deltaserve.server.state.url import parse as parse_url

    url = parse_url(given)
    try:
        store = KeyStore(await Store.open(url))
        kept, _ = await store.all()
        if not kept and Role.ADMIN not in key.roles:
            raise ConfigError("--role: the first key needs the role admin, to make others with")
        for other in kept:
            if key.subject and key.subject == other.subject and not other.revoked:
                raise ConfigError(f"--subject {key.subject}: the key {other.id} stands for it")
        entry = Entry("offline", "CreateKey", f"{key.tenant}/{key.id}")
        await store.create(key, entry)
    except (StateError, StateUnavailable) as error:
        shown = url.render_as_string(hide_password=True)
        raise ConfigError(f"--state {shown}: {error}") from error


def _into_file(path: Path, key: Key) -> None:
    """What is there stays as it is written; a server that reads meanwhile sees all or nothing."""
    text = path.read_text() if path.exists() else ""
    text = "\n".join(filter(None, [text.rstrip("\n") + "\n" if text else "", section(key)]))
    try:
        parse(text)
    except ValueError as error:
        raise ConfigError(f"--keys {path}: {error}") from error
    made = path.with_name(f".{path.name}.new")
    made.touch(0o600)
    made.write_text(text)
    os.replace(made, path)

"""Keys and tenants over the API and from the command line, and what a restart leaves of them."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from issue import issue
from served import served
from typer.testing import CliRunner

from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.identity_types import Tenant
from deltaserve.server.cli import app
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.service.identity import Identity
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

EVERY = ["generate", "feedback", "adapters", "routes", "admin"]


async def opened(path: Path, keys: Path | None = None) -> tuple[Store, Identity]:
    store = await Store.open(parse(str(path)))
    return store, await Identity.open(store, keys)


async def test_from_the_first_key_to_the_last(tmp_path: Path) -> None:
    store, identity = await opened(tmp_path / "s.db")
    async with served(identity=identity, store=store) as s:
        async with AsyncClient(s.address) as nobody:
            with pytest.raises(errors.FailedPrecondition, match="first key must have ROLE_ADMIN"):
                await nobody.create_key("acme", ["generate"])
            await nobody.generate("x", max_tokens=1)
            first = await nobody.create_key("ops", ["admin"], label="first")
            assert first.key.roles == ("admin",) and first.key.id in first.token
            with pytest.raises(errors.Unauthenticated):  # from now on
                await nobody.create_key("ops", EVERY)
        async with AsyncClient(s.address, token=first.token) as admin:
            work = await admin.create_key("acme", ["generate"], expires=time.time() + 3600)
            spiffe = await admin.create_key("acme", ["routes"], subject="uri:spiffe://x/a")
            assert not spiffe.token and spiffe.key.subject == "uri:spiffe://x/a"
            with pytest.raises(errors.FailedPrecondition, match=f"{spiffe.key.id} stands for"):
                await admin.create_key("evil", ["admin"], subject="uri:spiffe://x/a")
            with pytest.raises(errors.PermissionDenied, match=r"role generate; .* has admin"):
                await admin.generate("x")
            assert [t.name for t in await admin.list_tenants()] == ["acme", "ops"]
            acme = await admin.put_tenant(Tenant("acme", 60, 1000, 2))
            assert await admin.get_tenant("acme") == acme == Tenant("acme", 60, 1000, 2)
            with pytest.raises(errors.FailedPrecondition, match=f"has the keys .*{work.key.id}"):
                await admin.delete_tenant("acme")
            with pytest.raises(errors.NotFound):
                await admin.get_tenant("nobody")
            with pytest.raises(errors.NotFound):
                await admin.revoke_key("nobody")
            for wrong, field in (
                ({"tenant": "a b"}, "tenant"),
                ({"roles": []}, "roles"),
                ({"subject": "alice"}, "subject"),
                ({"expires": 5.0}, "expire_time"),
                ({"label": "\n"}, "label"),
            ):
                with pytest.raises(errors.InvalidArgument) as caught:
                    await admin.create_key(**{"tenant": "acme", "roles": EVERY, **wrong})
                assert caught.value.field == field
            with pytest.raises(errors.InvalidArgument, match="tokens_per_minute"):
                await admin.put_tenant(Tenant("acme", tokens_per_minute=1 << 41))
            revoked = await admin.revoke_key(spiffe.key.id)
            assert revoked.revoked and await admin.revoke_key(spiffe.key.id) == revoked
            again = await admin.create_key("acme", ["routes"], subject="uri:spiffe://x/a")
            before = await admin.list_keys()
            assert [k.id for k in before] == [
                k.id for k in (first.key, work.key, spiffe.key, again.key)
            ]
            assert await admin.list_keys("ops") == [first.key]

    text = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert first.key.id.encode() in text and first.token[20:].encode() not in text
    store, identity = await opened(tmp_path / "s.db")
    async with served(identity=identity, store=store) as s:
        async with AsyncClient(s.address, token=work.token) as client:
            await client.generate("x", max_tokens=1)
            with pytest.raises(errors.PermissionDenied):
                await client.list_keys()
        async with AsyncClient(s.address, token=first.token) as admin:
            assert await admin.list_keys() == before
            assert await admin.get_tenant("acme") == acme
            for key in (work.key, again.key):
                await admin.revoke_key(key.id)
            await admin.delete_tenant("acme")
            assert [t.name for t in await admin.list_tenants()] == ["ops"]
            assert (await admin.revoke_key(first.key.id)).revoked
            with pytest.raises(errors.Unauthenticated, match="was revoked"):
                await admin.list_keys()

    store, identity = await opened(tmp_path / "s.db")
    assert identity.book.closed, "without a valid key, nobody: not everybody"
    ops = f"ops/{first.key.id}"
    audit = [(e.who, e.verb, e.name, e.outcome) for e in await store.audit()]
    assert audit[-5:] == [
        (ops, "RevokeKey", work.key.id, "OK"),
        (ops, "RevokeKey", again.key.id, "OK"),
        (ops, "DeleteTenant", "acme", "OK"),
        (ops, "RevokeKey", first.key.id, "OK"),
        ("server", "Start", "", "OK"),
    ]
    assert (ops, "DeleteTenant", "acme", "IDENTITY_CONFLICT") in audit
    assert all(first.token[20:] not in str(entry) for entry in await store.audit())


async def test_what_cannot_be_kept_does_not_hold(tmp_path: Path) -> None:
    store, identity = await opened(tmp_path / "s.db")
    _, admin_token = issue(identity.book, Role.ADMIN)
    key, _ = issue(identity.book, Role.GENERATE)
    async with (
        served(identity=identity, store=store) as s,
        AsyncClient(s.address, token=admin_token) as admin,
    ):
        known = await admin.list_keys()
        (tmp_path / "s.db").rename(tmp_path / "away")
        for change in (
            admin.create_key("acme", EVERY),
            admin.revoke_key(key.id),
            admin.put_tenant(Tenant("new")),
        ):
            with pytest.raises(errors.Unavailable, match="unable to open"):
                await change
        assert await admin.list_keys() == known
        assert [t.name for t in await admin.list_tenants()] == ["acme"]


async def test_a_tenant_with_adapters_stays(tmp_path: Path) -> None:
    store, identity = await opened(tmp_path / "s.db")
    _, token = issue(identity.book, Role.ADMIN, Role.ADAPTERS, tenant="ops")
    key, worker = issue(identity.book, Role.ADAPTERS, tenant="acme")
    async with served(identity=identity, store=store) as s:
        async with AsyncClient(s.address, token=worker) as client:
            await client.load_adapter("a", "/a")
        async with AsyncClient(s.address, token=token) as admin:
            await admin.revoke_key(key.id)
            with pytest.raises(errors.FailedPrecondition, match="has the adapters a:"):
                await admin.delete_tenant("acme")
            await admin.unload_adapter("a")
            await admin.delete_tenant("acme")


async def test_without_a_state() -> None:
    book = Book()
    _, token = issue(book, Role.ADMIN)
    async with (
        served(identity=Identity(book)) as s,
        AsyncClient(s.address, token=token) as admin,
    ):
        with pytest.raises(errors.FailedPrecondition, match="--state"):
            await admin.create_key("acme", EVERY)
        assert len(await admin.list_keys()) == 1


def run(*arguments: str, code: int = 0, **environment: str) -> str:
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


async def test_commands(tmp_path: Path) -> None:
    """The first key offline, into either; the others over the API."""
    path, file = tmp_path / "s.db", tmp_path / "keys.toml"
    make = ["keys", "create", "--tenant", "ops"]
    offline = [*make, "--state", str(path)]
    refused = await asyncio.to_thread(run, *offline, "--role", "generate", code=2)
    assert "admin" in refused
    token = (await asyncio.to_thread(run, *offline, "--role", "admin")).strip()
    file.write_text("# ours\n[tenants.acme]\nrequests_per_minute = 6")
    other = run(*make, "--role", "generate", "--keys", str(file), "--expires", "90d").strip()
    run(*make, "--role", "admin", "--keys", str(file), "--subject", "dns:a.example")
    run(*make, "--role", "admin", "--keys", str(file), "--subject", "dns:a.example", code=2)
    for wrong in (
        ["--role", "root"],
        ["--role", "admin", "--expires", "soon"],
        ["--role", "admin", "--subject", "a"],
    ):
        run(*make, *wrong, "--keys", str(file), code=2)
    assert file.read_text().startswith("# ours\n") and token not in file.read_text()
    assert other.startswith("ds_") and other not in file.read_text()

    store, identity = await opened(path, file)
    async with served(identity=identity, store=store) as s:

        async def say(*arguments: str, code: int = 0, token: str = token) -> str:
            where = {"DELTASERVE_ADDRESS": s.address, "DELTASERVE_TOKEN": token}
            return await asyncio.to_thread(lambda: run(*arguments, code=code, **where))

        made = await say("keys", "create", "--tenant", "acme", "--role", "generate", "--json")
        key = json.loads(made)["key"]["id"]
        assert "NotFound" not in await say("generate", "x", token=other)
        assert "UNAUTHENTICATED" in await say("generate", "x", token="", code=1)
        listed = [json.loads(line) for line in (await say("keys", "list", "--json")).splitlines()]
        assert len(listed) == 4 and "token" not in listed[0]
        assert key in await say("keys", "list")
        assert "is revoked" in await say("keys", "revoke", key)
        assert str(file) in await say("keys", "revoke", other[3:19], code=1)
        put = await say("tenants", "put", "new", "--tokens-per-minute", "9")
        assert json.loads(put)["tokens_per_minute"] == 9
        assert str(file) in await say("tenants", "put", "acme", code=1)
        assert '"requests_per_minute": 6' in await say("tenants", "list")
        assert await say("tenants", "delete", "new") == "new is gone\n"

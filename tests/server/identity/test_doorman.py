"""Who is let in: keys, roles, and what becomes of those that end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from issue import issue
from served import served

from deltaserve.clients import AsyncClient, Client, errors
from deltaserve.server.config import ConfigError
from deltaserve.server.errors import Unauthenticated
from deltaserve.server.identity import doorman as doorman_module
from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Caller, Credentials, Role
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.identity.exposure import dangers
from deltaserve.server.identity.key_file import KeyFile, parse, section
from deltaserve.server.identity.records import Key
from deltaserve.server.service.access import NEEDED
from deltaserve.server.service.identity import Identity


def test_without_keys_everybody_may_everything() -> None:
    for role in Role:
        assert Doorman().admit(Credentials("ipv4:1.2.3.4:5"), role) == Caller("ipv4:1.2.3.4:5")


def test_tokens() -> None:
    book = Book()
    key, shown = issue(book, Role.GENERATE, Role.FEEDBACK)
    door = Doorman(book)
    caller = door.admit(Credentials("p", shown), Role.GENERATE)
    assert caller == Caller(f"acme/{key.id}", "acme", key.roles, key.id) and not caller.operator
    wrong = shown[:-1] + ("0" if shown[-1] != "0" else "1")
    unknown = f"ds_{'0' * 16}_{shown[20:]}"
    for bad in (wrong, unknown, shown.upper(), shown + "0", "ds_", "x", "\udcff", shown[:-1]):
        with pytest.raises(Unauthenticated, match=r"^the API key is not valid$"):
            door.admit(Credentials("p", bad), Role.GENERATE)
    with pytest.raises(Unauthenticated, match="no API key"):
        door.admit(Credentials("p"), Role.GENERATE)
    _, other = token.make()
    assert token.digest(shown) == key.digest and len({shown, other, key.digest}) == 3


def test_an_unknown_key_costs_what_a_wrong_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digests are made and compared, of the same lengths; and nothing else is asked of a
    key before its secret was right."""
    book, calls = Book(), list[tuple[str, int, int]]()
    _, shown = issue(book, Role.GENERATE, revoked=1.0)
    certified = Key("agent", "acme", frozenset({Role.GENERATE}), subject="dns:a")
    book.put(certified)

    def digest(text: str, plain: Any = token.digest) -> str:
        calls.append(("digest", len(text), 0))
        return str(plain(text))

    def same(kept: str, given: str, plain: Any = token.same) -> bool:
        calls.append(("same", len(kept), len(given)))
        return bool(plain(kept, given))

    monkeypatch.setattr(doorman_module.token, "digest", digest)
    monkeypatch.setattr(doorman_module.token, "same", same)
    monkeypatch.setattr(Key, "ended", lambda *_: pytest.fail("asked before it was compared"))
    flipped = shown[:-1] + ("0" if shown[-1] != "0" else "1")
    for bad in (flipped, f"ds_{'0' * 16}_{shown[20:]}"):
        calls.clear()
        with pytest.raises(Unauthenticated, match="is not valid"):
            Doorman(book).admit(Credentials("p", bad), Role.GENERATE)
        assert calls == [("digest", 84, 0), ("same", 64, 64)]


def test_keys_that_have_ended() -> None:
    book = Book()
    key, shown = issue(book, Role.GENERATE, expires=time.time() + 3600)
    door = Doorman(book)
    caller = door.admit(Credentials("p", shown), Role.GENERATE)
    door.confirm(caller)
    for ended, why in (
        (replace(key, expires=1.0), "expired"),
        (replace(key, revoked=1.0), "revoked"),
    ):
        book.put(ended)
        for ask in (
            lambda: door.admit(Credentials("p", shown), Role.GENERATE),
            lambda: door.confirm(caller),
        ):
            with pytest.raises(Unauthenticated, match=f"{key.id} .*{why}"):
                ask()
    book.forget([key.id])
    with pytest.raises(Unauthenticated):
        door.admit(Credentials("p"), Role.GENERATE)  # it stays closed
    with pytest.raises(Unauthenticated):
        door.confirm(caller)


def test_certificates() -> None:
    book = Book()
    names = ("subject:CN=a,O=b", "dns:a.example")
    for i, name in enumerate(names):
        book.put(Key(f"k{i}", f"t{i}", frozenset({Role.GENERATE}), subject=name))
    door = Doorman(book)
    for i, name in enumerate(names):
        shown = Credentials("p", subjects=(name, "dns:other"))
        assert door.admit(shown, Role.GENERATE).tenant == f"t{i}"
    with pytest.raises(Unauthenticated, match="several keys, k0 and k1"):
        door.admit(Credentials("p", subjects=names), Role.GENERATE)
    for strange in (("dns:a.example.org",), ("uri:a.example",), ("subject:CN=a",), ()):
        with pytest.raises(Unauthenticated):
            door.admit(Credentials("p", subjects=strange), Role.GENERATE)
    with pytest.raises(Unauthenticated, match="not valid"):  # a wrong key is not made good by it
        door.admit(Credentials("p", "ds_x", names[:1]), Role.GENERATE)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "192.0.2.1", "example.org"])
def test_dangers_are_told(host: str) -> None:
    def told(**given: bool) -> str:
        return " ".join(
            dangers(host, **{"closed": False, "certified": False, "encrypted": False} | given)
        )

    assert "EVERYBODY" in told() and "EVERYBODY" in told(encrypted=True)
    assert "plain text" in told(closed=True) and not told(certified=True, encrypted=True)
    assert not told(closed=True, encrypted=True)
    for near in ("127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1"):
        assert not dangers(near, closed=False, certified=False, encrypted=False)


async def test_every_method_needs_its_role() -> None:
    """Over the wire: without a key, with every role but the one that is needed, and with it."""
    book = Book()
    allowed = {role: issue(book, role)[1] for role in Role}
    others = {role: issue(book, *(set(Role) - {role}))[1] for role in Role}
    async with served(identity=Identity(book)) as s:
        async with grpc.aio.insecure_channel(s.address) as channel:
            known = {m.path: m for found in s.server.services.methods().values() for m in found}
            assert {path for path in NEEDED if "IdentityService" in path} <= set(known)

            async def code(path: str, shown: str) -> grpc.StatusCode:
                kind = channel.unary_stream if known[path].streaming else channel.unary_unary
                metadata = [("authorization", f"Bearer {shown}")] if shown else []
                call = kind(f"/{path}")(b"", metadata=metadata, timeout=0.5)
                try:
                    if known[path].streaming:
                        await call.read()
                    else:
                        await call
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

            for path in known:
                role = NEEDED[path]
                assert await code(path, "") == grpc.StatusCode.UNAUTHENTICATED, path
                assert await code(path, "ds_wrong") == grpc.StatusCode.UNAUTHENTICATED, path
                assert await code(path, others[role]) == grpc.StatusCode.PERMISSION_DENIED, path
                assert await code(path, allowed[role]) not in (
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                ), path
        async with AsyncClient(s.address) as client:
            assert await client.ready()  # probes have no key
            with pytest.raises(errors.Unauthenticated, match="no API key"):
                await client.server_info()
        async with AsyncClient(s.address, token=others[Role.ADAPTERS]) as client:
            with pytest.raises(errors.PermissionDenied, match="needs the role adapters") as caught:
                await client.load_adapter("a", "/a")
            assert caught.value.reason == "ROLE_MISSING"
        assert not s.engine.submitted and not s.engine.adapters.list()


async def test_both_clients_show_the_key() -> None:
    book = Book()
    _, shown = issue(book, Role.GENERATE)
    async with served(identity=Identity(book)) as s:
        async with AsyncClient(s.address, token=shown) as client:
            text = (await client.generate("x", max_tokens=3)).text
            assert "".join([p.text async for p in client.stream("x", max_tokens=3)]) == text

        def blocking() -> None:
            with Client(s.address, token=shown) as client:
                assert client.generate("x", max_tokens=3).text == text
                assert "".join(p.text for p in client.stream("x", max_tokens=3)) == text
            with Client(s.address, token="ds_x") as client:
                for call in (client.generate, lambda t: list(client.stream(t))):
                    with pytest.raises(errors.Unauthenticated, match="not valid"):
                        call("x")

        await asyncio.to_thread(blocking)


async def test_a_stream_ends_when_its_key_is_revoked() -> None:
    """And the engine is rid of its request; another key's stream goes on."""
    book = Book()
    key, shown = issue(book, Role.GENERATE)
    _, other = issue(book, Role.GENERATE)
    async with (
        served(identity=Identity(book)) as s,
        AsyncClient(s.address, token=shown) as a,
        AsyncClient(s.address, token=other) as b,
    ):
        streams = [c.stream("x", max_tokens=4000, ignore_eos=True) for c in (a, b)]
        for stream in streams:
            await anext(aiter(stream))
        book.put(replace(key, revoked=time.time()))
        with pytest.raises(errors.Unauthenticated, match="was revoked"):
            async for _ in streams[0]:
                pass
        async with asyncio.timeout(10):
            while s.engine.in_flight > 1:
                await asyncio.sleep(0.01)
        await anext(aiter(streams[1]))


FILE = """
[tenants.acme]
tokens_per_minute = 1000

[keys.agent]
tenant = "acme"
roles = ["generate"]
subject = "dns:agent.example"
"""


def test_a_file_of_keys(tmp_path: Path) -> None:
    path, book = tmp_path / "keys.toml", Book()
    key = Key(
        "0" * 16, 'a"b'.replace('"', ""), frozenset({Role.ADMIN}), "ab" * 32, "", 'l"\\', 0.0, 2e9
    )
    path.write_text(FILE + "\n" + section(key))
    file = KeyFile(path)
    file.load(book)
    assert book.find(key.id) == key
    assert (tenant := book.tenant("acme")) and tenant.tokens_per_minute == 1000
    assert [k.id for k in book.of_subjects(["dns:agent.example"])] == ["agent"]

    def changed(text: str) -> None:
        path.write_text(text)
        file._looked = -1e9
        file.refresh(book)

    changed("[keys.agent]\nroles = 3")
    assert book.find("agent") and book.find(key.id), "what is wrong changes nothing"
    changed("")
    assert not book.every_key() and book.closed and not book.of_subjects(["dns:agent.example"])
    with pytest.raises(ConfigError, match=r"--keys .*none.toml"):
        KeyFile(tmp_path / "none.toml").load(book)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x", "Expected"),
        ("key = 1", "'key' is not one of keys, tenants"),
        ("keys = 1", "must be tables"),
        ("[tenants.acme]\nrpm = 1", "'rpm' is not one of requests_per_minute"),
        ("[tenants.acme]\ntokens_per_minute = -1", "-1 must be a whole number"),
        ("[tenants.acme]\ntokens_per_minute = true", "True must be a whole number"),
        ('[tenants."a b"]', "a tenant's name"),
        ('[keys.a]\nroles = ["generate"]\nsubject = "dns:x"', "tenant ''"),
        ('[keys.a]\ntenant = "t"\nsubject = "dns:x"', r"roles \[\] must be some of generate"),
        ('[keys.a]\ntenant = "t"\nroles = ["root"]\nsubject = "dns:x"', "root"),
        ('[keys.a]\ntenant = "t"\nroles = ["generate"]', "one of sha256 and subject"),
        ('[keys.a]\ntenant = "t"\nroles = ["generate"]\nsha256 = "ds_x"', "64 hexadecimal"),
        ('[keys.a]\ntenant = "t"\nroles = ["generate"]\nsubject = "alice"', "KIND:NAME"),
        (
            '[keys.a]\ntenant = "t"\nroles = ["generate"]\nsubject = "dns:x"\nexpires = 2030-01-01',
            "a time with a zone",
        ),
        (FILE + FILE.replace("keys.agent", "keys.b").replace("s.acme", "s.b"), "two keys"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse(text)

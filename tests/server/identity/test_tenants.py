"""Tenants apart: no call tells one of them anything of another's adapters and requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest
from issue import issue
from rig import load_base
from served import Served, served
from serving import serving
from variants import make_base

from deltaserve.clients import AsyncClient, Client, DeltaserveError, errors
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.sight import Owner, Sight
from deltaserve.server.metrics import Metrics
from deltaserve.server.restore import restore
from deltaserve.server.service.identity import Identity
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

WORK = (Role.GENERATE, Role.ADAPTERS)


class Tenants:
    """acme and evil, and the operator."""

    def __init__(self, s: Served, book: Book, clients: dict[str, AsyncClient]) -> None:
        self.s, self.book = s, book
        self.acme, self.evil, self.operator = clients.values()


@asynccontextmanager
async def tenants(sight: Sight | None = None, store: Store | None = None) -> AsyncIterator[Tenants]:
    book = Book()
    shown = {t: issue(book, *WORK, tenant=t)[1] for t in ("acme", "evil")}
    shown["ops"] = issue(book, *WORK, Role.ADMIN, tenant="ops")[1]
    identity = Identity(book, sight=sight or Sight())
    async with served(identity=identity, store=store) as s:
        clients = {t: AsyncClient(s.address, token=k, timeout=10) for t, k in shown.items()}
        try:
            yield Tenants(s, book, clients)
        finally:
            for client in clients.values():
                await client.close()


def calls(c: AsyncClient, name: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every way of naming an adapter in a call."""

    async def streamed(**arguments: object) -> object:
        return [p async for p in c.stream("x", **arguments)]  # type: ignore[arg-type]

    return {
        "Generate": lambda: c.generate("x", name),
        "Generate by digest": lambda: c.generate("x", f"{name}@dig"),
        "Generate adapters": lambda: c.generate("x", adapters=["open", name]),
        "Generate member": lambda: c.generate(
            "x", combination={"rule": "mean", "members": [{"model": ""}, {"model": name}]}
        ),
        "Generate member adapters": lambda: c.generate(
            "x", combination={"rule": "mean", "members": [{"model": ""}, {"adapters": [name]}]}
        ),
        "GenerateStream": lambda: streamed(model=name),
        "GenerateStream adapters": lambda: streamed(adapters={name: 0.5}),
        "Score": lambda: c.score("x", ["y"], name),
        "Score adapters": lambda: c.score("x", ["y"], adapters=[name]),
        "Tokenize": lambda: c.tokenize("x", name),
        "Detokenize": lambda: c.detokenize([5], name),
        "GetAdapter": lambda: c.get_adapter(name),
        "UnloadAdapter": lambda: c.unload_adapter(name),
        "PinAdapter": lambda: c.pin_adapter(name),
        "UnpinAdapter": lambda: c.pin_adapter(name, False),
        "LoadAdapter parent": lambda: c.load_adapter("child", "/c", parent=name),
    }


async def said(call: Callable[[], Awaitable[object]]) -> tuple[object, ...]:
    try:
        return ("answered", await call())
    except DeltaserveError as error:
        return (error.code, error.reason, error.message, error.field)


async def test_another_tenants_adapter_is_as_one_that_nobody_has() -> None:
    async with tenants() as t:
        await t.operator.load_adapter("open", "/o")
        await t.acme.load_adapter("secret", "/s")
        nobody = calls(t.evil, "nobody")
        for name, call in calls(t.evil, "secret").items():
            got, wanted = await said(call), await said(nobody[name])
            assert got[0] == grpc.StatusCode.NOT_FOUND, (name, got)
            assert str(got).replace("secret", "nobody") == str(wanted), name
        for call in (t.evil.get_adapter, t.evil.unload_adapter, t.evil.pin_adapter):
            got, wanted = [await said(partial(call, f"{n}@dig")) for n in ("secret", "nobody")]
            assert str(got).replace("secret", "nobody") == str(wanted), "no digest is part of it"
        assert [a.name for a in await t.evil.list_adapters()] == ["open"]
        for uri in ("/s", "/other"):  # also for the same content
            with pytest.raises(errors.AlreadyExists, match="'secret' is taken"):
                await t.evil.load_adapter("secret", uri)
        assert not t.s.engine.submitted
        known = await t.acme.get_adapter("secret")
        assert (known.tenant, known.shared, known.pinned) == ("acme", False, False)
        for client in (t.acme, t.operator):
            for name, call in calls(client, "secret").items():
                if "member" not in name and name != "UnloadAdapter":
                    assert (await said(call))[0] == "answered", name
        await t.operator.unload_adapter("child")
        await t.acme.unload_adapter("secret")
        await t.evil.load_adapter("secret", "/mine")  # the name is free
        assert (await t.evil.get_adapter("secret")).tenant == "evil"


async def test_what_is_shared_can_be_used_and_not_changed() -> None:
    async with tenants() as t:
        await t.acme.load_adapter("private", "/p")
        await t.acme.load_adapter("common", "/c", shared=True)
        await t.operator.load_adapter("open", "/o")
        assert {a.name: a.tenant for a in await t.evil.list_adapters()} == {
            "common": "acme",
            "open": "ops",
        }
        for name in ("common", "open"):
            assert (await t.evil.generate("x", name)).served_by
            for change in (
                t.evil.unload_adapter(name),
                t.evil.pin_adapter(name),
                t.evil.load_adapter(name, f"/{name[0]}", pinned=True),
            ):
                with pytest.raises((errors.PermissionDenied, errors.AlreadyExists)):
                    await change
            assert not (await t.evil.get_adapter(name)).pinned
        await t.acme.load_adapter("private", "/p", shared=True)  # shared later
        assert (await t.evil.get_adapter("private")).shared


async def test_children_and_parents_of_others() -> None:
    async with tenants() as t:
        await t.acme.load_adapter("parent", "/p", shared=True)
        await t.evil.load_adapter("hidden-child", "/h", parent="parent")
        with pytest.raises(errors.Aborted, match="of other tenants") as caught:
            await t.acme.unload_adapter("parent")
        assert "hidden" not in str(caught.value)
        await t.acme.load_adapter("secret", "/s")
        await t.acme.load_adapter("child", "/c", parent="secret", shared=True)
        assert (await t.evil.get_adapter("child")).parent == ""
        assert (await t.acme.get_adapter("child")).parent == "secret"


async def test_watchers_see_their_own() -> None:
    async with tenants() as t:
        seen: dict[str, list[tuple[str, str]]] = {"acme": [], "evil": []}

        async def watch(tenant: str, client: AsyncClient) -> None:
            async for change in client.watch_adapters():
                seen[tenant] += [(a.name, a.state) for a in change.adapters]

        await t.acme.load_adapter("before", "/b")
        tasks = [asyncio.create_task(watch(n, getattr(t, n))) for n in seen]
        while t.s.engine.adapters.watchers < 2:
            await asyncio.sleep(0.01)
        await t.acme.load_adapter("secret", "/s")
        await t.acme.unload_adapter("secret")
        await t.operator.load_adapter("last", "/l")
        async with asyncio.timeout(10):
            while not all(("last", "ready") in found for found in seen.values()):
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert {name for name, _ in seen["evil"]} == {"last"}
        assert ("secret", "unloaded") in seen["acme"] and ("before", "ready") in seen["acme"]


async def test_weights_of_anothers_request() -> None:
    async with tenants() as t:
        changed: list[str] = []
        t.s.engine.set_weights = lambda i, w: changed.append(i)  # type: ignore[attr-defined]
        stream = t.acme.stream("x", max_tokens=4000, request_id="mine")
        await anext(aiter(stream))
        async with asyncio.timeout(5):
            await t.acme.set_weights("mine", [1.0])
        assert len(changed) == 1 and changed[0].startswith("mine#")
        changed.clear()
        await t.evil.set_weights("mine", [1.0])
        assert changed == [""], "the engine says that it knows no such request"


async def test_what_the_engine_is_told_of_tenants() -> None:
    """The prefix cache's salt and whose turn it is, whatever the client calls itself."""
    async with tenants() as t:
        for client in (t.acme, t.evil):
            await client.generate("x", max_tokens=1, user="u", cache_salt="s")
            await client.score("x", ["y"], user="acme", cache_salt="acme")
        told = [(r.tenant, r.user, r.salt) for r in t.s.engine.submitted]
        assert told == [
            ("acme", "u", "acme\0s"),
            ("acme", "acme", "acme\0acme"),
            ("evil", "u", "evil\0s"),
            ("evil", "acme", "evil\0acme"),
        ]
    async with served() as s, AsyncClient(s.address) as client:
        await client.generate("x", max_tokens=1, user="u", cache_salt="s")
        assert [(r.tenant, r.user, r.salt) for r in s.engine.submitted] == [("u", "", "s")]


def test_prefix_caches_are_apart(tmp_path: Path) -> None:
    """Of a real engine: a tenant's second request finds what its first one left, another tenant's
    does not, whatever it gives as its salt; and the answers are the same."""
    make_base(tmp_path, "llama")
    book, prompt = Book(), list(range(5, 45))
    tokens = [issue(book, Role.GENERATE, tenant=t)[1] for t in ("acme", "acme", "evil", "me")]
    with serving(load_base(tmp_path), [], identity=Identity(book)) as s:

        def cached(token: str, salt: str = "") -> int:
            with Client(s.address, token=token, timeout=60) as client:
                answer = client.generate(prompt, max_tokens=3, ignore_eos=True, cache_salt=salt)
            said.add(tuple(answer.choices[0].token_ids))
            return answer.usage.cached_tokens

        said: set[tuple[int, ...]] = set()
        acme, colleague, evil, other = tokens
        assert cached(acme) == 0 and cached(acme) == cached(colleague) == 32
        assert [cached(evil, salt) for salt in ("", "acme", "acme/")] == [0, 0, 0]
        assert cached(other, "acme") == 0 and cached(evil) == 32
        assert cached(acme, "mine") == 0 and cached(colleague, "mine") == 32
        assert len(said) == 1


async def test_owners_outlive_the_server(tmp_path: Path) -> None:
    store = await Store.open(parse(str(tmp_path / "s.db")))
    async with tenants(store=store) as t:
        await t.acme.load_adapter("secret", "/s")
        await t.acme.load_adapter("late", "/l", wait=False)
        await t.acme.load_adapter("common", "/c")
        await t.acme.load_adapter("common", "/c", shared=True)
        await t.acme.load_adapter("line", "/s")
        async with asyncio.timeout(10):
            while not all(r.digest for r in await store.adapters()):
                await asyncio.sleep(0.01)

    class Cache:
        """With `line` from the command line."""

        def list(self) -> list[object]:
            return [type("Info", (), {"name": "line"})]

        def load(self, name: str, uri: str, **_: object) -> object:
            done: Future[object] = Future()
            done.set_result(type("Info", (), {"digest": f"digest-of-{uri}"}))
            return done

    sight = await restore(Cache(), store, Metrics())  # type: ignore[arg-type]
    assert {n: sight.owner(n) for n in ("secret", "late", "common", "line")} == {
        "secret": Owner("acme", False),
        "late": Owner("acme", False),
        "common": Owner("acme", True),
        "line": Owner("", True),
    }

"""Adapters that were registered over the API are there after a restart, as they were."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from doors import doors
from fake_engine import FakeEngine, FakeText
from rig import load_base, running
from variants import VARIANTS, make_base

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.config import RpcConfig
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.text import Text
from deltaserve.server.metrics import Metrics
from deltaserve.server.restore import restore
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

PROMPT = list(range(5, 15))


class Started:
    def __init__(self, client: AsyncClient, store: Store, metrics: Metrics) -> None:
        self.client, self.store, self.metrics = client, store, metrics

    async def said(self, model: str) -> tuple[int, ...]:
        answer = await self.client.generate(PROMPT, model, max_tokens=8, ignore_eos=True)
        return tuple(answer.choices[0].token_ids)

    async def audit(self) -> list[tuple[str, str, str]]:
        return [(e.verb, e.name, e.outcome) for e in await self.store.audit()]


@asynccontextmanager
async def started(engine: Engine | FakeEngine, text: object, path: Path) -> AsyncIterator[Started]:
    metrics, store = Metrics(), await Store.open(parse(str(path)))
    if isinstance(engine, Engine):
        await restore(engine.adapters, store, metrics)
    server = doors(engine, text, RpcConfig(port=0), metrics, 100, store)
    try:
        async with AsyncClient((await server.start())[0], timeout=60) as client:
            yield Started(client, store, metrics)
    finally:
        await server.stop(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_restarts(tmp_path: Path) -> None:
    roots, path = tmp_path / "roots", tmp_path / "s.db"
    make_base(tmp_path / "base", "llama")
    for i, name in enumerate("abcdefg"):
        generator = torch.Generator().manual_seed(i)
        VARIANTS["lora"].make(tmp_path / "base", roots / name, generator)
    model, text = load_base(tmp_path / "base"), Text(tmp_path / "base")

    with running(model, [roots]) as engine:
        async with started(engine, text, path) as s:
            for name in "zedfg":  # z has the child that comes before it by name
                folder = "a" if name == "z" else name
                await s.client.load_adapter(name, str(roots / folder), pinned=name == "z")
            await s.client.load_adapter("c", str(roots / "c"), parent="z")
            await s.client.load_adapter("b", str(roots / "b"), register_only=True)
            await s.client.unload_adapter("d")
            await s.client.pin_adapter("f", True)
            with pytest.raises(errors.AlreadyExists):
                await s.client.load_adapter("z", str(roots / "b"))
            before = {a.name: a for a in await s.client.list_adapters()}
            answers = {name: await s.said(name) for name in "zcb"}
            assert len(set(answers.values())) == 3
            audit = await s.audit()
            assert audit[-4:] == [
                ("LoadAdapter", "b", "OK"),
                ("UnloadAdapter", "d", "OK"),
                ("PinAdapter", "f", "OK"),
                ("LoadAdapter", "z", "ADAPTER_CONFLICT"),
            ]

    shutil.move(roots / "e", roots / "away")
    shutil.copytree(roots / "a", roots / "e")
    shutil.rmtree(roots / "g")
    with sqlite3.connect(path) as file:
        row = "INSERT INTO adapters VALUES (?, ?, ?, 'd', 0, 0, 'me', '', '', 1)"
        file.execute(row, ("h", str(roots / "a"), '{"parent": 1}'))
        file.execute(row, ("n@me", str(roots / "a"), "{}"))
        options = '{"allow_base_mismatch": false, "task_id": null, "max_error": 0, "parent": "g"}'
        file.execute(row, ("i", str(roots / "a"), options))
    with running(model, [roots]) as engine:
        async with started(engine, text, path) as s:
            after = {a.name: a for a in await s.client.list_adapters()}
            for name in "zcfb":
                old, new = before[name], after[name]
                assert (new.uri, new.digest, new.pinned, new.parent, new.state) == (
                    old.uri,
                    old.digest,
                    old.pinned,
                    old.parent,
                    old.state,
                )
            assert after["f"].pinned and after["b"].state == "registered"
            assert {name: await s.said(name) for name in "zcb"} == answers
            failed = {name: a.error for name, a in after.items() if a.state == "failed"}
            assert set(failed) == {"e", "g", "h", "i", "n@me"} and "d" not in after
            assert "has changed since" in failed["e"] and str(roots / "g") in failed["g"]
            assert "options" in failed["h"] and "'g'" in failed["i"] and "name" in failed["n@me"]
            value = s.metrics.registry.get_sample_value
            assert value("deltaserve_quarantined_adapters_total") == 5
            with pytest.raises(errors.FailedPrecondition, match="has changed since"):
                await s.said("e")
            for name in "ig":
                assert await s.client.unload_adapter(name) == 0
            kept = {r.name: r.error for r in await s.store.adapters()}
            assert kept == {name: failed.get(name, "") for name in "zcfb"} | {
                name: why for name, why in failed.items() if name not in "ig"
            }

    shutil.rmtree(roots / "e")
    shutil.move(roots / "away", roots / "e")
    with running(model, [roots]) as engine:
        async with started(engine, text, path) as s:
            found = {a.name: a.state for a in await s.client.list_adapters()}
            assert found["e"] == "ready" and "g" not in found
            assert {r.name: r.error for r in await s.store.adapters()}["e"] == ""


async def test_a_database_that_is_gone_while_the_server_runs(tmp_path: Path) -> None:
    """What cannot be kept is served, the client is told, and may ask again."""
    path, away, engine = tmp_path / "s.db", tmp_path / "away.db", FakeEngine()
    engine.start()
    async with started(engine, FakeText(), path) as s:
        await s.client.load_adapter("a", "/a")
        path.rename(away)
        for change in (
            lambda: s.client.load_adapter("b", "/b"),
            lambda: s.client.load_adapter("c", "/c", wait=False),
            lambda: s.client.pin_adapter("a", True),
            lambda: s.client.unload_adapter("a"),
        ):
            with pytest.raises(
                errors.Unavailable, match=r"is made, but not kept: .* unable to open"
            ):
                await change()
        with pytest.raises(errors.NotFound):
            await s.client.pin_adapter("none", True)
        assert (await s.client.get_adapter("b")).state == "ready"
        await until(lambda: [i.name for i in engine.adapters.list()] == ["b", "c"])
        away.rename(path)
        assert [r.name for r in await s.store.adapters()] == ["a"]
        await s.client.load_adapter("b", "/b")
        assert await s.client.unload_adapter("a") == 0, "the state alone knew it"
        assert [r.name for r in await s.store.adapters()] == ["b"]
        with pytest.raises(errors.NotFound):
            await s.client.unload_adapter("a")
    engine.shutdown()


async def test_a_load_that_is_not_waited_for(tmp_path: Path) -> None:
    """It is kept from the answer on, with its digest once that is known; and a client that goes
    away does not keep a load from being kept."""
    engine = FakeEngine()
    engine.start()
    engine.adapters.load_seconds = 0.3
    async with started(engine, FakeText(), tmp_path / "s.db") as s:
        assert (await s.client.load_adapter("a", "/a", wait=False)).state == "loading"
        (begun,) = await s.store.adapters()
        assert (begun.name, begun.uri, begun.digest) == ("a", "/a", "")
        assert begun.owner.startswith("ipv4:127.0.0.1:")
        with pytest.raises(errors.DeadlineExceeded):
            await s.client.load_adapter("b", "/b", timeout=0.1)
        async with asyncio.timeout(10):
            while len([r for r in await s.store.adapters() if r.digest]) < 2:
                await asyncio.sleep(0.02)
        assert [r.digest for r in await s.store.adapters()] == ["digest-of-/a", "digest-of-/b"]
    engine.shutdown()

"""AdapterService, ServerService, health and reflection over a real connection."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.types import AdapterFit
from deltaserve.v1 import adapter_pb2, adapter_pb2_grpc


async def test_load_get_list_pin_unload() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        loaded = await client.load_adapter("b", "/b", pinned=True)
        assert (loaded.name, loaded.state, loaded.tier, loaded.pinned) == (
            "b",
            "ready",
            "host",
            True,
        )
        assert (loaded.resident_bytes, loaded.source_bytes) == (1000, 500)
        assert (loaded.loaded_at, loaded.load_seconds) == (1_700_000_000.25, 0.125)
        assert (loaded.last_used, loaded.notes) == (0, ("a note",))
        assert (loaded.primitives, loaded.digest) == (("LowRank",), "digest-of-/b")
        assert await client.load_adapter("b", "/b") == loaded, "the same content again is fine"
        await client.load_adapter("a", "/a")
        assert [a.name for a in await client.list_adapters()] == ["a", "b"]
        assert not (await client.pin_adapter("b", False)).pinned
        assert not (await client.get_adapter("b")).pinned
        assert await client.unload_adapter("b") == 1000
        with pytest.raises(errors.NotFound):
            await client.get_adapter("b")


async def test_load_without_waiting() -> None:
    engine = FakeEngine()
    engine.adapters.load_seconds = 0.3
    async with served(engine) as s, AsyncClient(s.address) as client:
        assert (await client.load_adapter("a", "/a", wait=False)).state == "loading"
        assert (await client.load_adapter("b", "/b")).state == "ready"


async def test_register_only() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        found = await client.load_adapter("a", "/a", register_only=True)
        assert (found.state, found.tier) == ("registered", "disk")


async def test_a_client_that_goes_away_does_not_break_a_load() -> None:
    engine = FakeEngine()
    engine.adapters.load_seconds = 0.3
    async with served(engine) as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.load_adapter("a", "/a", timeout=0.1)
        await asyncio.sleep(0.4)
        assert (await client.get_adapter("a")).state == "ready"


async def test_unload_waits_for_running_requests_and_refuses_new_ones() -> None:
    async with served(FakeEngine(step_seconds=0.01)) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        running = asyncio.create_task(client.generate("x", "a", max_tokens=50))
        while not s.engine.in_flight:
            await asyncio.sleep(0.005)
        unloading = asyncio.create_task(client.unload_adapter("a"))
        while (await client.get_adapter("a")).state != "unloading":
            await asyncio.sleep(0.005)
        with pytest.raises(errors.NotFound):
            await client.generate("x", "a")
        assert not unloading.done()
        assert len((await running).token_ids) == 50
        assert await unloading == 1000


async def test_pages() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        for i in range(7):
            await client.load_adapter(f"a{i}", f"/{i}")
        async with grpc.aio.insecure_channel(s.address) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            names, sizes, request = [], [], adapter_pb2.ListAdaptersRequest(page_size=3)
            while True:
                page = await stub.ListAdapters(request)
                names += [a.name for a in page.adapters]
                sizes.append(len(page.adapters))
                request.page_token = page.next_page_token
                if not page.next_page_token:
                    break
    assert names == [f"a{i}" for i in range(7)] and sizes == [3, 3, 1]


async def test_watch() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("old", "/old")
        seen: list[tuple[bool, list[tuple[str, str]]]] = []

        async def watch() -> None:
            async for change in client.watch_adapters():
                seen.append((change.snapshot, [(a.name, a.state) for a in change.adapters]))

        task = asyncio.create_task(watch())
        while not seen:
            await asyncio.sleep(0.005)
        await client.load_adapter("new", "/new")
        await client.unload_adapter("old")
        while ("old", "unloaded") not in [c for _, changes in seen for c in changes]:
            await asyncio.sleep(0.005)
        assert seen[0] == (True, [("old", "ready")])
        assert not any(snapshot for snapshot, _ in seen[1:])
        assert ("new", "ready") in [c for _, changes in seen for c in changes]
        assert s.engine.adapters.watchers == 1
        task.cancel()
        while s.engine.adapters.watchers:
            await asyncio.sleep(0.005)


async def test_server_info() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        info = await client.server_info()
    assert (info.base, info.held_fingerprint, info.dtype) == ("fake-base", "e" * 64, "float32")
    assert (info.vocab_size, info.max_length, info.weights_bytes) == (300, 4096, 123)
    assert (info.memory_budget_bytes, info.kv_cache_bytes, info.adapter_budget_bytes) == (
        8000,
        1760,
        7200,
    )
    assert (info.free_bytes, info.step_bytes, info.kv_floor_bytes) == (10_000, 100, 800)
    assert (info.kv_token_bytes, info.kv_tokens) == (10, 160)
    assert info.adapter_fits == (AdapterFit("LoRA r16", 300, 24, 160),)
    assert (info.kv_bytes, info.kv_blocks_idle) == (960, 2)
    assert (info.kv_blocks_total, info.kv_blocks_used, info.adapter_formats) == (10, 4, ("fake",))


async def test_health() -> None:
    async with served() as s, grpc.aio.insecure_channel(s.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "deltaserve.v1.GenerationService", "deltaserve.v1.AdapterService"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        async with AsyncClient(s.address) as client:
            await client.wait_ready(5)
            drained = asyncio.create_task(s.server.drain())
            assert await drained
            assert not await client.ready()
            with pytest.raises(errors.Unavailable) as caught:
                await client.generate("x")
            assert caught.value.reason == "SHUTTING_DOWN"
            with pytest.raises(errors.Unavailable, match="not serving"):
                await client.wait_ready(0.3)


async def test_reflection_knows_every_service() -> None:
    async with served() as s, grpc.aio.insecure_channel(s.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = {e.name async for r in call for e in r.list_services_response.service}
    for name in ("GenerationService", "AdapterService", "ServerService"):
        assert f"deltaserve.v1.{name}" in names
    assert {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names

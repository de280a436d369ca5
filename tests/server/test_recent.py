"""Recent: counts by the second, quantiles, bounds."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from served import served

from deltaserve.clients import AsyncClient, Client
from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.records import Key
from deltaserve.server.identity.sight import Owner
from deltaserve.server.recent import KEPT_SECONDS, MOST_MODELS, OTHER, Durations, Recent, quantiles
from deltaserve.server.service.identity import Identity
from deltaserve.v1 import server_pb2, server_pb2_grpc


class Clock:
    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


def test_quantiles_are_within_five_percent() -> None:
    rng = np.random.default_rng()
    drawn = rng.lognormal(-4, 2, 5000)
    parts = [Durations() for _ in range(3)]
    for i, seconds in enumerate(drawn):
        parts[i % 3].add(float(seconds))
    found = quantiles(parts)
    assert found is not None
    exact = np.quantile(drawn, [0.5, 0.9, 0.99], method="inverted_cdf")
    np.testing.assert_allclose([found.p50, found.p90, found.p99], exact, rtol=0.05)
    assert found.mean == pytest.approx(drawn.mean())


def test_no_time_at_all_is_counted_and_nothing_has_no_quantiles() -> None:
    none = Durations()
    assert quantiles([none]) is None
    none.add(0.0)
    found = quantiles([none])
    assert found is not None and found.p99 < 2e-5


def test_seconds_pass() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.tokens("a", 7, 1)
    clock.now += 1.5
    recent.tokens("a", 0, 2)
    recent.tokens("b", 0, 4)
    recent.finished("b")
    recent.shed()
    clock.now += 2
    assert [s.at for s in recent.history(300)] == [1000, 1001, 1002]
    assert [s.total().completion_tokens for s in recent.history(300)] == [1, 6, 0]
    assert [s.total().completion_tokens for s in recent.history(2)] == [6, 0]
    assert recent.window == 3.5
    assert sum(s.total().prompt_tokens for s in recent.last()) == 7
    assert [(s.shed, s.models["b"].requests) for s in recent.last() if s.shed] == [(1, 1)]
    clock.now += 57
    assert sum(s.total().completion_tokens for s in recent.last()) == 6, "the first one is out"
    assert recent.window == 60
    clock.now += 10_000
    assert recent.last()[0].models == {} and len(recent.history(10_000)) == KEPT_SECONDS


def test_names_are_bounded() -> None:
    recent = Recent(Clock())
    for i in range(3 * MOST_MODELS):
        recent.tokens(f"x{i}+y", 0, 1)
    (second,) = recent.last()
    assert len(second.models) == MOST_MODELS + 1
    assert second.models[OTHER].completion_tokens == 2 * MOST_MODELS


async def test_over_the_wire() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        s.metrics.on_tokens("", 5, 1)
        s.metrics.on_first_token("", 0.5)
        s.metrics.on_inter_token("", 0.02)
        s.metrics.on_tokens("a", 0, 3)
        s.metrics.on_shed("queue_full")
        async with grpc.aio.insecure_channel(s.address) as channel:
            stub = server_pb2_grpc.ServerServiceStub(channel)
            found = await stub.GetStats(server_pb2.GetStatsRequest(history_seconds=300))
            with pytest.raises(grpc.aio.AioRpcError, match=r"history_seconds.*301.*at most 300"):
                await stub.GetStats(server_pb2.GetStatsRequest(history_seconds=301))
        told = await client.stats()
        with Client(s.address) as blocking:
            same = await asyncio.to_thread(blocking.stats)
    assert (found.prompt_tokens, found.completion_tokens, found.shed_requests) == (5, 4, 1)
    assert [(m.model, m.completion_tokens) for m in found.models] == [("a", 3), ("", 1)]
    assert found.first_token_seconds.p99 == pytest.approx(0.5, rel=0.05)
    assert found.inter_token_seconds.p50 == pytest.approx(0.02, rel=0.05)
    assert [m.model for m in told.models] == ["a", ""] and told.models == same.models
    assert (told.completion_tokens, told.shed_requests, told.running_requests) == (4, 1, 0)
    assert told.first_token_seconds is not None and told.first_token_seconds.mean == 0.5
    assert told.inter_token_seconds == same.inter_token_seconds
    assert (found.load.kv_blocks_used, found.memory.kv_used_bytes) == (4, 4 * 960)


async def test_others_adapters_are_not_told() -> None:
    book, shown = Book(), {}
    for tenant in ("acme", "other"):
        name, shown[tenant] = token.make()
        book.put(Key(name, tenant, frozenset({Role.GENERATE}), token.digest(shown[tenant])))
    identity = Identity(book)
    identity.sight.put("secret", Owner("acme", shared=False))
    async with served(identity=identity) as s:
        for label in ("", "secret", "open", "open+secret", "open|secret", "open+open"):
            s.metrics.on_tokens(label, 0, 1)
        found = {}
        async with grpc.aio.insecure_channel(s.address) as channel:
            stub = server_pb2_grpc.ServerServiceStub(channel)
            for tenant, key in shown.items():
                metadata = (("authorization", f"Bearer {key}"),)
                found[tenant] = await stub.GetStats(server_pb2.GetStatsRequest(), metadata=metadata)
    assert {m.model for m in found["other"].models} == {"", "open", "open+open"}
    assert len(found["acme"].models) == 6
    assert {f.completion_tokens for f in found.values()} == {6}

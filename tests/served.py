"""A fake engine behind a real gRPC server, in the event loop of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from doors import doors
from fake_engine import FakeEngine, FakeText

from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import Doors
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.identity import Identity
from deltaserve.server.state.store import Store


class Served:
    """addresses: of gRPC, and of HTTP if there is a port for it."""

    def __init__(
        self, engine: FakeEngine, server: Doors, metrics: Metrics, addresses: list[str]
    ) -> None:
        self.engine = engine
        self.server = server
        self.metrics = metrics
        self.address, *others = addresses
        self.http = f"http://{others[0]}" if others else ""


@asynccontextmanager
async def served(
    engine: FakeEngine | None = None,
    identity: Identity | None = None,
    store: Store | None = None,
    **config: Any,
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    metrics = Metrics()
    rpc = RpcConfig(port=0, **config)
    server = doors(engine, FakeText(), rpc, metrics, engine.max_queue, store, identity)
    engine.start()
    try:
        yield Served(engine, server, metrics, await server.start())
    finally:
        await server.stop(0)
        engine.shutdown()

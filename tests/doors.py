"""The doors of a server, for an engine that is there, in the event loop of the caller."""

from __future__ import annotations

from typing import Any

from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import Doors
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.metrics import Metrics
from deltaserve.server.rpc.server import RpcDoor
from deltaserve.server.service.identity import Identity
from deltaserve.server.service.services import Services
from deltaserve.server.state.store import Store


def doors(
    engine: Any,
    text: Any,
    config: RpcConfig,
    metrics: Metrics | None = None,
    max_queue: int = 4096,
    store: Store | None = None,
    identity: Identity | None = None,
) -> Doors:
    """gRPC alone."""
    metrics = metrics or Metrics()
    identity = identity or Identity(Book())
    services = Services(engine, text, config, metrics.recent, store, identity)
    rpc = RpcDoor(services, Doorman(identity.book, identity.refresh), config, metrics, max_queue)
    return Doors(services, [rpc], config.grace_seconds)

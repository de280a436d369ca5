"""The doors of a server, for an engine that is there, in the event loop of the caller."""

from __future__ import annotations

from typing import Any

from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import Door, Doors
from deltaserve.server.http.door import HttpDoor
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.metrics import Metrics
from deltaserve.server.rpc.server import RpcDoor
from deltaserve.server.service.identity import Identity
from deltaserve.server.service.services import Services
from deltaserve.server.state.store import Store
from deltaserve.server.tgis import service as tgis


def doors(
    engine: Any,
    text: Any,
    config: RpcConfig,
    metrics: Metrics | None = None,
    max_queue: int = 4096,
    store: Store | None = None,
    identity: Identity | None = None,
) -> Doors:
    """gRPC, with TGIS's service beside our own, and HTTP where the config has a port for it."""
    metrics = metrics or Metrics()
    identity = identity or Identity(Book())
    services = Services(engine, text, config, metrics, store, identity)
    doorman = Doorman(identity.book, identity.refresh)
    given = (services, doorman, config, metrics, max_queue)
    opened: list[Door] = [RpcDoor(*given, tgis.served(services))]
    if config.http_port is not None:
        opened.append(HttpDoor(*given))
    return Doors(services, opened, config.grace_seconds)

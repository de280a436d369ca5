"""Services: everything that can be called, ready for every door of the server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from deltaserve.server.config import RpcConfig
from deltaserve.server.errors import StateUnavailable
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.quotas import Quotas
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.metrics import Metrics
from deltaserve.server.routes.book import SERVER, RouteBook
from deltaserve.server.routes.watch import Watch
from deltaserve.server.service.adapters import AdapterService
from deltaserve.server.service.constrain import Constrainer
from deltaserve.server.service.encode import Encoders
from deltaserve.server.service.generation import GenerationService
from deltaserve.server.service.identity import Identity, IdentityService
from deltaserve.server.service.info import ServerService
from deltaserve.server.service.methods import Method, methods
from deltaserve.server.service.outbox import LoopOutbox
from deltaserve.server.service.routes import RouteService
from deltaserve.server.service.routing import Routing
from deltaserve.server.service.status import reason
from deltaserve.server.service.traffic import Traffic
from deltaserve.v1 import adapter_pb2, generation_pb2, identity_pb2, route_pb2, server_pb2

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.engine.text import Text
    from deltaserve.server.ledger.keep import Keeper
    from deltaserve.server.routes.shelf import Shelf
    from deltaserve.server.state.store import Store


class Services:
    """To be made inside the event loop that runs the doors. metrics: the engine's observer.
    store: keeps what is changed. identity: whom the server knows."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        config: RpcConfig,
        metrics: Metrics,
        store: Store | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.info = info = engine.info()
        identity = identity or Identity(Book())
        self.traffic = Traffic()
        self._outbox = LoopOutbox(asyncio.get_running_loop())
        self.encoders = Encoders(text, info.max_length, engine.adapters.own_text)
        self._constrainer = Constrainer(text, info.vocab_size, info.eos_token_ids)
        self._routes = RouteBook(engine.adapters, info.names, _shelf(store), reason=reason)
        self.ledger = Ledger(_keeper(store))
        self._routing = Routing(self._routes, metrics, self.ledger)
        self._watch = Watch(self._routes, self.ledger)
        self._watching: asyncio.Task[None] | None = None
        self.quotas = Quotas(identity.book)
        self.generation = GenerationService(
            engine,
            self.encoders,
            self._constrainer,
            self._outbox,
            self._routing,
            identity.sight,
            self.quotas,
            config.max_seconds,
        )
        self.adapters = AdapterService(engine, self._routes, store, identity.sight)
        self.identity = IdentityService(identity)
        self.routes = RouteService(engine, self._routes, metrics, identity.sight, self.ledger)
        self.server = ServerService(
            engine, metrics.recent, identity.sight, chat=text.has_chat_template
        )

    async def start(self) -> None:
        """Bring back what the store has, before the first call. StateUnavailable."""
        await self._routes.restore()
        routes = {standing.route.name for standing in self._routes.all()}
        await self.ledger.open(routes | self._routes.failed(SERVER).keys())
        self._watching = asyncio.create_task(self._watch.run())

    @property
    def in_flight(self) -> int:
        """Requests that the engine has and somebody waits for."""
        return len(self._outbox)

    def methods(self) -> dict[str, list[Method]]:
        """Of each service, by its full name."""
        described = {
            generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]: self.generation,
            adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"]: self.adapters,
            identity_pb2.DESCRIPTOR.services_by_name["IdentityService"]: self.identity,
            route_pb2.DESCRIPTOR.services_by_name["RouteService"]: self.routes,
            server_pb2.DESCRIPTOR.services_by_name["ServerService"]: self.server,
        }
        return {d.full_name: list(methods(d, service)) for d, service in described.items()}

    def by_path(self) -> dict[str, Method]:
        """Every method, by its service's full name and its own."""
        return {method.path: method for each in self.methods().values() for method in each}

    async def drain(self, seconds: float) -> bool:
        """Refuse what is new, wait for what runs. True if all of it ended in time."""
        self.traffic.drain()
        self.adapters.close()
        self.generation.shadows.close()
        try:
            async with asyncio.timeout(seconds):
                await self.traffic.idle()
                await self._routing.drain()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Write down what is left, end the threads."""
        self.generation.shadows.close()
        if self._watching is not None:
            self._watching.cancel()
        with contextlib.suppress(StateUnavailable):
            await self._routes.write()
        await self.ledger.close()
        self.encoders.close()
        self._constrainer.close()
        self._routing.close()


def _shelf(store: Store | None) -> Shelf | None:
    if store is None:
        return None
    from deltaserve.server.routes.shelf import Shelf  # SQLAlchemy: not without --state

    return Shelf(store)


def _keeper(store: Store | None) -> Keeper | None:
    if store is None:
        return None
    from deltaserve.server.ledger.keep import Keeper  # likewise

    return Keeper(store)

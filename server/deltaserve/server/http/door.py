"""The HTTP door: OpenAI's API on a port of its own, in the event loop of the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn

from deltaserve.server.config import ConfigError, RpcConfig
from deltaserve.server.http.app import application
from deltaserve.server.http.protocol import Connection
from deltaserve.server.identity import tls
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.metrics import Metrics
from deltaserve.server.service.services import Services

log = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


class _Server(uvicorn.Server):
    """Leaves signals to `doors.serve_until_signal`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class HttpDoor:
    """To be made inside the event loop that runs it. `config.http_port` says where."""

    def __init__(
        self,
        services: Services,
        doorman: Doorman,
        config: RpcConfig,
        metrics: Metrics,
        max_queue: int,
    ) -> None:
        self._config = config
        certificates = tls.of(config)
        self._server = _Server(
            uvicorn.Config(
                application(services, doorman, config, metrics),
                loop="none",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                limit_concurrency=2 * max_queue + 1000,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                ssl_context_factory=(
                    (lambda *_: certificates.context()) if certificates is not None else None
                ),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen. -> ``host:port``, with the port that was picked; empty if it is taken and need
        not be had."""
        host, port = self._config.host, self._config.http_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port or 0), family=family, backlog=BACKLOG)
        except OSError as error:
            if not self._config.http_required:
                log.warning("no HTTP: cannot listen on %s port %s: %s", host, port, error)
                return ""
            raise ConfigError(f"--http-port {port}: cannot listen on {host}: {error}") from error
        listening.setblocking(False)
        self._serving = asyncio.create_task(self._server.serve([listening]))
        ready = asyncio.create_task(self._server.ready.wait())
        await asyncio.wait({ready, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._serving.done():
            self._serving.result()
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        address = f"{shown}:{listening.getsockname()[1]}"
        scheme = "http" if self._config.tls_key is None else "https"
        log.info("OpenAI's API on %s://%s/v1", scheme, address)
        return address

    async def unready(self) -> None:
        """/health tells by itself."""

    async def stop(self, grace: float) -> None:
        """Stop listening; calls that still run are cancelled after the grace, in seconds."""
        if self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = max(grace, 0.1)  # type: ignore[assignment]
        self._server.should_exit = True
        await self._serving

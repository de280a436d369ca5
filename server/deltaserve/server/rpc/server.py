"""The gRPC server: our services, health and reflection on one port; drains when told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deltaserve.server.config import ConfigError, RpcConfig
from deltaserve.server.metrics import Metrics
from deltaserve.server.rpc.adapter import AdapterService
from deltaserve.server.rpc.constrain import Constrainer
from deltaserve.server.rpc.encode import Encoders
from deltaserve.server.rpc.gate import Gate
from deltaserve.server.rpc.generation import GenerationService
from deltaserve.server.rpc.info import ServerService
from deltaserve.server.rpc.outbox import LoopOutbox
from deltaserve.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

if TYPE_CHECKING:
    from deltaserve.server.engine.engine import Engine
    from deltaserve.server.engine.text import Text
    from deltaserve.server.state.store import Store

log = logging.getLogger(__name__)

SERVICES = (
    *(s.full_name for s in generation_pb2.DESCRIPTOR.services_by_name.values()),
    *(s.full_name for s in adapter_pb2.DESCRIPTOR.services_by_name.values()),
    *(s.full_name for s in server_pb2.DESCRIPTOR.services_by_name.values()),
)
_LAST_WORDS_SECONDS = 1.0
"""For final statuses to reach their clients after the last call has ended."""


def options(config: RpcConfig, max_queue: int) -> list[tuple[str, Any]]:
    """gRPC's defaults drop bursts of streams at random (1,000 pending calls) and cut clients off
    that ping during a long prefill; these do not."""
    pending = 10 * max(max_queue, 1000)
    return [
        ("grpc.server.max_pending_requests", pending),
        ("grpc.server.max_pending_requests_hard_limit", 2 * pending),
        ("grpc.server_max_unrequested_time_in_server", 120),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", 64 << 20),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]


class Server:
    """Serves an engine; to be made inside the event loop that runs it."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        config: RpcConfig,
        metrics: Metrics,
        max_queue: int,
        store: Store | None = None,
    ) -> None:
        self._config = config
        self._gate = Gate(metrics)
        self._outbox = LoopOutbox(asyncio.get_running_loop())
        info = engine.info()
        self._encoders = Encoders(text, info.max_length, engine.adapters.own_text)
        self._constrainer = Constrainer(text, info.vocab_size, info.eos_token_ids)
        self._adapters = AdapterService(engine, config, store)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self._gate],
            options=options(config, max_queue),
            maximum_concurrent_rpcs=2 * max_queue + 1000,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(engine, self._encoders, self._constrainer, self._outbox, config),
            self._server,
        )
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self._adapters, self._server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(
            ServerService(engine, chat=text.has_chat_template), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> str:
        """Listen. -> ``host:port``, with the port that was picked."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        wanted = f"{host}:{self._config.port}"
        try:
            port = self._listen(wanted)
        except RuntimeError as error:
            raise ConfigError(f"--host, --port: cannot listen on {wanted}: {error}") from error
        await self._server.start()
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    def _listen(self, address: str) -> int:
        if self._config.tls_key is None or self._config.tls_certificate is None:
            return self._server.add_insecure_port(address)
        pair = (self._config.tls_key.read_bytes(), self._config.tls_certificate.read_bytes())
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def drain(self) -> bool:
        """Refuse what is new, wait for what runs. True if all of it ended within the grace."""
        self._gate.draining = True
        await self._health.enter_graceful_shutdown()
        self._adapters.close()
        try:
            async with asyncio.timeout(self._config.grace_seconds):
                await self._gate.idle()
        except TimeoutError:
            log.warning("some calls were still running after %g s", self._config.grace_seconds)
            return False
        return True

    async def stop(self, grace: float = _LAST_WORDS_SECONDS) -> None:
        """Stop listening; calls that still run are cancelled after the grace."""
        await self._server.stop(grace)
        self._encoders.close()
        self._constrainer.close()


async def serve_until_signal(server: Server, ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once. -> exit code: 0
    if every call could finish."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, on_signal)
    ready(await server.start())
    await first.wait()
    log.info("draining; a second signal stops at once")
    draining = asyncio.create_task(server.drain())
    hurry = asyncio.create_task(second.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    finished = draining.done() and draining.result()
    draining.cancel()
    hurry.cancel()
    await server.stop(_LAST_WORDS_SECONDS if finished else 0)
    return 0 if finished else 1

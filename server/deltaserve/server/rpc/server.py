"""The gRPC door: our services, health and reflection on one port."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deltaserve.server.config import ConfigError, RpcConfig
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.identity.tls import Certificates, Pem, of
from deltaserve.server.metrics import Metrics
from deltaserve.server.rpc.gate import Gate
from deltaserve.server.service.methods import Method
from deltaserve.server.service.services import Services


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


class RpcDoor:
    """To be made inside the event loop that runs it. also: served beside the services' own methods,
    by the full names of their services."""

    def __init__(
        self,
        services: Services,
        doorman: Doorman,
        config: RpcConfig,
        metrics: Metrics,
        max_queue: int,
        also: Mapping[str, list[Method]] | None = None,
    ) -> None:
        self._config = config
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=options(config, max_queue),
            maximum_concurrent_rpcs=2 * max_queue + 1000,
        )
        gate = Gate(services.traffic, doorman, metrics, config.write_seconds)
        served = {**services.methods(), **(also or {})}
        self._names = tuple(served)
        self._server.add_generic_rpc_handlers(
            tuple(gate.handler(name, methods) for name, methods in served.items())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
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
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    def _listen(self, address: str) -> int:
        certificates = of(self._config)
        if certificates is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, _renewing(certificates))

    async def unready(self) -> None:
        """Tell health checks that new calls are refused."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Stop listening; calls that still run are cancelled after the grace, in seconds."""
        await self._server.stop(grace)


def _renewing(certificates: Certificates) -> grpc.ServerCredentials:
    """They look for new files with every handshake."""
    pem = certificates.load()

    def made(pem: Pem) -> grpc.ServerCertificateConfiguration:
        pair = (pem.key, pem.certificate)
        return grpc.ssl_server_certificate_configuration([pair], pem.client_ca or None)

    def fetch() -> Any:
        """None for no change, which gRPC's types do not know of."""
        renewed = certificates.renewed()
        return made(renewed) if renewed is not None else None

    required = bool(pem.client_ca)
    return grpc.dynamic_ssl_server_credentials(made(pem), fetch, required)

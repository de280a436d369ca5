"""The metrics on a port of their own, for what scrapes them: threads, so that they are told even
while the event loop is busy."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from deltaserve.server.config import ConfigError, RpcConfig
from deltaserve.server.identity import tls

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""For a client to say what it wants, TLS handshake included."""


class _Server(ThreadingWSGIServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that speaks no HTTP, or has no certificate, is not our fault."""
        log.debug("a scrape from %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


@contextmanager
def scraped(registry: CollectorRegistry, config: RpcConfig) -> Iterator[str]:
    """Answer ``/metrics`` on `config.metrics_port`, with the certificates of the other doors, if
    there are any. -> its URL. ConfigError if it cannot listen."""
    server = _listening(registry, config)
    certificates = tls.of(config)
    if certificates is not None:
        # each handshake on its client's thread: one that says nothing keeps nobody else waiting
        server.socket = certificates.context().wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, name="deltaserve-scrape", daemon=True)
    thread.start()
    shown = f"[{config.host}]" if ":" in config.host else config.host
    scheme = "http" if certificates is None else "https"
    try:
        yield f"{scheme}://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listening(registry: CollectorRegistry, config: RpcConfig) -> WSGIServer:
    host, port = config.host, config.metrics_port or 0

    class Server(_Server):
        pass

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        Server.address_family = found[0][0]
        return make_server(
            str(found[0][4][0]), port, make_wsgi_app(registry), Server, handler_class=_Handler
        )
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host}: {error}") from error

"""TLS of every door: the server's certificate, whose clients it takes, and their renewal.

Files are looked at with each handshake; new ones hold from then on, for new connections. What
cannot be read, or does not fit together, leaves the certificate that there was.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from deltaserve.server.config import ConfigError, RpcConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold. client_ca: empty if clients need no certificate."""

    certificate: bytes
    key: bytes
    client_ca: bytes = b""


class Certificates:
    """One for each door, from PEM files. client_ca: of the authorities that clients must have a
    certificate of; None asks them for none. Thread-safe: a look at a file is one step."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._seen: tuple[tuple[int, int, int], ...] = ()

    def load(self) -> Pem:
        """ConfigError for what is no certificate, no key, or not of each other."""
        try:
            self._seen = self._stamps()
            self._made()
            ca = self._client_ca
            read = (self._certificate.read_bytes(), self._key.read_bytes())
            return Pem(*read, ca.read_bytes() if ca is not None else b"")
        except (OSError, ssl.SSLError) as error:
            flags = "--tls-certificate, --tls-key" + ", --tls-client-ca" * bool(self._client_ca)
            raise ConfigError(f"{flags}: {error}") from error

    def renewed(self) -> Pem | None:
        """What the files hold now, if they have changed and fit together."""
        try:
            if self._stamps() == self._seen:
                return None
            pem = self.load()
        except (OSError, ConfigError) as error:
            log.error("the certificate is not renewed: %s", error)
            return None
        log.info("the certificate was renewed from %s", self._certificate)
        return pem

    def context(self) -> ssl.SSLContext:
        """For a server of this process that takes such: it renews the files' contents itself."""
        self.load()
        base = latest = self._made()

        def renew(connection: ssl.SSLObject | ssl.SSLSocket, *_: object) -> int | None:
            nonlocal latest
            if self.renewed() is not None:
                latest = self._made()
            if latest is base:
                return None
            connection.context = latest
            if connection.session_reused and self._client_ca is not None:  # TLS 1.2, by its id
                return ssl.ALERT_DESCRIPTION_BAD_CERTIFICATE
            return None

        base.sni_callback = renew
        return base

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._client_ca)
            # who resumes a session shows no certificate: its authority may be one no longer
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
        return context

    def _stamps(self) -> tuple[tuple[int, int, int], ...]:
        files = (self._certificate, self._key, self._client_ca)
        found = (file.stat() for file in files if file is not None)
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in found)


def of(config: RpcConfig) -> Certificates | None:
    """What a door is to use; None for plain text."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    return Certificates(config.tls_certificate, config.tls_key, config.tls_client_ca)

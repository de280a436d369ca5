"""TLS with real certificates: who is let in, by which name, and certificates that change."""

from __future__ import annotations

import asyncio
import socket
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from issue import issue
from prometheus_client import CollectorRegistry, Counter
from served import served

from deltaserve.clients import AsyncClient, Client, errors
from deltaserve.server.config import ConfigError, RpcConfig
from deltaserve.server.identity import tls
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.certificate import from_ssl, is_subject, subjects
from deltaserve.server.identity.records import Key
from deltaserve.server.scrape import scraped
from deltaserve.server.service.identity import Identity

GENERATE = frozenset({Role.GENERATE})


def written(folder: Path, name: str, leaf: trustme.LeafCert) -> dict[str, Path]:
    """As the client takes them."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return {"certificate": certificate, "key": key}


class Pki:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)
        self.server = written(folder, "server", self.ca.issue_cert("localhost", "127.0.0.1"))

    def client(self, name: str, *names: str, **subject: str) -> dict[str, Path]:
        return {
            "ca": self.file,
            **written(self.folder, name, self.ca.issue_cert(*names, **subject)),
        }

    def config(self, *, clients: bool) -> dict[str, Path]:
        found = {"tls_certificate": self.server["certificate"], "tls_key": self.server["key"]}
        return {**found, "tls_client_ca": self.file} if clients else found


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def at(address: str) -> str:
    return address.replace("127.0.0.1", "localhost")


async def test_callers_by_their_certificates(pki: Pki, tmp_path: Path) -> None:
    book = Book()
    agent = pki.client("agent", "agent.example", common_name="whoever")
    person = pki.client("person", "p@x.example", common_name="Ann, O", organization_name="Örg")
    whole = x509.load_pem_x509_certificate(person["certificate"].read_bytes()).subject
    unit = whole.get_attributes_for_oid(x509.NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value
    subject = f"subject:CN=Ann\\, O,OU={unit},O=\\C3\\96rg"
    book.put(Key("k1", "acme", GENERATE, subject="dns:agent.example"))
    book.put(Key("k2", "people", GENERATE, subject=subject))
    _, token = issue(book, Role.ADAPTERS, tenant="third")
    stranger = pki.client("stranger", "evil.example", common_name="agent.example")
    (tmp_path / "foreign").mkdir()
    foreign = Pki(tmp_path / "foreign")
    forged = {**foreign.client("agent", "agent.example"), "ca": pki.file}
    async with served(identity=Identity(book), **pki.config(clients=True)) as s:
        for shown, tenant in ((agent, "acme"), (person, "people")):
            async with AsyncClient(at(s.address), **shown) as client:
                await client.generate("x", max_tokens=1)
                assert s.engine.submitted[-1].tenant == tenant
                with pytest.raises(errors.PermissionDenied):
                    await client.load_adapter("a", "/a")
        async with AsyncClient(at(s.address), **stranger) as client:
            with pytest.raises(errors.Unauthenticated, match="no name that is known"):
                await client.generate("x")
        async with AsyncClient(at(s.address), token=token, **stranger) as client:
            assert (await client.load_adapter("a", "/a")).tenant == "third"
        for wrong in (forged, {"ca": pki.file}):
            async with AsyncClient(at(s.address), token=token, **wrong) as client:
                with pytest.raises(errors.Unavailable):
                    await client.generate("x", timeout=5)

        def blocking() -> None:
            with Client(at(s.address), **agent) as client:
                assert client.ready() and client.generate("x", max_tokens=1).text

        await asyncio.to_thread(blocking)


async def test_a_certificate_alone_opens_a_server_without_keys(pki: Pki) -> None:
    shown = pki.client("a", "agent.example")
    async with (
        served(**pki.config(clients=True)) as s,
        AsyncClient(at(s.address), **shown) as client,
    ):
        await client.load_adapter("a", "/a")


async def test_certificates_are_renewed(pki: Pki) -> None:
    """New connections get the new one; running ones go on; what does not fit changes nothing."""
    async with served(**pki.config(clients=False)) as s:
        old = {"ca": pki.file}
        async with AsyncClient(at(s.address), **old) as first:
            stream = first.stream("x", max_tokens=4000)
            await anext(aiter(stream))
            (pki.folder / "next").mkdir()
            after = Pki(pki.folder / "next")
            renewed = after.server["key"].read_bytes()
            kept = pki.server["key"].read_bytes()
            pki.server["key"].write_bytes(renewed)  # the certificate is still the old one's
            async with AsyncClient(at(s.address), **old, options=ALONE) as client:
                assert await client.ready(timeout=5)
            assert kept != renewed
            pki.server["certificate"].write_bytes(after.server["certificate"].read_bytes())
            async with AsyncClient(at(s.address), ca=after.file, options=ALONE) as client:
                assert await client.ready(timeout=5)
            async with AsyncClient(at(s.address), **old, options=ALONE) as client:
                with pytest.raises(errors.Unavailable):
                    await client.ready(timeout=5)
            await anext(aiter(stream))


async def test_other_authorities_of_clients(pki: Pki) -> None:
    """From then on, for new connections: theirs, and no longer the old one's."""
    (pki.folder / "next").mkdir()
    after = Pki(pki.folder / "next")
    old, new = pki.client("old", "a.example"), {**after.client("new", "a.example"), "ca": pki.file}
    config = pki.config(clients=True)
    config["tls_client_ca"] = pki.folder / "clients.pem"
    config["tls_client_ca"].write_bytes(pki.file.read_bytes())
    async with served(**config) as s:

        async def let_in(shown: dict[str, Path]) -> bool:
            async with AsyncClient(at(s.address), **shown, options=ALONE) as client:
                try:
                    return await client.ready(timeout=5)
                except errors.Unavailable:
                    return False

        assert [await let_in(old), await let_in(new)] == [True, False]
        config["tls_client_ca"].write_bytes(after.file.read_bytes())
        assert [await let_in(old), await let_in(new)] == [False, True]


ALONE = [("grpc.use_local_subchannel_pool", 1)]
"""A connection of its own."""


async def test_the_http_door(pki: Pki) -> None:
    """The same names as over gRPC, and the same renewal."""
    shown = pki.client("person", "p@x.example", "a.example", "::1", common_name="Ann, Ö",
                       organization_name=" #x\\ ")  # fmt: skip
    certificates = tls.of(RpcConfig(**pki.config(clients=True)))
    assert certificates is not None
    context, seen = certificates.context(), list[tuple[str, ...]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(from_ssl(writer.get_extra_info("ssl_object").getpeercert()))
        writer.close()

    def client(ca: Path) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(ca))
        made.load_cert_chain(shown["certificate"], shown["key"])
        return made

    listening = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]

    async def connect(ca: Path) -> None:
        where = {"host": "127.0.0.1", "port": port, "server_hostname": "localhost"}
        reader, writer = await asyncio.open_connection(**where, ssl=client(ca))
        await reader.read()
        writer.close()

    await connect(pki.file)
    over_grpc: list[tuple[str, ...]] = []

    class Spy(Book):
        def of_subjects(self, names: object) -> list[Key]:
            over_grpc.append(tuple(names))  # type: ignore[arg-type]
            return []

    async with (
        served(identity=Identity(Spy(closed=True)), **pki.config(clients=True)) as s,
        AsyncClient(at(s.address), **shown) as c,
    ):
        with pytest.raises(errors.Unauthenticated):
            await c.generate("x")
    assert sorted(seen[0]) == sorted(over_grpc[0]) and all(map(is_subject, seen[0])), seen
    assert {name.partition(":")[0] for name in seen[0]} == {"subject", "email", "dns", "ip"}
    (pki.folder / "next").mkdir()
    after = Pki(pki.folder / "next")
    for part in ("key", "certificate"):
        pki.server[part].write_bytes(after.server[part].read_bytes())
    await connect(after.file)
    assert seen[1] == seen[0]
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(pki.file)
    listening.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_other_authorities_of_http_clients(pki: Pki, version: ssl.TLSVersion) -> None:
    """They hold for new connections, also of who had one and resumes its session."""
    (pki.folder / "next").mkdir()
    after = Pki(pki.folder / "next")
    authorities = pki.folder / "clients.pem"
    authorities.write_bytes(pki.file.read_bytes())
    context = tls.Certificates(*pki.server.values(), authorities).context()
    clients = []
    for shown in (pki.client("old", "a.x"), after.client("new", "a.x")):
        made = ssl.create_default_context(cafile=str(pki.file))
        made.load_cert_chain(shown["certificate"], shown["key"])
        made.maximum_version = version
        clients.append(made)
    old, new = clients

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]

    def ask(made: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Any:
        """The session, if the server answers."""
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
                made.wrap_socket(plain, server_hostname="localhost", session=session) as found,
            ):
                found.sendall(b"x")
                return found.session if found.recv(1) == b"x" else None
        except OSError:
            return None

    session = await asyncio.to_thread(ask, old)
    assert session and await asyncio.to_thread(ask, old, session)
    assert not await asyncio.to_thread(ask, new)
    authorities.write_bytes(after.file.read_bytes())
    assert await asyncio.to_thread(ask, new)
    assert not await asyncio.to_thread(ask, old)
    assert not await asyncio.to_thread(ask, old, session)
    listening.close()


def test_the_metrics_port(pki: Pki) -> None:
    """As the other doors; a client that says nothing holds up nobody."""
    registry = CollectorRegistry()
    Counter("seen", "Something", registry=registry).inc()
    shown = pki.client("scraper", "scraper.example")
    anybody = ssl.create_default_context(cafile=pki.file)
    known = ssl.create_default_context(cafile=pki.file)
    known.load_cert_chain(shown["certificate"], shown["key"])

    def ask(url: str, context: ssl.SSLContext | None) -> str:
        with urllib.request.urlopen(url, timeout=10, context=context) as answer:
            return str(answer.read().decode())

    with scraped(registry, RpcConfig(metrics_port=0)) as url:
        assert url.startswith("http://") and "seen_total 1.0" in ask(url, None)
    for clients in (False, True):
        config = RpcConfig(metrics_port=0, **pki.config(clients=clients))
        with scraped(registry, config) as url:
            assert url.startswith("https://")
            port = int(url.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port)):
                assert "seen_total 1.0" in ask(url, known)
            if clients:
                with pytest.raises(OSError):
                    ask(url, anybody)
            else:
                assert "seen_total 1.0" in ask(url, anybody)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = RpcConfig(metrics_port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="--metrics-port"), scraped(registry, busy):
            pass


def test_names_of_certificates() -> None:
    assert from_ssl(None) == from_ssl({}) == ()
    assert subjects([("ip", "0:0:0:0:0:0:0:1"), ("dns", ""), ("uri", "a:b")]) == (
        "ip:::1",
        "uri:a:b",
    )
    strange = {"subject": ((("commonName", "a"),), (("oddity", "b"),))}
    assert from_ssl(strange) == (), "half a subject would be another's"
    two = {"subject": ((("countryName", "DE"),), (("commonName", "a"), ("userId", "b")))}
    assert from_ssl(two) == ("subject:CN=a+UID=b,C=DE",)


def test_files_that_do_not_fit(pki: Pki) -> None:
    other = written(pki.folder, "other", pki.ca.issue_cert("localhost"))
    server = pki.server["certificate"]
    for pair in ((server, other["key"]), (other["key"], server), (server, pki.folder / "no.pem")):
        with pytest.raises(ConfigError, match="--tls-certificate, --tls-key"):
            tls.Certificates(*pair).load()
    with pytest.raises(ConfigError, match="needs --tls-certificate"):
        RpcConfig(tls_client_ca=pki.file)

"""HTTPS, with the certificate of gRPC, and clients known by certificates of their own."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2
import openai
import pytest
import trustme
from served import served

from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.records import Key
from deltaserve.server.service.identity import Identity


async def test_a_client_is_known_by_its_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("127.0.0.1"), authority.issue_cert("robot.example")
    files = {name: tmp_path / f"{name}.pem" for name in ("key", "cert", "ca")}
    ours.private_key_pem.write_to_path(files["key"])
    ours.cert_chain_pems[0].write_to_path(files["cert"])
    authority.cert_pem.write_to_path(files["ca"])
    book = Book([Key("robot", "acme", frozenset({Role.GENERATE}), subject="dns:robot.example")])
    stranger, robot = ssl.create_default_context(), ssl.create_default_context()
    for context in (stranger, robot):
        authority.configure_trust(context)
    theirs.configure_cert(robot)
    async with served(
        identity=Identity(book),
        http_port=0,
        tls_certificate=files["cert"],
        tls_key=files["key"],
        tls_client_ca=files["ca"],
    ) as s:
        url = s.http.replace("http://", "https://")
        async with (
            httpx2.AsyncClient(verify=robot) as http,
            openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key="none",
                default_headers={"authorization": ""},
                max_retries=0,
                http_client=http,
            ) as client,
        ):
            stream = await client.completions.create(
                model="", prompt="x", max_tokens=3, stream=True
            )
            assert "".join([c.choices[0].text async for c in stream if c.choices])
            with pytest.raises(openai.PermissionDeniedError, match="the key robot has generate"):
                await client.post("/load_lora_adapter", body={}, cast_to=str)
        for context in (stranger, True):
            async with httpx2.AsyncClient(verify=context) as http:
                with pytest.raises(httpx2.TransportError):
                    await http.get(f"{url}/health")
        async with httpx2.AsyncClient() as http:
            with pytest.raises(httpx2.TransportError):
                await http.get(f"{s.http}/health")

"""HTTPS, with the certificate of gRPC."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest
from served import served


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout", str(key)]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


async def test_https(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    async with served(http_port=0, tls_certificate=cert, tls_key=key) as s:
        url = s.http.replace("http://", "https://") + "/v1"
        trusting = httpx2.AsyncClient(verify=ssl.create_default_context(cafile=str(cert)))
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, http_client=trusting
        ) as client:
            stream = await client.completions.create(
                model="", prompt="x", max_tokens=3, stream=True
            )
            assert len([chunk async for chunk in stream]) > 0
        async with httpx2.AsyncClient() as plain:
            with pytest.raises(httpx2.TransportError):
                await plain.get(f"{s.http}/health")

"""Who is let in over HTTP."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from issue import issue
from served import served

from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.service.identity import Identity

PATHS: list[tuple[str, str, Any, Role]] = [
    ("POST", "/v1/completions", {"prompt": "x"}, Role.GENERATE),
    ("POST", "/v1/chat/completions", {"messages": []}, Role.GENERATE),
    ("POST", "/tokenize", {"prompt": "x"}, Role.GENERATE),
    ("POST", "/detokenize", {"tokens": [5]}, Role.GENERATE),
    ("GET", "/v1/models", None, Role.GENERATE),
    ("GET", "/v1/models/fake-base", None, Role.GENERATE),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, Role.ADAPTERS),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}, Role.ADAPTERS),
    ("GET", "/metrics", None, Role.ADMIN),
]


async def test_every_path_needs_its_role() -> None:
    book = Book()
    allowed = {role: issue(book, role)[1] for role in Role}
    others = {role: issue(book, *(set(Role) - {role}))[1] for role in Role}
    async with (
        served(identity=Identity(book), http_port=0) as s,
        httpx2.AsyncClient(base_url=s.http) as client,
    ):
        for method, path, body, role in PATHS:
            for shown, status, code in (
                ("", 401, "unauthenticated"),
                ("ds_wrong", 401, "unauthenticated"),
                (others[role], 403, "role_missing"),
                (allowed[role], 200, ""),
            ):
                headers = {"authorization": f"Bearer {shown}"} if shown else {}
                answer = await client.request(method, path, json=body, headers=headers)
                if status == 200:
                    assert answer.status_code not in (401, 403, 500), (path, answer.text)
                else:
                    assert answer.status_code == status, (path, answer.text)
                    assert answer.json()["error"]["code"] == code
        for path in ("/health", "/version"):
            assert (await client.get(path)).status_code == 200


async def test_a_page_cannot_reach_an_open_server_by_its_own_name() -> None:
    book = Book()
    async with served(http_port=0) as s, httpx2.AsyncClient(base_url=s.http) as client:
        for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "x]:["):
            answer = await client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 403, host
        for host in ("localhost", "localhost:9", "127.0.0.1", "[::1]:8000", "10.0.0.1"):
            answer = await client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 200, host
        answer = await client.get("/health", headers={"host": "evil.example"})
        assert answer.status_code == 200
    _, shown = issue(book, Role.GENERATE)
    headers = {"host": "models.example", "authorization": f"Bearer {shown}"}
    async with (
        served(identity=Identity(book), http_port=0) as s,
        httpx2.AsyncClient(base_url=s.http, headers=headers) as client,
    ):
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_stream_ends_when_its_key_is_revoked() -> None:
    book = Book()
    key, shown = issue(book, Role.GENERATE)
    async with (
        served(identity=Identity(book), http_port=0) as s,
        openai.AsyncOpenAI(base_url=f"{s.http}/v1", api_key=shown, max_retries=0) as client,
    ):
        stream = await client.completions.create(model="", prompt="x", max_tokens=4000, stream=True)
        await anext(aiter(stream))
        book.put(replace(key, revoked=time.time()))
        with pytest.raises(openai.APIError, match="was revoked"):
            async for _ in stream:
                pass
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()

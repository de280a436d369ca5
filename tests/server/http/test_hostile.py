"""What no client should send, and what no client should do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served, served

from deltaserve.clients import AsyncClient
from deltaserve.server.config import ConfigError
from deltaserve.server.http import fields, protocol

JSON = {"content-type": "application/json"}
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000
POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
)


def error(answer: httpx2.Response) -> dict[str, Any]:
    """The error of an answer; it has OpenAI's fields, and no more."""
    found: dict[str, Any] = answer.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"} and found["message"]
    return found


BODIES = {
    "empty": b"",
    "broken": b'{"prompt": ',
    "a list": b"[]",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinite": b'{"prompt": "x", "temperature": 1e999}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "half a pair": b'{"prompt": "\\ud800"}',
    "deep": DEEP,
}


async def test_bodies_that_are_no_request() -> None:
    async with served(http_port=0) as s, httpx2.AsyncClient(base_url=s.http) as client:
        for path in POSTS:
            for name, data in BODIES.items():
                if name == "infinite" and "completions" not in path:
                    continue  # an unknown field there
                answer = await client.post(path, content=data, headers=JSON)
                assert answer.status_code == 400, (path, name, answer.text)
                assert error(answer)["type"] == "invalid_request_error"
        assert not s.engine.submitted


async def test_other_paths_methods_and_types() -> None:
    async with served(http_port=0) as s, httpx2.AsyncClient(base_url=s.http) as client:
        assert error(await client.get("/v2/nothing"))["code"] == "unknown_url"
        wrong = await client.get("/v1/completions")
        assert wrong.status_code == 405 and error(wrong) and wrong.headers["allow"] == "POST"
        for path in ("/docs", "/redoc", "/openapi.json", "/v1/models/"):
            assert (await client.get(path)).status_code == 404
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await client.post(
                "/v1/load_lora_adapter", content=b"{}", headers={"content-type": kind}
            )
            assert answer.status_code == 415 and error(answer)
        across = await client.options(
            "/v1/completions",
            headers={"origin": "http://evil", "access-control-request-method": "POST"},
        )
        assert "access-control-allow-origin" not in across.headers
        for _ in range(3):
            await client.get(f"/{'x' * 50}")
        paths = [
            sample.labels["path"]
            for metric in s.metrics.registry.collect()
            if metric.name == "deltaserve_http_requests"
            for sample in metric.samples
        ]
        assert set(paths) == {
            "_unknown",
            "/v1/completions",
            "/v1/load_lora_adapter",
            "/v1/models/{name:path}",
        }


async def test_a_body_has_a_size() -> None:
    async with (
        served(http_port=0, max_message_bytes=1000) as s,
        httpx2.AsyncClient(base_url=s.http) as client,
    ):

        async def drops() -> Any:
            for _ in range(100):
                yield b" " * 100

        for content in (b" " * 1001, drops()):
            answer = await client.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 413 and error(answer)["code"] == "request_too_large"
        fits = json.dumps({"prompt": "x"}).encode().ljust(1000)
        answer = await client.post("/v1/completions", content=fits, headers=JSON)
        assert answer.status_code == 200


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, "prompt.0"),
    ("/v1/completions", {"prompt": [1, "x"]}, "prompt.0"),
    ("/v1/completions", {"prompt": [299, 300]}, "prompt"),
    ("/v1/completions", {"prompt": "x" * 5000}, "prompt"),
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": "7"}, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "max_tokens": True}, "max_tokens"),
    ("/v1/completions", {"prompt": "x", "temperature": 101}, "temperature"),
    ("/v1/completions", {"prompt": "x", "top_p": 0}, "top_p"),
    ("/v1/completions", {"prompt": "x", "n": 65}, "n"),
    ("/v1/completions", {"prompt": ["x"] * 33, "n": 32}, "n"),
    ("/v1/completions", {"prompt": ["x"] * 33, "best_of": 32}, "best_of"),
    ("/v1/completions", {"prompt": "x", "n": 2, "best_of": 1}, "best_of"),
    ("/v1/completions", {"prompt": "x", "n": 1, "best_of": 2, "stream": True}, "best_of"),
    ("/v1/completions", {"prompt": "x", "stop": ["x"] * 65}, "stop"),
    ("/v1/completions", {"prompt": "x", "stop": [""]}, "stop"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [300]}, "stop_token_ids"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "logprobs": 257}, "logprobs"),
    ("/v1/completions", {"prompt": "x", "bad_words": [" "]}, "bad_words"),
    ("/v1/completions", {"prompt": "x", "user": "a\nb"}, "user"),
    ("/v1/completions", {"prompt": "x", "priority": 1001}, "priority"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/v1/completions", {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    ("/v1/completions", {"prompt": "x", "adapters": [{"nam": "a"}]}, "adapters"),
    ("/v1/completions", {"prompt": "x", "model": "a", "adapters": {"b": 1}}, "adapters"),
    ("/v1/completions", {"prompt": "x", "model": "a@"}, "model"),
    ("/v1/completions", {"prompt": "x", "adapters": {"a@": 1}}, "adapters.name"),
    ("/tokenize", {"prompt": "x", "model": "a@"}, "model"),
    ("/v1/completions", {"prompt": "x", "combination": {"rule": 1}}, "combination.members"),
    ("/v1/completions", {"prompt": "x", "response_format": {"type": "x"}}, "response_format.type"),
    (
        "/v1/completions",
        {"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]},
        "guided_choice",
    ),
    ("/v1/completions", {"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ("/v1/chat/completions", {"messages": "x"}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages.role"),
    ("/v1/chat/completions", {"messages": [{"role": 1}]}, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages.0.content.0.type",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
        "top_logprobs",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 1 << 21},
        "max_completion_tokens",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
        "tools",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "functions": [{}]},
        "functions",
    ),
    ("/v1/completions", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
    ("/detokenize", {"tokens": [300]}, "tokens"),
    ("/v1/load_lora_adapter", {"lora_name": "@", "lora_path": "/a"}, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_name": "a"}, "lora_path"),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": ""}, "lora_path"),
    (
        "/v1/load_lora_adapter",
        {"lora_name": "a", "lora_path": "/a", "load_inplace": True},
        "load_inplace",
    ),
]


async def test_refusals_name_the_clients_field() -> None:
    async with served(http_port=0) as s, httpx2.AsyncClient(base_url=s.http) as client:
        for path, body, field in REFUSED:
            answer = await client.post(path, json=body)
            assert answer.status_code == 400, (body, answer.text)
            found = error(answer)
            assert found["param"] == field, (body, found)
            assert found["message"].startswith(f"{field}: "), found
        assert all(request.tenant != "a\nb" for request in s.engine.submitted)


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANY = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = sorted(
    {*fields.CompletionFields.model_fields, *fields.ChatFields.model_fields}
    - {"prompt", "messages"}
)


async def test_no_body_is_an_internal_error() -> None:
    loop = asyncio.get_running_loop()
    async with served(http_port=0) as s, httpx2.AsyncClient(base_url=s.http, timeout=30) as client:

        @settings(
            max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(
            st.sampled_from(("/v1/completions", "/v1/chat/completions")),
            st.dictionaries(st.sampled_from(NAMES), ANY, max_size=2),
            st.just("hello") | ANY,
        )
        def fuzz(path: str, more: dict[str, Any], content: Any) -> None:
            body = {"max_tokens": 2, "prompt": content, "messages": content, **more}
            if content == "hello" and path != "/v1/completions":
                body["messages"] = [{"role": "user", "content": "hello"}]
            data = json.dumps(body).encode()  # with NaN and Infinity
            asked = client.post(path, content=data, headers=JSON)
            answer = asyncio.run_coroutine_threadsafe(asked, loop).result(30)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code != 200:
                error(answer)

        await asyncio.to_thread(fuzz)
        async with asyncio.timeout(5):
            while s.engine.in_flight:
                await asyncio.sleep(0.01)


async def connected(s: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = s.http.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port), limit=1 << 10)


async def test_who_does_not_read_is_cut_off() -> None:
    engine = FakeEngine(step_seconds=0.004)
    async with served(engine, http_port=0, write_seconds=0.3) as s:
        _, writer = await connected(s)
        body = {"prompt": "x", "max_tokens": 4000, "n": 64, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-length: {len(data)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        await writer.drain()
        async with asyncio.timeout(20):
            while not engine.submitted:
                await asyncio.sleep(0.01)
            while engine.in_flight:
                await asyncio.sleep(0.02)
        assert engine.cancelled
        async with asyncio.timeout(5):
            await s.server.services.traffic.idle()
        writer.close()


async def test_headers_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    async with served(http_port=0) as s:
        for first in (b"", b"GET / HTTP/1.1\r\nx-slow: 1"):
            reader, writer = await connected(s)
            writer.write(first)
            async with asyncio.timeout(5):
                with pytest.raises(ConnectionResetError):
                    assert await reader.read() == b""
                    raise ConnectionResetError
            writer.close()
        monkeypatch.setattr(protocol, "HEADER_SECONDS", 60)
        reader, writer = await connected(s)
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionError):
                writer.write(b"GET / HTTP/1.1\r\n")
                while True:
                    writer.write(b"x-much: " + b"y" * 8000 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()
        async with httpx2.AsyncClient(base_url=s.http) as client:
            assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"])
@pytest.mark.parametrize(
    "sent",
    [
        b"what is this\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\na b: c\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ],
)
async def test_what_is_no_http(first: bytes, sent: bytes) -> None:
    async with served(http_port=0) as s:
        reader, writer = await connected(s)
        if first:
            writer.write(first)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.write(sent)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")  # /health has no body
            body = await reader.read()
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"connection: close\r\n" in head and b"content-type: application/json\r\n" in head
        assert b"content-length: %d\r\n" % len(body) in head and b"date: " in head
        refused = httpx2.Response(400, content=body)
        assert error(refused)["code"] == "malformed_http"
        writer.close()


@pytest.mark.parametrize("required", [True, False])
async def test_a_port_that_is_taken(required: bool, caplog: pytest.LogCaptureFixture) -> None:
    """gRPC is served without HTTP only where nobody asked for that port."""
    async with served(http_port=0) as s:
        port = int(s.http.rpartition(":")[2])
        if required:
            with pytest.raises(ConfigError, match=f"^--http-port {port}: cannot listen"):
                async with served(http_port=port):
                    pass
            return
        async with served(http_port=port, http_required=False) as other:
            assert other.http == "http://" and "no HTTP" in caplog.text
            async with AsyncClient(other.address) as client:
                assert (await client.generate("x", max_tokens=1)).text


STATS = "deltaserve.v1.ServerService/GetStats"


async def half_sent(s: Served, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request whose client sends a part of its body, and no more."""
    reader, writer = await connected(s)
    head = f"POST /{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: 99\r\n\r\n{{".encode())
    await writer.drain()
    return reader, writer


async def test_a_drain_waits_for_what_runs_and_refuses_what_is_new() -> None:
    engine = FakeEngine(step_seconds=0.01)
    async with (
        served(engine, http_port=0, grace_seconds=20) as s,
        httpx2.AsyncClient(base_url=s.http, timeout=20) as client,
    ):
        body = {"prompt": "x", "max_tokens": 60}
        whole = asyncio.create_task(client.post("/v1/completions", json=body))
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as flow:
            pieces = flow.aiter_text()
            await anext(pieces)
            while len(engine.submitted) < 2:
                await asyncio.sleep(0.01)
            halves = [await half_sent(s, path) for path in ("v1/completions", STATS)]
            draining = asyncio.create_task(s.server.drain())
            await asyncio.sleep(0.05)
            assert (await client.get("/health")).status_code == 503
            refused = await client.post("/v1/completions", json=body)
            assert refused.status_code == 503 and error(refused)["code"] == "shutting_down"
            for reader, writer in halves:
                assert (await reader.readline()).startswith(b"HTTP/1.1 503 ")
                writer.close()
            assert (await client.get("/metrics")).status_code == 200
            assert not draining.done()
            rest = [piece async for piece in pieces]
        assert rest[-1].endswith("data: [DONE]\n\n")
        assert (await whole).json()["usage"]["completion_tokens"] == 60
        assert await draining

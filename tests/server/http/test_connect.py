"""Our services over the Connect protocol, as JSON and as protobuf."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest
from fake_engine import FakeEngine
from google.rpc import error_details_pb2
from served import served

from deltaserve.server.identity import token
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.identity.records import Key
from deltaserve.server.service.identity import Identity
from deltaserve.v1 import adapter_pb2, generation_pb2

ADAPTERS = "/deltaserve.v1.AdapterService/"
STREAM = "/deltaserve.v1.GenerationService/GenerateStream"


def envelope(data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(data)) + data


async def envelopes(response: httpx.Response) -> AsyncIterator[tuple[int, bytes]]:
    kept = b""
    async for piece in response.aiter_raw():
        kept += piece
        while len(kept) >= 5 and len(kept) >= 5 + (size := struct.unpack(">I", kept[1:5])[0]):
            yield kept[0], kept[5 : 5 + size]
            kept = kept[5 + size :]
    assert not kept


async def streamed(
    client: httpx.AsyncClient, path: str, data: bytes, form: str = "json", **headers: str
) -> tuple[list[bytes], dict[str, Any]]:
    """The messages, and the end."""
    headers = {"content-type": f"application/connect+{form}", **headers}
    async with client.stream("POST", path, content=data, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == f"application/connect+{form}"
        found = [item async for item in envelopes(response)]
    assert [flags for flags, _ in found] == [0] * (len(found) - 1) + [2]
    return [data for _, data in found[:-1]], json.loads(found[-1][1])


async def test_unary_calls() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        made = await client.post(ADAPTERS + "LoadAdapter", json={"name": "a", "uri": "/a"})
        assert made.status_code == 200 and made.headers["content-type"] == "application/json"
        found = (await client.post(ADAPTERS + "ListAdapters", json={})).json()
        [adapter] = found["adapters"]
        assert adapter["state"] == "ADAPTER_STATE_READY" and adapter["residentBytes"] == "1000"
        assert adapter["pinned"] is False, "fields with their defaults are told"
        packed = await client.post(
            ADAPTERS + "GetAdapter",
            content=adapter_pb2.GetAdapterRequest(name="a").SerializeToString(),
            headers={"content-type": "application/proto", "connect-protocol-version": "1"},
        )
        assert packed.headers["content-type"] == "application/proto"
        answer = adapter_pb2.GetAdapterResponse.FromString(packed.content)
        assert answer.adapter.digest == adapter["digest"]
        counted = s.metrics.registry.get_sample_value
        labels = {"method": "deltaserve.v1.AdapterService/GetAdapter", "code": "OK"}
        assert counted("deltaserve_rpcs_total", labels) == 1


async def test_errors_have_codes_and_details() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        unknown = await client.post(ADAPTERS + "GetAdapter", json={"name": "nobody"})
        assert unknown.status_code == 404 and unknown.json()["code"] == "not_found"
        bad = await client.post(ADAPTERS + "ListAdapters", json={"pageSize": 1001})
        told = bad.json()
        assert bad.status_code == 400 and told["code"] == "invalid_argument"
        assert "page_size: 1001" in told["message"] and "at most 1000" in told["message"]
        [detail] = [d for d in told["details"] if d["type"] == "google.rpc.BadRequest"]
        assert detail["debug"] == {
            "fieldViolations": [{"field": "page_size", "description": told["message"]}]
        }
        value = base64.b64decode(detail["value"] + "=" * (-len(detail["value"]) % 4))
        parsed = error_details_pb2.BadRequest.FromString(value)
        assert parsed.field_violations[0].field == "page_size"
        s.engine.adapters.load("a", "/a").result()
        broken = {"name": "b", "uri": "bug:x"}
        bug = await client.post(ADAPTERS + "LoadAdapter", json=broken)
        assert bug.status_code == 500 and bug.json()["code"] == "internal"
        assert "a secret" not in bug.text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"nmae": "a"}', 'no field named "nmae"'),
        (b'{"name": 5}', "name"),
        (b"{", "the body is no GetAdapterRequest"),
        (b"\xff", "the body is no GetAdapterRequest"),
        (b"[" * 100_000, "the body is"),
        (b'{"name": "\\ud800"}', "name"),
    ],
)
async def test_bad_bodies(body: bytes, says: str) -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(ADAPTERS + "GetAdapter", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["code"] == "invalid_argument"
        assert says in answer.json()["message"]


async def test_what_else_is_refused() -> None:
    async with (
        served(http_port=0, max_message_bytes=1000) as s,
        httpx.AsyncClient(base_url=s.http) as client,
    ):
        path = ADAPTERS + "GetAdapter"
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await client.post(path, content=b"{}", headers={"content-type": kind})
            assert (
                answer.status_code == 415 and "application/json" in answer.headers["accept-post"]
            ), "what other origins may send without asking is not taken"
        assert (await client.get(path)).status_code == 405
        assert (await client.post(ADAPTERS + "Nothing", json={})).status_code == 404
        for header, value in (
            ("connect-timeout-ms", "soon"),
            ("connect-protocol-version", "2"),
        ):
            answer = await client.post(path, json={}, headers={header: value})
            assert answer.status_code == 400 and header in answer.json()["message"]
        answer = await client.post(path, json={"name": "a" * 2000})
        assert answer.status_code == 429 and "1000 bytes" in answer.json()["message"]


async def test_streams() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        request = {"text": "hello", "stop": {"maxTokens": 5}}
        pieces, end = await streamed(client, STREAM, envelope(json.dumps(request).encode()))
        messages = [json.loads(piece) for piece in pieces]
        assert end == {} and messages[0]["start"]["servedBy"]["base"] == "fake-base"
        ids = [i for m in messages for d in m["deltas"] for i in d["tokenIds"]]
        packed = generation_pb2.GenerateStreamRequest(text="hello")
        packed.stop.max_tokens = 5
        data = envelope(packed.SerializeToString())
        pieces, end = await streamed(client, STREAM, data, "proto")
        found = [generation_pb2.GenerateStreamResponse.FromString(piece) for piece in pieces]
        assert end == {} and len(ids) == 5
        assert [i for m in found for d in m.deltas for i in d.token_ids] == ids


async def test_what_is_sent_may_be_in_gzip() -> None:
    async with (
        served(http_port=0, max_message_bytes=1000) as s,
        httpx.AsyncClient(base_url=s.http) as client,
    ):
        s.engine.adapters.load("a", "/a").result()
        path, zipped = ADAPTERS + "GetAdapter", gzip.compress(b'{"name": "a"}')
        headers = {"content-type": "application/json", "content-encoding": "gzip"}

        async def told(data: bytes) -> tuple[int, Any]:
            answer = await client.post(path, content=data, headers=headers)
            return answer.status_code, answer.json()

        assert (await told(zipped))[1]["adapter"]["name"] == "a"
        bomb = gzip.compress(b" " * 500_000)
        for data, status, says in (
            (zipped[:-4], 400, "cut off"),
            (zipped * 2, 400, "cut off, or not one"),
            (b"{}", 400, "is not"),
            (bomb, 429, "larger than 1000 bytes"),
        ):
            code, error = await told(data)
            assert code == status and says in error["message"]
        headers["content-encoding"] = "br"
        code, error = await told(zipped)
        assert code == 501 and error["code"] == "unimplemented"
        hello = gzip.compress(b'{"text": "hello", "stop": {"maxTokens": 2}}')
        how = {"connect-content-encoding": "gzip"}
        pieces, end = await streamed(client, STREAM, envelope(hello, flags=1), **how)
        assert pieces and end == {}
        _, end = await streamed(client, STREAM, envelope(bomb, flags=1), **how)
        assert end["error"]["code"] == "resource_exhausted"


async def test_streams_end_with_their_error() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        bad = envelope(b'{"text": "x", "model": "nobody"}')
        pieces, end = await streamed(client, STREAM, bad)
        assert pieces == [] and end["error"]["code"] == "not_found"
        for data, says in (
            (b"", "one enveloped message"),
            (envelope(b"{}")[:-1], "says 2 bytes"),
            (envelope(b"{}") * 2, "says 2 bytes"),
            (envelope(b"{}", flags=1), "flags 1"),
            (envelope(b"x"), "no GenerateStreamRequest"),
        ):
            pieces, end = await streamed(client, STREAM, data)
            assert pieces == [] and end["error"]["code"] == "invalid_argument"
            assert says in end["error"]["message"]
        slow = envelope(b'{"text": "x", "stop": {"maxTokens": 4000}}')
        _, end = await streamed(client, STREAM, slow, **{"connect-timeout-ms": "100"})
        assert end["error"]["code"] == "deadline_exceeded"


async def test_who_goes_away_is_taken_from_the_engine() -> None:
    engine = FakeEngine(step_seconds=0.01)
    async with served(engine, http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        headers = {"content-type": "application/connect+json"}
        data = envelope(b'{"text": "x", "stop": {"maxTokens": 4000}}')
        async with client.stream("POST", STREAM, content=data, headers=headers) as response:
            await anext(envelopes(response))
            assert engine.in_flight == 1
        async with asyncio.timeout(5):
            while engine.in_flight:
                await asyncio.sleep(0.01)


async def test_a_watch_does_not_keep_the_server_from_ending() -> None:
    async with served(http_port=0) as s, httpx.AsyncClient(base_url=s.http) as client:
        headers = {"content-type": "application/connect+json"}
        path = ADAPTERS + "WatchAdapters"
        async with client.stream("POST", path, content=envelope(b"{}"), headers=headers) as watch:
            told = envelopes(watch)
            assert json.loads((await anext(told))[1])["snapshot"] is True
            s.engine.adapters.load("new", "/new").result()
            flags, data = await anext(told)
            assert flags == 0 and json.loads(data)["adapters"][0]["name"] == "new"
            assert await s.server.drain()
            last = [item async for item in told][-1]
            assert last[0] == 2 and json.loads(last[1])["error"]["code"] == "unavailable"
        refused = await client.post(ADAPTERS + "ListAdapters", json={})
        assert refused.status_code == 503


async def test_keys_and_roles() -> None:
    book = Book()
    name, shown = token.make()
    book.put(Key(name, "acme", frozenset({Role.GENERATE}), token.digest(shown)))
    async with (
        served(identity=Identity(book), http_port=0) as s,
        httpx.AsyncClient(base_url=s.http) as client,
    ):
        nobody = await client.post(ADAPTERS + "ListAdapters", json={})
        assert nobody.status_code == 401 and nobody.json()["code"] == "unauthenticated"
        _, end = await streamed(client, STREAM, envelope(b"{}"))
        assert end["error"]["code"] == "unauthenticated"
        client.headers["authorization"] = f"Bearer {shown}"
        assert (await client.post(ADAPTERS + "ListAdapters", json={})).status_code == 200
        loading = await client.post(ADAPTERS + "LoadAdapter", json={"name": "a", "uri": "/a"})
        assert loading.status_code == 403 and "role adapters" in loading.json()["message"]

"""Every refusal has the right code and names the field, over a real connection."""

from __future__ import annotations

import inspect
import json
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_engine import FakeEngine
from served import served

from deltaserve.adapters import errors as adapter_errors
from deltaserve.clients import AsyncClient, errors
from deltaserve.server import errors as server_errors
from deltaserve.server.service.status import TABLE, to_status
from deltaserve.v1 import generation_pb2 as pb
from deltaserve.v1 import generation_pb2_grpc

NAN, INF = float("nan"), float("inf")
BAD = [
    ({"temperature": NAN}, "sampling.temperature"),
    ({"temperature": -1.0}, "sampling.temperature"),
    ({"temperature": INF}, "sampling.temperature"),
    ({"top_p": 0.0}, "sampling.top_p"),
    ({"top_p": 1.5}, "sampling.top_p"),
    ({"top_p": NAN}, "sampling.top_p"),
    ({"min_p": -0.1}, "sampling.min_p"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ({"presence_penalty": INF}, "sampling.presence_penalty"),
    ({"frequency_penalty": NAN}, "sampling.frequency_penalty"),
    ({"logit_bias": {300: 1.0}}, "sampling.logit_bias"),
    ({"logit_bias": {3: NAN}}, "sampling.logit_bias"),
    ({"logit_bias": dict.fromkeys(range(20_000), 1.0)}, "sampling.logit_bias"),
    ({"max_tokens": 0}, "stop.max_tokens"),
    ({"max_tokens": 2**32 - 1}, "stop.max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "stop.min_tokens"),
    ({"stop": [""]}, "stop.strings"),
    ({"stop": ["x"] * 65}, "stop.strings"),
    ({"stop": ["x" * 100_000]}, "stop.strings"),
    ({"stop_token_ids": [300]}, "stop.token_ids"),
    ({"stop_token_ids": list(range(300)) * 4}, "stop.token_ids"),
    ({"logprobs": 301}, "logprobs"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"prompt": ""}, "text"),
    ({"prompt": "a\0b"}, "text"),
    ({"prompt": "x" * 2_000_000}, "text"),
    ({"prompt": []}, "token_ids.ids"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": [5] * 5000}, "token_ids.ids"),
    ({"prompt": [5] * 3_000_000}, "token_ids.ids"),
    ({"prompt": [5] * 4096}, "prompt"),
    ({"prompt": [{"role": "", "content": "x"}]}, "chat.messages.role"),
    ({"prompt": [{"role": "user", "content": "\0"}]}, "chat.messages.content"),
    ({"adapters": {"a": NAN}}, "adapters.strength"),
    ({"adapters": {"a": INF}}, "adapters.strength"),
    ({"adapters": [""]}, "adapters.name"),
    ({"adapters": ["a"], "model": "b"}, "adapters"),
    ({"adapters": ["a"] * 2}, "adapters"),
    ({"adapters": [f"a{i}" for i in range(17)]}, "adapters"),
    ({"user": "x" * 1000}, "user"),
    ({"cache_salt": "a\nb"}, "cache_salt"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"request_id": "a\u2028b"}, "request_id"),
    ({"priority": 2**31 - 1}, "priority"),
    ({"max_wait_seconds": 0.0}, "max_wait_seconds"),
    ({"max_wait_seconds": -1.0}, "max_wait_seconds"),
    ({"max_wait_seconds": NAN}, "max_wait_seconds"),
    ({"max_wait_seconds": INF}, "max_wait_seconds"),
    ({"speculation": {"draft_tokens": 33}}, "speculation.draft_tokens"),
    ({"speculation": {"min_ngram": 0}}, "speculation.min_ngram"),
    ({"speculation": {"max_ngram": 17}}, "speculation.max_ngram"),
    ({"speculation": {"min_ngram": 5, "max_ngram": 4}}, "speculation.min_ngram"),
]


async def test_bad_requests() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        for arguments, field in BAD:
            for call in (client.generate, client.stream):
                with pytest.raises(errors.InvalidArgument) as caught:
                    result = call(**{"prompt": "fine", **arguments})
                    _ = [p async for p in result] if call == client.stream else await result
                error = caught.value
                assert (error.field, error.reason) == (field, "INVALID_REQUEST"), arguments
                name = field.rpartition(".")[2]
                assert name in error.message or field in ("stop.strings", "stop.token_ids")
        assert not s.engine.submitted


@pytest.mark.parametrize("prompt", [[-1], [2**33], "\ud800"])
async def test_what_the_wire_cannot_carry_the_client_refuses(prompt: object) -> None:
    async with served() as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.InvalidArgument):
            await client.generate(prompt)  # type: ignore[arg-type]


async def test_a_request_without_a_prompt() -> None:
    async with served() as s, grpc.aio.insecure_channel(s.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="prompt: there is none") as caught:
            await stub.Generate(pb.GenerateRequest())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for empty in ([], [pb.Continuation()], [pb.Continuation(text="")]):
            with pytest.raises(grpc.aio.AioRpcError, match="continuations") as caught:
                await stub.Score(pb.ScoreRequest(text="x", continuations=empty))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["", "a@b", "a,b", "a+b", "../a", "a b", "x" * 129, "fake-base"])
async def test_bad_adapter_names(name: str) -> None:
    async with served() as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.InvalidArgument) as caught:
            await client.load_adapter(name, "/x")
        assert caught.value.field == "name"


LOADS = [
    ("AdapterNotFound", errors.NotFound, "ADAPTER_NOT_FOUND"),
    ("SourceForbidden", errors.PermissionDenied, "SOURCE_FORBIDDEN"),
    ("MalformedAdapter", errors.InvalidArgument, "ADAPTER_MALFORMED"),
    ("UnsupportedAdapter", errors.FailedPrecondition, "ADAPTER_UNSUPPORTED"),
    ("InvalidAdapter", errors.FailedPrecondition, "ADAPTER_INVALID"),
    ("BaseMismatch", errors.FailedPrecondition, "BASE_MISMATCH"),
]


@pytest.mark.parametrize(("kind", "error", "reason"), LOADS, ids=[k for k, _, _ in LOADS])
async def test_refused_loads(kind: str, error: type[Exception], reason: str) -> None:
    async with served() as s, AsyncClient(s.address) as client:
        with pytest.raises(error, match=f"{kind}:x: refused") as caught:
            await client.load_adapter("a", f"{kind}:x")
        assert caught.value.reason == reason  # type: ignore[attr-defined]
        assert caught.value.field == "some.tensor"  # type: ignore[attr-defined]
        assert await client.list_adapters() == []


async def test_other_codes() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        with pytest.raises(errors.AlreadyExists):
            await client.load_adapter("a", "/other")
        with pytest.raises(errors.InvalidArgument, match="uri"):
            await client.load_adapter("b", "")
        with pytest.raises(errors.InvalidArgument, match="uri"):
            await client.load_adapter("b", "/x\0y")
        for call in (client.unload_adapter, client.get_adapter, client.pin_adapter):
            with pytest.raises(errors.NotFound) as caught:
                await call("nobody")
            assert caught.value.field == "name"
        for call in (client.get_route, client.delete_route, client.roll_back_route):
            with pytest.raises(errors.NotFound) as caught:
                await call("nobody")
            assert caught.value.field == "name"
        for asked in (
            client.get_report("nobody"),
            client.record_feedback(reward=1.0, route="nobody", user="u"),
        ):
            with pytest.raises(errors.NotFound) as caught:
                await asked
            assert caught.value.field == "route"


NAMED: list[tuple[dict[str, Any], str]] = [
    ({"model": "nobody"}, "model"),
    ({"adapters": ["a", "nobody"]}, "adapters.name"),
    (
        {"combination": {"rule": "mean", "members": [{"model": "a"}, {"model": "nobody"}]}},
        "combination.members[1].model",
    ),
    (
        {"combination": {"rule": "mean", "members": [{"model": "a"}, {"adapters": ["nobody"]}]}},
        "combination.members[1].adapters.name",
    ),
]
"""Ways to name an adapter, and the field that does."""


@pytest.mark.parametrize(("arguments", "field"), NAMED)
async def test_the_field_that_names_an_unknown_adapter(
    arguments: dict[str, Any], field: str
) -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        asked = [
            client.generate("x", **arguments),
            anext(client.stream("x", **arguments)),
            client.score("x", ["y"], **arguments),
        ]
        for call in asked:
            with pytest.raises(errors.NotFound, match="no adapter named 'nobody'") as caught:
                await call
            assert caught.value.field == field


@pytest.mark.parametrize(("arguments", "field"), NAMED)
async def test_no_digest_behind_the_sign_for_it(arguments: dict[str, Any], field: str) -> None:
    arguments = json.loads(json.dumps(arguments).replace("nobody", "a@"))
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        asked = [
            client.generate("x", **arguments),
            anext(client.stream("x", **arguments)),
            client.score("x", ["y"], **arguments),
        ]
        if "model" in arguments:
            asked += [client.tokenize("x", "a@"), client.detokenize([5], "a@")]
        for call in asked:
            with pytest.raises(errors.InvalidArgument, match="digest behind the @") as caught:
                await call
            assert caught.value.field == field and str(caught.value).startswith(field)
        with pytest.raises(errors.InvalidArgument) as caught:
            await client.load_adapter("b", "/b", parent="a@")
        assert caught.value.field == "options.parent"
        assert (await client.generate("x", "a@dig", max_tokens=1)).served_by


async def test_a_bug_of_ours_tells_nothing_but_an_incident(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.Internal) as caught:
            await client.load_adapter("a", "bug:x")
        assert "secret" not in str(caught.value)
        incident = caught.value.metadata["incident"]
        assert incident in str(caught.value) and incident in caplog.text
        assert "a secret" in caplog.text
        s.engine.fail = RuntimeError("another secret")
        with pytest.raises(errors.Internal) as caught:
            _ = [p async for p in client.stream("x")]
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x1a\xff\x7f"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_bytes_that_are_no_message(data: bytes, streaming: bool) -> None:
    async with served() as s, grpc.aio.insecure_channel(s.address) as channel:
        if streaming:
            call = channel.unary_stream("/deltaserve.v1.GenerationService/GenerateStream")(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [m async for m in call]
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/deltaserve.v1.GenerationService/Generate")(data)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_what_the_library_refuses() -> None:
    async with (
        served(max_message_bytes=10_000) as s,
        grpc.aio.insecure_channel(s.address) as channel,
    ):
        generate = channel.unary_unary("/deltaserve.v1.GenerationService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(b"x" * 20_000)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/deltaserve.v1.GenerationService/Nothing")(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def leaves(module: object) -> list[type[Exception]]:
    found = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    return [c for c in found if issubclass(c, Exception) and not c.__subclasses__()]


@pytest.mark.parametrize("kind", leaves(server_errors) + leaves(adapter_errors))
def test_every_exception_has_a_code(kind: type[Exception]) -> None:
    code, status = to_status(kind("what happened", field="f"))  # type: ignore[call-arg]
    assert kind in TABLE and code is TABLE[kind][0]
    assert status.code == code.value[0] and status.message == "what happened"


def test_reasons_are_distinct_and_long_texts_are_cut() -> None:
    assert len({reason for _, reason in TABLE.values()}) == len(TABLE)
    _, status = to_status(server_errors.InvalidRequest("x" * 100_000, field="y" * 100_000))
    assert status.ByteSize() < 4096


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with served(FakeEngine(0.01, max_queue=1)) as s, AsyncClient(s.address) as client:
        stream = client.stream("x", max_tokens=4000)
        async for _ in stream:
            break
        with pytest.raises(errors.ResourceExhausted) as caught:
            await client.generate("x")
        assert caught.value.retry_after == 1.5
        await stream.aclose()

"""fmaas.GenerationService over a real connection, by clients made from TGIS's own proto."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_engine import BOS, FakeEngine, FakeText, token_id
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from issue import issue
from served import Served, served

from deltaserve.clients import AsyncClient
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.service.identity import Identity
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.tgis.generation_pb2_grpc import GenerationServiceStub


@asynccontextmanager
async def stub(engine: FakeEngine | None = None) -> AsyncIterator[tuple[Served, Any]]:
    async with served(engine) as s, grpc.aio.insecure_channel(s.address) as channel:
        yield s, GenerationServiceStub(channel)


def batch(*texts: str, adapter_id: str | None = None, **params: Any) -> Any:
    return tgis.BatchedGenerationRequest(
        model_id="whatever",
        adapter_id=adapter_id,
        requests=[tgis.GenerationRequest(text=t) for t in texts],
        params=tgis.Parameters(**params),
    )


def single(text: str, **params: Any) -> Any:
    one = tgis.GenerationRequest(text=text)
    return tgis.SingleGenerationRequest(request=one, params=tgis.Parameters(**params))


def tokens(text: str, count: int) -> list[int]:
    prompt = tuple(FakeText().encode(text))
    return [token_id(prompt, i) for i in range(count)]


def said(ids: list[int]) -> str:
    return "".join(FakeText().decode([i]) for i in ids)


async def test_a_batch_with_nothing_set_has_the_defaults_of_tgis() -> None:
    async with stub() as (s, client):
        answer = await client.Generate(batch("ab cd", "x"))
        assert not (await client.Generate(tgis.BatchedGenerationRequest())).responses
    assert [r.text for r in answer.responses] == [said(tokens(t, 20)) for t in ("ab cd", "x")]
    first, second = answer.responses
    assert (first.input_token_count, second.input_token_count) == (5, 2)
    assert first.generated_token_count == 20 and first.stop_reason == tgis.MAX_TOKENS
    assert not first.tokens and not first.input_tokens and first.seed == 0
    sampling = s.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.min_tokens, sampling.stop) == (0.0, 0, ())
    assert (sampling.repetition_penalty, sampling.logprobs) == (1.0, None)


async def test_what_is_sent_arrives_in_the_engine() -> None:
    async with stub() as (s, client):
        async with AsyncClient(s.address) as ours:
            await ours.load_adapter("a", "/a")
        request = batch(
            "hello",
            "you",
            adapter_id="a",
            method=tgis.SAMPLE,
            sampling=tgis.SamplingParameters(temperature=0.5, top_k=7, top_p=0.25, seed=11),
            stopping=tgis.StoppingCriteria(
                max_new_tokens=9, min_new_tokens=2, stop_sequences=["x", "yz"]
            ),
            decoding=tgis.DecodingParameters(
                repetition_penalty=1.25,
                length_penalty={"start_index": 3, "decay_factor": 1.5},
            ),
        )
        metadata = [("x-correlation-id", "mine")]
        answer = await client.Generate(request, metadata=metadata, timeout=50)
        request.ClearField("adapter_id")
        request.prefix_id = "a"
        await client.Generate(request)
    first, second, third, _ = s.engine.submitted
    p = first.sampling
    assert (p.temperature, p.top_k, p.top_p, p.seed) == (0.5, 7, 0.25, 11)
    assert (p.max_tokens, p.min_tokens, p.stop) == (9, 2, ("x", "yz"))
    assert p.repetition_penalty == 1.25 and second.sampling == p
    assert p.length_penalty == (3, 1.5)
    assert [r.adapters[0].name for r in (first, second, third)] == ["a", "a", "a"]
    assert {first.request_id.split("#")[0], second.request_id.split("#")[0]} == {"mine-0", "mine-1"}
    assert 0 < first.deadline - time.monotonic() < 51  # type: ignore[operator]
    assert [r.seed for r in answer.responses] == [11, 11]


async def test_sampling_without_a_seed_tells_the_one_that_was_drawn() -> None:
    async with stub() as (s, client):
        answer = await client.Generate(batch("a", "b", method=tgis.SAMPLE))
        zero = tgis.SamplingParameters(temperature=0.0, seed=4)
        greedy = await client.Generate(batch("a", method=tgis.SAMPLE, sampling=zero))
    drawn = {r.sampling.seed for r in s.engine.submitted[:2]}
    assert {r.seed for r in answer.responses} == drawn and len(drawn) == 2
    assert [r.sampling.temperature for r in s.engine.submitted] == [1.0, 1.0, 0.0]
    assert greedy.responses[0].seed == 0


async def test_tokens_and_their_details() -> None:
    shown = tgis.ResponseOptions(
        input_text=True,
        input_tokens=True,
        generated_tokens=True,
        token_logprobs=True,
        token_ranks=True,
        top_n_tokens=2,
    )
    stopping = tgis.StoppingCriteria(max_new_tokens=3)
    async with stub() as (s, client):
        answer = (await client.Generate(batch("hi", response=shown, stopping=stopping))).responses
        shown = tgis.ResponseOptions(generated_tokens=True)
        plain = (await client.Generate(batch("hi", response=shown, stopping=stopping))).responses
    assert [r.sampling.ranks for r in s.engine.submitted] == [True, False]
    ids = tokens("hi", 3)
    assert answer[0].text == "hi" + said(ids)
    assert [t.text for t in answer[0].tokens] == [f"<{i}>" for i in ids]
    assert [t.logprob for t in answer[0].tokens] == [-i / 128 for i in ids]
    assert [t.rank for t in answer[0].tokens] == [1 + i % 2 for i in ids]
    best = ids[0] + ids[0] % 2
    top = answer[0].tokens[0].top_tokens
    assert [(t.text, t.logprob) for t in top] == [(f"<{best}>", -0.5), (f"<{best + 1}>", -1.5)]
    given = answer[0].input_tokens
    prompt = FakeText().encode("hi")
    assert [t.text for t in given] == [f"<{i}>" for i in prompt]
    assert [t.logprob for t in given] == [0, *(-i / 128 for i in prompt[1:])]
    assert [len(t.top_tokens) for t in given] == [0, 2, 2]
    assert [t.text for t in plain[0].tokens] == [f"<{i}>" for i in ids]
    assert not any(t.logprob or t.rank or t.top_tokens for t in plain[0].tokens)
    assert not plain[0].input_tokens


async def test_a_stream_says_what_generate_says() -> None:
    shown = tgis.ResponseOptions(
        input_text=True, input_tokens=True, generated_tokens=True, token_logprobs=True
    )
    async with stub() as (_, client):
        request = single("ab c", response=shown, stopping=tgis.StoppingCriteria(max_new_tokens=6))
        pieces = [p async for p in client.GenerateStream(request)]
        whole = (await client.Generate(batch("ab c", **fields(request.params)))).responses[0]
    first, *rest = pieces
    assert first.text == "ab c" and first.input_token_count == 4 and not first.tokens
    assert first.input_tokens == whole.input_tokens
    assert [p.stop_reason for p in rest[:-1]] == [tgis.NOT_FINISHED] * (len(rest) - 1)
    assert rest[-1].stop_reason == tgis.MAX_TOKENS == whole.stop_reason
    counts = [p.generated_token_count for p in rest]
    assert counts == sorted(counts) and counts[-1] == 6 == whole.generated_token_count
    assert "".join(p.text for p in pieces) == whole.text
    assert [t for p in rest for t in p.tokens] == list(whole.tokens)


def fields(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


async def test_the_time_limit_ends_with_what_there_is() -> None:
    engine = FakeEngine(step_seconds=0.02)
    stopping = tgis.StoppingCriteria(max_new_tokens=4000, time_limit_millis=150)
    async with stub(engine) as (s, client):
        found = (await client.Generate(batch("a", "b", stopping=stopping))).responses
        pieces = [p async for p in client.GenerateStream(single("a", stopping=stopping))]
        assert s.server.services.in_flight == 0
    async with stub(FakeEngine(step_seconds=60.0)) as (s, client):
        none = await client.Generate(batch("abc", stopping=stopping))
        assert s.server.services.in_flight == 0
    for one, text in zip(found, "ab", strict=True):
        assert one.stop_reason == tgis.TIME_LIMIT and 0 < one.generated_token_count < 100
        assert one.text == said(tokens(text, one.generated_token_count))
    assert pieces[-1].stop_reason == tgis.TIME_LIMIT and not pieces[-1].text
    assert none.responses[0].stop_reason == tgis.TIME_LIMIT
    assert none.responses[0].input_token_count == 3 and not none.responses[0].text


async def test_tokenize() -> None:
    request = tgis.BatchedTokenizeRequest(
        requests=[tgis.TokenizeRequest(text=t) for t in ("hello", "x")],
        return_tokens=True,
        return_offsets=True,
        truncate_input_tokens=4,
    )
    async with stub() as (_, client):
        long, short = (await client.Tokenize(request)).responses
        bare = tgis.BatchedTokenizeRequest(requests=request.requests)
        counts = [r.token_count for r in (await client.Tokenize(bare)).responses]
    assert counts == [6, 2] and (long.token_count, short.token_count) == (4, 2)
    assert list(long.tokens) == [f"<{i}>" for i in (BOS, *FakeText().encode("hello")[-3:])]
    assert [(o.start, o.end) for o in long.offsets] == [(0, 0), (2, 3), (3, 4), (4, 5)]


async def test_truncation_keeps_the_end_of_the_prompt() -> None:
    async with stub() as (s, client):
        request = batch("hello", truncate_input_tokens=3, response={"input_text": True})
        answer = (await client.Generate(request)).responses[0]
    assert s.engine.submitted[0].prompt_ids == (BOS, *FakeText().encode("hello")[-2:])
    assert answer.input_token_count == 3 and answer.text.startswith("hello")


async def test_model_info() -> None:
    async with stub() as (_, client):
        info = await client.ModelInfo(tgis.ModelInfoRequest(model_id="x"))
    assert info.model_kind == tgis.ModelInfoResponse.DECODER_ONLY
    assert (info.max_sequence_length, info.max_new_tokens) == (4096, 4095)


REFUSED = {
    "params.sampling.typical_p": {
        "method": tgis.SAMPLE,
        "sampling": {"typical_p": 0.5},
    },
    "params.sampling.top_p": {"method": tgis.SAMPLE, "sampling": {"top_p": 1.5}},
    "params.sampling.temperature": {"method": tgis.SAMPLE, "sampling": {"temperature": -1.0}},
    "params.decoding.length_penalty.decay_factor": {
        "decoding": {"length_penalty": {"decay_factor": 0.5}}
    },
    "params.decoding.repetition_penalty": {"decoding": {"repetition_penalty": -2.0}},
    "params.decoding.choice": {"decoding": {"choice": {}}},
    "params.decoding.json_schema": {"decoding": {"json_schema": ""}},
    "params.stopping.max_new_tokens": {"stopping": {"max_new_tokens": 1 << 30}},
    "params.stopping.min_new_tokens": {"stopping": {"min_new_tokens": 21}},
    "params.stopping.stop_sequences": {"stopping": {"stop_sequences": [""]}},
    "params.response": {"response": {"token_ranks": True}},
    "params.response.top_n_tokens": {"response": {"generated_tokens": True, "top_n_tokens": 1000}},
    "params.truncate_input_tokens": {"truncate_input_tokens": 1},
    "params.method": {"method": 7},
}


async def test_refusals_name_the_field_that_tgis_has() -> None:
    async with stub() as (s, client):
        for field, params in REFUSED.items():
            for call in (lambda p: client.Generate(batch("fine", **p)), lambda p: last(client, p)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call(params)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, field
                assert refused.value.details().startswith(f"{field}: "), refused.value.details()
        with pytest.raises(grpc.aio.AioRpcError, match=r"requests\[1\].text: '' is not possible"):
            await client.Generate(batch("fine", ""))
        with pytest.raises(grpc.aio.AioRpcError, match="x-correlation-id: text of 302 char"):
            await client.Generate(batch("f"), metadata=[("x-correlation-id", "c" * 300)])
        with pytest.raises(grpc.aio.AioRpcError, match="prefix_id: another one than adapter_id"):
            request = batch("fine", adapter_id="a")
            request.prefix_id = "b"
            await client.Generate(request)
        with pytest.raises(grpc.aio.AioRpcError, match="nobody") as unknown:
            await client.Generate(batch("fine", adapter_id="nobody"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError, match="adapter_id: 'a@' has no digest"):
            await client.Generate(batch("fine", adapter_id="a@"))
        assert s.server.services.in_flight == 0


async def last(client: Any, params: dict[str, Any]) -> None:
    async for _ in client.GenerateStream(single("fine", **params)):
        pass


async def test_reflection_tells_of_it_and_calls_are_counted_apart() -> None:
    async with stub() as (s, client), grpc.aio.insecure_channel(s.address) as channel:
        await client.Generate(batch("x"))
        ask = reflection_pb2.ServerReflectionRequest
        asked = [ask(list_services=""), ask(file_containing_symbol="fmaas.GenerationService")]
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
        listed, described = [r async for r in replies]
        s.server.services.traffic.drain()
        with pytest.raises(grpc.aio.AioRpcError) as drained:
            await client.ModelInfo(tgis.ModelInfoRequest())
    names = {service.name for service in listed.list_services_response.service}
    assert {"fmaas.GenerationService", "deltaserve.v1.GenerationService"} <= names
    found = FileDescriptorProto.FromString(
        described.file_descriptor_response.file_descriptor_proto[0]
    )
    assert found.service[0].method[1].name == "GenerateStream"
    assert drained.value.code() == grpc.StatusCode.UNAVAILABLE
    counted = s.metrics.registry.get_sample_value(
        "deltaserve_rpcs_total", {"method": "fmaas.GenerationService/Generate", "code": "OK"}
    )
    assert counted == 1


async def test_keys_hold_here_too() -> None:
    book = Book()
    book.closed = True
    _, generates = issue(book, Role.GENERATE)
    _, loads = issue(book, Role.ADAPTERS)
    async with (
        served(identity=Identity(book)) as s,
        grpc.aio.insecure_channel(s.address) as channel,
    ):
        client: Any = GenerationServiceStub(channel)
        codes = {}
        for token in ("", loads, generates):
            metadata = [("authorization", f"Bearer {token}")] if token else []
            for call in (
                client.Generate(batch("x"), metadata=metadata),
                client.Tokenize(tgis.BatchedTokenizeRequest(), metadata=metadata),
                client.ModelInfo(tgis.ModelInfoRequest(), metadata=metadata),
            ):
                codes.setdefault(token, set()).add(await call.code())
    assert codes[""] == {grpc.StatusCode.UNAUTHENTICATED}
    assert codes[loads] == {grpc.StatusCode.PERMISSION_DENIED}
    assert codes[generates] == {grpc.StatusCode.OK}

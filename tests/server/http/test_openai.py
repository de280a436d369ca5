"""OpenAI's own client against a real server with the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from fake_engine import FakeEngine, FakeText, token_id
from served import Served, served

from deltaserve.server.errors import EngineFailure


@asynccontextmanager
async def asked(
    engine: FakeEngine | None = None,
) -> AsyncIterator[tuple[Served, openai.AsyncOpenAI]]:
    async with (
        served(engine, http_port=0) as s,
        openai.AsyncOpenAI(base_url=f"{s.http}/v1", api_key="none", max_retries=0) as client,
    ):
        yield s, client


def text_of(prompt: str, count: int) -> str:
    """What the fake model says."""
    ids = tuple(FakeText().encode(prompt))
    return "".join(FakeText().decode([token_id(ids, i)]) for i in range(count))


async def test_completions() -> None:
    async with asked() as (s, client):
        answer = await client.completions.create(model="fake-base", prompt="hello", max_tokens=5)
        [choice] = answer.choices
        assert choice.text == text_of("hello", 5)
        assert (choice.finish_reason, choice.logprobs) == ("length", None)
        assert answer.usage is not None and answer.usage.prompt_tokens == 6
        assert answer.usage.completion_tokens == 5 and answer.usage.total_tokens == 11
        details = answer.usage.prompt_tokens_details
        assert details is not None and details.cached_tokens == 1
        assert answer.id.startswith("cmpl-") and answer.system_fingerprint == "fp_eeeeeeeeeeee"
        [request] = s.engine.submitted
        assert request.sampling.temperature == 1.0


async def test_a_completion_without_max_tokens_has_16_and_a_chat_goes_on() -> None:
    async with asked() as (s, client):
        answer = await client.completions.create(model="fake-base", prompt="hello")
        assert answer.usage is not None and answer.usage.completion_tokens == 16
        stream = await client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        await anext(aiter(stream))
        await stream.close()
        assert s.engine.submitted[-1].sampling.max_tokens == s.engine.info().max_length


async def test_a_stream_is_the_same_text_in_pieces() -> None:
    async with asked() as (s, client):
        s.engine.adapters.load("poet", "/poet").result()
        stream = await client.chat.completions.create(
            model="poet",
            messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": "hello"}],
            max_completion_tokens=7,
            n=2,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        texts, reasons = {0: "", 1: ""}, {}
        for chunk in chunks[:-1]:
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        expected = text_of("<system>be<user>hello<assistant>", 7)
        assert texts == {0: expected, 1: expected} and reasons == {0: "length", 1: "length"}
        assert {c.choices[0].index for c in chunks[:2]} <= {0, 1}
        assert chunks[0].choices[0].delta.role == "assistant"
        served_by = chunks[0].model_extra["served_by"]
        assert served_by["adapters"][0]["digest"] == "digest-of-/poet"
        assert chunks[0].usage is None and chunks[-1].choices == []
        usage = chunks[-1].usage
        assert usage is not None and usage.completion_tokens == 14
        assert len({chunk.id for chunk in chunks}) == 1


async def test_several_prompts_in_one_request() -> None:
    async with asked() as (_, client):
        prompts = ["one", "two", "three"]
        answer = await client.completions.create(
            model="fake-base", prompt=prompts, max_tokens=3, n=2
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == [
            text_of(prompt, 3) for prompt in prompts for _ in range(2)
        ]
        ids = [FakeText().encode(prompt) for prompt in prompts]
        stream = await client.completions.create(
            model="fake-base",
            prompt=ids,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [text_of(prompt, 3) for prompt in prompts]
        assert chunk.usage is not None and chunk.usage.prompt_tokens == sum(map(len, ids))


async def test_ranks_are_computed_for_those_answers_that_tell_them() -> None:
    async with asked() as (s, client):
        given = {"model": "fake-base", "prompt": "abc", "max_tokens": 1}
        body = given | {"prompt_logprobs": 0}
        told = await client.post("/completions", body=body, cast_to=dict)
        await client.completions.create(**given, logprobs=2)  # type: ignore[call-overload]
    places = told["choices"][0]["prompt_logprobs"]
    ids = FakeText().encode("abc")
    assert [p[str(i)]["rank"] for i, p in zip(ids[1:], places[1:], strict=True)] == [
        1 + i % 2 for i in ids[1:]
    ]
    assert [r.sampling.ranks for r in s.engine.submitted] == [True, False]


async def test_log_probabilities_in_both_shapes() -> None:
    async with asked() as (_, client):
        answer = await client.completions.create(
            model="fake-base", prompt="abc", max_tokens=2, logprobs=2, echo=True
        )
        found = answer.choices[0].logprobs
        assert found is not None and found.tokens and found.token_logprobs
        assert found.tokens[:3] == ["<s>", "ab", "c"] and found.token_logprobs[0] is None
        assert answer.choices[0].text.startswith("abc")
        assert found.text_offset == [0, 3, 5, 6, 6 + len(found.tokens[3])]
        assert found.top_logprobs and found.top_logprobs[0] is None
        assert all(
            t in top for t, top in zip(found.tokens[1:], found.top_logprobs[1:], strict=True)
        )
        chat = await client.chat.completions.create(
            model="fake-base",
            messages=[{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
            max_tokens=2,
            logprobs=True,
            top_logprobs=3,
        )
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert len(logprobs.content) == 2
        assert all(len(place.top_logprobs) == 3 for place in logprobs.content)
        place = logprobs.content[0]
        assert place.bytes is None or bytes(place.bytes).decode() == place.token


async def test_every_field_reaches_the_engine() -> None:
    given = {
        "model": "",
        "prompt": "hello",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"17": -2.5},
        "stop": "x",
        "stop_token_ids": [8],
        "bad_words": ["no"],
        "bad_token_sequences": [[4, 5]],
        "eos_ramp": 0.25,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 2,
        "user": "ann",
        "priority": 3,
        "cache_salt": "salt",
        "max_wait_seconds": 5.0,
        "request_id": "mine",
        "speculation": {"draft_tokens": 4},
        "some_new_field": [1],
    }
    async with asked() as (s, client):
        answer = await client.post("/completions", body=given, cast_to=dict)
        assert answer["id"] == "mine"
        [request] = s.engine.submitted
        p = request.sampling
        assert (p.max_tokens, p.min_tokens, p.temperature, p.top_p, p.top_k) == (9, 2, 0.5, 0.9, 7)
        assert (p.min_p, p.seed, p.eos_ramp, p.logprobs) == (0.1, 3, 0.25, 2)
        penalties = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
        assert penalties == (0.1, 0.2, 1.1) and p.logit_bias == ((17, -2.5),)
        assert (p.stop, p.stop_token_ids, p.ignore_eos) == (("x",), (8,), True)
        assert (4, 5) in p.bad_tokens and len(p.bad_tokens) == 3 and not p.skip_special_tokens
        assert (request.priority, request.max_wait) == (-3, 5.0)
        assert request.tenant.endswith("ann") and request.salt.endswith("salt")
        assert request.speculation.draft_tokens == 4
        await client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "x"}],
            max_tokens=1,
            safety_identifier="bob",
            extra_body={"top_k": -1},
        )
        assert s.engine.submitted[-1].tenant.endswith("bob")
        assert s.engine.submitted[-1].sampling.top_k == 0


async def test_errors_are_openais() -> None:
    async with asked() as (s, client):
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.completions.create(model="nobody", prompt="x")
        assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="", prompt="x", max_tokens=1 << 21)
        assert bad.value.param == "max_tokens" and "max_tokens: 2097152" in str(bad.value)
        with pytest.raises(openai.BadRequestError) as image:
            await client.chat.completions.create(
                model="",
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                    }
                ],
            )
        assert image.value.param == "messages.0.content.0.type"
        with pytest.raises(openai.BadRequestError) as suffix:
            await client.completions.create(model="", prompt="x", suffix="y")
        assert suffix.value.param == "suffix"
        s.engine.max_queue = 0
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="", prompt="x")
        assert full.value.response.headers["retry-after"] == "2"
        assert full.value.response.headers["retry-after-ms"] == "1500"


async def test_a_failure_inside_a_stream_ends_it() -> None:
    engine = FakeEngine(step_seconds=0.01)
    async with asked(engine) as (_, client):
        stream = await client.completions.create(model="", prompt="x", max_tokens=200, stream=True)
        await anext(aiter(stream))
        engine.break_with = EngineFailure("it broke")
        with pytest.raises(openai.APIError, match="it broke"):
            async for _ in stream:
                pass


async def test_who_goes_away_is_taken_from_the_engine() -> None:
    engine = FakeEngine(step_seconds=0.01)
    async with asked(engine) as (_, client):
        stream = await client.completions.create(model="", prompt="x", max_tokens=4000, stream=True)
        await anext(aiter(stream))
        assert engine.in_flight == 1
        await stream.close()
        whole = asyncio.create_task(
            client.completions.create(model="", prompt=["x", "y"], max_tokens=4000)
        )
        while len(engine.submitted) < 3:
            await asyncio.sleep(0.01)
        whole.cancel()
        async with asyncio.timeout(5):
            while engine.in_flight:
                await asyncio.sleep(0.01)


async def test_models_come_and_go() -> None:
    async with asked() as (_, client):
        for _ in range(2):
            done = await client.post(
                "/load_lora_adapter",
                body={"lora_name": "team/poet", "lora_path": "/poet"},
                cast_to=str,
            )
        assert "team/poet" in done
        found = [model async for model in client.models.list()]
        assert [(m.id, m.model_extra["parent"]) for m in found] == [
            ("fake-base", None),
            ("team/poet", "fake-base"),
        ]
        assert (await client.models.retrieve("team/poet")).model_extra["root"] == "/poet"
        with pytest.raises(openai.ConflictError) as conflict:
            await client.post(
                "/load_lora_adapter",
                body={"lora_name": "team/poet", "lora_path": "/other"},
                cast_to=str,
            )
        assert conflict.value.param == "lora_name"
        await client.post("/unload_lora_adapter", body={"lora_name": "team/poet"}, cast_to=str)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("team/poet")


async def test_the_usage_so_far_is_told_with_every_piece() -> None:
    async with asked() as (_, client):
        stream = await client.completions.create(
            model="",
            prompt=["hello", "you"],
            max_tokens=4,
            n=2,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )
        told = [chunk.usage async for chunk in stream]
        counts = [usage.completion_tokens for usage in told if usage is not None]
        assert len(counts) == len(told) and counts == sorted(counts)
        assert counts[0] < 16 and counts[-2:] == [16, 16]
        assert told[-1] is not None and told[-1].prompt_tokens == 6 + 4

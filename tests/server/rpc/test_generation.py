"""GenerationService over a real connection, with an engine whose tokens are known."""

from __future__ import annotations

import asyncio
import time

import pytest
from fake_engine import AB, BOS, FakeEngine, FakeText, token_id
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.engine.core import Speculation
from deltaserve.server.errors import EngineFailure


async def until(condition, seconds: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


def expected(prompt: list[int], count: int) -> list[int]:
    return [token_id(tuple(prompt), i) for i in range(count)]


@pytest.mark.parametrize(
    "prompt", ["ab cd", [7, 8, 9], [{"role": "user", "content": "hi"}]], ids=["text", "ids", "chat"]
)
async def test_generate(prompt) -> None:  # type: ignore[no-untyped-def]
    ids = {str: lambda: FakeText().encode(prompt), list: lambda: prompt}[type(prompt)]()
    if ids and isinstance(ids[0], dict):
        ids = FakeText().encode("<user>hi<assistant>")
    async with served() as s, AsyncClient(s.address) as client:
        answer = await client.generate(prompt, max_tokens=5)
    assert answer.token_ids == expected(ids, 5)
    assert answer.text == "".join(FakeText().decode([t]) for t in answer.token_ids)
    assert (answer.finish_reason, answer.logprobs) == ("length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 5)
    assert answer.served_by.base == "fake-base" and answer.served_by.adapters == ()


async def test_a_stream_says_what_generate_says() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        kwargs = {"model": "a", "max_tokens": 40, "logprobs": 2, "n": 3, "request_id": "mine"}
        whole = await client.generate("hello", **kwargs)
        pieces = [p async for p in client.stream("hello", **kwargs)]
    assert pieces[0].served_by == whole.served_by
    assert whole.served_by.adapters[0].digest == "digest-of-/a"
    assert whole.request_id == pieces[0].request_id == "mine"
    for i, choice in enumerate(whole.choices):
        mine = [p for p in pieces if p.index == i]
        assert "".join(p.text for p in mine) == choice.text
        assert [t for p in mine for t in p.token_ids] == choice.token_ids
        assert [x for p in mine for x in p.logprobs or ()] == choice.logprobs
        assert [p.finish_reason for p in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == "length" and mine[-1].usage is not None
    assert whole.usage.completion_tokens == 120
    assert whole.usage.prompt_tokens == mine[-1].usage.prompt_tokens


async def test_what_is_sent_arrives_in_the_engine() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        for name in ("a", "b"):
            await client.load_adapter(name, f"/{name}")
        await client.generate(
            [5],
            adapters={"a": 0.5, "b": -2.0},
            max_tokens=9,
            temperature=0.7,
            logprobs=4,
            ignore_eos=True,
            top_p=0.9,
            top_k=3,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            seed=11,
            logit_bias={4: -1.5},
            min_tokens=2,
            stop=["x", "yz"],
            stop_token_ids=[8],
            n=2,
            user="u",
            priority=-3,
            max_wait_seconds=2.5,
            cache_salt="tenant",
            keep_special_tokens=True,
            speculation={"draft_tokens": 0, "max_ngram": 3},
            timeout=50.0,
        )
    first, second = s.engine.submitted
    p = first.sampling
    assert [(r.name, r.strength) for r in first.adapters] == [("a", 0.5), ("b", -2.0)]
    assert (p.max_tokens, p.min_tokens, p.temperature, p.top_p, p.top_k) == (9, 2, 0.7, 0.9, 3)
    assert (p.min_p, p.repetition_penalty) == (0.05, 1.1)
    assert (p.presence_penalty, p.frequency_penalty) == (0.2, 0.3)
    assert (p.logit_bias, p.stop, p.stop_token_ids) == (((4, -1.5),), ("x", "yz"), (8,))
    assert (p.seed, second.sampling.seed) == (11, 12)
    assert (p.ignore_eos, p.logprobs, p.skip_special_tokens) == (True, 4, False)
    assert (first.priority, first.salt) == (-3, "tenant")
    assert (first.tenant, first.max_wait) == ("u", 2.5)
    assert first.speculation == second.speculation == Speculation(0, None, 3)
    assert 0 < first.deadline - time.monotonic() < 51  # type: ignore[operator]


async def test_the_usage_counts_drafts() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        kwargs = {"max_tokens": 5, "n": 2, "speculation": {"draft_tokens": 4}}
        usage = (await client.generate("x", **kwargs)).usage
        plain = (await client.generate("x", max_tokens=5)).usage
        pieces = [p async for p in client.stream("x", **kwargs)]
    assert (usage.drafted_tokens, usage.accepted_tokens) == (6, 4)
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    streamed = [p.usage for p in pieces if p.usage is not None]
    assert [(u.drafted_tokens, u.accepted_tokens) for u in streamed] == [(3, 2)] * 2


async def test_score() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        scores = await client.score("x a", ["b c", "!", "z"])
        by_ids = await client.score([5, 6], [[10, 20]])
    text = FakeText().encode
    first = s.engine.submitted[0]
    assert list(first.prompt_ids) == [*text("x "), AB, *text(" c")[1:]]
    assert first.sampling.score_from == len(text("x ")), "a token across the border is scored"
    assert scores[0].token_ids[0] == AB and len(scores[0].token_ids) == 3
    assert scores[1].logprob == pytest.approx(-(ord("!") + 3) / 128)
    assert [s.greedy for s in scores] == [False, True, False]
    assert by_ids[0].token_ids == [10, 20] and by_ids[0].greedy
    assert by_ids[0].logprob == pytest.approx(-30 / 128)


async def test_score_a_continuation_of_a_chat_has_no_second_beginning() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        scores = await client.score([{"role": "user", "content": "hi"}], ["yes"])
    assert scores[0].token_ids == FakeText().encode("yes")[1:]
    assert list(s.engine.submitted[0].prompt_ids).count(BOS) == 1


async def test_tokenize_and_back() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        ids = await client.tokenize("ab é")
        assert ids == FakeText().encode("ab é")
        assert await client.detokenize(ids) == "<s>ab é"
        long = "word " * 3000
        assert await client.tokenize(long) == FakeText().encode(long)
        with pytest.raises(errors.InvalidArgument, match="300"):
            await client.detokenize([1, 300])


async def test_leaving_a_stream_frees_the_request() -> None:
    async with served(FakeEngine(step_seconds=0.01)) as s, AsyncClient(s.address) as client:
        stream = client.stream("x", max_tokens=4000)
        async for _ in stream:
            break
        await stream.aclose()
        await until(lambda: s.engine.in_flight == 0)
        assert len(s.engine.cancelled) == 1


@pytest.mark.parametrize("method", ["generate", "score", "stream"])
async def test_cancelling_a_call_frees_the_request(method: str) -> None:
    async with served(FakeEngine(step_seconds=0.5)) as s, AsyncClient(s.address) as client:

        async def call() -> None:
            if method == "generate":
                await client.generate("x", max_tokens=4000, n=3)
            elif method == "score":
                await client.score("x", ["y"])
            else:
                _ = [p async for p in client.stream("x", max_tokens=4000, n=3)]

        task = asyncio.create_task(call())
        await until(lambda: s.engine.in_flight >= (1 if method == "score" else 3))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: s.engine.in_flight == 0)


async def test_a_closed_connection_frees_its_requests() -> None:
    async with served(FakeEngine(step_seconds=0.01)) as s:
        client = AsyncClient(s.address)
        tasks = [asyncio.create_task(client.generate([i + 1], max_tokens=4000)) for i in range(20)]
        await until(lambda: s.engine.in_flight == 20)
        await client.close()
        await until(lambda: s.engine.in_flight == 0)
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_clients_deadline_ends_the_request() -> None:
    async with served(FakeEngine(step_seconds=0.02)) as s, AsyncClient(s.address) as client:
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("x", max_tokens=4000, timeout=0.3)
        assert 0.25 < time.monotonic() - began < 2
        await until(lambda: s.engine.in_flight == 0)


async def test_the_servers_own_limit_of_time() -> None:
    engine = FakeEngine(step_seconds=0.02)
    async with served(engine, max_seconds=0.2) as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await client.generate("x", max_tokens=4000)
        assert caught.value.reason == "DEADLINE_EXCEEDED"


async def test_a_failure_in_the_middle_of_a_stream() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        s.engine.break_with = EngineFailure("the step failed (incident 42)")
        got = []
        with pytest.raises(errors.Internal, match="incident 42"):
            async for piece in client.stream("x", max_tokens=5):
                got.append(piece)
        s.engine.break_with = None
        assert (await client.generate("x", max_tokens=2)).finish_reason == "length"


async def test_of_several_choices_all_are_freed_when_one_is_refused() -> None:
    async with served(FakeEngine(0.01, max_queue=2)) as s, AsyncClient(s.address) as client:
        with pytest.raises(errors.ResourceExhausted) as caught:
            await client.generate("x", max_tokens=4000, n=4)
        assert caught.value.retry_after == 1.5 and caught.value.reason == "OVERLOADED"
        await until(lambda: s.engine.in_flight == 0)

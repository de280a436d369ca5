"""Random bytes, random cancels, compressed bombs: no unexplained status, and nothing left over."""

from __future__ import annotations

import asyncio
import random

import grpc
import grpc.aio
import pytest
from fake_engine import FakeEngine
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.v1 import generation_pb2 as pb

EXPLAINED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.ALREADY_EXISTS,
}
METHODS = [
    "GenerationService/Generate",
    "GenerationService/Score",
    "GenerationService/Tokenize",
    "GenerationService/Detokenize",
    "AdapterService/LoadAdapter",
    "AdapterService/UnloadAdapter",
    "AdapterService/ListAdapters",
    "AdapterService/PinAdapter",
]


def mutated(rng: random.Random) -> bytes:
    """A valid request with some bytes changed, added or taken away; or noise."""
    request = pb.GenerateRequest(
        model="a",
        text="prompt",
        sampling=pb.SamplingParams(temperature=0.5, seed=3, logit_bias={4: 1.0}),
        stop=pb.StopParams(max_tokens=3, strings=["x"]),
        n=2,
        logprobs=1,
    )
    data = bytearray(request.SerializeToString())
    for _ in range(rng.randint(1, 6)):
        i = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.6:
            data[i] = rng.randrange(256)
        elif kind < 0.8:
            data[i:i] = rng.randbytes(rng.randint(1, 4))
        elif len(data) > 8:
            del data[i : i + rng.randint(1, 4)]
    return bytes(data) if rng.random() < 0.9 else rng.randbytes(rng.randint(0, 40))


async def test_fuzzed_bytes(caplog: pytest.LogCaptureFixture) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    seen: set[grpc.StatusCode] = set()
    async with served() as s, grpc.aio.insecure_channel(s.address) as channel:
        for _ in range(600):
            method, data = rng.choice(METHODS), mutated(rng)
            call = channel.unary_unary(f"/deltaserve.v1.{method}")(data, timeout=10)
            code = await call.code()
            assert code in EXPLAINED, (seed, method, data.hex(), await call.details())
            seen.add(code)
        assert s.engine.in_flight == 0
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= seen, seed
    assert "incident" not in caplog.text


async def test_a_compressed_bomb_is_refused() -> None:
    async with (
        served(max_message_bytes=1 << 20) as s,
        grpc.aio.insecure_channel(s.address, compression=grpc.Compression.Gzip) as channel,
    ):
        bomb = pb.GenerateRequest(text="x" * (20 << 20)).SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/deltaserve.v1.GenerationService/Generate")(bomb)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_storm_of_cancels_leaves_nothing() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    async with served(FakeEngine(step_seconds=0.005)) as s:
        async with AsyncClient(s.address) as client:

            async def one() -> None:
                tokens, n = rng.randint(1, 200), rng.randint(1, 3)
                limit = rng.choice([None, rng.random() * 0.3])
                if rng.random() < 0.5:
                    await client.generate("x", max_tokens=tokens, n=n, timeout=limit or 60)
                else:
                    async for _ in client.stream("x", max_tokens=tokens, n=n, timeout=limit or 60):
                        if rng.random() < 0.03:
                            break

            tasks = []
            for _ in range(300):
                tasks.append(asyncio.create_task(one()))
                await asyncio.sleep(rng.random() * 0.004)
                if rng.random() < 0.4:
                    rng.choice(tasks).cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        allowed = (asyncio.CancelledError, errors.DeadlineExceeded)
        assert all(r is None or isinstance(r, allowed) for r in results), seed
        for _ in range(400):
            if not s.engine.in_flight and not s.server.services.in_flight:
                break
            await asyncio.sleep(0.01)
        assert s.engine.in_flight == 0, seed
        assert s.server.services.in_flight == 0, seed
        async with AsyncClient(s.address) as client:
            assert len((await client.generate("x", max_tokens=5)).token_ids) == 5

"""Many streams at once, slow readers, and what a shutdown leaves."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest
from doors import doors
from fake_engine import FakeEngine, FakeText
from served import served

from deltaserve.clients import AsyncClient, Client, errors
from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import serve_until_signal
from deltaserve.v1 import generation_pb2 as pb
from deltaserve.v1 import generation_pb2_grpc


async def test_1500_streams_at_once() -> None:
    """gRPC's own defaults cancel some of so many at random."""
    count, tokens = 1500, 20
    async with served(FakeEngine(step_seconds=0.05)) as s, AsyncClient(s.address) as client:

        async def stream(i: int) -> tuple[int, int]:
            pieces = [p async for p in client.stream([3 + i % 200], max_tokens=tokens)]
            return sum(len(p.token_ids) for p in pieces), len(pieces)

        results = await asyncio.gather(*(stream(i) for i in range(count)))
    assert {n for n, _ in results} == {tokens}
    messages = sum(m for _, m in results)
    assert messages < 0.95 * count * tokens, "pieces are gathered when there are many streams"


async def test_a_stream_that_nobody_reads_is_ended_and_disturbs_nobody() -> None:
    engine = FakeEngine(step_seconds=0.0005)
    async with served(engine, write_seconds=0.5) as s:
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with (
            grpc.aio.insecure_channel(s.address, options=options) as channel,
            AsyncClient(s.address) as client,
        ):
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.GenerateStream(
                pb.GenerateStreamRequest(
                    text="x", stop=pb.StopParams(max_tokens=4000), logprobs=256
                )
            )
            await call.read()
            began = time.monotonic()
            while engine.in_flight:
                assert len((await client.generate("y", max_tokens=3)).token_ids) == 3
                assert time.monotonic() - began < 20, "the unread stream still runs"
            assert engine.cancelled, "it ended by itself"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() == grpc.StatusCode.ABORTED
            assert "was not read" in (caught.value.details() or "")


async def test_a_slow_reader_gets_everything_in_larger_pieces() -> None:
    async with served(FakeEngine(step_seconds=0.001)) as s, AsyncClient(s.address) as client:
        got: list[int] = []
        async for piece in client.stream("x", max_tokens=1500, logprobs=200):
            got += piece.token_ids
            await asyncio.sleep(0.0005)
    assert len(got) == 1500


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    script = Path(__file__).parent / "serve_fake.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on ")
    return process, line.removeprefix("listening on ").strip()


def test_sigterm_drains() -> None:
    process, address = start()
    with Client(address) as client, Client(address) as late:
        client.wait_ready(10)
        stream = client.stream("x", max_tokens=100)  # about a second
        next(stream)
        watch = client.watch_adapters()
        assert next(watch).snapshot
        assert late.ready()
        process.send_signal(signal.SIGTERM)
        while late.ready():
            time.sleep(0.01)
        with pytest.raises(errors.Unavailable):
            late.generate("y")
        with pytest.raises(errors.Unavailable):
            next(watch)
        assert len([t for p in stream for t in p.token_ids]) == 99, "what ran could finish"
    assert process.wait(10) == 0
    assert process.stdout is not None and process.stdout.read() == "", "one line on stdout"


def test_a_second_sigterm_stops_at_once() -> None:
    process, address = start()
    with Client(address) as client:
        stream = client.stream("x", max_tokens=4000)  # at least forty seconds
        next(stream)
        process.send_signal(signal.SIGTERM)
        while client.ready():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        with pytest.raises((errors.Unavailable, errors.Cancelled)):
            list(stream)


async def test_a_server_whose_engine_is_dead_ends() -> None:
    engine, dead = FakeEngine(), asyncio.Event()
    engine.start()
    opened = doors(engine, FakeText(), RpcConfig(port=0, grace_seconds=5), max_queue=10)
    serving = serve_until_signal(opened, lambda _: dead.set(), dead)
    assert await asyncio.wait_for(serving, 20) == 1
    engine.shutdown()


def test_the_grace_has_an_end() -> None:
    process, address = start("0.3")
    with Client(address) as client:
        stream = client.stream("x", max_tokens=4000)
        next(stream)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
        assert time.monotonic() - began < 5
        with pytest.raises((errors.Unavailable, errors.Cancelled)):
            list(stream)

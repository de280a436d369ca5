"""A real engine behind a real gRPC server in this process, and streams that nothing may disturb."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doors import doors
from rig import running

from deltaserve.clients import Client
from deltaserve.server.config import RpcConfig
from deltaserve.server.doors import Doors
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.text import Text
from deltaserve.server.model import BaseModel
from deltaserve.server.service.identity import Identity


@dataclass
class Serving:
    engine: Engine
    client: Client
    http: str = ""

    @property
    def address(self) -> str:
        return self.client.address

    def held(self) -> tuple[int, int, list[str]]:
        """What must be as before once nothing runs: blocks, adapter bytes, adapters."""
        info = self.client.server_info()
        names = [a.name for a in self.client.list_adapters()]
        return info.kv_blocks_used, info.adapter_bytes, names


@contextmanager
def serving(
    model: BaseModel,
    roots: Sequence[Path],
    *,
    http: bool = False,
    identity: Identity | None = None,
    **config: Any,
) -> Iterator[Serving]:
    with running(model, roots, **config) as engine:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()

        async def start() -> tuple[Doors, list[str]]:
            ports = RpcConfig(port=0, http_port=0 if http else None)
            server = doors(engine, Text(model.folder), ports, identity=identity)
            return server, await server.start()

        server, (address, *others) = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        try:
            with Client(address, timeout=60) as client:
                yield Serving(engine, client, f"http://{others[0]}" if http else "")
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.005)


class Bystander(threading.Thread):
    """Streams the same greedy request again and again, and keeps what was wrong."""

    def __init__(self, serving: Serving, prompt: list[int], model: str, expected: list[int]):
        super().__init__(daemon=True)
        self._serving, self._prompt, self._model = serving, prompt, model
        self._expected = expected
        self._stop_soon = threading.Event()
        self.streaming = threading.Event()
        self.wrong: list[object] = []
        self.rounds = 0

    def run(self) -> None:
        try:
            while not (self.rounds and self._stop_soon.is_set()):
                got: list[int] = []
                for piece in self._serving.client.stream(
                    self._prompt, self._model, max_tokens=len(self._expected), ignore_eos=True
                ):
                    got += piece.token_ids
                    self.streaming.set()
                if got != self._expected:
                    self.wrong.append(got)
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)
            self.streaming.set()

    def finish(self) -> None:
        self._stop_soon.set()
        self.join(60)
        assert not self.is_alive() and self.rounds and not self.wrong, self.wrong


@contextmanager
def undisturbed(
    serving: Serving, expected: dict[str, tuple[list[int], list[int]]]
) -> Iterator[None]:
    """While the body runs, a stream of each model (name -> prompt, tokens) gives what it gave
    alone; afterwards everything that is held is as it was."""
    before = serving.held()
    bystanders = [Bystander(serving, p, model, t) for model, (p, t) in expected.items()]
    for bystander in bystanders:
        bystander.start()
    for bystander in bystanders:
        assert bystander.streaming.wait(30)
    try:
        yield
    finally:
        for bystander in bystanders:
            bystander.finish()
    until(lambda: serving.held() == before, f"back to {before}, now {serving.held()}")

"""A server's engine in this process, and how long its start took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import triton
from gpu_kernels.data import ON_GPU

from deltaserve.server.config import AdapterConfig, Config, EngineConfig, ModelConfig
from deltaserve.server.engine import build
from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.observer import NullObserver
from deltaserve.server.garbage import settled
from gpu_serving.sizes import Sizes

LOAD, COMPILE, TEST, CAPTURE, REST = (
    "load the base",
    "compile kernels",
    "test kernels",
    "capture graphs",
    "plan memory, wire",
)
LOADERS = 4
"""Adapters that are loaded at once, for so many gigabytes of them."""
STAGES = {"compiling": COMPILE, "testing": TEST, "capturing": CAPTURE}
"""First word of what `build_engine` says it is doing -> stage; else it is loading."""


class Stopwatch:
    """`build_engine`'s progress, turned into the seconds of each stage."""

    def __init__(self, moved: Callable[[], object]) -> None:
        """moved: is called whenever there is progress."""
        self.seconds: dict[str, float] = {}
        self._moved = moved
        self._stage, self._since = LOAD, time.perf_counter()

    def __call__(self, share: float, what: str) -> None:
        self._moved()
        self._enter(REST if share >= 1 else STAGES.get(what.split()[0], LOAD))

    def stop(self) -> dict[str, float]:
        self._enter(REST)
        return self.seconds

    def _enter(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


@dataclass
class Serving:
    """graphs: how it was started. start: seconds of each stage. compiled: kernels that were in
    Triton's cache before it."""

    engine: Engine
    sizes: Sizes
    graphs: str
    start: dict[str, float]
    compiled: int
    _loaded: dict[str, AdapterInfo] = field(default_factory=dict)

    @contextmanager
    def stepping(self, graphs: str) -> Iterator[None]:
        """For as long as the ``with`` lasts "off" has an engine that was started with graphs launch
        its steps one by one, as --enforce-eager does. Nothing may be running before and after."""
        runner, given = self.engine._runner, self.graphs
        held = runner._graphs
        if graphs == "off":
            self.graphs, runner._graphs = graphs, None
        try:
            yield
        finally:
            self.graphs, runner._graphs = given, held

    @property
    def launches(self) -> bool:
        """Whether its steps launch kernels, on a GPU or in the interpreter."""
        return self.engine.info().device == "cuda"

    @property
    def captured(self) -> bool:
        """Whether steps can be replayed from graphs."""
        return self.engine._runner._graphs is not None

    @contextmanager
    def loaded(self, folders: Iterable[tuple[str, Path]]) -> Iterator[dict[str, AdapterInfo]]:
        """Adapters by name, side by side, for as long as the ``with`` lasts."""
        cache = self.engine.adapters
        waiting = {name: cache.load(name, str(folder)) for name, folder in folders}
        try:
            yield {name: future.result(300) for name, future in waiting.items()}
        finally:
            for name, future in waiting.items():
                if future.done() and future.exception() is None:
                    cache.unload(name).result(60)

    def weight_bytes(self) -> int:
        """Of the base, read by every step: all but the embedding, of which a step picks rows."""
        c = self.sizes.shape.config
        size = 2 if self.sizes.shape.dtype == "bfloat16" else 4
        return self.engine.info().memory.weights - c["vocab_size"] * c["hidden_size"] * size

    def token_bytes(self) -> float:
        """Of the keys and values of one token."""
        shape = self.engine.info().memory.shape
        return shape.block / shape.block_size


@contextmanager
def serving(
    base: Path,
    roots: Path,
    sizes: Sizes,
    graphs: str,
    device: str = "cuda",
    moved: Callable[[], object] = lambda: None,
) -> Iterator[Serving]:
    """The engine as `deltaserve serve` makes it, running. graphs: "auto" or "off". device: without
    a GPU "cuda" is Triton's interpreter. moved: is called as the start goes on."""
    config = Config(
        ModelConfig(base, dtype=sizes.shape.dtype, device=device),
        AdapterConfig(
            roots=(roots,), bytes=sizes.adapter_bytes, loaders=LOADERS, loader_processes=ON_GPU
        ),
        EngineConfig(
            kv_cache_bytes=sizes.kv_bytes,
            max_length=sizes.max_length,
            max_batch_tokens=sizes.max_batch_tokens,
            max_sequences=sizes.max_sequences,
            enforce_eager=graphs == "off",
        ),
    )
    with ExitStack() as stack:
        if device == "cuda" and not ON_GPU:
            stack.enter_context(_interpreted())
        compiled, watch = _compiled(), Stopwatch(moved)
        engine, _ = build.build_engine(config, NullObserver(), watch)
        seconds = watch.stop()
        engine.start()
        stack.callback(engine.shutdown)
        stack.enter_context(settled())
        yield Serving(engine, sizes, graphs, seconds, compiled)


def _compiled() -> int:
    folder = Path(triton.knobs.cache.dir)
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


@contextmanager
def _interpreted() -> Iterator[None]:
    """Serving in Triton's interpreter, for a rehearsal: the backend that is not offered without a
    GPU, and a self-test that takes seconds."""
    from deltaserve.kernels.gpu import selftest
    from deltaserve.kernels.gpu.backend import TritonBackend

    given, buckets = build.open_backend, selftest.BUCKETS
    build.open_backend, selftest.BUCKETS = lambda device: TritonBackend(), (16,)
    try:
        yield
    finally:
        build.open_backend, selftest.BUCKETS = given, buckets

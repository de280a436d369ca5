"""Sequences that decode together, and when their tokens came."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.core import AdapterRef, Output, Request, SamplingParams
from deltaserve.server.engine.engine import Engine
from gpu_serving.sizes import Sizes

PATIENCE = 120.0
"""Seconds to wait for a step that should take milliseconds."""
_ids = itertools.count()

Names = Sequence[str]
"""The adapter of each sequence, "" for none."""


class Streams:
    """The sequences' outbox. between: called with the steps made after each, on the engine
    thread."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.counts = dict.fromkeys(ids, 0)
        self.steps: list[tuple[float, int]] = []
        self.error: Exception | None = None
        self.between: Callable[[int], None] = lambda steps: None
        self._open = set(ids)
        self._changed = threading.Condition()

    def deliver(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        with self._changed:
            tokens = sum(len(o.token_ids) for o in outputs)
            for o in outputs:
                self.counts[o.request_id] += len(o.token_ids)
                if o.finish_reason is not None:
                    self._open.discard(o.request_id)
                if o.error is not None and o.finish_reason != "cancelled":
                    self.error = o.error
            if tokens:
                self.steps.append((now, tokens))
            self.between(len(self.steps))
            self._changed.notify_all()

    def until(self, met: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: met() or self.error or not self._open, PATIENCE)
        if self.error is not None:
            raise self.error
        if not met() and not self._open:
            raise RuntimeError(f"the sequences ended after {len(self.steps)} steps")
        if not met():
            raise TimeoutError(f"after {len(self.steps)} steps nothing came for {PATIENCE:g} s")

    def wait(self, count: int) -> None:
        """Until that many steps have been made from now on."""
        end = len(self.steps) + count
        self.until(lambda: len(self.steps) >= end)

    def end(self, engine: Engine) -> None:
        """Cancels what is left."""
        for request_id in self.counts:
            engine.cancel(request_id)
        with self._changed:
            self._changed.wait_for(lambda: not self._open, PATIENCE)


@dataclass(frozen=True)
class Decoded:
    """gaps: seconds between two steps. context: tokens of a sequence, halfway. replayed: share of
    the steps that were replayed from graphs."""

    tokens_per_second: float
    gaps: tuple[float, ...]
    context: int
    replayed: float

    def ms(self, share: float) -> float:
        """Of the gaps."""
        found = sorted(self.gaps)
        return 1e3 * found[min(len(found) - 1, int(share * len(found)))]


def request(
    sizes: Sizes, i: int, name: str, tokens: int, length: int = 0, **sampling: Any
) -> Request:
    """Greedy, of exactly so many tokens; sequence i has a prompt of its own."""
    vocabulary = sizes.shape.config["vocab_size"] - 300
    prompt = tuple(
        (i * 7919 + k * 104729 + k * k * 31) % vocabulary + 270
        for k in range(length or sizes.prompt)
    )
    given = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
    adapters = (AdapterRef(name),) if name else ()
    return Request(f"bench-{next(_ids)}", prompt, given, adapters)


def fill(engine: Engine, sizes: Sizes, names: Names, first: int = 0) -> float:
    """Computes the prompts, which stay in the prefix cache. first: number of the first sequence.
    Returns seconds."""
    began = time.perf_counter()
    asked = [request(sizes, i, name, 1) for i, name in enumerate(names, first)]
    generate(engine, asked, PATIENCE)
    return time.perf_counter() - began


def begin(engine: Engine, sizes: Sizes, names: Names) -> Streams:
    """Has the sequences decode, all of them by the time it returns."""
    most = sizes.max_length - sizes.prompt - 64
    asked = [request(sizes, i, name, most) for i, name in enumerate(names)]
    streams = Streams([r.request_id for r in asked])
    for one in asked:
        engine.submit(one, streams)
    streams.until(lambda: min(streams.counts.values()) >= sizes.warm)
    return streams


def decode(
    engine: Engine, sizes: Sizes, names: Names, between: Callable[[int], None] | None = None
) -> Decoded:
    """The prompts first, then all sequences side by side, until they have made their steps.
    between: as of Streams, with the steps measured."""
    fill(engine, sizes, names)
    streams = begin(engine, sizes, names)
    try:
        first, replays = len(streams.steps), engine._runner.replays
        if between is not None:
            streams.between = lambda steps: between(steps - first)
        before = sum(streams.counts.values()) / len(names)
        streams.wait(sizes.steps)
        made, replays = len(streams.steps) - first, engine._runner.replays - replays
    finally:
        streams.end(engine)
    window = streams.steps[first - 1 : first + sizes.steps]
    times = [at for at, _ in window]
    tokens = sum(count for _, count in window[1:])
    return Decoded(
        tokens / (times[-1] - times[0]),
        tuple(b - a for a, b in itertools.pairwise(times)),
        round(sizes.prompt + before + sizes.steps / 2),
        round(min(1.0, replays / made), 2),
    )

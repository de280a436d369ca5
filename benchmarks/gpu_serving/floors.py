"""What a decoding step cannot be faster than: its bytes, and the sum of its own kernels' times."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_kernels import ceilings
from gpu_kernels.timing import measure

from deltaserve.kernels.gpu import launch as seam
from deltaserve.server.engine.core import AdapterInfo
from gpu_serving.serving import Serving
from gpu_serving.streams import Decoded, Names, decode

REPLAYS = 10
RECORDED = 2
"""Steps of a measurement before the one whose launches are recorded."""


def bytes_ms(
    serving: Serving, decoded: Decoded, batch: int, adapters: Iterable[AdapterInfo] = ()
) -> float:
    """Base, the adapters of the batch, keys and values, at the rate of a copy on the device."""
    held = sum(info.resident_bytes for info in adapters)
    keys = batch * decoded.context * serving.token_bytes()
    return 1e-9 * (serving.weight_bytes() + held + keys) / ceilings.copy_tb_per_s()


class Launches:
    """The launches of one step, each to be made again with the arguments it had."""

    def __init__(self) -> None:
        self.on = False
        self._found: dict[tuple[Any, ...], list[Callable[[], None]]] = defaultdict(list)

    def add(self, original: Callable[..., None], kernel: Any, grid: Any, arguments: Any,
            *rest: Any, **named: Any) -> None:  # fmt: skip
        if self.on:
            name = getattr(kernel, "__name__", "") or kernel.fn.__name__
            numbers = tuple(a for a in arguments if isinstance(a, int | float))
            key = name, tuple(grid), numbers, repr((rest, named))
            call = partial(original, kernel, grid, tuple(arguments), *rest, **named)
            self._found[key].append(call)
        original(kernel, grid, arguments, *rest, **named)

    @property
    def count(self) -> int:
        return sum(map(len, self._found.values()))

    def alike(self) -> list[tuple[str, Sequence[Callable[[], None]]]]:
        """Kernel and calls of the launches that are alike: a layer's in all layers, say."""
        return [(str(key[0]), calls) for key, calls in self._found.items()]


@contextmanager
def recording(launches: Launches) -> Iterator[None]:
    """Every launch of the product goes through `launches`."""
    original = seam.launch
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("deltaserve.") and vars(module).get("launch") is original
    ]
    for module in modules:
        module.launch = partial(launches.add, original)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.launch = original  # type: ignore[attr-defined]


def kernels_ms(serving: Serving, names: Names) -> tuple[dict[str, float], int]:
    """Milliseconds of each kernel in one decoding step of these sequences, and the step's launches.

    Launches that are alike are timed together, in a graph that goes through all layers and so
    through weights larger than the cache, and apart from all others. What torch launches itself is
    not in it. For steps that are launched one by one.
    """
    launches = Launches()

    def between(step: int) -> None:
        launches.on = step >= RECORDED and not launches.count

    # the one recorded, and one more, so that nobody ends the sequences before it
    sizes = replace(serving.sizes, steps=RECORDED + 2)
    with recording(launches):
        decode(serving.engine, sizes, names, between)
    if not launches.count:
        raise RuntimeError("the step launched no kernels of ours one by one")
    found: dict[str, float] = {}
    with torch.inference_mode():
        for name, calls in launches.alike():
            ms = 1e-3 * measure(calls, REPLAYS).us * len(calls)
            found[name] = found.get(name, 0.0) + ms
    return found, launches.count

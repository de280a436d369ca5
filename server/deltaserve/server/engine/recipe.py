"""Recipe: all that making an adapter takes beside its files, but for the base's weights.

It can be given to a process that has no base. Few adapters are lowered by the base's weights; there
such a process asks the server for each weight as it is served, so that it makes the same bytes.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import BaseSpec
from deltaserve.adapters.load import load as load_adapter
from deltaserve.adapters.lowered_cache import LoweredCache
from deltaserve.adapters.options import LoadOptions
from deltaserve.adapters.parent import load_on
from deltaserve.adapters.source import resolve
from deltaserve.kernels.cache import folder as cache_root
from deltaserve.server.config import AdapterConfig
from deltaserve.server.engine.make import Line, Made, MakeHere, Packs, Wanted
from deltaserve.server.engine.transfer import receive, send
from deltaserve.server.packing.packer import Packer

FOLDER_EXTRAS = 1 << 30
"""Bytes that an adapter's folder may hold beside its weights: tokenizers, optimizer states."""


def make_here(config: AdapterConfig, base: BaseSpec, host: Packs, budget: int) -> MakeHere:
    """What makes adapters for a base in this process. budget: bytes for all adapters; files far
    beyond it are refused unread."""
    cache = None
    if config.cache_bytes:
        folder = config.cache_folder or cache_root() / "adapters"
        cache = LoweredCache(folder, config.cache_bytes, base, any_base=config.allow_base_mismatch)
    return MakeHere(reader(config, base, budget, cache), host, cache)


def locator(config: AdapterConfig, budget: int) -> Callable[[str], Path]:
    """uri -> where it is; only in the folders given as roots and at the paths given by name on the
    command line. budget: as in `make_here`."""
    named = {str(path): path for _, path in config.preload}
    named |= {str(patch.path): patch.path for patch in config.patches}
    named |= {str(path): path for _, path in config.registered}
    most = 4 * budget + FOLDER_EXTRAS

    def locate(uri: str) -> Path:
        return named[uri] if uri in named else resolve(uri, config.roots, max_bytes=most)

    return locate


def reader(
    config: AdapterConfig, base: BaseSpec, budget: int, cache: LoweredCache | None = None
) -> Callable[[str, LoadOptions, Adapter | None], Adapter]:
    """uri, options, parent -> Adapter lowered for this base."""
    locate = locator(config, budget)

    def read(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
        path = locate(uri)
        if config.allow_base_mismatch:
            options = replace(options, allow_base_mismatch=True)
        if parent is not None:
            return load_on(path, base, parent, options)
        known = None if cache is None else partial(cache.find_unread, options=options)
        return load_adapter(path, base, options, known)

    return read


@dataclass(frozen=True, slots=True)
class Ask:
    """For a weight or bias of the base, as `BaseSpec` has them."""

    what: Literal["weight", "bias"]
    module: str


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why there is no answer."""

    text: str


@dataclass(frozen=True)
class Recipe:
    """base: without its weights."""

    config: AdapterConfig
    base: BaseSpec
    packer: Packer
    budget: int

    @staticmethod
    def of(config: AdapterConfig, base: BaseSpec, packer: Packer, budget: int) -> Recipe:
        """base: with or without its weights."""
        return Recipe(config, replace(base, weight=_absent, bias=_absent), packer, budget)

    def over(self, connection: socket.socket) -> MakeAsking:
        """What makes adapters in a process. connection: to the server, which calls `answer` with
        what it is asked."""
        return MakeAsking(self, connection)


class MakeAsking:
    """A `Make` that asks for weights while a call lasts."""

    def __init__(self, recipe: Recipe, connection: socket.socket) -> None:
        self._connection = connection
        self._called = False
        base = replace(recipe.base, weight=self._weight, bias=partial(self._ask, "bias"))
        self._make = make_here(recipe.config, base, recipe.packer, recipe.budget)

    def __call__(self, line: Line, wanted: Wanted) -> Made:
        self._called = True
        try:
            return self._make(line, wanted)
        finally:
            self._called = False

    def finish(self) -> None:
        self._make.finish()

    def close(self) -> None:
        self._make.close()

    def _weight(self, module: str) -> Tensor:
        found = self._ask("weight", module)
        assert found is not None
        return found

    def _ask(self, what: Literal["weight", "bias"], module: str) -> Tensor | None:
        if not self._called:  # the server would take it for the next call's
            raise RuntimeError(f"the base's {what} of {module} was asked for after the load")
        send(self._connection, Ask(what, module))
        answer: Tensor | Unanswered | None = receive(self._connection)
        if isinstance(answer, Unanswered):
            raise RuntimeError(f"in the server:\n{answer.text}")
        return answer


def answer(connection: socket.socket, base: BaseSpec, ask: Ask) -> None:
    """Send what was asked for."""
    found: Tensor | Unanswered | None
    try:
        found = (base.weight if ask.what == "weight" else base.bias)(ask.module)
        if found is not None and found.untyped_storage().nbytes() > found.nbytes:
            found = found.clone()  # of what is computed as one, this alone is sent
    except Exception:
        found = Unanswered(traceback.format_exc())
    send(connection, found, shared=False)


def _absent(module: str) -> Tensor:
    raise RuntimeError(f"the weights of {module} are not in this process")

"""Registering every adapter of a folder before the server is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from deltaserve.adapters.errors import AdapterError
from deltaserve.server.config import ADAPTER_NAME, NAME_RULE
from deltaserve.server.engine.engine import Engine
from deltaserve.server.errors import RequestError

log = logging.getLogger(__name__)

TOLD = 20
"""Adapters that fail are named in the log, up to so many of them."""


def register(
    engine: Engine, adapters: Sequence[tuple[str, Path]], progress: Callable[[float, str], None]
) -> int:
    """Read and check each adapter (name, path); it is loaded when a request asks for it. One that
    fails is named in the log and left out: the others are served. -> how many are registered."""
    failed: dict[str, str] = {}
    futures = []
    for name, path in adapters:
        if ADAPTER_NAME.fullmatch(name):
            futures.append((name, engine.adapters.load(name, str(path), register_only=True)))
        else:
            failed[name] = NAME_RULE
    for done, (name, future) in enumerate(futures):
        progress(done / len(futures), f"registering adapters: {done} of {len(futures)}")
        try:
            future.result()
        except (AdapterError, RequestError) as error:
            failed[name] = str(error)
    for name, why in list(failed.items())[:TOLD]:
        log.warning("--adapter-dir: %s is left out: %s", name, why)
    if len(failed) > TOLD:
        log.warning("--adapter-dir: %d more are left out", len(failed) - TOLD)
    count = len(adapters) - len(failed)
    log.info("registered %d adapters, left out %d", count, len(failed))
    return count

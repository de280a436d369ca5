"""From a Config to a running server, and to its end."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.options import LoadOptions
from deltaserve.server import log as logs
from deltaserve.server.config import NO_STATE, Config
from deltaserve.server.doors import Door, Doors, serve_until_signal
from deltaserve.server.engine.build import build_engine
from deltaserve.server.engine.core import AdapterRef
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.text import Text
from deltaserve.server.engine_metrics import EngineCollector
from deltaserve.server.errors import NameTaken, RequestError, StateUnavailable
from deltaserve.server.folders import register
from deltaserve.server.garbage import settled
from deltaserve.server.http.door import HttpDoor
from deltaserve.server.identity.doorman import Doorman
from deltaserve.server.identity.exposure import dangers
from deltaserve.server.metrics import Metrics
from deltaserve.server.model.errors import ModelError
from deltaserve.server.planner import show
from deltaserve.server.progress import Bar
from deltaserve.server.rpc.server import RpcDoor
from deltaserve.server.scrape import scraped
from deltaserve.server.service.identity import Identity
from deltaserve.server.service.services import Services
from deltaserve.server.tgis import service as tgis

if TYPE_CHECKING:
    from sqlalchemy import URL

    from deltaserve.server.identity.sight import Sight
    from deltaserve.server.state.store import Store

log = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message says why."""


def run(config: Config) -> int:
    """Load, serve until a signal, drain. -> exit code. Raises StartError or ConfigError."""
    logs.set_up(config.log_level)
    metrics, state = Metrics(), _state(config.state)
    with Bar() as bar:
        try:
            engine, text = build_engine(config, metrics, bar)
        except (ModelError, OSError) as error:
            raise StartError(f"--base {config.model.base}: {error}") from error
    show(engine.info().memory, Console(stderr=True))
    engine.start()
    try:
        _preload(engine, config)
        if config.adapters.registered:
            with Bar() as bar:
                register(engine, config.adapters.registered, bar)
        metrics.registry.register(EngineCollector(engine))
        with settled(), ExitStack() as held:
            if config.rpc.metrics_port is not None:
                url = held.enter_context(scraped(metrics.registry, config.rpc))
                log.info("metrics on %s", url)
            return _run_loop(_serve(engine, text, config, metrics, state))
    finally:
        engine.shutdown()


def _preload(engine: Engine, config: Config) -> None:
    """The adapters of the command line, all at once; the first failure ends the start."""
    cache, given = engine.adapters, config.adapters
    loads = [
        (f"--patch {p.name}={p.path}", cache.load(p.name, str(p.path), patch=True))
        for p in given.patches
    ]
    tasks, max_errors = dict(given.tasks), dict(given.max_errors)
    for name, path, parent in given.in_order():
        options = LoadOptions(
            task_id=tasks.get(name), max_error=max_errors.get(name, 0.0), parent=parent
        )
        loads.append((f"--adapter {name}={path}", cache.load(name, str(path), options=options)))
    held = 0
    for flag, future in loads:
        try:
            info = future.result()
        except (AdapterError, RequestError) as error:
            raise StartError(f"{flag}: {error}") from error
        held += info.resident_bytes
        log.info("adapter %s: %s, %d bytes", info.name, info.format, info.resident_bytes)
        for note in info.notes:
            log.info("adapter %s: %s", info.name, note)
    if cache.evictions:
        raise StartError(
            f"--adapter and --patch: together they take up to {held} bytes, and there is room for "
            f"{cache.budget} beside a request of the greatest length; give more --memory, a lower "
            "--max-length, or have some registered alone, to be loaded when they are asked for"
        )
    try:
        engine.set_patches([AdapterRef(p.name, p.strength, patch=True) for p in given.patches])
    except RequestError as error:
        raise StartError(f"--patch: {error}") from error


async def _serve(
    engine: Engine, text: Text, config: Config, metrics: Metrics, state: URL | None
) -> int:
    store, sight = (None, None) if state is None else await _restore(engine, state, metrics)
    identity = await _identity(config, store, sight)
    services = Services(engine, text, config.rpc, metrics, store, identity)
    doorman = Doorman(identity.book, identity.refresh)
    given = (services, doorman, config.rpc, metrics, config.engine.max_queue)
    opened: list[Door] = [RpcDoor(*given, tgis.served(services))]
    if config.rpc.http_port is not None:
        opened.append(HttpDoor(*given))
    doors = Doors(services, opened, config.rpc.grace_seconds)
    loop, dead = asyncio.get_running_loop(), asyncio.Event()
    engine.when_dead(lambda: loop.call_soon_threadsafe(dead.set))
    try:
        return await serve_until_signal(
            doors, lambda a: print(f"listening on {a[0]}", flush=True), dead
        )
    except StateUnavailable as error:  # when what was kept was to be brought back
        raise StartError(f"--state: {error}") from error


async def _identity(config: Config, store: Store | None, sight: Sight | None) -> Identity:
    try:
        identity = await Identity.open(store, config.keys, sight)
    except StateUnavailable as error:
        raise StartError(f"--state: {error}") from error
    rpc = config.rpc
    for danger in dangers(
        rpc.host,
        closed=identity.book.closed,
        certified=rpc.tls_client_ca is not None,
        encrypted=rpc.tls_key is not None,
    ):
        log.warning("%s", danger)
    return identity


def _state(given: str) -> URL | None:
    if given == NO_STATE:
        return None
    from deltaserve.server.state.url import parse  # SQLAlchemy: not without --state

    return parse(given)


async def _restore(engine: Engine, state: URL, metrics: Metrics) -> tuple[Store, Sight]:
    from deltaserve.server.restore import check_names, restore
    from deltaserve.server.state.store import StateError, Store

    try:
        store = await Store.open(state)
        await check_names(store, engine.info().names)
        return store, await restore(engine.adapters, store, metrics)
    except (NameTaken, StateError, StateUnavailable) as error:
        shown = state.render_as_string(hide_password=True)
        raise StartError(f"--state {shown}: {error}") from error


def _run_loop(serving: Coroutine[Any, Any, int]) -> int:
    if sys.platform == "win32":
        return asyncio.run(serving)
    import uvloop

    return uvloop.run(serving)

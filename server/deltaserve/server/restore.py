"""Bringing back the adapters that were registered over the API before the server was restarted."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from dataclasses import replace

from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.server.config import ADAPTER_NAME, NAME_RULE
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.core import AdapterInfo
from deltaserve.server.errors import AdapterConflict, NameTaken, RequestError, StateUnavailable
from deltaserve.server.identity.sight import Owner, Sight
from deltaserve.server.metrics import Metrics
from deltaserve.server.state.records import AdapterRecord, Entry, parse
from deltaserve.server.state.routes import routes
from deltaserve.server.state.store import Store

log = logging.getLogger(__name__)


async def restore(cache: AdapterCache, store: Store, metrics: Metrics) -> Sight:
    """Load each, or register it, as it was; parents before their children. One that is not what it
    was is listed as failed, with the reason, and tried again at the next start. StateUnavailable if
    they cannot be read. -> whose they are: the command line's are the operator's, whatever the
    state has under their names."""
    own, sight = {info.name for info in cache.list()}, Sight()
    left = {record.name: record for record in await store.adapters()}
    for record in left.values():
        if record.name not in own:
            sight.put(record.name, Owner(record.tenant, record.shared))
    options: dict[str, LoadOptions] = {}
    served = 0
    for record in list(left.values()):
        try:
            if not ADAPTER_NAME.fullmatch(record.name):
                raise ValueError(f"its name is not possible: {NAME_RULE}")
            options[record.name] = parse(record.options)
        except ValueError as error:
            await _quarantine(cache, store, metrics, left.pop(record.name), DEFAULT, str(error))
    while left:
        free = [n for n in left if options[n].parent not in left] or list(left)
        started = [
            (left.pop(n), _start(cache, record, options[n]))
            for n, record in [(n, left[n]) for n in free]
        ]
        for record, future in started:
            chosen = options[record.name]
            try:
                info = await asyncio.wrap_future(future)
                if record.digest and info.digest != record.digest:
                    raise AdapterConflict(
                        f"the name is taken by other content: digest {info.digest[:16]}, "
                        f"registered {record.digest[:16]}"
                    )
            except (AdapterError, RequestError) as error:
                await _quarantine(cache, store, metrics, record, chosen, str(error))
            else:
                served += 1
                await _served(store, record, info)
    log.info("brought back %d adapters", served)
    return sight


async def check_names(store: Store, base: tuple[str, ...]) -> None:
    """NameTaken if an adapter or a route of the state has a name of the base: requests for it would
    get the base. StateUnavailable."""
    found = [("adapter", record.name) for record in await store.adapters()]
    found += [("route", record.name) for record in await routes(store)]
    for kind, name in found:
        if name in base:
            raise NameTaken(
                f"the base is called {name!r}, as is a registered {kind}: give the base another "
                f"name with --served-model-name, and take the {kind} away then if this is to stay"
            )


def _start(cache: AdapterCache, record: AdapterRecord, options: LoadOptions) -> Future[AdapterInfo]:
    try:
        return cache.load(
            record.name,
            record.uri,
            pinned=record.pinned,
            options=options,
            register_only=record.register_only and not record.pinned,
            digest=record.digest,
        )
    except RequestError as error:
        refused: Future[AdapterInfo] = Future()
        refused.set_exception(error)
        return refused


async def _quarantine(
    cache: AdapterCache,
    store: Store,
    metrics: Metrics,
    record: AdapterRecord,
    options: LoadOptions,
    error: str,
) -> None:
    metrics.on_quarantined()
    log.warning("adapter %r of --state is not served: %s", record.name, error)
    cache.quarantine(record.name, record.uri, options, record.digest, error)
    entry = Entry("server", "Restore", record.name, "QUARANTINED", detail=error)
    try:
        await store.fail(record.name, error, entry)
    except StateUnavailable as unavailable:
        log.warning("--state: %s", unavailable)


async def _served(store: Store, record: AdapterRecord, info: AdapterInfo) -> None:
    """Write down what is new of it."""
    if record.digest and not record.error:
        return
    now = replace(record, digest=info.digest, error="")
    try:
        await store.keep(lambda: now, Entry("server", "Restore", record.name))
    except StateUnavailable as unavailable:
        log.warning("--state: %s", unavailable)

"""A database that is gone while routes change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_engine import FakeEngine, FakeText
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.config import RpcConfig
from deltaserve.server.errors import StateUnavailable
from deltaserve.server.metrics import Metrics
from deltaserve.server.routes.book import SERVER, RouteBook
from deltaserve.server.run import StartError, _serve
from deltaserve.server.state.routes import routes
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

ARMS = [{"name": "base"}, {"name": "tuned", "model": "a", "weight": 3}]


async def test_a_database_that_is_gone(tmp_path: Path) -> None:
    """What could do harm does not happen, what keeps it away does."""
    path, away = tmp_path / "s.db", tmp_path / "away.db"
    store = await Store.open(parse(str(path)))
    async with served(store=store) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        first = await client.put_route("r", ARMS)
        path.rename(away)
        for change in (
            client.put_route("r", ARMS[:1]),
            client.put_route("q", ARMS),
            client.delete_route("r"),
        ):
            with pytest.raises(errors.Unavailable, match="unable to open"):
                await change
        assert await client.list_routes() == [first]
        with pytest.raises(errors.Unavailable, match="'r' is rolled_back, but that is not written"):
            await client.roll_back_route("r", "harm")
        assert (await client.get_route("r")).state == "rolled_back"
        watch = s.server.services._watch
        await watch.look()
        away.rename(path)
        assert [r.state for r in await routes(store)] == ["active"]
        await watch.look()
        assert [(r.name, r.state) for r in await routes(store)] == [("r", "rolled_back")]
        await s.server.services._routes.roll_back(SERVER, "r", "of another epoch", epoch=1)
        with pytest.raises(errors.InvalidArgument):
            await client.put_route("r", [])
        audit = [(e.verb, e.name, e.outcome) for e in await store.audit()]
        assert audit[-2:] == [("RollBackRoute", "r", "OK"), ("PutRoute", "r", "INVALID_REQUEST")]
        assert sum(verb == "RollBackRoute" for verb, _, _ in audit) == 1, "what changes nothing"


async def test_a_database_that_cannot_be_read_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(book: RouteBook) -> None:
        raise StateUnavailable("it is gone")

    monkeypatch.setattr(RouteBook, "restore", gone)
    engine = FakeEngine()
    config: Any = SimpleNamespace(
        rpc=RpcConfig(port=0), keys=None, engine=SimpleNamespace(max_queue=4)
    )
    with pytest.raises(StartError, match="--state: it is gone"):
        await _serve(cast(Any, engine), cast(Any, FakeText()), config, Metrics(), None)

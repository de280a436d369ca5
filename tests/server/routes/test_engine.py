"""Routes over a real engine, through a restart: an arm answers as what it stands for does."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import doors
from rig import load_base, running
from variants import VARIANTS, make_base

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.config import RpcConfig
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.text import Text
from deltaserve.server.metrics import Metrics
from deltaserve.server.restore import restore
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

PROMPT = list(range(5, 15))
MIX = [{"name": "a", "strength": 0.5}, {"name": "b", "strength": -1.5}]
HOT = {"temperature": 1.5, "seed": 7, "top_k": 20}
ARMS: list[Any] = [
    {"name": "base"},
    {"name": "tuned", "model": "a"},
    {"name": "mix", "adapters": MIX, "weight": 2},
    {"name": "hot", "model": "b", "sampling": HOT, "stop": {"max_tokens": 5}},
]
DIRECT: dict[str, dict[str, Any]] = {
    "base": {},
    "tuned": {"model": "a"},
    "mix": {"adapters": MIX},
    "hot": {"model": "b", **HOT, "max_tokens": 5},
}
USERS = [f"user-{i}" for i in range(24)]


@asynccontextmanager
async def started(engine: Engine, text: Text, path: Path) -> AsyncIterator[AsyncClient]:
    metrics, store = Metrics(), await Store.open(parse(str(path)))
    await restore(engine.adapters, store, metrics)
    server = doors(engine, text, RpcConfig(port=0), metrics, 100, store)
    try:
        async with AsyncClient((await server.start())[0], timeout=60) as client:
            yield client
    finally:
        await server.stop(0)


async def arms(client: AsyncClient) -> dict[str, str]:
    given: dict[str, Any] = {"max_tokens": 1}
    return {u: (await client.generate(PROMPT, "r", user=u, **given)).served_by.arm for u in USERS}


async def test_arms(tmp_path: Path) -> None:
    roots, path = tmp_path / "roots", tmp_path / "s.db"
    make_base(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(i)
        VARIANTS["lora"].make(tmp_path / "base", roots / name, generator)
    model, text = load_base(tmp_path / "base"), Text(tmp_path / "base")

    with running(model, [roots]) as engine:
        async with started(engine, text, path) as client:
            for name in "ab":
                await client.load_adapter(name, str(roots / name))
            route = await client.put_route("r", ARMS, control="tuned")
            digests = {a.name: a.digest for a in await client.list_adapters()}
            assert {a.name: a.digests for a in route.arms} == {
                "base": (),
                "tuned": (digests["a"],),
                "mix": (digests["a"], digests["b"]),
                "hot": (digests["b"],),
            }
            sticky = await arms(client)
            assert set(sticky.values()) == set(DIRECT)
            said = {}
            for arm, user in {arm: user for user, arm in sticky.items()}.items():
                given: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "logprobs": True}
                routed = await client.generate(PROMPT, "r", user=user, **given)
                direct = await client.generate(PROMPT, user=user, **{**given, **DIRECT[arm]})
                assert routed.token_ids == direct.token_ids, arm
                assert routed.logprobs == pytest.approx(direct.logprobs, abs=1e-5)
                assert routed.served_by.adapters == direct.served_by.adapters
                said[arm] = tuple(routed.token_ids)
                if arm != "hot":
                    target = {k: v for k, v in DIRECT[arm].items() if k in ("model", "adapters")}
                    asked: Any = (PROMPT, [[20, 21]])
                    (score,) = await client.score(*asked, "r", user=user)
                    (plain,) = await client.score(*asked, **target)
                    assert score.logprob == pytest.approx(plain.logprob, abs=1e-5)
            assert len(set(said.values())) == 4 and len(said["hot"]) == 5
            with pytest.raises(errors.Aborted, match=r"arm 'mix' of route 'r'|arm 'tuned'"):
                await client.unload_adapter("a")
            with pytest.raises(errors.AlreadyExists, match="'r' is taken by a route"):
                await client.load_adapter("r", str(roots / "a"))
            for bad in ({"adapters": ["b", "r"]}, {"combination": _mean("b", "r")}):
                with pytest.raises(errors.InvalidArgument, match="route 'r'"):
                    await client.generate(PROMPT, **bad)

    shutil.rmtree(roots / "b")
    shutil.copytree(roots / "a", roots / "b")
    with sqlite3.connect(path) as file:
        columns = "epoch, etag, began, changed, owner, tenant, state, reason, weights, bandit_at"
        row = f"INSERT INTO routes SELECT ?, ?, {columns} FROM routes WHERE name = 'r'"
        file.execute("DELETE FROM adapters WHERE name = 'b'")
        file.execute(row, ("broken", '{"name": "broken", "arms": 3}'))
        file.execute(row, ("renamed", '{"name": "other", "arms": [{"name": "x"}]}'))
        file.execute(row, ("a", '{"name": "a", "arms": [{"name": "x"}]}'))
    with running(model, [roots]) as engine:
        async with started(engine, text, path) as client:
            again = await client.get_route("r")
            assert (again.etag, again.arms, again.start_time) == (
                route.etag,
                route.arms,
                route.start_time,
            )
            assert (again.control, again.weights) == ("tuned", route.weights)
            whose = {arm: user for user, arm in sticky.items()}
            for why in ("no adapter named 'b'", "'b' has digest"):
                for arm in ("mix", "hot"):
                    refused = f"route 'r', arm '{arm}': .*{why}"
                    with pytest.raises(errors.FailedPrecondition, match=refused):
                        await client.generate(PROMPT, "r", user=whose[arm])
                await client.load_adapter("b", str(roots / "b"))
            for user, arm in sticky.items():
                if arm in ("base", "tuned"):
                    answer = await client.generate(
                        PROMPT, "r", user=user, max_tokens=8, ignore_eos=True
                    )
                    assert tuple(answer.token_ids) == said[arm]
            failed = {r.name: r.reason for r in await client.list_routes() if r.state == "failed"}
            assert set(failed) == {"broken", "renamed", "a"}
            assert "'other'" in failed["renamed"] and "taken by an adapter" in failed["a"]
            with pytest.raises(errors.FailedPrecondition, match="could not be brought back"):
                await client.generate(PROMPT, "broken")
            assert (await client.generate(PROMPT, "a", max_tokens=1)).served_by.route == ""
            await client.delete_route("a")
            assert (await client.put_route("broken", ARMS[:1])).state == "active"
            rolled = await client.roll_back_route("r", "b is gone")
            assert set((await arms(client)).values()) == {"tuned"}
            with sqlite3.connect(path) as file:
                audit = file.execute("SELECT verb, name, outcome FROM audit").fetchall()
            assert ("Restore", "broken", "QUARANTINED") in audit
            assert audit[-3:] == [
                ("DeleteRoute", "a", "OK"),
                ("PutRoute", "broken", "OK"),
                ("RollBackRoute", "r", "OK"),
            ]

    with running(model, [roots]) as engine:
        async with started(engine, text, path) as client:
            again = await client.get_route("r")
            assert (again.state, again.reason) == ("rolled_back", "b is gone")
            assert again.etag == rolled.etag
            assert [r.name for r in await client.list_routes()] == ["broken", "r", "renamed"]


def _mean(*models: str) -> Any:
    return {"members": list(models), "rule": "mean"}

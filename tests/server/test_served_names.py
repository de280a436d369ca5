"""--served-model-name: what the base is called, at every door."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import openai
import pytest
from fake_engine import FakeEngine
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.engine.core import Member, Request
from deltaserve.server.errors import NameTaken
from deltaserve.server.restore import check_names
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse
from deltaserve.tgis import generation_pb2 as tgis
from deltaserve.tgis.generation_pb2_grpc import GenerationServiceStub

NAMES = ("team/big", "big")


def members_of(request: Request) -> tuple[Member, ...]:
    return request.combination.members if request.combination is not None else ()


async def test_the_base_answers_to_each_of_its_names() -> None:
    engine = FakeEngine(names=NAMES)
    async with served(engine, http_port=0) as s, AsyncClient(s.address) as client:
        info = await client.server_info()
        assert (info.base, info.base_names) == (NAMES[0], NAMES)
        for name in NAMES:
            assert (await client.generate("x", name, max_tokens=1)).served_by.base == NAMES[0]
            assert [p async for p in client.stream("x", name, max_tokens=1)]
            assert await client.score("x", ["y"], name)
            assert await client.tokenize("x", name) and await client.detokenize([70], name)
            members = [{"model": name}, {"model": ""}]
            await client.generate("x", combination={"rule": "mean", "members": members})
        async with grpc.aio.insecure_channel(s.address) as channel:
            texts = [tgis.GenerationRequest(text="x")]
            for name in NAMES:
                request = tgis.BatchedGenerationRequest(adapter_id=name, requests=texts)
                await GenerationServiceStub(channel).Generate(request)
        url = f"{s.http}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as http:
            models = [model async for model in http.models.list()]
            assert [m.id for m in models] == list(NAMES)
            assert {(m.model_extra or {})["root"] for m in models} == {"fake-folder"}
            for name in NAMES:
                assert (await http.models.retrieve(name)).id == name
                answer = await http.completions.create(model=name, prompt="x", max_tokens=1)
                assert answer.model == NAMES[0]
            with pytest.raises(openai.NotFoundError):
                await http.completions.create(model="fake-folder", prompt="x")
            parts = [p for r in engine.submitted for p in (r, *members_of(r))]
            assert len(parts) > 10 and not any(part.adapters for part in parts)
            await client.load_adapter("a", "/a")
            for name in NAMES:
                members = {"rule": "COMBINATION_RULE_MEAN", "members": [{"model": "a"}, {}]}
                for extra in ({"adapters": {"a": 0.5}}, {"combination": members}):
                    await http.completions.create(model=name, prompt="x", extra_body=extra)
                    parts = [engine.submitted[-1], *members_of(engine.submitted[-1])]
                    assert [ref.name for part in parts for ref in part.adapters] == ["a"]


async def test_nothing_else_gets_one_of_its_names() -> None:
    async with served(FakeEngine(names=NAMES)) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        for name in NAMES:
            with pytest.raises(errors.InvalidArgument, match="base model's") as caught:
                await client.load_adapter(name, "/a")
            assert caught.value.field == "name"
            arms = [{"name": "base", "model": name}, {"name": "tuned", "model": "a"}]
            with pytest.raises(errors.InvalidArgument, match="base model's") as caught:
                await client.put_route(name, arms)
            assert caught.value.field == "route.name"
            route = await client.put_route("r", arms)
            assert route.arms[0].model == ""


async def test_what_the_state_has_keeps_its_name(tmp_path: Path) -> None:
    store = await Store.open(parse(str(tmp_path / "s.db")))
    async with served(store=store) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        await client.put_route("r", [{"name": "base"}, {"name": "tuned", "model": "a"}])
        await check_names(store, ("fake-base", "b"))
        for name, kind in (("a", "adapter"), ("r", "route")):
            said = f"^the base is called '{name}', as is a registered {kind}: .*--served-model-name"
            with pytest.raises(NameTaken, match=said):
                await check_names(store, ("b", name))

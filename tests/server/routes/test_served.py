"""Routes over a real connection, with an engine whose tokens are known."""

from __future__ import annotations

from collections import Counter

import pytest
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.route_messages import again
from deltaserve.server.experiments.assignment import assign

ARMS = [{"name": "base"}, {"name": "tuned", "model": "a", "weight": 3}]


async def test_a_request_gets_an_arm() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        route = await client.put_route("r", ARMS)
        assert route.weights == {"base": 0.25, "tuned": 0.75} and route.state == "active"
        assert [a.digests for a in route.arms] == [(), ("digest-of-/a",)]
        users = [f"user-{i}" for i in range(60)]
        found = {}
        for user in users:
            served_by = (await client.generate("hi", "r", max_tokens=1, user=user)).served_by
            assert (served_by.route, served_by.assignment) == ("r", "sticky")
            assert [a.name for a in served_by.adapters] == ["a"] * (served_by.arm == "tuned")
            found[user] = served_by.arm
        assert found == {u: assign("r", {"base": 1, "tuned": 3}, u) for u in users}
        pieces = [p async for p in client.stream("hi", "r", max_tokens=2, user=users[0])]
        assert pieces[0].served_by is not None and pieces[0].served_by.arm == found[users[0]]
        anonymous = [await client.generate("hi", "r", max_tokens=1) for _ in range(30)]
        assert {a.served_by.assignment for a in anonymous} == {"random"}
        assert len(Counter(a.served_by.arm for a in anonymous)) == 2
        plain = (await client.generate("hi", "a", max_tokens=1)).served_by
        assert (plain.route, plain.arm, plain.assignment) == ("", "", "")


async def test_changes() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        first = await client.put_route("r", ARMS)
        arms, options = again(first)
        second = await client.put_route("r", arms, **options)
        assert second.etag != first.etag and second.start_time == first.start_time
        with pytest.raises(errors.Aborted, match="etag"):
            await client.put_route("r", arms, **options)
        with pytest.raises(errors.Aborted, match="does not exist"):
            await client.put_route("q", arms, **options)
        rolled = await client.roll_back_route("r", "it shouts")
        assert (rolled.state, rolled.reason) == ("rolled_back", "it shouts")
        assert rolled.weights == {"base": 1.0, "tuned": 0.0}
        said = (await client.generate("hi", "r", max_tokens=1, user="u")).served_by
        assert (said.arm, said.assignment) == ("base", "rolled_back")
        third = await client.put_route("r", ARMS)
        assert third.state == "active" and third.start_time > first.start_time
        assert [r.name for r in await client.list_routes()] == ["r"]
        await client.delete_route("r")
        for call in (client.get_route, client.delete_route, client.roll_back_route):
            with pytest.raises(errors.NotFound, match="'r'"):
                await call("r")

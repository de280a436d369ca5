"""Routes of tenants: whose they are, who sees them, and whose users they are of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from issue import issue
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.experiments.assignment import assign
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.service.identity import Identity

WORK = (Role.GENERATE, Role.ADAPTERS, Role.ROUTES, Role.FEEDBACK)


def arms(*models: str) -> list[dict[str, str]]:
    return [{"name": f"arm{i}", "model": model} for i, model in enumerate(models)]


async def test_tenants() -> None:
    book = Book()
    keys = {t: issue(book, *WORK, tenant=t)[1] for t in ("acme", "evil")}
    keys["ops"] = issue(book, *WORK, Role.ADMIN, tenant="ops")[1]
    async with served(identity=Identity(book)) as s:
        clients = {t: AsyncClient(s.address, token=key, timeout=10) for t, key in keys.items()}
        acme, evil, ops = clients.values()
        await acme.load_adapter("secret", "/s")
        await acme.load_adapter("lent", "/l", shared=True)
        await ops.load_adapter("open", "/o")
        for name in ("secret", "nobodys"):
            said = f"route.arms\\[1\\].model: no adapter named '{name}' is registered"
            with pytest.raises(errors.NotFound, match=f"^{said}$"):
                await evil.put_route("r", arms("", name))
        await acme.put_route("r", arms("", "secret"), layer={"name": "l", "start": 0, "end": 1})
        await ops.put_route("all", arms("", "open"))
        names = {t: [r.name for r in await c.list_routes()] for t, c in clients.items()}
        assert names == {"acme": ["all", "r"], "evil": ["all"], "ops": ["all", "r"]}
        for call in (evil.get_route, evil.delete_route, evil.roll_back_route):
            with pytest.raises(errors.NotFound, match="no route named 'r'"):
                await call("r")
        with pytest.raises(errors.NotFound, match="no adapter named 'r'"):
            await evil.generate("x", "r", max_tokens=1)
        with pytest.raises(errors.AlreadyExists, match="taken"):
            await evil.put_route("r", arms(""))
        await evil.put_route("own", arms("", "lent"), layer={"name": "l", "start": 0, "end": 1})
        for change in (lambda: evil.delete_route("all"), lambda: evil.roll_back_route("all")):
            with pytest.raises(errors.PermissionDenied, match="the operator's"):
                await change()
        with pytest.raises(errors.PermissionDenied, match="the operator's"):
            await evil.put_route("all", arms(""))
        with pytest.raises(errors.NotFound, match="no route named 'r'"):
            await evil.get_report("r")
        with pytest.raises(errors.PermissionDenied, match="the operator's"):
            await evil.get_report("all")
        answer = await acme.generate("x", "all", max_tokens=1, user="u")
        with pytest.raises(errors.NotFound, match="no route gave an answer"):
            await evil.record_feedback(answer.request_id, 0.0)
        with pytest.raises(errors.FailedPrecondition):
            await evil.record_feedback(route="all", user="u", reward=0.0)
        await acme.record_feedback(answer.request_id, 1.0)
        assert sum(arm.rewarded_users for arm in (await ops.get_report("all")).arms) == 1
        for tenant, client in (("acme", acme), ("evil", evil)):
            for user in map(str, range(12)):
                said = (await client.generate("x", "all", max_tokens=1, user=user)).served_by
                both = {"arm0": 1, "arm1": 1}
                assert said.arm == assign("all", both, f"{tenant}\0{user}")
        with pytest.raises(errors.Aborted, match="'open' is in arm 'arm1' of route 'all'"):
            await ops.unload_adapter("open")
        assert await acme.unload_adapter("lent"), "evil's route does not keep it from its owner"
        with pytest.raises(errors.FailedPrecondition, match=r"route 'own', arm 'arm1': .*'lent'"):
            for user in users():
                await evil.generate("x", "own", max_tokens=1, user=user)
        await ops.roll_back_route("r", "by ops")
        assert (await acme.get_route("r")).reason == "by ops"
        for client in clients.values():
            await client.close()


def users() -> Iterator[str]:
    return map(str, range(30))

"""Feedback and reports over a real connection."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from issue import issue
from served import served
from typer.testing import CliRunner

from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.cli import app
from deltaserve.clients.report_types import Erased
from deltaserve.server.identity.book import Book
from deltaserve.server.identity.caller import Role
from deltaserve.server.service.identity import Identity
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

ARMS = [{"name": "base"}, {"name": "tuned", "model": "a"}]


async def test_from_answers_to_a_report(tmp_path: Path) -> None:
    store = await Store.open(parse(str(tmp_path / "s.db")))
    async with served(store=store) as s, AsyncClient(s.address) as client:
        await client.load_adapter("a", "/a")
        await client.put_route(
            "r", ARMS, guardrails=[{"metric": "long", "tolerated": 0.5, "tokens": 2}]
        )
        empty = await client.get_report("r", points=3)
        assert [a.arm for a in empty.arms] == ["base", "tuned"] and not empty.history
        assert empty.warnings == ("nothing was recorded since counting began",)

        arms = {}
        for i in range(30):
            answer = await client.generate("hi", "r", max_tokens=2 + i % 2, user=f"u{i}")
            said = await client.record_feedback(
                answer.request_id, float(i % 3), labels={"edited": "yes"}
            )
            arms[i] = said.arm
            assert (said.route, said.arm) == ("r", answer.served_by.arm)
        nobody = await client.generate("hi", "r", max_tokens=1)
        assert (await client.record_feedback(nobody.request_id, -1.0)).route == "r"
        assert (await client.record_feedback(route="r", user="u7", reward=1.0)).arm == arms[7]

        report = await client.get_report("r", points=5, level=0.1, tuned_for=100)
        for arm in report.arms:
            mine = [i for i in arms if arms[i] == arm.arm]
            assert (arm.users, arm.rewarded_users) == (len(mine), len(mine))
            assert arm.requests - arm.anonymous_requests == len(mine)
            assert arm.reward is not None and arm.shares["negative_feedback"].value == 0
            assert arm.reward.value == pytest.approx(sum(i % 3 for i in mine) / len(mine))
            assert arm.reward.low == -math.inf
            longs = sum(i % 2 for i in mine)
            assert arm.shares["long"].value == pytest.approx(longs / len(mine))
            assert 0 < arm.seconds.p50 <= arm.seconds.p99 and "slow" not in arm.shares
        assert sum(a.anonymous_requests for a in report.arms) == 1
        assert report.arms[1].difference is not None and report.arms[0].difference is None
        assert report.sample_ratio.expected == {"base": 15.0, "tuned": 15.0}
        assert report.history[-1].rewarded_users == report.arms[1].rewarded_users
        assert any("1 of 31 requests" in w for w in report.warnings)

        run = CliRunner().invoke
        command = ["routes", "report", "r", "--address", s.address]
        shown = await asyncio.to_thread(run, app, command, env={"COLUMNS": "200"})
        assert shown.exit_code == 0 and "! arm 'base' has" in shown.output
        assert "not known yet" in shown.output and "negative feedback" in shown.output
        printed = await asyncio.to_thread(run, app, [*command, "--json", "--points", "5"])
        plain = json.loads(printed.output)
        assert plain["arms"][0]["reward"]["low"] is None
        assert plain["arms"][0]["users"] == report.arms[0].users
        command = ["routes", "feedback", nobody.request_id, "--reward", "1", "--label", "a=b"]
        said_so = await asyncio.to_thread(run, app, [*command, "--address", s.address])
        assert said_so.output == f"counts for arm {nobody.served_by.arm} of route r\n"

        for bad, match in (
            ({"request_id": nobody.request_id, "reward": math.inf}, "reward: inf"),
            ({"request_id": nobody.request_id, "reward": 2e6}, "reward: 2000000"),
            ({"request_id": nobody.request_id}, "says nothing"),
            ({"request_id": "x", "user": "u", "reward": 1.0}, "request_id alone"),
            ({"user": "u", "reward": 1.0}, "route: ''"),
            ({"route": "r", "reward": 1.0}, "user: ''"),
            ({"request_id": "x", "labels": {str(i): "" for i in range(17)}}, "at most 16"),
            ({"request_id": "x", "labels": {"a": "b" * 257}}, "labels: text of 257"),
            ({"request_id": "x" * 257, "reward": 1.0}, "request_id: text of 257"),
        ):
            with pytest.raises(errors.InvalidArgument, match=match):
                await client.record_feedback(**bad)  # type: ignore[arg-type]
        for options, match in (
            ({"level": 0.6}, "level: 0.6"),
            ({"level": math.nan}, "level: nan"),
            ({"points": 201}, "points: 201"),
            ({"tuned_for": 0}, "tuned_for: 0"),
        ):
            with pytest.raises(errors.InvalidArgument, match=match):
                await client.get_report("r", **options)  # type: ignore[arg-type]
        with pytest.raises(errors.NotFound, match="'none': no route gave"):
            await client.record_feedback("none", 1.0)
        with pytest.raises(errors.NotFound):
            await client.get_report("none")
        with pytest.raises(errors.FailedPrecondition, match="'stranger'"):
            await client.record_feedback(route="r", user="stranger", reward=1.0)


async def test_a_user_is_erased(tmp_path: Path) -> None:
    """By who may, for good, and nothing says who it was."""
    store, book = await Store.open(parse(str(tmp_path / "s.db"))), Book()
    every = [role for role in Role if role is not Role.ADMIN]
    acme, admin = issue(book, *every, tenant="acme")[1], issue(book, Role.ADMIN, tenant="ops")[1]
    identity = Identity(book)
    users = {"the one": 1.0, "u1": 0.0, "u2": -1.0}

    async def counted(client: AsyncClient) -> tuple[int, float, int]:
        arms = (await client.get_report("r")).arms
        rewarded = [(a.rewarded_users, a.reward.value if a.reward else 0.0) for a in arms]
        return sum(a.users for a in arms), sum(n * m for n, m in rewarded), arms[0].requests

    async with served(identity=identity, store=store) as s:
        async with AsyncClient(s.address, token=acme) as client:
            await client.put_route("r", [{"name": "base"}, {"name": "other"}])
            for user, reward in users.items():
                answer = await client.generate("hi", "r", max_tokens=1, user=user)
                await client.record_feedback(answer.request_id, reward)
            before = await counted(client)
            assert before[:2] == (3, pytest.approx(0.0))
            with pytest.raises(errors.PermissionDenied):
                await client.erase_user("the one")
        async with AsyncClient(s.address, token=admin) as operator:
            assert await operator.erase_user("the one") == Erased(0, 0, 0), "of its own tenant"
            assert await operator.erase_user("the one", "acme") == Erased(1, 1, 1)
            for arguments, field in ((("",), "user"), (("u", "a\nb"), "tenant")):
                with pytest.raises(errors.InvalidArgument) as caught:
                    await operator.erase_user(*arguments)
                assert caught.value.field == field
        async with AsyncClient(s.address, token=acme) as client:
            after = await counted(client)
            assert after == (2, pytest.approx(-1.0), before[2]), "the arm's requests stay"
    audit = [e for e in await store.audit() if e.verb == "EraseUser"]
    assert [(e.name, e.outcome) for e in audit] == [("ops", "OK"), ("acme", "OK")]
    assert all(e.who.startswith("ops/") for e in audit) and "the one" not in repr(audit)
    again = await Store.open(parse(str(tmp_path / "s.db")))
    async with (
        served(identity=identity, store=again) as s,
        AsyncClient(s.address, token=acme) as client,
    ):
        assert await counted(client) == after

"""Feedback and reports over a real connection."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from served import served
from typer.testing import CliRunner

from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.cli import app
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

"""Every request of a route becomes one trial that says what came of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from served import served

from deltaserve.clients import AsyncClient, errors
from deltaserve.server.errors import EngineFailure, Overloaded, QuotaExceeded
from deltaserve.server.ledger.trial import Ended, Trial

RAILS: Any = [
    {"metric": "long", "tolerated": 0.5, "tokens": 3},
    {"metric": "slow", "tolerated": 0.5, "seconds": 1e-9},
    {"metric": "slow_first_token", "tolerated": 0.5, "seconds": 1000},
    {"metric": "refusal", "tolerated": 0.5, "refusals": ["A"]},
]
SPACE, LETTER = [20, 12], [60, 5]
"""Prompts that the fake model continues by a space, and by A."""


async def test_trials() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        trials: list[Trial] = []
        s.server.services.ledger.record = trials.append  # type: ignore[method-assign]

        async def last() -> Trial:
            async with asyncio.timeout(10):
                while not trials:
                    await asyncio.sleep(0.005)
            assert len(trials) == 1
            return trials.pop()

        await client.load_adapter("a", "/a")
        put = await client.put_route("r", [{"name": "x", "model": "a"}], guardrails=RAILS)

        answer = await client.generate(LETTER, "r", max_tokens=2, user="u", request_id="mine")
        trial = await last()
        assert answer.text.startswith("A")
        assert (trial.request_id, trial.route, trial.arm, trial.user) == ("mine", "r", "x", "u")
        assert trial.epoch == pytest.approx(put.start_time * 1000, abs=1)
        assert (trial.ended, trial.prompt_tokens, trial.completion_tokens) == ("answered", 2, 2)
        assert trial.weights == {"x": 1.0} and not trial.shadow
        assert trial.refusal and trial.slow and not trial.slow_first_token
        assert not trial.empty and not trial.long
        assert 0 < trial.first_token <= trial.seconds

        answer = await client.generate(SPACE, "r", max_tokens=1, echo=True)
        trial = await last()
        assert answer.text.endswith(" ") and answer.request_id == trial.request_id
        assert trial.empty and not trial.refusal, "the echo of the prompt is no answer"
        assert trial.user == "" and trial.weights == {}

        await client.generate(LETTER, "r", max_tokens=3, n=2, user="u")
        trial = await last()
        assert not trial.long, "each choice is an answer"
        assert (trial.longest, trial.completion_tokens) == (3, 6)
        async for _ in client.stream(SPACE, "r", max_tokens=4, user="u"):
            pass
        trial = await last()
        assert trial.long and not trial.empty and trial.completion_tokens == 4

        await client.score([5, 6], [[7], [8, 9]], "r", user="u")
        trial = await last()
        assert (trial.ended, trial.empty, trial.prompt_tokens) == (Ended.ANSWERED, False, 7)

        async for _ in client.stream([5], "r", max_tokens=4000, user="u"):
            break
        trial = await last()
        assert (trial.ended, trial.slow) == (Ended.CANCELLED, False)

        failures: list[tuple[Exception, Ended, Any]] = [
            (EngineFailure("broken"), Ended.ERROR, errors.Internal),
            (Overloaded("full"), Ended.REFUSED, errors.ResourceExhausted),
            (QuotaExceeded("spent"), Ended.REFUSED, errors.ResourceExhausted),
        ]
        for failure, ended, kind in failures:
            s.engine.fail = failure
            with pytest.raises(kind):
                await client.generate([5], "r", user="u")
            assert (await last()).ended == ended
        s.engine.fail = None
        with pytest.raises(errors.InvalidArgument, match="temperature"):
            await client.generate([5], "r", temperature=-1, user="u")
        assert (await last()).ended is Ended.REFUSED
        s.engine.break_with = EngineFailure("late")
        with pytest.raises(errors.Internal):
            await client.generate([5], "r", max_tokens=3, user="u")
        trial = await last()
        assert (trial.ended, trial.empty, trial.slow) == (Ended.ERROR, False, False)
        s.engine.break_with = None

        await client.generate([5], "a", max_tokens=1)
        await asyncio.sleep(0.05)
        assert not trials, "no route, no trial"


async def test_an_arm_overrides_field_by_field() -> None:
    async with served() as s, AsyncClient(s.address) as client:
        arm: Any = {
            "name": "x",
            "sampling": {"temperature": 0, "logit_bias": {"7": 2.0}, "bad_words": ["no"]},
            "stop": {"strings": ["END"], "ignore_eos": True},
        }
        await client.put_route("r", [arm])
        await client.generate(
            [5],
            "r",
            max_tokens=2,
            temperature=0.5,
            top_k=9,
            seed=3,
            logit_bias={8: 1.0},
            stop=["a", "b"],
            bad_words=["x"],
        )
        p = s.engine.submitted[-1].sampling
        assert (p.temperature, p.top_k, p.seed, p.max_tokens) == (0.0, 9, 3, 2)
        assert (p.logit_bias, p.stop, p.ignore_eos) == (((7, 2.0),), ("END",), True)
        direct = await client.generate([5], max_tokens=2, bad_words=["no"])
        assert p.bad_tokens == s.engine.submitted[-1].sampling.bad_tokens and direct.text
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("route.arms[0].sampling.temperature", {"sampling": {"temperature": -1}}),
            ("route.arms[0].stop.strings", {"stop": {"strings": ["x"] * 65}}),
            ("route.arms[0].sampling.bad_words", {"sampling": {"bad_words": [" "]}}),
        ]
        for field, given in wrong:
            with pytest.raises(errors.InvalidArgument) as raised:
                await client.put_route("r", [{"name": "x", **given}])  # type: ignore[typeddict-item]
            assert raised.value.field == field and field in str(raised.value)

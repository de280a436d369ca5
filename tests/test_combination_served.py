"""Combinations over the wire: what clients see, what is refused, and who else notices."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from rig import load_base
from served import served
from serving import Serving, serving, undisturbed, until
from typer.testing import CliRunner
from variants import VARIANTS, linears, make_base, open_base

from deltaserve.adapters.delta_file import write_delta
from deltaserve.clients import AsyncClient, errors
from deltaserve.clients.cli import app
from deltaserve.clients.requests import Combination
from deltaserve.kernels.primitives import LowRank
from deltaserve.server.config import ADAPTER_NAME
from deltaserve.server.engine.core import FinishReason, Timings, Usage
from deltaserve.server.metrics import Metrics
from deltaserve.v1 import generation_pb2 as pb
from deltaserve.v1 import generation_pb2_grpc

GOOD = ("lora", "dora", "prompt-tuning", "prefix-tuning")
NAN = float("nan")
MEAN: Combination = {"members": ["lora", "dora"], "rule": "mean"}


@dataclass
class World:
    base: Path
    roots: Path
    serving: Serving
    expected: dict[str, tuple[list[int], list[int]]]

    @property
    def client(self) -> Any:
        return self.serving.client

    def undisturbed(self) -> Any:
        return undisturbed(self.serving, self.expected)


def prompt(seed: int, length: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("combination-served") / "base"
    make_base(base, "llama")
    roots = base.parent / "adapters"
    roots.mkdir()
    for seed, name in enumerate(GOOD):
        generator = torch.Generator().manual_seed(seed)
        VARIANTS[name].make(base, roots / name, generator)
    with serving(load_base(base), [roots], max_sequences=6, kv_cache_bytes=1 << 20) as made:
        for name in GOOD:
            made.client.load_adapter(name, str(roots / name))
        expected = {}
        for seed, name in enumerate(("", "lora")):
            ids = prompt(seed)
            answer = made.client.generate(ids, name, max_tokens=40, ignore_eos=True)
            expected[name] = (ids, answer.token_ids)
        yield World(base, roots, made, expected)


def test_what_a_client_sees(world: World) -> None:
    asked: Combination = {
        "members": [
            "lora",
            {"adapters": {"dora": 0.5}, "weight": 0.25, "prompt": "another prompt"},
            {"weight": -0.5, "prompt": [1, 2, 3]},
        ],
        "rule": "product",
        "plausibility": 0.1,
        "disagreement": True,
    }
    given: dict[str, Any] = {"combination": asked, "max_tokens": 9, "ignore_eos": True}
    answer = world.client.generate("a prompt", logprobs=40, **given)
    members = answer.served_by.members
    assert [[(a.name, a.strength) for a in m.adapters] for m in members] == [
        [("lora", 1.0)],
        [("dora", 0.5)],
        [],
    ]
    assert [m.weight for m in members] == [1.0, 0.25, -0.5] and not answer.served_by.adapters
    assert members[0].adapters[0].digest == world.client.get_adapter("lora").digest
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (8 + 14 + 3, 9)
    assert len(answer.disagreements) == len(answer.token_ids) == 9
    for told, top in zip(answer.disagreements, answer.top_logprobs, strict=True):
        assert len(told.logprobs) == 3 and told.divergence > 0
        assert all(value > float("-inf") for _, value in top)
    assert any(0 < len(top) < 40 for top in answer.top_logprobs)  # others are not plausible

    pieces = list(world.client.stream("a prompt", **given))
    assert [t for p in pieces for t in p.token_ids] == answer.token_ids
    again = [d for p in pieces for d in p.disagreements]
    for ours, theirs in zip(again, answer.disagreements, strict=True):
        assert ours.divergence == pytest.approx(theirs.divergence, abs=1e-4)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert pieces[0].served_by == answer.served_by
    assert "".join(p.text for p in pieces) == answer.text

    async def from_another_loop() -> list[int]:
        async with AsyncClient(world.serving.address) as client:
            return (await client.generate("a prompt", **given)).token_ids

    assert asyncio.run(from_another_loop()) == answer.token_ids
    plain = world.client.generate("a prompt", "lora", max_tokens=2)
    assert not plain.disagreements and not plain.served_by.members


def test_the_command(world: World) -> None:
    asked = ["generate", "x", "--max-tokens", "7", "--ignore-eos", "--json"]
    asked += ["--address", world.serving.address]
    run = CliRunner().invoke
    members = ["--member", "lora=1.5", "--member", "=-0.5"]
    done = run(app, [*asked, *members, "--rule", "product", "--plausibility", "0.1"])
    combination: Combination = {
        "members": [{"model": "lora", "weight": 1.5}, {"weight": -0.5}],
        "rule": "product",
        "plausibility": 0.1,
    }
    same = world.client.generate("x", combination=combination, max_tokens=7, ignore_eos=True)
    assert json.loads(done.stdout)["token_ids"] == same.token_ids
    assert run(app, [*asked, "--member", "lora=much"]).exit_code == 2
    assert run(app, [*asked, *members, "--rule", "median"]).exit_code == 2
    assert run(app, [*asked, *members]).exit_code == 1  # a mean has no negative weights


def test_choices_and_prompts_of_every_member(world: World) -> None:
    asked: Combination = {
        "members": [{"model": "lora", "prompt": "one"}, {"prompt": "the other"}],
        "rule": "mean",
    }
    given: dict[str, Any] = {"combination": asked, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    answer = world.client.generate(None, n=3, **given)
    assert len({tuple(c.token_ids) for c in answer.choices}) == 3
    for i, choice in enumerate(answer.choices):
        alone = world.client.generate(None, **{**given, "seed": 5 + i})
        assert alone.token_ids == choice.token_ids


def test_scores_are_of_what_is_generated(world: World) -> None:
    asked: Combination = {**MEAN, "disagreement": True}
    ids = prompt(4)
    answer = world.client.generate(ids, combination=asked, max_tokens=6, logprobs=True)
    found = world.client.score(ids, [answer.token_ids, [1, 2]], combination=asked)
    assert found[0].greedy and not found[1].greedy
    assert found[0].logprobs == pytest.approx(answer.logprobs, abs=1e-4)
    told = [d.divergence for d in found[0].disagreements]
    assert told == pytest.approx([d.divergence for d in answer.disagreements], abs=1e-4)
    text = world.client.score(
        "a", [" b", " c"], combination={**MEAN, "members": ["lora", {"prompt": "other"}]}
    )
    assert [len(s.token_ids) for s in text] == [2, 2]


def test_what_narrows_the_choice_narrows_the_combined_one(world: World) -> None:
    """A constraint and bad words are asked once, whatever the members would like."""
    given: dict[str, Any] = {"combination": MEAN, "max_tokens": 12, "temperature": 1.0, "seed": 3}
    free = world.client.generate("x", **given)
    bound = world.client.generate("x", regex="[ab]{5}c", **given)
    assert re.fullmatch("[ab]{5}c", bound.text) and not re.fullmatch("[ab]{5}c", free.text)
    without = world.client.generate("x", regex="[ab]{5}c", bad_words=["a"], **given)
    assert without.text == "bbbbbc"
    sure: Combination = {**MEAN, "plausibility": 1.0}
    end = world.client.generate("x", regex="[ab]{5}c", **{**given, "combination": sure})
    assert end.finish_reason == "dead_end"  # the one plausible token is neither a nor b


REFUSED: dict[str, tuple[Any, str, list[str]]] = {
    "nobody": ({**MEAN, "members": []}, "combination.members", ["0 members", "1 to 8"]),
    "too many": ({**MEAN, "members": [""] * 9}, "combination.members", ["9 members", "1 to 8"]),
    "more than run": ({**MEAN, "members": [""] * 7}, "combination.members", ["7 members", "6"]),
    "a negative share": (
        {**MEAN, "members": [{"weight": 1.0}, {"weight": -0.5}]},
        "combination.members[1].weight",
        ["-0.5", "from 0"],
    ),
    "NaN": ({**MEAN, "members": [{"weight": NAN}]}, "combination.members[0].weight", ["nan"]),
    "a huge weight": (
        {"members": [{"weight": 1e6}], "rule": "product"},
        "combination.members[0].weight",
        ["1000000", "1000"],
    ),
    "no weight": (
        {"members": [{"weight": 0.0}], "rule": "product"},
        "combination.members.weight",
        ["0 for every member"],
    ),
    "plausibility": ({**MEAN, "plausibility": 1.5}, "combination.plausibility", ["1.5", "to 1"]),
    "a strength": (
        {**MEAN, "members": ["lora", {"adapters": {"dora": 1e6}}]},
        "combination.members[1].adapters.strength",
        ["1000"],
    ),
    "two targets": (
        {**MEAN, "members": [{"model": "lora", "adapters": {"dora": 1.0}}]},
        "combination.members[0].adapters",
        ["lora", "empty"],
    ),
    "an empty prompt": (
        {**MEAN, "members": ["", {"prompt": ""}]},
        "combination.members[1].text",
        ["''"],
    ),
    "a token id too large": (
        {**MEAN, "members": ["", {"prompt": [1000]}]},
        "combination.members[1].prompt",
        ["1000", "259"],
    ),
    "a prompt too long": (
        {**MEAN, "members": ["", {"prompt": [1] * 512}]},
        "combination.members[1].prompt",
        ["512", "511"],
    ),
    "two prefixes in one member": (
        {**MEAN, "members": ["lora", {"adapters": ["prompt-tuning", "prefix-tuning"]}]},
        "combination.members[1].adapters",
        ["virtual tokens"],
    ),
    "a prompt that a prefix makes too long": (
        {**MEAN, "members": ["", {"model": "prefix-tuning", "prompt": [1] * 505}]},
        "combination.members[1].prompt",
        ["11 virtual"],
    ),
    "more than the cache holds": (
        {**MEAN, "members": [{"prompt": prompt(i, 480)} for i in range(5)] + [""]},
        "combination.members",
        ["6 members", "KV cache"],
    ),
    "a prompt for nobody": ({**MEAN, "members": [{"prompt": "a"}]}, "prompt", ["nobody"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_combination(world: World, what: str) -> None:
    combination, field, words = REFUSED[what]
    given = {"prompt": "x", "combination": combination, "max_tokens": 20}
    with world.undisturbed():
        for call in (world.client.generate, lambda **a: list(world.client.stream(**a))):
            with pytest.raises(errors.InvalidArgument) as caught:
                call(**given)
            assert caught.value.field == field, caught.value.message
            assert all(word in caught.value.message for word in words), caught.value.message


def test_a_target_beside_a_combination(world: World) -> None:
    for target in ({"model": "lora"}, {"adapters": ["lora"]}):
        with pytest.raises(errors.InvalidArgument, match="members have their own") as caught:
            world.client.generate("x", combination=MEAN, **target)
        assert caught.value.field == next(iter(target))


def test_an_unknown_rule(world: World) -> None:
    with grpc.insecure_channel(world.serving.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for rule in (0, 17):
            combination = pb.Combination(members=[pb.CombinationMember()], rule=rule)  # type: ignore[arg-type]
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(pb.GenerateRequest(text="x", combination=combination))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"combination.rule: {rule}" in caught.value.details()


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": ["lora"], "rule": "median"},
        {"members": ["lora"]},
        {"members": "lora", "rule": "mean"},
        {"members": ["lora"], "rule": "mean", "alpha": 1},
        {"members": [{"name": "lora"}], "rule": "mean"},
    ],
)
def test_what_is_no_combination_at_all(world: World, wrong: Any) -> None:
    with pytest.raises(TypeError, match="combination"):
        world.client.generate("x", combination=wrong)


def test_an_empty_continuation(world: World) -> None:
    combination: Combination = {**MEAN, "members": ["lora", {"prompt": [1]}]}
    assert world.client.score("ab", ["c"], combination=combination)
    with pytest.raises(errors.InvalidArgument, match="an empty one") as caught:
        world.client.score("ab", [[]], combination=combination)
    assert caught.value.field == "continuations"


def test_a_continuation_must_be_the_same_tokens_for_all() -> None:
    """Of the fake tokenizer, to which "ab" is one token."""

    async def ask(continuation: str) -> int:
        combination: Combination = {"members": ["", {"prompt": "a"}], "rule": "mean"}
        async with served() as server, AsyncClient(server.address) as client:
            found = await client.score("-", [continuation], combination=combination)
            return len(found[0].token_ids)

    assert asyncio.run(ask("cb")) == 2
    with pytest.raises(errors.InvalidArgument, match=r"\[0\].*members\[1\].*token ids") as caught:
        asyncio.run(ask("bc"))
    assert caught.value.field == "continuations"


def test_an_unknown_member(world: World) -> None:
    with world.undisturbed():
        for _ in range(3):
            with pytest.raises(errors.NotFound, match=r"members\[1\].*'nobody'"):
                world.client.generate("x", combination={**MEAN, "members": ["lora", "nobody"]})
        until(lambda: world.client.get_adapter("lora").in_flight <= 1, "nothing is held")


def test_a_member_that_overflows(world: World) -> None:
    """Whatever its weight: the request ends, its blocks are clean, nobody notices."""
    modules = {}
    for name, linear in linears(open_base(world.base)).items():
        out, in_ = linear.weight.shape
        modules[name] = (LowRank(torch.full((2, in_), 1e38), torch.full((out, 2), 1e38)),)
    write_delta(world.roots / "huge", modules, kind="test")
    world.client.load_adapter("huge", str(world.roots / "huge"))
    with world.undisturbed():
        for members in (["lora", "huge"], ["huge", ""], ["", {"model": "huge", "weight": 0.0}]):
            with pytest.raises(errors.FailedPrecondition, match="not finite") as caught:
                world.client.generate(
                    prompt(8, 40), combination={"members": members, "rule": "mean"}
                )
            assert "huge" in caught.value.message
        kv = world.serving.engine._runner.kv
        assert all(
            bool(cells.isfinite().all()) for cells in (*kv.keys.values(), *kv.values.values())
        )
    assert world.client.unload_adapter("huge") > 0


def test_cancelled_and_out_of_time(world: World) -> None:
    """Whenever it happens, everything is given back."""
    endless: dict[str, Any] = {"combination": MEAN, "max_tokens": 400, "ignore_eos": True}
    with world.undisturbed():
        for seconds in (0.001, 0.03, 0.2):
            with pytest.raises(errors.DeadlineExceeded):
                world.client.generate(prompt(6, 50), timeout=seconds, **endless)
        for pieces in range(1, 4):
            stream = world.client.stream(prompt(6, 50), **endless)
            assert len(list(itertools.islice(stream, pieces))) == pieces
            stream.close()


def test_unload_waits_for_members(world: World) -> None:
    client = world.client
    generator = torch.Generator().manual_seed(9)
    VARIANTS["lora-r11"].make(world.base, world.roots / "leaving", generator)
    size = client.load_adapter("leaving", str(world.roots / "leaving")).resident_bytes
    combination = {"members": ["lora", "leaving"], "rule": "mean"}
    stream = client.stream(prompt(7), combination=combination, max_tokens=450, ignore_eos=True)
    got = list(next(stream).token_ids)
    freed: list[int] = []
    thread = threading.Thread(target=lambda: freed.append(client.unload_adapter("leaving")))
    thread.start()
    until(lambda: client.get_adapter("leaving").state == "unloading", "unloading")
    time.sleep(0.05)
    assert not freed
    got += [t for piece in stream for t in piece.token_ids]
    thread.join(10)
    assert len(got) == 450 and freed == [size]


def test_the_label_of_metrics() -> None:
    """However many combinations of adapters there are, one series."""
    assert not ADAPTER_NAME.fullmatch("a|b")
    metrics = Metrics()
    metrics.on_adapter_load("a", 1.0)
    for label in ("a|b", "|", "a+c|"):
        metrics.on_finished(label, FinishReason.STOP, Usage(5, 3, 0), Timings(0, 0, 0, 0))
    value = metrics.registry.get_sample_value
    assert value("deltaserve_requests_total", {"adapter": "_combined", "reason": "stop"}) == 3


def test_live_weights(world: World) -> None:
    """Other weights hold from the token on that the stream names, and are those of a request that
    had them from the start."""
    ids = prompt(11)
    members = ["lora", "dora", ""]
    combination: Combination = {"members": members, "rule": "product", "live": True}
    given: dict[str, Any] = {"max_tokens": 90, "ignore_eos": True, "request_id": "dial"}
    weights = {0: (1.0, 1.0, 1.0)}
    got: list[int] = []
    wanted = [(2.0, 0.0, -1.0), (0.5, 0.25, 0.25)]
    with world.undisturbed():
        for piece in world.client.stream(ids, combination=combination, **given):
            for change in piece.weight_changes:
                weights[len(got) + change.token] = change.weights
            got += piece.token_ids
            if wanted and len(got) > 30 // len(wanted):
                world.client.set_weights("dial", wanted.pop(0))
    assert list(weights.values()) == [(1.0, 1.0, 1.0), (2.0, 0.0, -1.0), (0.5, 0.25, 0.25)]
    ends = [*list(weights)[1:], len(got)]
    for (start, used), end in zip(weights.items(), ends, strict=True):
        weighted = [{"model": m, "weight": w} for m, w in zip(members, used, strict=True)]
        fixed: Combination = {"members": weighted, "rule": "product"}  # type: ignore[typeddict-item]
        scores = world.client.score([*ids, *got[:start]], [got[start:end]], combination=fixed)
        assert scores[0].greedy, (start, used)
    first = {"members": members, "rule": "product"}
    assert not world.client.score(ids, [got], combination=first)[0].greedy


def in_flight(client: Any) -> int:
    info = client.server_info()
    return int(info.running_requests + info.waiting_requests)


def test_weights_that_cannot_be_set(world: World) -> None:
    client = world.client
    given: dict[str, Any] = {"max_tokens": 450, "ignore_eos": True}
    fixed = client.stream(prompt(1), combination=MEAN, request_id="fixed", **given)
    live: Combination = {**MEAN, "live": True}
    streams = [
        client.stream(prompt(i), combination=live, request_id=name, **given)
        for i, name in enumerate(["live", "twice", "twice"])
    ]
    for stream in (fixed, *streams[:1]):
        next(stream)
    for name in ("", "nobody", "fixed"):
        with pytest.raises(errors.NotFound, match="no combination that runs") as caught:
            client.set_weights(name, [1.0, 1.0])
        assert (caught.value.field, caught.value.reason) == ("request_id", "REQUEST_UNKNOWN")
    for weights, field in (
        ([1.0], "weights"),
        ([1.0, -1.0], "weights[1]"),
        ([NAN, 1.0], "weights[0]"),
        ([0.0, 0.0], "weights"),
    ):
        with pytest.raises(errors.InvalidArgument) as refused:
            client.set_weights("live", weights)
        assert refused.value.field == field, refused.value.message
    until(lambda: in_flight(client) == 4, "both are called so")
    with pytest.raises(errors.InvalidArgument, match="several requests"):
        client.set_weights("twice", [1.0, 2.0])
    with pytest.raises(errors.InvalidArgument, match="nothing is generated"):
        client.score("x", ["y"], combination=live)
    for stream in (fixed, *streams):
        stream.close()

"""Variant trees, patches under every request, and adapters on some of their modules, in an engine.

Compared, teacher-forced, with the float32 model that dense float64 arithmetic makes: greedy tokens
equal, log-probabilities within 1e-3, with base rows and other adapters between.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from rig import load_base, request, running
from serving import until
from test_equivalence import check
from variants import VARIANTS, interpolated, logits_of, make_base, merge, open_base

from deltaserve.adapters.options import LoadOptions
from deltaserve.clients import Client, errors
from deltaserve.server.engine.collector import Answer, generate
from deltaserve.server.engine.core import AdapterRef, AdapterState, Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.errors import (
    AdapterBusy,
    AdapterConflict,
    AdapterUnknown,
    InvalidRequest,
)

Fresh: TypeAlias = Callable[..., AbstractContextManager[Engine]]
KINDS = ("lora", "dora", "ia3", "bitdelta", "half-fine-tune", "shira", "sparse")


class Files:
    """A base, one adapter of each kind, and what the base becomes with it."""

    def __init__(self, root: Path) -> None:
        self.base, self.roots = root / "base", root / "adapters"
        make_base(self.base, "llama")
        self.plain = open_base(self.base)
        self.tuned: dict[str, Any] = {}
        self.roots.mkdir()
        for i, name in enumerate((*KINDS, "prompt-tuning")):
            generator = torch.Generator().manual_seed(i)
            VARIANTS[name].make(self.base, self.roots / name, generator)
            if name in KINDS:
                self.tuned[name] = merge(VARIANTS[name].reference(self.plain, self.roots / name))

    def uri(self, name: str) -> str:
        return str(self.roots / name)

    def child(self, kind: str, parent: str) -> tuple[str, Any]:
        """(uri of an adapter made on top of the parent's model, the model of both)."""
        merged = self.roots / f"{parent}-merged"
        if not merged.exists():
            self.tuned[parent].save_pretrained(merged)
        folder = self.roots / f"{kind}-on-{parent}"
        VARIANTS[kind].make(merged, folder, torch.Generator().manual_seed(99))
        model = merge(VARIANTS[kind].reference(self.tuned[parent], folder))
        self.tuned[folder.name] = model
        return str(folder), model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("composition"))


@pytest.fixture
def fresh(files: Files) -> Fresh:
    """An engine of the test's own."""
    return lambda **config: running(load_base(files.base), [files.roots], **config)


@pytest.fixture
def engine(fresh: Fresh) -> Iterator[Engine]:
    with fresh() as made:
        yield made


def prompt(seed: int, length: int = 23) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def ask(ids: Sequence[int], *refs: AdapterRef) -> Request:
    made = request(ids)
    return Request(made.request_id, made.prompt_ids, made.sampling, refs)


def answers(engine: Engine, *asked: Request) -> list[Answer]:
    return generate(engine, list(asked), timeout=120)


def refusal(engine: Engine, asked: Request) -> str:
    """Of a request that is refused once its adapters are in memory."""
    with pytest.raises(InvalidRequest) as error:
        found = answers(engine, asked)[0]
        assert found.last.error is not None
        raise found.last.error
    return str(error.value)


# Variant trees:


def test_a_tree_of_variants(files: Files, engine: Engine) -> None:
    cache = engine.adapters
    cache.load("domain", files.uri("lora")).result(60)
    models, prompts = {"domain": files.tuned["lora"]}, {}
    for kind in ("dora", "ia3", "bitdelta", "sparse", "half-fine-tune"):
        uri, models[kind] = files.child(kind, "lora")
        info = cache.load(kind, uri, options=LoadOptions(parent="domain")).result(60)
        assert info.parent == "domain" and info.digest != cache.get("domain").digest
    uri, models["leaf"] = files.child("shira", "ia3-on-lora")
    cache.load("leaf", uri, options=LoadOptions(parent=f"ia3@{cache.get('ia3').digest[:9]}"))
    names = [n for name in models for n in ("", name)]
    prompts = [prompt(i) for i in range(len(names))]
    asked = [request(p, n) for p, n in zip(prompts, names, strict=True)]
    for ids, name, answer in zip(prompts, names, answers(engine, *asked), strict=True):
        check(answer, ids, models.get(name, files.plain), name or "base")


def test_a_parent_need_not_be_in_memory(files: Files, fresh: Fresh) -> None:
    uri, tuned = files.child("dora", "lora")
    with fresh() as roomy:
        roomy.adapters.load("lora", files.uri("lora")).result(60)
        size = max(
            roomy.adapters.load("child", uri, options=LoadOptions(parent="lora"))
            .result(60)
            .resident_bytes,
            roomy.adapters.get("lora").resident_bytes,
        )
    with fresh(adapter_bytes=size) as engine:
        engine.adapters.load("lora", files.uri("lora")).result(60)
        engine.adapters.load("child", uri, options=LoadOptions(parent="lora")).result(60)
        assert engine.adapters.get("lora").state is AdapterState.REGISTERED
        for name, expected in (("child", tuned), ("lora", files.tuned["lora"]), ("child", tuned)):
            check(answers(engine, request(prompt(1), name))[0], prompt(1), expected, name)
        assert engine.adapters.get("child").loads == 2


def test_what_a_parent_may_be(files: Files, engine: Engine) -> None:
    cache = engine.adapters
    uri, _ = files.child("ia3", "lora")
    with pytest.raises(AdapterUnknown, match="'nobody'") as unknown:
        cache.load("child", uri, options=LoadOptions(parent="nobody"))
    assert unknown.value.field == "options.parent"
    cache.load("lora", files.uri("lora")).result(60)
    with pytest.raises(AdapterUnknown, match="has digest"):
        cache.load("child", uri, options=LoadOptions(parent="lora@0123"))
    cache.load("child", uri, options=LoadOptions(parent="lora")).result(60)
    with pytest.raises(AdapterBusy, match="is the parent of child"):
        cache.unload("lora")
    with pytest.raises(AdapterConflict):  # the same files without the parent are other content
        cache.load("child", uri).result(60)
    at = "child"
    for i in range(5):
        cache.load(f"d{i}", files.uri("lora"), options=LoadOptions(parent=at)).result(60)
        at = f"d{i}"
    cache.load("d5", files.uri("lora"), options=LoadOptions(parent=at)).result(60)
    with pytest.raises(InvalidRequest, match="line of parents"):
        cache.load("d6", files.uri("lora"), options=LoadOptions(parent="d5"))
    for name in ("d5", *(f"d{i}" for i in reversed(range(5))), "child", "lora"):
        cache.unload(name).result(60)
    assert engine.adapters.used_bytes == 0


# Patches:


@pytest.fixture(scope="module")
def patched(files: Files) -> Iterator[Engine]:
    with running(load_base(files.base), [files.roots]) as made:
        for name in (*KINDS, "prompt-tuning"):
            made.adapters.load(name, files.uri(name)).result(60)
        made.adapters.load("safety", files.uri("lora"), patch=True).result(60)
        made.adapters.load("unlearn", files.uri("bitdelta"), patch=True).result(60)
        made.set_patches([AdapterRef("safety", 0.5, patch=True), AdapterRef("unlearn", patch=True)])
        yield made


OWN = [("lora", 0.5), ("bitdelta", 1.0)]


def test_a_patch_is_under_every_request(files: Files, patched: Engine) -> None:
    mixes: list[list[tuple[str, float]]] = [[], [("dora", 1.0)], [], [("shira", 0.7), ("ia3", 1.0)]]
    prompts = [prompt(50 + i) for i in range(len(mixes))]
    found = answers(patched, *(request(p, m) for p, m in zip(prompts, mixes, strict=True)))
    for ids, mix, answer in zip(prompts, mixes, found, strict=True):
        tuned = [(files.tuned[name], w) for name, w in (*OWN, *mix)]
        check(answer, ids, interpolated(files.plain, tuned), repr(mix))
        served = answer.last.served_by
        assert served is not None
        assert [(s.name, s.strength, s.patch) for s in served] == [
            ("safety", 0.5, True),
            ("unlearn", 1.0, True),
            *((name, w, False) for name, w in mix),
        ]


def test_patches_are_part_of_the_prefix_caches_key(files: Files, fresh: Fresh) -> None:
    ids = prompt(3, 40)
    with fresh() as engine:
        engine.adapters.load("safety", files.uri("lora"), patch=True).result(60)
        assert answers(engine, request(ids))[0].last.usage.cached_tokens == 0
        assert answers(engine, request(ids))[0].last.usage.cached_tokens > 0
        engine.set_patches([AdapterRef("safety", patch=True)])
        changed = answers(engine, request(ids))[0]
        assert changed.last.usage.cached_tokens == 0
        check(changed, ids, files.tuned["lora"], "patched")


def test_a_patch_stays_and_is_not_asked_for(patched: Engine) -> None:
    assert patched.adapters.get("safety").patch and patched.adapters.get("safety").pinned
    with pytest.raises(AdapterBusy, match="part of every request"):
        patched.adapters.unload("safety")
    with pytest.raises(AdapterBusy, match="part of every request"):
        patched.adapters.pin("safety", False)
    for name in ("safety", "safety@" + patched.adapters.get("safety").digest[:8]):
        assert "leave it out" in refusal(patched, request(prompt(1), name))


def test_patches_that_cannot_be_combined(files: Files, fresh: Fresh) -> None:
    with fresh() as engine:
        for name in ("virtual", "virtual2"):
            engine.adapters.load(name, files.uri("prompt-tuning"), patch=True).result(60)
        engine.adapters.load("prompt", files.uri("prompt-tuning")).result(60)
        with pytest.raises(InvalidRequest, match="must be 1"):
            engine.set_patches([AdapterRef("virtual", 0.5, patch=True)])
        with pytest.raises(InvalidRequest, match="at most one can"):
            engine.set_patches([AdapterRef(n, patch=True) for n in ("virtual", "virtual2")])
        engine.set_patches([AdapterRef("virtual", patch=True)])
        text = refusal(engine, request(prompt(1), "prompt"))
        assert "at most one can ('virtual' is part of every request" in text
        usage = answers(engine, request(prompt(1)))[0].last.usage
        assert usage is not None and usage.prefix_tokens > 0


# Masks:


def only(files: Files, name: str, patterns: Sequence[str]) -> Any:
    """The base with an adapter on the modules that match alone."""
    model, tuned = copy.deepcopy(files.plain), files.tuned[name]
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            module = path.rpartition(".")[0]
            if any(fnmatchcase(module, pattern) for pattern in patterns):
                parameter.copy_(tuned.get_parameter(path))
    return model


MASKS: list[tuple[str, tuple[str, ...]]] = [
    ("lora", ("*.q_proj",)),
    ("lora", ("*.q_proj", "*.down_proj")),
    ("lora", ("model.layers.1.*",)),
    ("dora", ("*.[kv]_proj",)),
    ("ia3", ("model.layers.?.mlp.*",)),
    ("bitdelta", ("*.gate_proj",)),
    ("sparse", ("*layers.0.*",)),
    ("half-fine-tune", ("*norm", "lm_head")),
]


def test_an_adapter_acts_on_the_chosen_modules_alone(files: Files, patched: Engine) -> None:
    """`patched` has its patches; the plain engine below has none."""
    asked, expected = [], []
    for i, (name, patterns) in enumerate(MASKS):
        ids = prompt(i)
        asked += [ask(ids, AdapterRef(name, 1.0, patterns)), request(ids, name)]
        tuned = [(files.tuned["lora"], 0.5), (files.tuned["bitdelta"], 1.0)]
        for part in (only(files, name, patterns), files.tuned[name]):
            expected.append(interpolated(files.plain, [*tuned, (part, 1.0)]))
    before = patched.adapters.used_bytes
    found = answers(patched, *asked)
    for one, answer, right in zip(asked, found, expected, strict=True):
        check(answer, list(one.prompt_ids), right, repr(one.adapters))
    served = found[0].last.served_by
    assert served is not None and served[-1].modules == ("*.q_proj",)
    assert patched.adapters.used_bytes == before


def test_masks_with_strengths_and_in_lists(files: Files, engine: Engine) -> None:
    for name in ("lora", "dora", "ia3"):
        engine.adapters.load(name, files.uri(name)).result(60)
    ids = prompt(8)
    refs = (
        AdapterRef("lora", 0.6, ("*.mlp.*",)),
        AdapterRef("dora", -0.5, ("*.q_proj", "*.o_proj")),
        AdapterRef("ia3", 1.0, ("*.k_proj",)),
    )
    parts = [(only(files, r.name, r.modules), r.strength) for r in refs]
    answer = answers(engine, ask(ids, *refs))[0]
    check(answer, ids, interpolated(files.plain, parts), "list")


def test_a_masks_slot_lives_as_long_as_its_requests(files: Files, engine: Engine) -> None:
    engine.adapters.load("lora", files.uri("lora")).result(60)
    host = engine._runner.model.modules._installed
    assert len(host) == 1
    masks = [("*.q_proj",), ("*.q_pro?",), ("*.v_proj",), ("*",), ()]
    held: list[int] = []
    run = engine._runner.run

    def watched(batch: Any) -> Any:
        held.append(len(host))
        return run(batch)

    engine._runner.run = watched  # type: ignore[method-assign]
    answers(engine, *(ask(prompt(i), AdapterRef("lora", 1.0, m)) for i, m in enumerate(masks * 2)))
    assert max(held) == 3, "equal choices share a slot, and all of the modules are no choice"
    until(lambda: len(host) == 1, "the slots are given back")
    engine.adapters.unload("lora").result(60)
    assert not host


def test_masks_under_preemption_and_eviction(files: Files, fresh: Fresh) -> None:
    """Few blocks, room for one adapter: sequences are preempted, adapters evicted between."""
    size = max(
        int(sum(f.stat().st_size for f in Path(files.uri(n)).iterdir())) for n in ("lora", "dora")
    )
    with fresh(adapter_bytes=size, kv_cache_bytes=16 * 8 * 512) as engine:
        for name in ("lora", "dora"):
            engine.adapters.load(name, files.uri(name)).result(60)
        masks = ("*.q_proj", "*.v_proj")
        refs = [AdapterRef(("lora", "dora")[i % 2], 1.0, masks[i % 3 :]) for i in range(12)]
        asked = [ask(prompt(i), ref) for i, ref in enumerate(refs)]
        found = answers(engine, *asked)
        assert engine.adapters.evictions > 0 and engine.stats().preemptions > 0
        for one, answer in zip(asked, found, strict=True):
            (ref,) = one.adapters
            right = only(files, ref.name, ref.modules) if ref.modules else files.tuned[ref.name]
            check(answer, list(one.prompt_ids), right, repr(ref))


def test_masks_are_part_of_the_prefix_caches_key(files: Files, engine: Engine) -> None:
    engine.adapters.load("lora", files.uri("lora")).result(60)
    ids = prompt(4, 40)
    cached = []
    for patterns in ((), ("*.q_proj",), ("*.v_proj",), ("*.q_pro*",), ("*",)):
        answer = answers(engine, ask(ids, AdapterRef("lora", 1.0, patterns)))[0]
        usage = answer.last.usage
        assert usage is not None
        cached.append(usage.cached_tokens > 0)
    assert cached == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("name", "patterns", "message"),
    [
        ("lora", ("*.q_proj", "*.nothing"), r"'\*\.nothing' matches none of the modules"),
        ("lora", ("q_proj",), "'q_proj' matches none"),
        ("lora", ("[",), "matches none"),
        ("prompt-tuning", ("*",), "virtual tokens"),
        ("lora", ("*",) * 17, "at most 16"),
        ("lora", ("",), "1 to 256 characters"),
        ("lora", ("x" * 300,), "1 to 256 characters"),
        ("lora", ("*a" * 120 + "b",), "matches none"),
    ],
)
def test_masks_that_are_refused(
    name: str, patterns: tuple[str, ...], message: str, patched: Engine
) -> None:
    assert re.search(message, refusal(patched, ask(prompt(1), AdapterRef(name, 1.0, patterns))))


# From the command line:


def test_a_server_with_a_patch_and_a_tree(files: Files) -> None:
    uri, _ = files.child("dora", "lora")
    arguments = [
        *("--base", files.base, "--patch", f"safety@0.5={files.uri('shira')}"),
        *("--adapter", f"leaf={uri}", "--adapter", f"root={files.uri('lora')}"),
        *("--parent", "leaf=root", "--kv-cache-bytes", "16MiB", "--threads", 1, "--port", 0),
    ]
    command = [sys.executable, "-m", "deltaserve.server", "serve", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("listening on ").strip()
            with Client(address, timeout=60) as client:
                assert client.get_adapter("safety").patch
                assert client.get_adapter("leaf").parent == "root"
                with pytest.raises(errors.Aborted):
                    client.unload_adapter("safety")
                ids = prompt(2)
                mix = {"name": "leaf", "modules": ["*.q_proj"]}
                found = client.generate(ids, adapters=[mix], max_tokens=8, ignore_eos=True)
                assert [(s.name, s.patch, s.modules) for s in found.served_by.adapters] == [
                    ("safety", True, ()),
                    ("leaf", False, ("*.q_proj",)),
                ]
        finally:
            process.terminate()
    part = only(files, "dora-on-lora", ["*.q_proj"])
    model = interpolated(files.plain, [(files.tuned["shira"], 0.5), (part, 1.0)])
    logits = logits_of(model, [*ids, *found.token_ids])[len(ids) - 1 : -1]
    assert found.token_ids == logits.argmax(-1).tolist()

"""THE test: a request in a mixed batch gets what it would get alone.

Every architecture and kind of adapter: greedy tokens equal and log-probabilities within 1e-3 of
transformers + PEFT (or of the merged float32 model), with chunked prefill, requests arriving at
different times, base rows between. Base rows are bit-equal to a batch without adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import load_base, request, running
from torch import Tensor
from variants import BASES, VARIANTS, interpolated, logits_of, make_base, merge, open_base

from deltaserve.server.engine.collector import Answer, Collector, generate
from deltaserve.server.engine.core import Request
from deltaserve.server.engine.engine import Engine
from deltaserve.server.model import BaseModel

TOLERANCE = 1e-3
MIXES: dict[str, list[tuple[str, float]]] = {
    "lora at 0.5": [("lora", 0.5)],
    "dora at -0.7": [("dora", -0.7)],
    "ia3 at 1.5": [("ia3", 1.5)],
    "bitdelta at 0.4": [("bitdelta", 0.4)],
    "half at 0.3": [("half-fine-tune", 0.3)],
    "lora + rslora": [("lora", 1.0), ("rslora", 1.0)],
    "bitdelta + sparse": [("bitdelta", 0.6), ("sparse", 1.2)],
    "dora + lora + shira": [("dora", 0.8), ("lora-r11", -0.5), ("shira", 1.0)],
    "half + lora": [("half-fine-tune", 1.0), ("lora", 0.7)],
}


@dataclass
class Family:
    """One base with an adapter of every kind and the reference of each."""

    folder: Path
    roots: Path
    base: Any
    references: dict[str, Any]

    def logits(self, mix: list[tuple[str, float]], ids: list[int]) -> Tensor:
        return logits_of(self.model(mix), ids)

    def model(self, mix: list[tuple[str, float]]) -> Any:
        if not mix:
            return self.base
        if len(mix) == 1 and mix[0][1] == 1.0:
            return self.references[mix[0][0]]
        key = repr(mix)
        if key not in self.references:
            tuned = [(merge(self.references[name]), w) for name, w in mix]
            self.references[key] = interpolated(self.base, tuned)
        return self.references[key]


def make_family(tmp: Path, arch: str, as_served: Callable[[Path], Any] = open_base) -> Family:
    """as_served: from the checkpoint's folder to what stands for the base in the references."""
    folder, roots = tmp / "base", tmp / "adapters"
    make_base(folder, arch)
    roots.mkdir()
    generator = torch.Generator().manual_seed(1)
    base = as_served(folder)
    references = {}
    for name, variant in VARIANTS.items():
        variant.make(folder, roots / name, generator)
        references[name] = variant.reference(base, roots / name)
    return Family(folder, roots, base, references)


def load_all(engine: Engine, roots: Path) -> None:
    for name in VARIANTS:
        engine.adapters.load(name, str(roots / name)).result(timeout=60)


def prompts(count: int, seed: int, low: int = 3, high: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    shared = torch.randint(0, 256, (high,), generator=generator).tolist()
    return [
        shared[: n // 2] + torch.randint(0, 256, (n - n // 2,), generator=generator).tolist()
        for n in lengths
    ]


def check(answer: Answer, prompt: list[int], reference: Any, what: str) -> None:
    """Teacher-forced: the reference, given our tokens, would have chosen each of them."""
    ids = [*prompt, *answer.token_ids]
    logprobs = torch.log_softmax(logits_of(reference, ids[:-1])[len(prompt) - 1 :], -1)
    for i, (token, ours) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        best = logprobs[i].max().item()
        theirs = logprobs[i, token].item()
        assert abs(ours.logprob - theirs) < TOLERANCE, f"{what}: token {i}: {ours} vs {theirs}"
        assert theirs > best - 1e-4, f"{what}: token {i} is not the reference's choice"


def submit_in_turn(engine: Engine, requests: list[Request]) -> list[Answer]:
    """A few at a time, while the others run."""
    collector = Collector()
    for i, r in enumerate(requests):
        engine.submit(r, collector)
        if i % 4 == 3:
            time.sleep(0.01)
    return [collector.wait(r.request_id, timeout=120) for r in requests]


def check_every_kind(family: Family, engine: Engine, seed: int) -> None:
    """One batch of all kinds, weighted ones, compositions, and base rows between."""
    mixes: list[tuple[str, list[tuple[str, float]]]] = [("base", []), ("base", [])]
    for name in VARIANTS:
        mixes += [(name, [(name, 1.0)]), ("base", [])]
    mixes += list(MIXES.items())
    texts = prompts(len(mixes), seed)
    answers = submit_in_turn(
        engine, [request(p, m) for p, (_, m) in zip(texts, mixes, strict=True)]
    )
    for prompt, (what, mix), answer in zip(texts, mixes, answers, strict=True):
        check(answer, prompt, family.model(mix), what)


@pytest.fixture(scope="module", params=list(BASES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(family: Family) -> BaseModel:
    return load_base(family.folder)


@pytest.fixture(scope="module")
def engine(family: Family, model: BaseModel) -> Iterator[Engine]:
    with running(model, [family.roots]) as made:
        load_all(made, family.roots)
        yield made


def test_every_kind_in_one_batch(family: Family, engine: Engine) -> None:
    check_every_kind(family, engine, seed=5)


def test_every_kind_changes_the_output(family: Family) -> None:
    """Otherwise the test above could not fail."""
    ids = prompts(1, seed=9)[0]
    base = torch.log_softmax(family.logits([], ids), -1)
    for mix in [*([(name, 1.0)] for name in VARIANTS), *MIXES.values()]:
        changed = torch.log_softmax(family.logits(mix, ids), -1)
        assert (changed - base).abs().max() > 30 * TOLERANCE, mix


def test_base_rows_are_bit_equal_without_the_adapters(family: Family) -> None:
    """In steps of the same shapes: all prompts are computed whole, whatever order is fair."""
    names = [n for n, v in VARIANTS.items() if v.additive]  # virtual tokens change the batch
    texts = prompts(4 + len(names), seed=6)

    def base_rows(adapters: list[str]) -> list[Answer]:
        model = load_base(family.folder)
        with running(model, [family.roots], prefix_cache=False, max_batch_tokens=4096) as engine:
            for name in adapters:
                engine.adapters.load(name, str(family.roots / name)).result(timeout=60)
            asked = [request(p) for p in texts[:4]]
            asked += [request(p, adapters[i] if adapters else "") for i, p in enumerate(texts[4:])]
            return generate(engine, asked, timeout=120)[:4]

    for mixed, plain in zip(base_rows(names), base_rows([]), strict=True):
        assert mixed.token_ids == plain.token_ids
        assert [x.logprob for x in mixed.logprobs] == [x.logprob for x in plain.logprobs]


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_every_kind_on_a_quantized_base(tmp_path: Path, arch: str, quantize: str) -> None:
    """Against transformers with the base's weights as they are held, dequantized."""
    held: list[BaseModel] = []

    def dequantized(folder: Path) -> Any:
        held.append(load_base(folder, quantize=quantize))
        plain = open_base(folder)
        changed = 0
        with torch.no_grad():
            for name in held[0].spec.modules:
                weight = plain.get_submodule(name).weight
                served = held[0].spec.weight(name)
                changed += int((weight - served).abs().max() > 1e-3)
                weight.copy_(served)
        assert changed >= 14, "the base is not quantized"
        return plain

    family = make_family(tmp_path, arch, dequantized)
    with running(held[0], [family.roots]) as engine:
        load_all(engine, family.roots)
        check_every_kind(family, engine, seed=7)

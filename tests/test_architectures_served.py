"""Every architecture through the whole engine: greedy requests of the base, of an adapter and of a
weighted pair in one batch get the tokens and log-probabilities of plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import archs
import pytest
import torch
from rig import load_base, request, running
from torch import nn

from deltaserve.adapters.base import ModuleKind
from deltaserve.adapters.delta_file import write_delta
from deltaserve.kernels.backend import Backend
from deltaserve.kernels.primitives import LowRank
from deltaserve.server.engine.collector import generate
from deltaserve.server.model import BaseModel

MIXES: list[list[tuple[str, float]]] = [
    [],
    [("one", 1.0)],
    [("one", 0.6), ("two", -0.5)],
    [("two", 1.0)],
    [],
]


def make_adapter(model: BaseModel, folder: Path, seed: int) -> dict[str, LowRank]:
    """LowRank on every linear that takes one, in our own format."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in model.spec.modules.items():
        if spec.kind is ModuleKind.LINEAR and not model.packer.refusal(name):
            a = torch.randn(3, spec.in_features, generator=g) * 0.2
            made[name] = LowRank(a, torch.randn(spec.out_features, 3, generator=g) * 0.2)
    write_delta(folder, {name: (p,) for name, p in made.items()}, kind="test")
    return made


def tuned(
    reference: Any, model: BaseModel, weighted: list[tuple[dict[str, LowRank], float]]
) -> Any:
    result = copy.deepcopy(reference)
    for adapter, strength in weighted:
        for name, p in adapter.items():
            module = result.get_submodule(name)
            delta = strength * p.b @ p.a
            spec = model.spec.modules[name]
            # a parameter of its own: a tied partner keeps the old weight
            module.weight = nn.Parameter(
                module.weight.detach() + (delta.T if spec.transposed else delta)
            )
    return result


@pytest.mark.parametrize("name", archs.ARCHS)
def test_greedy_requests_equal_transformers(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, (7, 19, 5, 13, 11), 6)


def check(
    name: str,
    tmp_path: Path,
    lengths: Sequence[int],
    tokens: int,
    backend: Backend | None = None,
) -> None:
    """lengths: of prompts, the first of `MIXES`. tokens: of each answer."""
    reference: Any = archs.build(name).eval()
    reference.save_pretrained(tmp_path / "base")
    model = load_base(tmp_path / "base", backend=backend)
    adapters = {n: make_adapter(model, tmp_path / n, seed) for n, seed in (("one", 1), ("two", 2))}
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 250, (n,), generator=g).tolist() for n in lengths]
    with running(model, [tmp_path], text=False, max_batch_tokens=16) as engine:
        for n in adapters:
            engine.adapters.load(n, str(tmp_path / n)).result(timeout=60)
        mixes = MIXES[: len(prompts)]
        asked = [request(p, m, max_tokens=tokens) for p, m in zip(prompts, mixes, strict=True)]
        answers = generate(engine, asked, timeout=120)
    for prompt, mix, answer in zip(prompts, mixes, answers, strict=True):
        expected = tuned(reference, model, [(adapters[n], w) for n, w in mix])
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        with torch.inference_mode():
            logits = expected(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        logprobs = torch.log_softmax(logits.float(), -1)
        chosen = logprobs[range(len(answer.token_ids)), list(answer.token_ids)]
        ours = torch.tensor([x.logprob for x in answer.logprobs])
        assert (ours - chosen).abs().max() < 1e-3, f"{mix}: log-probabilities"
        assert (chosen > logprobs.max(-1).values - 1e-4).all(), f"{mix}: greedy tokens"

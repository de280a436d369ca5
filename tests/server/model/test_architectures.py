"""Every architecture, served, against plain transformers: mixed steps of chunked prompts and
decodes, the base and adapters side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import archs
import pytest
import torch
from stepping import Sequence, Stepper
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import ModuleKind
from deltaserve.kernels.primitives import LowRank, Primitive, Replace, ReplaceRows
from deltaserve.server.model import BaseModel, load
from deltaserve.server.model.architectures import TESTED

Save = Callable[[PreTrainedModel], Path]
TOKENS = 33
RANK = 3
ROWS = 40


def adapter(model: BaseModel, seed: int) -> Adapter:
    """LowRank on every linear that takes it, a new gain on every norm, new rows of the input
    embedding."""
    g = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Primitive, ...]] = {}
    for name, spec in model.spec.modules.items():
        if model.packer.refusal(name):
            continue
        if spec.kind is ModuleKind.NORM:
            new = model.spec.weight(name) + 0.2 * torch.randn(spec.in_features, generator=g)
            modules[name] = (Replace(new),)
        elif spec.kind is ModuleKind.EMBEDDING:
            index = torch.randperm(spec.in_features, generator=g)[:ROWS]
            values = torch.randn(ROWS, spec.out_features, generator=g) * 0.1
            modules[name] = (ReplaceRows(index, values),)
        else:
            a = torch.randn(RANK, spec.in_features, generator=g) * 0.2
            b = torch.randn(spec.out_features, RANK, generator=g) * 0.2
            modules[name] = (LowRank(a, b, 0.7),)
    return Adapter(digest=str(seed), format="test", modules=modules)


def merged(
    reference: PreTrainedModel, model: BaseModel, weighted: list[tuple[Adapter, float]]
) -> PreTrainedModel:
    """The reference with the adapters added up in weight space."""
    result = copy.deepcopy(reference)
    names = {name for a, _ in weighted for name in a.modules}
    for name in names:
        module = result.get_submodule(name)
        base = reference.get_submodule(name).weight.detach()
        total = base.clone()
        for a, strength in weighted:
            total += strength * change(base, a.modules[name], model.spec.modules[name].transposed)
        # a parameter of its own: a tied partner keeps the old weight
        module.weight = nn.Parameter(total)
    return result


def change(base: Tensor, primitives: tuple[Primitive, ...], transposed: bool) -> Tensor:
    (primitive,) = primitives
    if isinstance(primitive, LowRank):
        delta = primitive.scale * primitive.b @ primitive.a
        return delta.T if transposed else delta
    if isinstance(primitive, Replace):
        return primitive.weight - base
    assert isinstance(primitive, ReplaceRows)
    delta = torch.zeros_like(base)
    delta[primitive.index] = primitive.values - base[primitive.index]
    return delta


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return found


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("name", archs.ARCHS)
def test_mixed_steps_equal_transformers(name: str, saved: Save) -> None:
    reference = archs.build(name)
    model = load(saved(reference), dtype=torch.float32)
    assert not [n for n in model.spec.modules if model.packer.refusal(n)]
    known = model.spec.modules
    assert list(known) == [n for n, _ in reference.named_modules() if n in known]
    one, two = adapter(model, 1), adapter(model, 2)
    model.install(1, model.prepare(one))
    model.install(2, model.prepare(two))
    ids = torch.randint(3, 256, (3, TOKENS), generator=torch.Generator().manual_seed(5))
    base = Sequence(ids[0])
    tuned = Sequence(ids[1], ((1, 1.0),))
    mixed = Sequence(ids[2], ((1, 0.6), (2, -0.5)))
    stepper = Stepper(model)
    stepper.step([(base, 20), (tuned, 9)])
    stepper.step([(tuned, 1), (base, 9), (mixed, 21)])
    stepper.step([(tuned, 1), (base, 1), (mixed, 7)])
    while base.left or tuned.left or mixed.left:
        stepper.step([(s, 1) for s in (mixed, base, tuned) if s.left])
    weighted = {(): [], ((1, 1.0),): [(one, 1.0)], mixed.mix: [(one, 0.6), (two, -0.5)]}
    for sequence in (base, tuned, mixed):
        want = logits(merged(reference, model, weighted[sequence.mix]), sequence.ids)
        close(torch.cat(sequence.logits), want[sequence.at])
    apart = logits(reference, ids[1]) - logits(merged(reference, model, [(one, 1.0)]), ids[1])
    assert apart.abs().max() > 1e-2, "the adapter changes nothing, so this test shows nothing"


@pytest.mark.parametrize(
    ("name", "quantize"),
    [(name, "int4") for name in archs.ARCHS]
    + [(name, "int8") for name in ("llama-tied-biased", "gpt2", "gemma3n", "qwen2-moe")],
)
def test_quantized_equals_transformers_with_dequantized_weights(
    name: str, quantize: str, saved: Save
) -> None:
    reference = archs.build(name)
    model = load(saved(reference), dtype=torch.float32, quantize=quantize)
    changed = 0
    for path, spec in model.spec.modules.items():
        if spec.kind is ModuleKind.LINEAR:
            module = reference.get_submodule(path)
            served = model.spec.weight(path)
            changed += not torch.equal(served, module.weight)
            module.weight = nn.Parameter(served)
    assert changed, "nothing is quantized"
    ids = torch.randint(3, 256, (19,), generator=torch.Generator().manual_seed(6))
    sequence = Sequence(ids)
    stepper = Stepper(model)
    stepper.step([(sequence, 18)])
    stepper.step([(sequence, 1)])
    close(torch.cat(sequence.logits), logits(reference, ids)[sequence.at])


def test_the_allow_list_is_what_is_tested() -> None:
    assert {kind for kind, _ in archs.ARCHS.values()} == TESTED


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "gpt-oss", "phi", "deepseek-v3"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(name: str, saved: Save) -> None:
    reference = archs.build(name).to(torch.bfloat16)
    model = load(saved(reference), dtype=torch.bfloat16)
    ids = torch.randint(3, 256, (31,), generator=torch.Generator().manual_seed(7))
    sequence = Sequence(ids)
    stepper = Stepper(model)
    stepper.step([(sequence, 30)])
    stepper.step([(sequence, 1)])
    theirs = logits(reference, ids).float()[sequence.at]
    exact = logits(reference.float(), ids)[sequence.at]
    ours = torch.cat(sequence.logits)
    assert (ours - exact).square().mean() < 2 * (theirs - exact).square().mean()

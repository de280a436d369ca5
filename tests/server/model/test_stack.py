"""All layers in one native call give what the layers give one by one, whatever adapters act."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import archs
import pytest
import torch
from stepping import Sequence, Stepper
from torch import Tensor
from transformers import PreTrainedModel

from deltaserve.adapters.adapter import Adapter
from deltaserve.kernels.native import library
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    LowRank,
    Primitive,
    Replace,
    Scale,
    SparseCols,
    SparseCsr,
    SparseRows,
    pack_signs,
)
from deltaserve.kernels.segments import Mix
from deltaserve.server.model import BaseModel, load
from deltaserve.server.model.stack import FusedStack

Save = Callable[[PreTrainedModel], Path]
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def primitives(kind: str, out: int, inner: int) -> tuple[Primitive, ...]:
    match kind:
        case "low":
            return (LowRank(torch.randn(5, inner) / inner**0.5, torch.randn(out, 5), 0.4),)
        case "bit":
            return (Bit(pack_signs(torch.rand(1, out, inner) < 0.5), torch.rand(1, out) * 0.1),)
        case "csr":
            mask = torch.rand(out, inner) < 0.1
            indptr = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
            values = torch.randn(int(mask.sum())) * 0.2
            return (SparseCsr(indptr, mask.nonzero()[:, 1].int(), values),)
        case "rows" | "more rows":
            chosen = [torch.randperm(out)[: 1 + out // 8] for _ in range(1 + (kind != "rows"))]
            return tuple(SparseRows(i, torch.randn(len(i), inner) * 0.1) for i in chosen)
        case "cols":
            return (SparseCols(torch.randperm(inner)[:9], torch.randn(out, 9) * 0.2),)
        case "scaled":
            return (
                Scale(output=torch.rand(out) + 0.5),
                LowRank(torch.randn(3, inner) / inner**0.5, torch.randn(out, 3), 0.3),
                Bias(torch.randn(out) * 0.3),
            )
        case "bias":
            return (Bias(torch.randn(out) * 0.3),)
    raise AssertionError(kind)


AT_ONCE = ("low", "bit", "csr", "rows", "scaled", "bias", "inputs", "norms")
ONE_BY_ONE = ("cols", "more rows", "some inputs")


def adapter(kind: str, model: BaseModel) -> Adapter:
    modules: dict[str, tuple[Primitive, ...]] = {}
    if kind == "norms":
        for name, norm in model.modules.norms.items():
            gain = Replace(torch.rand(len(norm.weight)) + 0.5)
            modules[name] = (gain, Bias(torch.randn(len(norm.weight)) * 0.3))
        return Adapter(digest=kind, format="test", modules=modules)
    for group in model.modules.groups.values():
        if group.logits:
            continue
        inner = group.base.in_features
        shared = torch.rand(inner) + 0.5
        for i, (name, out) in enumerate(zip(group.names, group.sizes, strict=True)):
            if kind == "inputs" or (kind == "some inputs" and i == 0):
                modules[name] = (Scale(input=shared),)
            elif kind != "some inputs":
                modules[name] = primitives(kind, out, inner)
    return Adapter(digest=kind, format="test", modules=modules)


@DTYPES
@pytest.mark.parametrize("quantize", ["int4", "int8"])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["llama-tied-biased", "mistral"])
def test_all_layers_at_once_give_what_they_give_one_by_one(
    name: str,
    quantize: Any,
    activations: Any,
    dtype: torch.dtype,
    saved: Save,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    model = load(
        saved(archs.build(name).to(dtype)), dtype=dtype, quantize=quantize, activations=activations
    )
    for slot, kind in enumerate((*AT_ONCE, *ONE_BY_ONE), 1):
        model.install(slot, model.prepare(adapter(kind, model)))
    slots = range(1, len(AT_ONCE) + 1)
    mixes: list[Mix] = [(), *(((slot, 1.0),) for slot in slots), (), ((1, 0.5), (3, -0.25))]
    mixes += [((5, 1.5), (2, 0.5), (8, 0.5)), ((7, 0.5), (5, 1.0)), ((8, 1.0), (6, -1.0), (1, 1.0))]
    apart: list[Mix] = [((len(AT_ONCE) + 1 + i, 1.0),) for i in range(len(ONE_BY_ONE))]
    ids = torch.randint(3, 256, (len(mixes) + len(apart), 12))
    runs: list[int] = []
    original = FusedStack._run

    def run(self: FusedStack, x: Tensor, *rest: Any) -> Tensor:
        runs.append(x.shape[1])
        return original(self, x, *rest)

    monkeypatch.setattr(FusedStack, "_run", run)

    def serve() -> list[Tensor]:
        all = [Sequence(ids[i], mix) for i, mix in enumerate((*mixes, *apart))]
        usual, last = all[: len(mixes)], all[len(mixes) :]
        stepper = Stepper(model)
        stepper.step([(s, 5) for s in all])
        stepper.step([(s, 1) for s in usual])
        stepper.step([(all[0], 1), (all[1], 1), (all[3], 4)])  # with a prompt
        stepper.step([(s, 1) for s in usual])
        for s in last:
            stepper.step([(s, 1), (all[0], 1), (all[1], 1)])
        stepper.step([(all[0], 1)])
        stepper.step([(usual[-1], 1)])  # a LoRA and a bias: the families that add to bfloat16
        return [torch.cat(s.logits) for s in all]

    got = serve()
    assert runs == [len(mixes), len(mixes), 1, 1]
    for i in range(1, len(mixes)):
        assert not torch.equal(got[0][:1], got[i][:1])
    monkeypatch.setattr(
        FusedStack, "start", lambda self, x, r: self.layers[0](x, position_embeddings=r)
    )
    for a, b in zip(got, serve(), strict=True):
        assert torch.equal(a, b)
    assert len(runs) == 4


def test_a_slot_that_is_emptied_and_filled_anew(saved: Save) -> None:
    """The native call reads tables that move as they grow."""
    torch.manual_seed(4)
    model = load(saved(archs.build("llama")), dtype=torch.float32, quantize="int8")
    made = [model.prepare(adapter("low", model)) for _ in range(40)]
    ids = torch.randint(3, 256, (8,))

    def last(mix: Mix) -> Tensor:
        sequence, stepper = Sequence(ids, mix), Stepper(model)
        stepper.step([(sequence, 6)])
        stepper.step([(sequence, 1)])
        stepper.step([(sequence, 1)])
        return sequence.logits[-1]

    base = last(())
    model.install(1, made[0])
    first = last(((1, 1.0),))
    assert not torch.equal(first, base)
    for slot, prepared in enumerate(made[1:], 2):
        model.install(slot, prepared)
    assert torch.equal(last(((1, 1.0),)), first)
    model.remove(1)
    assert torch.equal(last(((1, 1.0),)), base)
    model.install(1, made[5])
    assert torch.equal(last(((1, 1.0),)), last(((6, 1.0),)))

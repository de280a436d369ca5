"""Decoder layers in the GPU's launches, beside the general path on the same kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import archs
import pytest
import test_fused
import torch
from stepping import Sequence, Stepper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import interpreter
from kernel_oracle import random_primitive, relative_error

from deltaserve.adapters.adapter import Adapter
from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.backend import TritonBackend
from deltaserve.kernels.primitives import Bias, GatedPrefix, LowRank, Primitive, Replace, Scale
from deltaserve.kernels.segments import Mix
from deltaserve.server.model import BaseModel, load
from deltaserve.server.model.fused_gpu import fused_layers

if device.interpreted():
    interpreter.complete()

Save = Callable[[PreTrainedModel], Path]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@contextmanager
def general(model: BaseModel) -> Iterator[None]:
    """The layers as the modeling code has them."""
    own = {m: m.__dict__.pop("forward") for m in model.model.modules() if "forward" in m.__dict__}
    assert own
    yield
    for module, forward in own.items():
        module.forward = forward


def serve(model: BaseModel, mixes: Seq[Mix]) -> list[Tensor]:
    """Logits of sequences with these mixes: prompts, then decodes beside a prompt."""
    ids = torch.randint(3, 256, (len(mixes), 3), generator=torch.Generator().manual_seed(5))
    sequences = [Sequence(row, mix) for row, mix in zip(ids, mixes, strict=True)]
    stepper = Stepper(model)
    stepper.step([(s, 2) for s in sequences[:-1]])
    stepper.step([*((s, 1) for s in sequences[:-1]), (sequences[-1], 3)])
    return [torch.cat(s.logits) for s in sequences]


def low(out: int, inner: int) -> LowRank:
    return LowRank(torch.randn(3, inner) / inner**0.5, torch.randn(out, 3) * 0.2)


def adapters(model: BaseModel) -> Mapping[int, Adapter]:
    """Of each kind one: LoRA everywhere; all families; norms; other inputs for gate and for up;
    attention to prompts beside the sequence."""
    sizes = {
        member: (size, group.base.in_features)
        for group in model.modules.groups.values()
        for member, size in zip(group.names, group.sizes, strict=True)
        if "layers" in member
    }
    kinds = ("low", "bit", "csr", "output", "input", "bias")
    norms = [n for n in model.modules.norms if "layers" in n]
    size_of = {n: len(model.modules.norms[n].weight) for n in norms}
    tuned: dict[str, tuple[Primitive, ...]] = {
        n: (Replace(1 + 0.3 * torch.randn(size_of[n])), Bias(0.1 * torch.randn(size_of[n])))
        for n in norms
    }
    families: dict[str, tuple[Primitive, ...]] = {
        m: (random_primitive(kinds[i % 6], *size),) for i, (m, size) in enumerate(sizes.items())
    }
    inputs: dict[str, tuple[Primitive, ...]] = {
        m: (Scale(input=1 + 0.3 * torch.randn(inner)),) for m, (_, inner) in sizes.items()
    }
    shape = (3, model.attention[0].kv_heads, model.attention[0].key_dim)
    beside = [tuple(0.5 * torch.randn(shape) for _ in model.attention) for _ in range(2)]
    return {
        1: of("1", {m: (low(*s),) for m, s in sizes.items()}),
        2: of("2", families),
        3: of("3", {**tuned, next(iter(sizes)): (low(*next(iter(sizes.values()))),)}),
        4: of("4", inputs),
        5: of("5", {}, GatedPrefix(*beside)),
    }


def of(digest: str, modules: dict[str, tuple[Primitive, ...]], prefix: Any = None) -> Adapter:
    return Adapter(digest=digest, format="test", modules=modules, prefix=prefix)


MIXES: list[Mix] = [
    (),
    ((1, 1.0),),
    ((2, 1.0),),
    ((3, 1.0),),
    ((4, 0.5), (1, 0.5)),
    ((5, 1.0),),
    (),
]


@pytest.mark.parametrize(
    ("name", "dtype", "quantize"),
    [
        ("llama", torch.bfloat16, "int4"),
        ("llama-tied-biased", torch.float32, "int4"),
        ("mistral", torch.bfloat16, "int8"),
        ("qwen2", torch.float32, "none"),
        ("qwen3", torch.bfloat16, "int4"),
        ("phi3", torch.float32, "int8"),
    ],
)
def test_layers_give_what_the_general_path_gives(
    name: str, dtype: torch.dtype, quantize: Any, saved: Save
) -> None:
    torch.manual_seed(1)
    model = load(
        saved(archs.build(name).to(dtype)), dtype=dtype, quantize=quantize, backend=TritonBackend()
    )
    assert len(fused_layers(model.model)) == 2
    alone = serve(model, [()] * len(MIXES))
    with general(model):
        check(alone, serve(model, [()] * len(MIXES)), dtype)
    for slot, adapter in adapters(model).items():
        model.install(slot, model.prepare(adapter))
    mixed = serve(model, MIXES)
    with general(model):
        check(mixed, serve(model, MIXES), dtype)
    for i, mix in enumerate(MIXES):
        assert torch.equal(mixed[i], alone[i]) == (not mix)


@pytest.mark.parametrize("twist", [test_fused.gelu, test_fused.parallel, test_fused.interleaved])
def test_a_small_difference_is_seen(
    twist: Any, saved: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name = {
        test_fused.gelu: (LlamaMLP, "forward"),
        test_fused.parallel: (LlamaDecoderLayer, "forward"),
        test_fused.interleaved: (modeling_llama, "apply_rotary_pos_emb"),
    }[twist]
    monkeypatch.setattr(where, name, twist)
    model = load(saved(archs.build("llama")), dtype=torch.float32, backend=TritonBackend())
    assert not fused_layers(model.model)


@pytest.mark.parametrize("name", ["olmo2", "gpt-neox"])
def test_layers_of_another_form(name: str, saved: Save) -> None:
    model = load(saved(archs.build(name)), dtype=torch.float32, backend=TritonBackend())
    assert not fused_layers(model.model)


def check(got: Seq[Tensor], want: Seq[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b.double()) < TOLERANCE[dtype]

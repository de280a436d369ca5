"""Which layers are run fused: those that numbers show to be of the form, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import archs
import pytest
import torch
from stepping import Sequence, Stepper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from deltaserve.kernels.native import library
from deltaserve.server.model import BaseModel, load
from deltaserve.server.model.fused_layer import FusedLayer
from deltaserve.server.model.stack import StackedLayer

Save = Callable[[PreTrainedModel], Path]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def fused(model: BaseModel) -> int:
    found = [m.__dict__.get("forward") for m in model.model.modules()]
    return sum(isinstance(forward, FusedLayer | StackedLayer) for forward in found)


@DTYPES
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "mistral", "qwen2", "phi3"])
def test_layers_of_the_form(name: str, dtype: torch.dtype, saved: Save) -> None:
    assert fused(load(saved(archs.build(name).to(dtype)), dtype=dtype)) == 2


@pytest.mark.parametrize("quantize", ["int4", "int8"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_quantized_layers(quantize: Any, activations: Any, saved: Save) -> None:
    model = load(
        saved(archs.build("llama")),
        dtype=torch.bfloat16,
        quantize=quantize,
        activations=activations,
    )
    assert fused(model) == 2


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "olmo2", "cohere", "glm4", "gpt-neox"])
def test_layers_of_another_form(name: str, saved: Save) -> None:
    assert fused(load(saved(archs.build(name)), dtype=torch.float32)) == 0


def scaled_residual(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    h = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]
    return h + self.mlp(self.post_attention_layernorm(h)) * 1.05


def clipped_residual(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    h = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]
    return (h + self.mlp(self.post_attention_layernorm(h))).clamp(-30, 30)


def parallel(self: Any, x: Tensor, **kwargs: Any) -> Tensor:
    mixed, _ = self.self_attn(self.input_layernorm(x), **kwargs)
    return x + mixed + self.mlp(self.post_attention_layernorm(x))


def gelu(self: Any, x: Tensor) -> Tensor:
    found: Tensor = self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))
    return found


def swapped(self: Any, x: Tensor) -> Tensor:
    found: Tensor = self.down_proj(self.gate_proj(x) * nn.functional.silu(self.up_proj(x)))
    return found


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        half = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos.unsqueeze(1) + half * sin.unsqueeze(1)

    return turn(q), turn(k)


def unturned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


@DTYPES
@pytest.mark.parametrize(
    ("where", "name", "twist"),
    [
        (LlamaDecoderLayer, "forward", scaled_residual),
        (LlamaDecoderLayer, "forward", clipped_residual),
        (LlamaDecoderLayer, "forward", parallel),
        (LlamaMLP, "forward", gelu),
        (LlamaMLP, "forward", swapped),
        (modeling_llama, "apply_rotary_pos_emb", interleaved),
        (modeling_llama, "apply_rotary_pos_emb", unturned),
    ],
)
def test_a_small_difference_is_seen(
    where: Any,
    name: str,
    twist: Any,
    dtype: torch.dtype,
    saved: Save,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, twist)
    assert fused(load(saved(archs.build("llama").to(dtype)), dtype=dtype)) == 0


def test_a_layer_in_which_positions_do_not_show_is_not_proven(saved: Save) -> None:
    reference = archs.build("llama")
    attention: LlamaAttention = reference.model.layers[1].self_attn
    attention.q_proj.weight.data.zero_()
    assert fused(load(saved(reference), dtype=torch.float32)) == 1


@DTYPES
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, saved: Save) -> None:
    model = load(saved(archs.build("llama").to(dtype)), dtype=dtype, quantize="int4")
    assert fused(model) == 2
    ids = torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(5))

    def last(rows: list[int]) -> Tensor:
        sequences = {row: Sequence(ids[row]) for row in rows}
        stepper = Stepper(model)
        for row in rows:
            stepper.step([(sequences[row], 10)])
        stepper.step([(s, 1) for s in sequences.values()])
        stepper.step([(s, 1) for s in sequences.values()])
        return sequences[0].logits[-1]

    assert torch.equal(last([0]), last([1, 0, 2]))


def test_dense_linears_are_called_one_by_one(saved: Save) -> None:
    model = load(saved(archs.build("llama")), dtype=torch.float32)
    found = [type(m.__dict__.get("forward")) for m in model.model.modules()]
    assert found.count(FusedLayer) == 2 and StackedLayer not in found

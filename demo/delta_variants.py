"""Variants stored in this project's delta format: a 1-bit full fine-tune, a half fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from base import load
from torch import Tensor, nn
from torch.nn.utils import parametrize
from training import Batch, batches, pairs, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from variants import Variant

from deltaserve.adapters.delta_file import write_delta
from deltaserve.adapters.extract import bitdelta_from
from deltaserve.adapters.fingerprint import fingerprint, tensor_digests
from deltaserve.kernels.primitives import Bit, Primitive, Replace, unpack_signs

BASE_NAME = "demo/zoo/base"
DISTILL_STEPS = 60
HALF = (
    ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"),
    ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "post_attention_layernorm"),
)
"""What even and odd layers tune in the half fine-tune: half of each layer's attention matrices,
of the norms, and (over two layers) of the feed-forward matrices, as HFT (Hui et al. 2024) does."""

Modules = dict[str, tuple[Primitive, ...]]


class OneBit(nn.Module):
    """A weight's parametrization: the base's weight plus ``scale * sign``, scale alone trained."""

    sign: Tensor

    def __init__(self, bit: Bit, in_features: int) -> None:
        super().__init__()
        self.signs = bit.signs
        self.register_buffer("sign", unpack_signs(bit.signs[0], in_features), persistent=False)
        self.scale = nn.Parameter(bit.scale[0, 0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.sign

    def bit(self) -> Bit:
        """As stored: the matrix's one scale, repeated for each output row."""
        rows = self.signs.shape[1]
        return Bit(self.signs, self.scale.detach().expand(1, rows).contiguous())


def build(variant: Variant, base: Path, folder: Path) -> int:
    """Train on the plain prompt, compress, write; the number of training steps."""
    tuned, tokenizer = load(base)
    if variant.kind == "BitDelta":
        _tune(tuned, tokenizer, variant)
        modules = _one_bit(variant, base, tuned)
    else:
        layers = range(tuned.config.num_hidden_layers)
        chosen = {f"model.layers.{i}.{name}" for i in layers for name in HALF[i % 2]}
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in chosen)
        _tune(tuned, tokenizer, variant)
        modules = {name: (_replace(tuned, name),) for name in sorted(chosen)}
    digests = tensor_digests(base)
    write_delta(
        folder,
        modules,
        kind=variant.kind,
        base_name=BASE_NAME,
        base_fingerprint=fingerprint(digests),
        base_digests={f"{name}.weight": digests[f"{name}.weight"] for name in modules},
        dtype=torch.bfloat16,
    )
    return variant.steps


def _tune(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, variant: Variant) -> None:
    data = batches(pairs(variant.skill, 2), tokenizer)
    train(model, data, steps=variant.steps, lr=variant.lr, label=variant.name)


def _replace(model: LlamaForCausalLM, name: str) -> Replace:
    return Replace(model.get_parameter(f"{name}.weight").detach())


def _one_bit(variant: Variant, base: Path, tuned: LlamaForCausalLM) -> Modules:
    """The linears of the layers as signs and one scale each, the scales distilled against the
    tuned model's logits (BitDelta, Liu et al. 2024); everything else replaced."""
    student, tokenizer = load(base)
    student.requires_grad_(False)
    modules: Modules = {}
    forms: dict[str, OneBit] = {}
    for name, module in list(student.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            bit = bitdelta_from(module.weight, tuned.get_parameter(f"{name}.weight"))
            forms[name] = OneBit(bit, module.in_features)
            parametrize.register_parametrization(module, "weight", forms[name])
        elif isinstance(getattr(module, "weight", None), Tensor):
            replaced = _replace(tuned, name)
            student.get_parameter(f"{name}.weight").data.copy_(replaced.weight)
            modules[name] = (replaced,)
    distill(student, tuned, tokenizer, variant)
    return modules | {name: (form.bit(),) for name, form in forms.items()}


def distill(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    variant: Variant,
    steps: int = DISTILL_STEPS,
) -> None:
    """Fit what the student may change to the teacher's logits on the variant's own prompts."""

    def distance(output: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits
        counts = batch["labels"][:, 1:] != -100
        return nn.functional.mse_loss(output.logits[:, :-1][counts], wanted[:, :-1][counts])

    data = batches(pairs(variant.skill, 3), tokenizer)
    train(student, data, steps=steps, lr=1e-3, label="  distill", loss=distance)

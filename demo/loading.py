"""A stored variant as a plain model: through PEFT, or the delta merged into the base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from base import load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deltaserve.kernels.primitives import unpack_signs


def variant(base: Path, folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The variant in `folder` over the base, in float32, ready to generate."""
    model, tokenizer = load(base)
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, folder).eval(), tokenizer
    merge(model, folder)
    return model, tokenizer


def merge(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a delta of bits and replaced weights into the model's own weights."""
    stored = load_file(folder / "delta_model.safetensors")
    for key, value in stored.items():
        module, primitive, field = key.rsplit(".", 2)
        weight = model.get_parameter(f"{module}.weight").data
        if (primitive, field) == ("replace", "weight"):
            weight.copy_(value)
        elif (primitive, field) == ("bit", "signs"):
            signs = unpack_signs(value, weight.shape[1])
            weight += (stored[f"{module}.bit.scale"].unsqueeze(-1) * signs).sum(0)
        elif (primitive, field) != ("bit", "scale"):
            raise ValueError(f"{folder}: tensor {key!r} is not one that the zoo stores")

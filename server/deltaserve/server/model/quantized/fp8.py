"""FP8: weights of 8-bit floats (e4m3fn) with a scale for all, for a row or for a block of them.

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float [out / rows, in / columns]   of `weight_block_size`, as DeepSeek-V3
    weight_scale      float [], [1], [out] or [out, 1]   as AutoFP8, vLLM and FBGEMM

w = weight * scale under either name (the inverse is of what the weights were multiplied with).
Scales of activations are not used: activations stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear
from deltaserve.server.model.errors import MalformedModel
from deltaserve.server.model.quantized.build import floats, spread
from deltaserve.server.model.quantized.fields import Fields
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.packed import FLOATS, Packed

SCALES = ("weight_scale_inv", "weight_scale")

HARMLESS = frozenset(
    {
        "bits",
        "dequantize",
        "ignored_layers",
        "modules_to_convert",
        "modules_to_not_convert",
        "quant_method",
        "weight_per_tensor",
        "act_per_tensor",
    }
)
"""Which modules are packed is told by their tensors, and so is what has a scale of its own."""

FLOAT_ACTIVATIONS = (
    "the checkpoint asks for activations in 8 bits; they stay floats, which is nearer to the model "
    "that was quantized"
)
FLOAT_CACHE = "the checkpoint asks for keys and values in 8 bits; they stay floats"


class Fp8(Format):
    marks: ClassVar[tuple[str, ...]] = SCALES
    parts: ClassVar[tuple[str, ...]] = ("weight", *SCALES)

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields(config, "quantization_config")
        scheme = fields.one_of("activation_scheme", ("dynamic", "static", "none"), "dynamic")
        fields.get("activation_scale_ub")
        fields.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        fields.one_of("scale_fmt", ("float", "ue8m0"), "float")
        fields.one_of("expert_dtype", ("fp8",), "fp8")
        cache = fields.get("kv_cache_scheme") or fields.get("kv_cache_quant_method")
        self.block = _block(fields)
        fields.finish(HARMLESS)
        self.notes = (FLOAT_ACTIVATIONS,) * (scheme != "none") + (FLOAT_CACHE,) * bool(cache)
        rows = "" if self.block is None else f"-block{self.block[0]}x{self.block[1]}"
        self.label = f"fp8-e4m3{rows}"

    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        q = packed.take("weight", (out, inner), (torch.float8_e4m3fn,))
        part = SCALES[SCALES[0] not in packed.parts]
        if self.block is None:
            return floats(packed, q, one_or_rows(packed, part, out), inner, dtype)
        height, width = self.block
        shape = (-(-out // height), -(-inner // width))
        scale = packed.take(part, shape, FLOATS)
        return floats(packed, q, spread(scale, self.block, out), min(width, inner), dtype)


def one_or_rows(packed: Packed, part: str, out: int) -> Tensor:
    """A scale for all weights or for each row, as [out, 1]."""
    scale = packed.take(part, None, FLOATS)
    if tuple(scale.shape) in ((), (1,), (1, 1)):
        return scale.reshape(1, 1).expand(out, 1)
    if tuple(scale.shape) in ((out,), (out, 1)):
        return scale.reshape(out, 1)
    raise MalformedModel(
        f"{packed.module}.{part} has shape {tuple(scale.shape)}; it must be (), (1,), ({out},) or "
        f"({out}, 1)"
    )


def _block(fields: Fields) -> tuple[int, int] | None:
    block = fields.get("weight_block_size")
    if block is None:
        return None
    whole = isinstance(block, list) and len(block) == 2
    if not whole or not all(type(n) is int and n > 0 for n in block):
        raise fields.refusal("weight_block_size", "must be two numbers above 0: rows and columns")
    return block[0], block[1]

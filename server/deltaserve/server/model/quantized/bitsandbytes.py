"""bitsandbytes: NF4 and FP4 codes with a scale per block, or rows of int8.

    weight                                uint8 [n / 2, 1], n = out * in, the higher nibble first
    weight.absmax                         float [blocks], or uint8 where it is quantized again
    weight.quant_map                      float [16], what the nibbles stand for
    weight.nested_absmax, .nested_quant_map                 of the scales, float [.], [256]
    weight.quant_state.bitsandbytes__nf4  uint8, JSON: blocksize, shape, nested_blocksize, ...

    weight int8 [out, in], SCB float [out], weight_format uint8 []        w = weight * SCB / 127

w = quant_map[nibble] * absmax, blocks running on over the rows; a quantized absmax is
nested_quant_map[absmax] * nested_absmax + nested_offset. Layout: `QuantState.from_dict` and
`dequantize_4bit` of bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear, Code4Linear, Int8Linear
from deltaserve.server.model.errors import MalformedModel, UnsupportedModel
from deltaserve.server.model.quantized.fields import Fields
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.fp8 import FLOAT_ACTIVATIONS
from deltaserve.server.model.quantized.packed import FLOATS, Packed

STATE = "weight.quant_state.bitsandbytes__"
STORAGE = (torch.uint8, torch.int8, *FLOATS)
# QLoRA (arXiv 2305.14314), appendix E; bitsandbytes' kernels have these numbers built in.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4 = tuple(s * v / 12 for s in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODES = {"nf4": NF4, "fp4": FP4}

HARMLESS = frozenset(
    {
        "_load_in_4bit",
        "_load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
        "quant_method",
    }
)
"""It is computed in the server's dtype; outliers of activations (`llm_int8_threshold`) need no care
where activations are floats; the rest is told by the tensors."""


class BitsAndBytes(Format):
    marks: ClassVar[tuple[str, ...]] = (f"{STATE}nf4", f"{STATE}fp4", "SCB")
    parts: ClassVar[tuple[str, ...]] = (
        *marks,
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight_format",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields(config, "quantization_config")
        four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
        if four == eight:
            raise fields.refusal("load_in_4bit", "must be the opposite of load_in_8bit")
        fields.one_of("llm_int8_has_fp16_weight", (False,), False)
        self.code = fields.one_of("bnb_4bit_quant_type", tuple(CODES), "fp4") if four else "int8"
        fields.finish(HARMLESS | {"bnb_4bit_quant_type"})
        self.label = f"bitsandbytes-{self.code}"
        self.notes = () if four else (FLOAT_ACTIVATIONS,)

    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        mark = "SCB" if self.code == "int8" else f"{STATE}{self.code}"
        if mark not in packed.parts:
            known = ", ".join(sorted(packed.parts))
            raise MalformedModel(f"{packed.module} has {known}, which is not {self.label}")
        if self.code == "int8":
            return _rows(packed, out, inner, dtype)
        return self._codes(packed, out, inner, dtype)

    def _codes(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        part = f"{STATE}{self.code}"
        state = _state(packed, part)
        size = out * inner
        block = _number(packed, part, state, "blocksize")
        if state.get("shape") != [out, inner] or state.get("quant_type") != self.code:
            raise MalformedModel(
                f"{packed.module}.{part} has shape {state.get('shape')} and quant_type "
                f"{state.get('quant_type')!r}; the model needs {[out, inner]} and {self.code!r}"
            )
        code = packed.take("weight.quant_map", (16,), (torch.float32,))
        if not torch.allclose(code, torch.tensor(CODES[self.code]), rtol=0, atol=1e-6):
            raise UnsupportedModel(
                f"{packed.module}.weight.quant_map is not {self.code}, which bitsandbytes uses "
                "whatever the file says"
            )
        scale = _absmax(packed, part, state, -(-size // block))
        group = gcd(inner, block)
        if group % 8:
            raise UnsupportedModel(
                f"{packed.module} has {inner} inputs, which blocks of {block} weights cut at "
                f"multiples of {group}; a multiple of 8 can be held"
            )
        q = _nibbles(packed, size).view(out, inner)
        first = torch.arange(0, size, group).view(out, -1)
        return Code4Linear(q, code, scale[first // block], None, dtype, group)


def _nibbles(packed: Packed, size: int) -> Tensor:
    octets = packed.take("weight", None, STORAGE, raw=True).reshape(-1).view(torch.uint8)
    if len(octets) != -(-size // 2):
        raise MalformedModel(
            f"{packed.module}.weight has {len(octets)} bytes; {size} weights of 4 bits need "
            f"{-(-size // 2)}"
        )
    return torch.stack((octets >> 4, octets & 15), -1).flatten()[:size]


def _state(packed: Packed, part: str) -> dict[str, Any]:
    """The numbers that are stored as text."""
    octets = packed.take(part, None, (torch.uint8,))
    try:
        found = json.loads(bytes(octets.tolist()).decode())
    except ValueError as error:
        raise MalformedModel(f"{packed.module}.{part} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise MalformedModel(f"{packed.module}.{part} is not an object of JSON")
    return found


def _number(packed: Packed, part: str, state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if type(value) is not int or value < 1:
        raise MalformedModel(f"{packed.module}.{part} has {name} {value!r}; it must be above 0")
    return value


def _absmax(packed: Packed, part: str, state: Mapping[str, Any], count: int) -> Tensor:
    """float32 [count], with its own quantization undone."""
    if "weight.nested_absmax" not in packed.parts:
        return packed.take("weight.absmax", (count,), FLOATS)
    codes = packed.take("weight.absmax", (count,), (torch.uint8,))
    block = _number(packed, part, state, "nested_blocksize")
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool):
        raise MalformedModel(f"{packed.module}.{part} has nested_offset {offset!r}")
    table = packed.take("weight.nested_quant_map", (256,), FLOATS)
    scale = packed.take("weight.nested_absmax", (-(-count // block),), FLOATS)
    values = table[codes.int()] * scale.repeat_interleave(block)[:count]
    return values + torch.tensor(float(offset))


def _rows(packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
    q = packed.take("weight", (out, inner), (torch.int8,))
    scale = packed.take("SCB", (out,), FLOATS)
    if "weight_format" in packed.parts:
        layout = packed.take("weight_format", None, (torch.uint8,))
        if layout.numel() != 1 or int(layout) != 0:
            raise UnsupportedModel(
                f"{packed.module}.weight_format is {layout.tolist()}; only 0, row by row, is read"
            )
    return Int8Linear(q, (scale.double() / 127).float(), None, dtype)

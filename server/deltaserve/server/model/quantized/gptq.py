"""GPTQ: q, scale and zero per group of inputs, as AutoGPTQ and GPTQModel write them.

    qweight int32 [in * bits / 32, out]       along the inputs, lowest bits first
    qzeros  int32 [groups, out * bits / 32]   along the outputs
    scales  float [groups, out]               w = (q - zero) * scale
    g_idx   int32 [in]                        the group of each input

Layout: `QuantLinear.pack` of AutoGPTQ's qlinear_cuda.py. Zeros are stored less one in format
"gptq" (v1) and as they are in "gptq_v2".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear
from deltaserve.server.model.errors import MalformedModel, UnsupportedModel
from deltaserve.server.model.quantized import bits as streams
from deltaserve.server.model.quantized.build import WIDTHS, order_of, whole
from deltaserve.server.model.quantized.fields import Fields
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.packed import FLOATS, Packed

V1, V2 = "gptq", "gptq_v2"

HARMLESS = frozenset(
    {
        "act_group_aware",
        "auto_forward_data_parallel",
        "backend",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "calibration_data_device",
        "compute_device_filter",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "device",
        "dense_vram_strategy",
        "disable_exllama",
        "exllama_config",
        "fail_safe",
        "failsafe",
        "fallback",
        "foem",
        "gc_mode",
        "gptaq",
        "hessian",
        "hyb_act",
        "lm_head",
        "max_input_length",
        "mock_quantization",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "moe",
        "moe_vram_strategy",
        "mse",
        "offload_to_disk",
        "offload_to_disk_path",
        "pack_impl",
        "pad_token_id",
        "parallel_packing",
        "quant_method",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "v2",
        "v2_alpha",
        "vram_strategy",
        "wait_for_submodule_finalizers",
    }
)
"""How the weights were found, or how to run them elsewhere. `sym`: the zeros are stored either way.
`lm_head`, `modules_in_block_to_quantize`: which modules are packed is told by their tensors."""


class Gptq(Format):
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields(config, "quantization_config")
        self.bits = fields.one_of("bits", WIDTHS)
        self.group_size = fields.group_size(default=128)
        self.desc_act = fields.flag("desc_act")
        stored = fields.one_of("checkpoint_format", (V1, V2), fields.get("format", V1))
        fields.one_of("format", (stored,), stored)
        fields.one_of("method", ("gptq",), "gptq")
        fields.one_of("pack_dtype", ("int32",), "int32")
        fields.one_of("is_marlin_format", (False,), False)
        self.v1 = stored == V1
        meta = fields.get("meta", {})
        self.wraps = (
            "gptqmodel" in str(meta.get("quantizer", "")) if isinstance(meta, dict) else False
        )
        self.dynamic = _dynamic(fields)
        fields.finish(HARMLESS)
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        self.label = f"gptq-int{self.bits}-{group}"

    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        bits, group, desc_act = self._scheme(packed.module)
        group = inner if group == -1 else group
        groups = -(-inner // group)
        if inner * bits % 32 or out * bits % 32:
            raise MalformedModel(
                f"{packed.module} has {inner} inputs and {out} outputs, which do not fill words "
                f"of 32 bits at {bits} bits each"
            )
        words = packed.take("qweight", (inner * bits // 32, out), (torch.int32,))
        zeros = self._zeros(packed, groups, out, bits)
        scale = packed.take("scales", (groups, out), FLOATS)
        order = self._order(packed, inner, group, desc_act)
        q = streams.unpack(words.T.contiguous(), bits, inner)
        return whole(q, bits, scale.T, zeros.T, group, order, dtype)

    def _scheme(self, module: str) -> tuple[int, int, bool]:
        """(bits, group size, whether in activation order), by the first pattern of `dynamic` that
        the module's path begins with."""
        found = next((o for pattern, o in self.dynamic if pattern.match(module)), {})
        if found is None:
            raise MalformedModel(
                f"{module} is packed, which quantization_config.dynamic says it is not"
            )
        group = found.get("group_size", self.group_size)
        return found.get("bits", self.bits), group, found.get("desc_act", self.desc_act)

    def _zeros(self, packed: Packed, groups: int, out: int, bits: int) -> Tensor:
        """float32 [groups, out]."""
        words = packed.take("qzeros", (groups, out * bits // 32), (torch.int32,))
        stored = streams.unpack(words, bits, out)
        if not self.v1:
            return stored.float()
        top = (1 << bits) - 1
        if not bool((stored == top).any()):
            return stored.float() + 1
        if self.wraps and 32 % bits == 0:
            # GPTQModel takes one from every field by one subtraction from the word, so a zero of 0
            # borrows from its neighbour; adding the same word undoes it.
            ones = sum(1 << at for at in range(0, 32, bits))
            words = (words.long() + ones).to(torch.int32)
            return streams.unpack(words, bits, out).float()
        raise UnsupportedModel(
            f"{packed.module}.qzeros holds {top} in format gptq (v1), which some programs read as "
            f"a zero of 0 and some of {top + 1}; save it as gptq_v2, where zeros are as they are"
        )

    def _order(self, packed: Packed, inner: int, group: int, desc_act: bool) -> Tensor | None:
        """The inputs in the order of their groups; None if they are in it."""
        if "g_idx" not in packed.parts and not desc_act:
            return None
        order = order_of(packed, "g_idx", inner, group)
        if order is not None and not desc_act:
            raise UnsupportedModel(
                f"{packed.module}.g_idx is not in order although quantization_config.desc_act is "
                "false; programs differ in which of the two they follow"
            )
        return order


def _dynamic(fields: Fields) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """GPTQModel's rules in order: pattern -> what differs there, None if it is not quantized."""
    rules = fields.get("dynamic", {})
    if not isinstance(rules, dict):
        raise fields.refusal("dynamic", "must map patterns to fields")
    found: list[tuple[re.Pattern[str], dict[str, Any] | None]] = []
    for pattern, overrides in rules.items():
        try:
            compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise fields.refusal("dynamic", f"has a pattern that is none: {error}") from error
        if pattern.startswith("-:"):
            found.append((compiled, None))
            continue
        own = Fields(overrides, f"quantization_config.dynamic[{pattern!r}]")
        differs: dict[str, Any] = {}
        if own.get("bits") is not None:
            differs["bits"] = own.one_of("bits", WIDTHS)
        if own.get("group_size") is not None:
            differs["group_size"] = own.group_size()
        if own.get("desc_act") is not None:
            differs["desc_act"] = own.flag("desc_act")
        own.finish(HARMLESS)
        found.append((compiled, differs))
    return found

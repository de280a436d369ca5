"""compressed-tensors: what llm-compressor writes.

    pack-quantized    weight_packed int32 [out, in * bits / 32], weight_shape int64 [2],
                      weight_scale [out, groups], weight_zero_point int32 [out * bits / 32, groups],
                      weight_g_idx int32 [in]
    int-quantized     weight int8, weight_scale, weight_zero_point int8 of the scale's shape
    float-quantized   weight float8_e4m3fn, weight_scale
    naive-quantized   either of the two

Values are signed; packed ones are stored plus half their range, lowest bits first. A scale is for
all weights ([1]), for a row ([out, 1]), for a group of inputs or for a block;
w = (q - zero) * scale. Layout: `pack_quantized`, `naive_quantized` and `dequantize` of the
compressed-tensors package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear, ByteLinear, Int8Linear
from deltaserve.server.model.errors import MalformedModel, UnsupportedModel
from deltaserve.server.model.quantized import bits as streams
from deltaserve.server.model.quantized.build import floats, order_of, spread, whole
from deltaserve.server.model.quantized.fields import Fields
from deltaserve.server.model.quantized.format import Format
from deltaserve.server.model.quantized.fp8 import FLOAT_ACTIVATIONS, FLOAT_CACHE, one_or_rows
from deltaserve.server.model.quantized.packed import FLOATS, Packed

PACKED, INTS, E4M3, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
FORMATS = (PACKED, INTS, E4M3, NAIVE)
HARMLESS = frozenset({"global_compression_ratio", "quant_method", "version"})
HARMLESS_ARGS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})


@dataclass(frozen=True)
class Weights:
    """How one config group holds its weights. group: of inputs, None for all; block: of rows and
    inputs, None if a scale is not of one."""

    format: str
    bits: int
    float: bool
    symmetric: bool
    group: int | None
    block: tuple[int, int] | None
    order: bool

    @property
    def label(self) -> str:
        kind = "fp8-e4m3" if self.float else f"int{self.bits}"
        if self.block is not None:
            return f"{kind}-block{self.block[0]}x{self.block[1]}"
        return kind if self.group is None else f"{kind}-g{self.group}"


class CompressedTensors(Format):
    marks: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    parts: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields(config, "quantization_config")
        stored = fields.get("format", "dense")
        if stored not in (*FORMATS, "mixed-precision"):
            raise fields.refusal("format", f"must be one of {', '.join(FORMATS)}")
        fields.one_of("quantization_status", ("compressed",), "compressed")
        self.ignore = fields.names("ignore")
        _nothing(fields, "transform_config", "transforms of activations are not computed")
        _nothing(fields, "moe_sparsity_config", "experts are served as they are")
        sparsity = fields.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise fields.refusal("sparsity_config", 'must have format "dense"')
        cache = fields.get("kv_cache_scheme")
        fields.finish(HARMLESS | {"config_groups"})
        groups = fields.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise fields.refusal("config_groups", "must name at least one group")
        self.targets: list[tuple[str, Weights]] = []
        activations = False
        for name, group in groups.items():
            own = Fields(group, f"quantization_config.config_groups.{name}")
            weights = _weights(own, stored)
            activations |= own.get("input_activations") is not None
            activations |= own.get("output_activations") is not None
            self.targets += [(target, weights) for target in own.names("targets")]
            own.finish(())
        self.notes = (FLOAT_ACTIVATIONS,) * activations + (FLOAT_CACHE,) * bool(cache)
        labels = dict.fromkeys(weights.label for _, weights in self.targets)
        self.label = f"compressed-tensors-{'+'.join(labels)}"

    def linear(self, packed: Packed, out: int, inner: int, dtype: torch.dtype) -> BaseLinear:
        weights = self._of(packed.module)
        if ("weight_packed" in packed.parts) != (weights.format == PACKED):
            known = ", ".join(sorted(packed.parts))
            raise MalformedModel(
                f"{packed.module} has {known}, which is not what format {weights.format} holds"
            )
        group = inner if weights.group is None else weights.group
        if weights.float:
            q = packed.take("weight", (out, inner), (torch.float8_e4m3fn,))
            scale, group = _scale(packed, weights, out, inner, group)
            return floats(packed, q, scale, group, dtype)
        scale, group = _scale(packed, weights, out, inner, group)
        order = None
        if weights.order and "weight_g_idx" in packed.parts:
            order = order_of(packed, "weight_g_idx", inner, group)
        elif weights.order:
            raise MalformedModel(f"{packed.module}.weight_g_idx is missing")
        if weights.format == PACKED:
            return self._unpack(packed, weights, scale, group, order, dtype, (out, inner))
        q = packed.take("weight", (out, inner), (torch.int8,))
        if weights.symmetric and scale.shape[1] == 1:
            return Int8Linear(q, scale[:, 0], None, dtype)
        zero = None
        if not weights.symmetric:
            zero = packed.take("weight_zero_point", None, (torch.int8,)).float()
            zero = zero.reshape(-1, zero.shape[-1] if zero.dim() else 1)
            if weights.block is not None:
                zero = spread(zero, weights.block, out)
            zero = zero.expand(scale.shape) if zero.numel() == 1 else zero
            if zero.shape != scale.shape:
                raise MalformedModel(
                    f"{packed.module}.weight_zero_point has not the shape of its scale"
                )
        if order is not None:
            raise UnsupportedModel(f"{packed.module}.weight_g_idx is read of {PACKED} only")
        return ByteLinear(q, scale, zero, None, dtype, group)

    def _unpack(
        self,
        packed: Packed,
        weights: Weights,
        scale: Tensor,
        group: int,
        order: Tensor | None,
        dtype: torch.dtype,
        shape: tuple[int, int],
    ) -> BaseLinear:
        out, inner = shape
        bits = weights.bits
        stated = packed.take("weight_shape", (2,), (torch.int64, torch.int32))
        if tuple(stated.tolist()) != shape:
            raise MalformedModel(
                f"{packed.module}.weight_shape is {tuple(stated.tolist())}; the model needs {shape}"
            )
        words = packed.take("weight_packed", (out, -(-inner * bits // 32)), (torch.int32,))
        zero = None
        if not weights.symmetric:
            rows = -(-out * bits // 32)
            zeros = packed.take("weight_zero_point", (rows, scale.shape[1]), (torch.int32,))
            zero = streams.unpack(zeros.T.contiguous(), bits, out).T.float()
        return whole(streams.unpack(words, bits, inner), bits, scale, zero, group, order, dtype)

    def _of(self, module: str) -> Weights:
        """By the first target that is the module's name, else a pattern of it, else its class."""
        if any(_matches(module, name) for name in self.ignore):
            raise MalformedModel(f"{module} is packed, although quantization_config.ignore has it")
        by_name = [w for target, w in self.targets if _matches(module, target)]
        by_class = [w for target, w in self.targets if target == "Linear"]
        for found in (*by_name, *by_class):
            return found
        raise MalformedModel(f"{module} is packed, but no target of quantization_config is it")


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _nothing(fields: Fields, name: str, why: str) -> None:
    if fields.get(name):
        raise fields.refusal(name, f"must be left out: {why}")


def _weights(group: Fields, stored: str) -> Weights:
    held = group.one_of("format", FORMATS, None if stored == "mixed-precision" else stored)
    given = group.get("weights")
    if not isinstance(given, dict):
        raise group.refusal("weights", "must say how the weights are held")
    fields = Fields(given, f"{group.where}.weights")
    kind = fields.one_of("type", ("int", "float"), "int")
    bits = fields.one_of("num_bits", (8,) if kind == "float" or held != PACKED else (4, 8), 8)
    if held != NAIVE and (kind == "float") != (held == E4M3):
        raise fields.refusal("type", f"does not go with format {held}")
    symmetric = fields.one_of("symmetric", (True,) if kind == "float" else (True, False), True)
    fields.one_of("dynamic", (False,), False)
    group_size = fields.get("group_size")
    strategy = fields.get("strategy", "tensor" if group_size is None else "group")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise fields.refusal("strategy", "must be tensor, channel, group or block")
    size = fields.group_size() if strategy == "group" else None
    block = fields.get("block_structure")
    if strategy == "block":
        pair = isinstance(block, list) and len(block) == 2
        if not pair or not all(type(n) is int and n > 0 for n in block) or held == PACKED:
            raise fields.refusal("block_structure", "must be [rows, columns], and not packed")
        block = (block[0], block[1])
    order = fields.get("actorder", False)
    if order not in (False, True, "group", "weight", "static", "dynamic"):
        raise fields.refusal("actorder", "must be group, weight, static or dynamic")
    fields.finish(HARMLESS_ARGS)
    return Weights(
        held,
        bits,
        kind == "float",
        symmetric,
        None if size == -1 else size,
        block if strategy == "block" else None,
        order in (True, "group", "dynamic"),
    )


def _scale(
    packed: Packed, weights: Weights, out: int, inner: int, group: int
) -> tuple[Tensor, int]:
    """([out, groups], inputs in a group)."""
    if weights.block is not None:
        height, width = weights.block
        shape = (-(-out // height), -(-inner // width))
        scale = packed.take("weight_scale", shape, FLOATS)
        return spread(scale, weights.block, out), min(width, inner)
    if weights.group is None:
        return one_or_rows(packed, "weight_scale", out), inner
    return packed.take("weight_scale", (out, -(-inner // group)), FLOATS), group

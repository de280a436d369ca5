"""The compiled forms that a group of linears needs, to be compiled before a server serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from deltaserve.kernels.gated import gpu as gated
from deltaserve.kernels.gated.kernel import gate_kernel
from deltaserve.kernels.gpu import aux, embedding, gemm, inputs
from deltaserve.kernels.gpu.aux_kernel import aux_kernel
from deltaserve.kernels.gpu.base import FOUR_BITS, WITH_ZEROS, GpuLinear
from deltaserve.kernels.gpu.config import (
    WHOLE,
    AuxConfig,
    GemmConfig,
    GroupKey,
    aux_config,
    gemm_config,
    measured,
)
from deltaserve.kernels.gpu.device import NAMES
from deltaserve.kernels.gpu.embedding_kernel import embedding_kernel
from deltaserve.kernels.gpu.gemm_kernel import gemm_kernel
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.quantize_kernel import quantize_kernel
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.table import Group

FLOATS = frozenset({
    "sums", "given", "y_sums", "token_scale", "partial", "arena_float", "norm_float", "h",
    "planes", "page_scale", "vec_strength", "strengths", "mix_strength", "biases", "columns",
    "floats", "key_floats", "key_strengths", "factors",
})  # fmt: skip
NUMBERS = frozenset({
    "M", "TILES", "WIDTH8", "x_part", "sums_part", "y_padded", "copies", "uses", "block_step",
})  # fmt: skip
FACTORS = frozenset({"eps", "offset", "multiplier"})
TABLES = frozenset({
    "arena_int", "bounds", "counter", "entries", "gates", "his", "items", "los", "n_items",
    "offsets", "order", "key_bounds", "key_mixes", "key_offsets", "mix_bounds", "mix_offset",
    "mixes", "page_a", "page_b", "page_bounds", "page_col", "page_hi", "page_lo", "plane_count",
    "tiles", "vec_bounds", "vec_hi", "vec_lo", "vec_offset", "weight",
})  # fmt: skip
COMPUTE = frozenset({
    "x", "scaled", "turned", "arena", "bias", "y", "residual", "gain", "key_gain", "normed", "qkv",
    "cosine", "sine", "keys", "values",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group of linears of a model, as its kernels know it. group_size: inputs of one scale, 0 for
    a scale per row; None: 128 of 4 bits, rows of others. wide_scales: scales and zeros are float32
    where they could be of 16 bits. whole_zeros, ordered: see `Weights`. adapters: whether any may
    act on it; the rows of one without are not the step's tokens and may be more."""

    name: str
    format: str
    in_features: int
    parts: tuple[int, ...]
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = None
    residual: bool = False
    bias: bool = False
    wide_scales: bool = False
    whole_zeros: bool = True
    ordered: bool = False
    adapters: bool = True

    @property
    def key(self) -> GroupKey:
        size = self.group_size
        if size is None:
            size = 128 if self.format in FOUR_BITS else 0
        gated = self.activation is not None
        return GroupKey(self.format, size, self.in_features, sum(self.parts), gated)

    @property
    def whole(self) -> bool:
        """See `inputs.Wanted`."""
        return self.format in WHOLE

    @property
    def group(self) -> Group:
        return Group(self.in_features, self.parts, self.dtype)

    def config(self, tokens: int, arch: int) -> GemmConfig:
        """As `gemm.choose`."""
        config = gemm_config(self.key, tokens, arch)
        return gemm.fitted(config, self.format, self.dtype, self.whole_zeros)


def spec_of(base: GpuLinear, group: Group | None) -> GroupSpec:
    """A group of linears of a loaded model, whose outputs are those of `base`; None: no adapter may
    act on them."""
    adapters = group is not None
    group = group or Group(base.in_features, (base.out_features,), base.dtype)
    wide = base.format in WITH_ZEROS and base.weights.scale.dtype != torch.int32
    return GroupSpec(
        name=f"{group.in_features} to {', '.join(map(str, group.out_features))}",
        format=base.format,
        in_features=group.in_features,
        parts=group.out_features,
        group_size=base.group_size,
        dtype=base.dtype,
        bias=base.bias is not None,
        wide_scales=wide,
        whole_zeros=base.weights.whole_zeros,
        ordered=base.weights.order is not None,
        adapters=adapters,
    )


def gemm_variant(
    spec: GroupSpec, config: GemmConfig, tokens: int, h_split: int, pdl: bool = True, *,
    step: int = 0, y_step: int = 0, apart: bool = False,
) -> Variant:  # fmt: skip
    """h_split: 0 without adapters. step, y_step, apart: see `gemm.constants`."""
    adapters = h_split > 0
    constants = gemm.constants(
        spec.key, spec.dtype, spec.parts, config, tokens=tokens, h_split=h_split,
        activation=spec.activation, bias=spec.bias, residual=spec.residual, pdl=pdl and adapters,
        step=step, y_step=y_step, apart=apart,
    )  # fmt: skip
    constants["PACKED"] = True
    types: dict[str, str] = {}
    if spec.format == "dense":
        types = {"weight": _pointer(spec.dtype), "scale": "*fp32", "zero": "*fp32"}
    elif spec.format in WITH_ZEROS:
        types = {"scale": "*fp32" if spec.wide_scales else "*i32", "zero": "*fp32"}
    else:
        types = {"scale": "*fp32", "zero": "*fp32"}
    if spec.whole:
        types["x"] = "*i8"
    if spec.format == "w8a8":
        types["weight"] = "*i8"
    given = {"bias": spec.bias, "residual": spec.residual, "y_sums": y_step > 0}
    absent = [name for name, here in given.items() if not here]
    name = f"gemm {spec.name} {spec.format} {config.bm}x{config.bn}x{config.bk}"
    name += f" {config.how}" if spec.format == "int4" else ""
    name += f" by {step}" if step not in (0, config.bk) else ""
    name += f" for sums of {y_step}" if y_step else ""
    name += " adapters" if adapters else ""
    name += " apart" if apart else ""
    return variant_of(
        name, gemm_kernel, constants, spec.dtype, config.num_warps, config.num_stages, types,
        absent, weights=config.bn * config.bk, pdl=pdl and adapters,
    )  # fmt: skip


def aux_variant(
    spec: GroupSpec, config: AuxConfig, tokens: int, arch: int, pdl: bool = True
) -> Variant:
    constants = {**aux.constants(spec.group, config, tokens, arch, pdl), "PACKED": True}
    columns = "*i16" if spec.in_features <= 1 << 16 else "*i32"
    name = f"aux {spec.name} {config.block} of {tokens} tokens by {config.gathers}"
    return variant_of(
        name, aux_kernel, constants, spec.dtype,
        config.num_warps, config.num_stages, {"arena_column": columns}, pdl=pdl,
    )  # fmt: skip


def gate_variant(dtype: torch.dtype, tokens: int, h_split: int) -> Variant:
    """Of routers; tokens: of a tile."""
    constants = gated.constants(tokens, h_split)
    name = f"gates {tokens} tokens in {h_split} pieces"
    return variant_of(name, gate_kernel, constants, dtype, 1, 1, {})


def embedding_variant(hidden: int, dtype: torch.dtype) -> Variant:
    """Of the token embedding."""
    types = {"ids": "*i64", "weight": _pointer(dtype)}
    name = f"embedding of {hidden}"
    return variant_of(
        name, embedding_kernel, embedding.constants(hidden), dtype, embedding.WARPS, 1, types
    )


def inputs_variant(
    spec: GroupSpec, tokens: int, step: int, uses: Uses, pdl: bool = True, given: bool = False
) -> Variant:
    """step: columns of a sum, 0 for no sums. given: those of unscaled inputs are there already."""
    parts = len(spec.parts)
    want = inputs.Wanted(tokens, spec.in_features, parts, step, 1, tokens, uses)
    constants = inputs.constants(want, step, given, pdl)
    flags = [f"sums of {step}"] if step else []
    flags += [name for name in ("scaled", "turned", "biased") if getattr(uses, name)]
    flags += ["given"] if given else []
    flags += ["ordered"] if spec.ordered else []
    name = f"inputs {spec.name} {tokens} tokens {' '.join(flags)}"
    absent = [] if spec.ordered else ["order"]
    return variant_of(name, inputs_kernel, constants, spec.dtype, 4, 1, {}, absent, pdl=pdl)


def quantize_variant(spec: GroupSpec, tokens: int, step: int, pdl: bool = True) -> Variant:
    """step: columns of a sum, 0 for no sums."""
    want = inputs.Wanted(tokens, spec.in_features, 1, step, 1, tokens, Uses(), whole=True)
    constants = inputs.quantize_constants(want, pdl)
    name = f"quantize {spec.name} {tokens} tokens" + (f" sums of {step}" if step else "")
    warps = inputs.row_warps(spec.in_features)
    return variant_of(name, quantize_kernel, constants, spec.dtype, warps, 1, {"q": "*i8"}, pdl=pdl)


def of_group(spec: GroupSpec, buckets: Sequence[int], arch: int) -> Iterator[Variant]:
    """What a group needs for these numbers of tokens, with adapters and without; of a step without
    any, the base as one linear (`GpuLinear`). One that no adapter may act on: that alone, for any
    number of rows."""
    seen: set[tuple[object, ...]] = set()
    one = replace(spec, name=f"{spec.name} as one", parts=(sum(spec.parts),))
    if not spec.adapters:
        buckets = sorted({*buckets, *measured(spec.key, arch)})
        buckets.append(buckets[-1] + 256)  # what the rule says of more
    for bucket in buckets:
        found = _of_base(one, bucket, arch)
        if spec.adapters:
            found += _of_base(spec, bucket, arch) + _with_adapters(spec, bucket, arch)
        for variant in found:
            if variant.identity not in seen:
                seen.add(variant.identity)
                yield variant


def _of_base(spec: GroupSpec, bucket: int, arch: int) -> list[Variant]:
    """In steps without adapters."""
    config = spec.config(bucket, arch)
    tokens = max(config.bm, 16)
    step = config.summed(spec.format, spec.key.group_size)
    found = [gemm_variant(spec, config, tokens, 0)]
    if spec.whole:
        found.append(quantize_variant(spec, tokens, step))
        step = 0
    if step or spec.ordered:
        found.append(inputs_variant(spec, tokens, step, Uses()))
    return found


def _with_adapters(spec: GroupSpec, bucket: int, arch: int) -> list[Variant]:
    config = spec.config(bucket, arch)
    own = aux_config(bucket, spec.in_features, arch)
    tokens = max(config.bm, own.block, 16)
    step = config.summed(spec.format, spec.key.group_size)
    found = [
        gemm_variant(spec, config, tokens, own.h_split),
        aux_variant(spec, own, tokens, arch),
        gate_variant(spec.dtype, tokens, own.h_split),
    ]
    if spec.whole:
        found.append(quantize_variant(spec, tokens, step))
        step = 0
    for scaled, turned, biased in product((False, True), repeat=3):
        uses = Uses(scaled, False, turned, biased)
        wanted = step or spec.ordered or any((scaled, turned, biased))
        if wanted and (own.gathers > 1 or not turned):
            found.append(inputs_variant(spec, tokens, step, uses))
    return found


def variant_of(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    num_warps: int,
    num_stages: int,
    types: dict[str, str],
    absent: Sequence[str] = (),
    weights: int = 0,
    pdl: bool = False,
) -> Variant:
    """types: of arguments that are not of the usual type of their name. absent: that are None."""
    constants = {**constants, **dict.fromkeys(absent)}
    signature = {
        argument: types.get(argument) or _type(argument, dtype)
        for argument in kernel.arg_names
        if argument not in constants
    }
    aligned = frozenset(a for a, t in signature.items() if t.startswith("*"))
    return Variant(name, kernel, signature, constants, aligned, num_warps, num_stages, weights, pdl)


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in COMPUTE:
        return _pointer(dtype)
    if argument in FACTORS:
        return "fp32"
    if argument in FLOATS:
        return "*fp32"
    return {**dict.fromkeys(NUMBERS, "i32"), **dict.fromkeys(TABLES, "*i32")}[argument]


def _pointer(dtype: torch.dtype) -> str:
    return f"*{NAMES[dtype]}"

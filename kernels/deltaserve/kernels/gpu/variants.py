"""Every compiled form that a server of a model needs: what start-up compiles and the gate reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from deltaserve.kernels.attention import variants as attention
from deltaserve.kernels.gpu import aux, gemm, inputs
from deltaserve.kernels.gpu.aux_kernel import aux_kernel
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.config import AuxConfig, GemmConfig, GroupKey, aux_config, gemm_config
from deltaserve.kernels.gpu.device import NAMES
from deltaserve.kernels.gpu.gemm_kernel import gemm_kernel
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.step import EVERYTHING
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.table import Group

FLOATS = frozenset({
    "sums", "partial", "arena_float", "h", "planes", "page_scale", "vec_strength", "strengths",
    "biases", "columns",
})  # fmt: skip
NUMBERS = frozenset({"M", "TILES", "WIDTH8", "x_part", "sums_part"})
TABLES = frozenset({
    "arena_int", "bounds", "counter", "entries", "his", "items", "los", "n_items", "offsets",
    "page_a", "page_b", "page_bounds", "page_col", "page_hi", "page_lo", "plane_count", "tiles",
    "vec_bounds", "vec_hi", "vec_lo", "vec_offset", "weight",
})  # fmt: skip
COMPUTE = frozenset({"x", "scaled", "turned", "arena", "bias", "y", "residual"})


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group of linears of a model, as its kernels know it. wide_scales: scales and zeros of int4
    are float32 (see `Weights`)."""

    name: str
    format: str
    in_features: int
    parts: tuple[int, ...]
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = None
    residual: bool = False
    bias: bool = False
    wide_scales: bool = False

    @property
    def key(self) -> GroupKey:
        size = self.group_size if self.format == "int4" else 0
        gated = self.activation is not None
        return GroupKey(self.format, size, self.in_features, sum(self.parts), gated)

    @property
    def group(self) -> Group:
        return Group(self.in_features, self.parts, self.dtype)


def spec_of(base: GpuLinear, group: Group) -> GroupSpec:
    """A group of linears of a loaded model, whose outputs are those of `base`."""
    wide = base.format == "int4" and base.weights.scale.dtype != torch.int32
    return GroupSpec(
        name=f"{group.in_features} to {', '.join(map(str, group.out_features))}",
        format=base.format,
        in_features=group.in_features,
        parts=group.out_features,
        group_size=base.group_size or 128,
        dtype=base.dtype,
        bias=base.bias is not None,
        wide_scales=wide,
    )


def gemm_variant(
    spec: GroupSpec, config: GemmConfig, tokens: int, h_split: int, pdl: bool = True
) -> Variant:
    """h_split: 0 without adapters."""
    adapters = h_split > 0
    constants = gemm.constants(
        spec.key, spec.dtype, spec.parts, config, tokens=tokens, h_split=h_split,
        activation=spec.activation, bias=spec.bias, residual=spec.residual, pdl=pdl and adapters,
    )  # fmt: skip
    constants["PACKED"] = True
    types: dict[str, str] = {}
    if spec.format == "dense":
        types = {"weight": _pointer(spec.dtype), "scale": "*fp32", "zero": "*fp32"}
    elif spec.format == "int4":
        types = {"scale": "*fp32" if spec.wide_scales else "*i32", "zero": "*fp32"}
    else:
        types = {"scale": "*fp32", "zero": "*fp32"}
    absent = [n for n, here in (("bias", spec.bias), ("residual", spec.residual)) if not here]
    name = f"gemm {spec.name} {spec.format} {config.bm}x{config.bn}x{config.bk}"
    name += f" {config.how}" if spec.format == "int4" else ""
    name += " adapters" if adapters else ""
    return _variant(
        name, gemm_kernel, constants, spec.dtype, config.num_warps, config.num_stages, types,
        absent, weights=config.bn * config.bk, pdl=pdl and adapters,
    )  # fmt: skip


def aux_variant(
    spec: GroupSpec, config: AuxConfig, tokens: int, arch: int, pdl: bool = True
) -> Variant:
    constants = {**aux.constants(spec.group, config, tokens, arch, pdl), "PACKED": True}
    columns = "*i16" if spec.in_features <= 1 << 16 else "*i32"
    name = f"aux {spec.name} {config.block} of {tokens} tokens by {config.gathers}"
    return _variant(
        name, aux_kernel, constants, spec.dtype,
        config.num_warps, config.num_stages, {"arena_column": columns}, pdl=pdl,
    )  # fmt: skip


def inputs_variant(
    spec: GroupSpec, tokens: int, step: int, uses: Uses, pdl: bool = True
) -> Variant:
    """step: columns of a sum, 0 for no sums."""
    parts = len(spec.parts)
    constants = inputs.constants(spec.in_features, parts, step, tokens, uses, pdl)
    flags = [f"sums of {step}"] if step else []
    flags += [name for name in ("scaled", "turned", "biased") if getattr(uses, name)]
    name = f"inputs {spec.name} {tokens} tokens {' '.join(flags)}"
    return _variant(name, inputs_kernel, constants, spec.dtype, 4, 1, {}, pdl=pdl)


def of_group(spec: GroupSpec, buckets: Sequence[int], arch: int) -> Iterator[Variant]:
    """What a group needs for these numbers of tokens, with adapters and without."""
    seen: set[tuple[object, ...]] = set()
    for bucket in buckets:
        config = gemm_config(spec.key, bucket, arch)
        own = aux_config(bucket, spec.in_features, arch)
        tokens = max(config.bm, own.block, 16)
        step = config.bk if spec.format == "int4" and config.how == "sums" else 0
        found = [
            gemm_variant(spec, config, max(config.bm, 16), 0),
            gemm_variant(spec, config, tokens, own.h_split),
            aux_variant(spec, own, tokens, arch),
        ]
        for scaled, turned, biased in product((False, True), repeat=3):
            uses = Uses(scaled, False, turned, biased)
            if (step or any((scaled, turned, biased))) and (own.gathers > 1 or not turned):
                found.append(inputs_variant(spec, tokens, step, uses))
        if step and tokens != max(config.bm, 16):
            found.append(inputs_variant(spec, max(config.bm, 16), step, Uses()))
        for variant in found:
            if variant.identity not in seen:
                seen.add(variant.identity)
                yield variant


def llama_8b(format: str) -> list[GroupSpec]:
    """The groups of Llama-3.1-8B, which the committed tables and the gate are about."""
    return [
        GroupSpec("qkv", format, 4096, (4096, 1024, 1024)),
        GroupSpec("o", format, 4096, (4096,), residual=True),
        GroupSpec("gate_up", format, 4096, (14336, 14336), activation="silu"),
        GroupSpec("down", format, 14336, (4096,), residual=True),
    ]


def all_variants(arch: int = 90) -> list[Variant]:
    """What the compile gate checks: int4 at every tile size, the other formats, small groups of
    weights with a bias, whatever an adapter needs, attention."""
    qkv, _, gate_up, down = llama_8b("int4")
    found = [v for v in of_group(qkv, (1, 16, 64, 256), arch) if v.kernel is not inputs_kernel]
    found.append(inputs_variant(qkv, 16, 128, EVERYTHING))
    found += _gemms(gate_up, (1, 16, 64, 256), arch)
    found += _gemms(down, (16, 256), arch)
    for format in ("int8", "fp8", "dense"):
        found += _gemms(llama_8b(format)[0], (16, 256), arch)
    small = GroupSpec("qkv g64 bias", "int4", 2048, (2048, 512, 512), 64, bias=True)
    found += _gemms(small, (16, 64), arch)
    found += attention.variants(32, 8, 128, 128)
    found += attention.variants(8, 4, 256, 256, windowed=(True,), softcap=True)
    found += attention.variants(64, 8, 64, 64, windowed=(True,), sinks=torch.bfloat16)
    return found


def _gemms(spec: GroupSpec, buckets: Sequence[int], arch: int) -> Iterator[Variant]:
    """Those of `of_group` that depend on the base's format, in their larger form."""
    found = (v for v in of_group(spec, buckets, arch) if v.kernel is gemm_kernel)
    return (v for v in found if v.constants["ADAPTERS"])


def _variant(
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
    if argument in FLOATS:
        return "*fp32"
    return {**dict.fromkeys(NUMBERS, "i32"), **dict.fromkeys(TABLES, "*i32")}[argument]


def _pointer(dtype: torch.dtype) -> str:
    return f"*{NAMES[dtype]}"

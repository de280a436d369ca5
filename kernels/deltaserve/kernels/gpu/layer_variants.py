"""The compiled forms that a decoder layer run by `GpuLayer` needs beside those of its groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch

from deltaserve.kernels.attention import variants as attention
from deltaserve.kernels.attention.cells import write_kernel
from deltaserve.kernels.attention.gpu import sum_step
from deltaserve.kernels.gpu import norm, rope
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.config import AuxConfig, GemmConfig, aux_config
from deltaserve.kernels.gpu.gemm import tile_rows
from deltaserve.kernels.gpu.inputs import Wanted
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.norm_kernel import norm_kernel
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.rope_kernel import rope_kernel
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.gpu.variants import (
    GroupSpec,
    aux_variant,
    gate_variant,
    gemm_variant,
    inputs_variant,
    quantize_variant,
    spec_of,
    variant_of,
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A decoder layer as `GpuLayer` runs it. groups: q k v, o, gate up, down; the third with an
    activation, the second and fourth with a residual. turned: elements of a head that are turned.
    block_size: cells of a block. windowed: whether a query sees a window of its sequence."""

    groups: tuple[GroupSpec, GroupSpec, GroupSpec, GroupSpec]
    heads: int
    kv_heads: int
    dim: int
    turned: int
    block_size: int = 16
    windowed: bool = False
    softcap: bool = False
    head_norms: bool = False

    def __str__(self) -> str:
        return f"decoder layers of {self.heads} heads of {self.dim}, {self.groups[0].format}"


def spec_of_layer(layer: GpuLayer, turned: int, block_size: int) -> LayerSpec:
    """A layer of a loaded model."""
    parts = layer.parts
    qkv, o, up, down = (
        spec_of(cast(GpuLinear, linear.base), linear.deltas.group) for linear in parts.linears
    )
    return LayerSpec(
        (
            qkv,
            replace(o, residual=True),
            replace(up, activation="silu"),
            replace(down, residual=True),
        ),
        parts.heads,
        parts.kv_heads,
        parts.dim,
        turned,
        block_size,
        windowed=parts.how.window is not None,
        softcap=parts.how.softcap is not None,
        head_norms=parts.head_norms is not None,
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a group is cut for a number of tokens. step: columns of the sums that it wants."""

    spec: GroupSpec
    config: GemmConfig
    aux: AuxConfig | None

    @property
    def tokens(self) -> int:
        return max(self.fewer, self.aux.block if self.aux else 0)

    @property
    def fewer(self) -> int:
        """Tokens of a tile where no adapter acts on the group, while some do elsewhere."""
        return max(self.config.bm, 16)

    @property
    def step(self) -> int:
        return self.config.summed(self.spec.format, self.spec.key.group_size)

    @property
    def step_of_x(self) -> int:
        """See `Wanted`."""
        return 0 if self.spec.ordered or self.spec.whole else self.step


def of_layer(spec: LayerSpec, buckets: Sequence[int], arch: int) -> Iterator[Variant]:
    """What a layer needs for these numbers of tokens, with adapters and without; all of it."""
    seen: set[tuple[object, ...]] = set()
    for bucket, adapters in product(buckets, (False, True)):
        for variant in _of_step(spec, bucket, adapters, arch):
            if variant.identity not in seen:
                seen.add(variant.identity)
                yield variant


def _of_step(spec: LayerSpec, bucket: int, adapters: bool, arch: int) -> Iterator[Variant]:
    qkv, o, up, down = (
        _Cut(g, g.config(bucket, arch), aux_config(bucket, g.in_features, arch))
        if adapters
        else _Cut(g, g.config(bucket, arch), None)
        for g in spec.groups
    )
    dtype = qkv.spec.dtype
    for cut in (qkv, up):
        if cut.spec.ordered:  # the norm makes x alone
            yield _norm(
                f"norm {cut.spec.name} alone", norm.alone(1, cut.spec.in_features), dtype, adapters
            )
            yield from _inputs(cut, 0)
        else:
            for tokens in {cut.tokens, cut.fewer}:  # tuned norms alone are adapters too
                yield norm_variant(cut.spec, tokens, cut.step, adapters)
    for tuned in {False, adapters and spec.head_norms}:
        yield rope_variant(spec, dtype, tuned)
    mixed = sum_step(spec.dim, o.step_of_x) if o.step_of_x else 0
    act = min(down.step_of_x, tile_rows(up.config, True))
    found = attention.variants(
        spec.heads, spec.kv_heads, spec.dim, spec.dim, spec.block_size, dtype, (spec.windowed,),
        spec.softcap, sums=mixed,
    )  # fmt: skip
    yield from (v for v in found if v.kernel is not write_kernel)
    for cut, step, y_step in ((qkv, 0, 0), (o, mixed, 0), (up, 0, act), (down, act, 0)):
        h_split = cut.aux.h_split if cut.aux else 0
        for apart in {False, adapters and cut is up}:
            yield gemm_variant(
                cut.spec, cut.config, cut.tokens, h_split, step=step, y_step=y_step, apart=apart
            )
        if cut.aux is not None:
            yield aux_variant(cut.spec, cut.aux, cut.tokens, arch)
            yield gate_variant(dtype, cut.tokens, cut.aux.h_split)
    yield from _inputs(o, mixed)
    yield from _inputs(down, act)


def _inputs(cut: _Cut, given: int) -> Iterator[Variant]:
    """For what was not made with x. given: columns of the sums that were, 0 for none."""
    summed = cut.step
    if cut.spec.whole:
        yield quantize_variant(cut.spec, cut.tokens, summed)
        summed = 0
    for scaled, turned, biased in product((False, True), repeat=3):
        if (scaled or turned or biased) and not (cut.aux and (cut.aux.gathers > 1 or not turned)):
            continue
        step = (given or summed) if scaled or not given else 0
        if step or scaled or turned or biased or cut.spec.ordered:
            uses = Uses(scaled, False, turned, biased)
            yield inputs_variant(cut.spec, cut.tokens, step, uses, given=bool(given and step))


def norm_variant(spec: GroupSpec, tokens: int, step: int, adapters: bool) -> Variant:
    """Of a norm before a group. step: columns of the sums that it wants, 0 for none."""
    want = Wanted(
        tokens, spec.in_features, len(spec.parts), step, 1, tokens, Uses(), whole=spec.whole
    )
    name = f"norm {spec.name} {tokens} tokens"
    name += f" sums of {step}" if step else ""
    name += " in 8 bits" if spec.whole else ""
    return _norm(name, want, spec.dtype, adapters)


def of_norm(hidden: int, dtype: torch.dtype) -> Iterator[Variant]:
    """What a norm of which nothing but x is wanted needs, with adapters and without."""
    for adapters in (False, True):
        yield _norm(f"norm of {hidden}", norm.alone(1, hidden), dtype, adapters)


def _norm(name: str, want: Wanted, dtype: torch.dtype, adapters: bool) -> Variant:
    constants = norm.constants(want, False, adapters, True)
    name += " adapters" if adapters else ""
    types = {"scaled": "*i8"} if want.whole else {}
    return variant_of(name, norm_kernel, constants, dtype, norm.warps(want), 1, types, pdl=True)


def rope_variant(spec: LayerSpec, dtype: torch.dtype, tuned: bool) -> Variant:
    """tuned: whether adapters tune the norms of heads."""
    shape = (spec.heads, spec.kv_heads, spec.dim, spec.turned, spec.block_size)
    constants = rope.constants(*shape, spec.head_norms, tuned, True)
    tables = ["floats", "mixes", "bounds", "offsets", "strengths"]
    absent = [] if spec.head_norms else ["gain", "key_gain"]
    absent += [] if tuned else [*tables, *(f"key_{name}" for name in tables)]
    name = f"rope {spec.heads}/{spec.kv_heads} x {spec.dim} turned {spec.turned}"
    name += " normed" if spec.head_norms else ""
    name += " tuned" if tuned else ""
    types = {"cells": "*i64", "block_step": "i32"}
    return variant_of(name, rope_kernel, constants, dtype, 4, 1, types, absent, pdl=True)

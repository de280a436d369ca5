"""What the compile gate reads of all that a server may compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from deltaserve.kernels.attention import variants as attention
from deltaserve.kernels.gpu.config import aux_config, gemm_config
from deltaserve.kernels.gpu.gemm_kernel import gemm_kernel
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.layer_variants import LayerSpec, norm_variant, rope_variant
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.step import EVERYTHING
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.gpu.variants import (
    GroupSpec,
    embedding_variant,
    gemm_variant,
    inputs_variant,
    of_group,
    quantize_variant,
)


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
    found += _forms(arch)
    found += _whole(arch)
    found += _layer(arch)
    found.append(embedding_variant(4096, torch.bfloat16))
    found += attention.variants(32, 8, 128, 128)
    found += attention.variants(8, 4, 256, 256, windowed=(True,), softcap=True)
    found += attention.variants(64, 8, 64, 64, windowed=(True,), sinks=torch.bfloat16)
    return found


def _forms(arch: int) -> list[Variant]:
    """What else checkpoints hold: scales for groups of bytes, zeros of bytes, codes, inputs in an
    order of their own."""
    found: list[Variant] = []
    for format, size in (("int8", 128), ("uint8", 128), ("fp8", 128), ("code4", 64)):
        spec = GroupSpec(f"qkv g{size}", format, 4096, (4096, 1024, 1024), size)
        found += _gemms(spec, (16, 256) if format == "code4" else (16,), arch)
    ordered = replace(llama_8b("int4")[0], ordered=True)
    found.append(inputs_variant(ordered, 16, 128, EVERYTHING))
    return found


def _whole(arch: int) -> list[Variant]:
    """Products of whole numbers at every tile size, and what quantizes their inputs."""
    found: list[Variant] = []
    for format, step in (("w8a8", 0), ("w4a8", 128)):
        qkv, _, gate_up, down = llama_8b(format)
        found += _gemms(qkv, (1, 16, 64, 256), arch)
        found += _gemms(gate_up, (16, 256), arch)
        found.append(quantize_variant(down, 16, step))
        found.append(norm_variant(gate_up, 16, step, True))
    found += _gemms(GroupSpec("qkv g64", "w4a8", 4096, (4096, 1024, 1024), 64), (16, 256), arch)
    return found


def _gemms(spec: GroupSpec, buckets: Sequence[int], arch: int) -> Iterator[Variant]:
    """Those of `of_group` that depend on the base's format, in their larger form."""
    found = (v for v in of_group(spec, buckets, arch) if v.kernel is gemm_kernel)
    return (v for v in found if v.constants["ADAPTERS"])


def _layer(arch: int) -> list[Variant]:
    """Of Llama-3.1-8B's layer: its norms and rotations, attention that gives sums, products that
    give sums and take finer ones. Of another's: norms of heads, and heads turned in part; gate and
    up in one module."""
    qkv, o, gate_up, down = llama_8b("int4")
    spec = LayerSpec((qkv, o, gate_up, down), 32, 8, 128, 128)
    other = LayerSpec(spec.groups, 16, 8, 128, 96, head_norms=True)
    found = [norm_variant(qkv, 16, 128, False), norm_variant(gate_up, 16, 128, True)]
    found += [rope_variant(spec, qkv.dtype, False), rope_variant(other, qkv.dtype, True)]
    found += [v for v in attention.variants(32, 8, 128, 128, sums=128) if "SUM" in v.constants]
    cut, h_split = gemm_config(gate_up.key, 16, arch), aux_config(16, 4096, arch).h_split
    for apart in (False, True):
        found.append(gemm_variant(gate_up, cut, 16, h_split, y_step=64, apart=apart))
    joined = replace(gate_up, name="gate_up joined", parts=(sum(gate_up.parts),))
    found.append(gemm_variant(joined, cut, 16, h_split, y_step=64))
    found.append(gemm_variant(down, gemm_config(down.key, 16, arch), 16, h_split, step=64))
    found.append(inputs_variant(down, 16, 64, Uses(True, False, True, True), given=True))
    return found

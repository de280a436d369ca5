"""Which linears and batches are measured, and the bytes and operations they cannot do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

QUANTIZED_GROUP = 128
"""Inputs that share a scale and a zero point in int4."""


@dataclass(frozen=True)
class Group:
    """Linears that share their input, their outputs side by side."""

    name: str
    in_features: int
    parts: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.parts)

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


LLAMA_8B = (
    Group("qkv", 4096, (4096, 1024, 1024)),
    Group("o", 4096, (4096,)),
    Group("gate_up", 4096, (14336, 14336)),
    Group("down", 14336, (4096,)),
)
LLAMA_70B = (
    Group("70b.qkv", 8192, (8192, 1024, 1024)),
    Group("70b.gate_up", 8192, (28672, 28672)),
)
TINY = (Group("qkv", 256, (128, 64, 64)), Group("down", 512, (128,)))
"""For the interpreter."""

Batch = tuple[int, ...]
"""The adapter of each token, -1 for none; equal ones are neighbours, as in a scheduled batch."""


def spread(tokens: int, adapters: int, first: int = 0) -> Batch:
    """`tokens` over `adapters` as evenly as they go, adapters numbered from `first`."""
    return tuple(sorted(first + i % adapters for i in range(tokens)))


def base_bytes(group: Group, form: str) -> int:
    """Of the weights: "16-bit", "int8" and "fp8" with a float32 scale per output, "int4" with a
    16-bit scale and zero point per 128 inputs. "w8a8" and "w4a8": as int8 and int4, of inputs in 8
    bits."""
    form = {"w8a8": "int8", "w4a8": "int4"}.get(form, form)
    if form == "16-bit":
        return 2 * group.weights
    if form in ("int8", "fp8"):
        return group.weights + 4 * group.out_features
    if form == "int4":
        return group.weights // 2 + 4 * group.weights // QUANTIZED_GROUP
    raise ValueError(f"no such form of a base: {form}")


def lowrank_bytes(group: Group, ranks: Sequence[int]) -> int:
    """16-bit A and B of one adapter of each of these ranks."""
    row = len(group.parts) * group.in_features + group.out_features
    return 2 * row * sum(ranks)


def bit_bytes(group: Group, adapters: int) -> int:
    """One sign plane and a float32 scale per output."""
    return adapters * (group.weights // 8 + 4 * group.out_features)


def sparse_bytes(group: Group, adapters: int, density: float) -> int:
    """A 16-bit value and a 16-bit column per nonzero, a 32-bit row pointer per output."""
    return adapters * (round(4 * density * group.weights) + 4 * group.out_features)


def activation_bytes(group: Group, tokens: int) -> int:
    """16-bit x read once, 16-bit y written once."""
    return 2 * tokens * (group.in_features + group.out_features)


def operations(group: Group, tokens: int, form: str = "16-bit") -> int:
    """Of the base product, as many as take the time on 16-bit floats: whole numbers of 8 bits are
    multiplied at twice the rate."""
    return (1 if form.endswith("a8") else 2) * tokens * group.weights


def floor_us(nbytes: float, operations: float, tb_per_s: float, tflop_per_s: float) -> float:
    """Microseconds that neither the memory nor the matrix units can do better than."""
    return max(nbytes / tb_per_s, operations / tflop_per_s) / 1e6


def copies(nbytes: int, cache: int, least: int = 8, most: int = 1024) -> int:
    """How many sets of `nbytes` to rotate through so that each comes from memory: more than four
    times the cache, and no fewer than `least`."""
    return max(least, min(most, -(-4 * cache // max(nbytes, 1))))

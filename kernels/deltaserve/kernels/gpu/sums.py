"""Sums: what a base of 4-bit weights wants of its input, where the kernel that makes it takes
them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Sums:
    """values: float32 [width / step, padded], flat: x [M, width] summed over `step` columns at a
    time. What lies past the M tokens may hold anything."""

    values: Tensor
    step: int
    padded: int

"""Variant: one compiled form of a kernel, named so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What `triton.compile` needs to know, and what the compile gate checks.

    signature: Triton's type of every argument that is not a constant ("*bf16", "i32").
    constants: the value of every `tl.constexpr` argument.
    aligned: the arguments promised to be divisible by 16, without which no wide load is made.
    weights: how many weights one iteration of the main loop consumes, or 0 if it has none to
    count: the instruction budget is per weight.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    weights: int = 0
    pdl: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for variants that compile to the same machine code."""
        constants = tuple(sorted((k, str(v)) for k, v in self.constants.items()))
        signature = tuple(sorted(self.signature.items()))
        options = (self.num_warps, self.num_stages, self.pdl)
        return self.kernel.fn.__name__, signature, constants, self.aligned, options

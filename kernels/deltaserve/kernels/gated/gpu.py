"""The launch of gate_kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaserve.kernels.gated.kernel import gate_kernel
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.step import StepPlan

BLOCK = 16
"""Tokens of one program."""


def run_gates(h: Tensor, plan: StepPlan) -> None:
    """Weighs the experts' rows of h, as `run_aux` made it, in place. It starts when that has ended,
    and the base product's epilogue waits for it."""
    tokens = plan.tiling.tokens
    launch(
        gate_kernel,
        (plan.gates, tokens // BLOCK),
        (h, plan.tables["gates"], plan.tiles, plan.width // 8),
        constants(tokens, plan.aux.h_split),
        num_warps=1,
        num_stages=1,
    )


def constants(tokens: int, h_split: int) -> dict[str, Any]:
    """The kernel's constants. tokens: of a tile."""
    return {"TOKENS": tokens, "BM": BLOCK, "SPLIT": h_split}

"""The launch of inputs_kernel: what a group's launches are given beside x."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.bit.words import offsets
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.config import GemmConfig
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.gpu.workspace import Workspace

BLOCK = 16
"""Tokens of one program."""


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """x: what the adapters read, [M, K]. base: what the base reads, [M, K] or [parts, M, K].
    sums: float32 [parts or 1, steps, padded]; turned: [K, padded]; biases: float32 [K / 128,
    padded]. padded: tokens in whole tiles of `tokens`. apart: whether base and sums have one copy
    per part."""

    x: Tensor
    base: Tensor
    sums: Tensor
    turned: Tensor
    biases: Tensor
    tiles: int
    tokens: int
    apart: bool

    @property
    def padded(self) -> int:
        return self.tiles * self.tokens


def run_inputs(
    x: Tensor,
    weights: Weights,
    plan: StepPlan | None,
    config: GemmConfig,
    parts: int,
    arena: Arena | None,
    workspace: Workspace,
) -> Inputs:
    """x: [M, K], contiguous. One launch, or none if nothing beside x is wanted."""
    count, width = x.shape
    tokens = plan.tiling.tokens if plan else max(config.bm, 16)
    tiles = plan.tiles if plan else -(-count // tokens)
    uses = plan.uses if plan else Uses()
    step = config.bk if weights.format == "int4" and config.how == "sums" else 0
    copies = parts if uses.apart else 1
    chunks = -(-width // 128)
    padded = tiles * tokens
    inputs = Inputs(
        x=x,
        base=workspace.take("scaled", copies * x.numel(), x.dtype) if uses.scaled else x,
        sums=workspace.take("sums", copies * -(-width // step) * padded if step else 1),
        turned=workspace.take("turned", width * padded if uses.turned else 1, x.dtype),
        biases=workspace.take("biases", chunks * padded if uses.biased else 1),
        tiles=tiles,
        tokens=tokens,
        apart=uses.apart,
    )
    if not (step or uses.scaled or uses.turned or uses.biased):
        return inputs
    t = plan.tables if plan else {}
    ints, floats = workspace.take("nothing", 1, torch.int32), workspace.take("nothing", 1)
    pdl = gpu.overlaps(x.device)
    launch(
        inputs_kernel,
        (padded // BLOCK, chunks, copies),
        (
            x, inputs.base, inputs.sums, inputs.turned, inputs.biases,
            column_offsets(x.dtype, x.device) if uses.biased else floats,
            arena.view(torch.float32) if arena else floats, t.get("in_offset", ints),
            t.get("in_lo", ints), t.get("in_hi", ints), t.get("in_strength", floats),
            t.get("in_bounds", ints), count, tiles,
        ),
        constants(width, parts, step, tokens, uses, pdl),
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )  # fmt: skip
    return inputs


def constants(
    in_features: int, parts: int, step: int, tokens: int, uses: Uses, pdl: bool
) -> dict[str, Any]:
    """The kernel's constants. step: columns of a sum, 0 for none."""
    return dict(
        K=in_features, PARTS=parts, STEP=step, TOKENS=tokens, BT=BLOCK, SCALED=uses.scaled,
        TURNED=uses.turned, BIASED=uses.biased, PDL=pdl,
    )  # fmt: skip


@cache
def column_offsets(dtype: torch.dtype, device: torch.device) -> Tensor:
    """float32 [128], see bit/words.py."""
    return offsets(dtype).to(device)

"""What a group's launches are given beside x: scaled copies, sums over int4's steps, x turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.config import GemmConfig
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.gpu.workspace import Workspace

BLOCK = 16
"""Tokens of one program."""


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """x: what the adapters read, [M, K]. base: what the base reads, [M, K] or [parts, M, K].
    sums: float32 [parts or 1, groups, padded]; turned: [K, padded]. padded: tokens in whole tiles
    of `tokens`. apart: whether base and sums have one copy per part."""

    x: Tensor
    base: Tensor
    sums: Tensor
    turned: Tensor
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
    wants_sums = weights.format == "int4" and config.how == "sums"
    scaled, turned = plan is not None and plan.scaled, plan is not None and plan.turned
    apart = plan is not None and plan.apart
    copies = parts if apart else 1
    group = config.bk if wants_sums else 128
    groups = -(-width // group)
    inputs = Inputs(
        x=x,
        base=workspace.take("scaled", copies * x.numel(), x.dtype) if scaled else x,
        sums=workspace.take("sums", copies * groups * tiles * tokens),
        turned=workspace.take("turned", width * tiles * tokens if turned else 1, x.dtype),
        tiles=tiles,
        tokens=tokens,
        apart=apart,
    )
    if not (wants_sums or scaled or turned):
        return inputs
    tables = plan.tables if plan else {}
    nothing = workspace.take("nothing", 1, torch.int32)
    no_floats = workspace.take("nothing", 1)
    pdl = gpu.overlaps(x.device)
    launch(
        inputs_kernel,
        (tiles * tokens // BLOCK, groups, copies),
        (
            x, inputs.base, inputs.sums, inputs.turned,
            arena.view(torch.float32) if arena else no_floats,
            tables.get("in_offset", nothing), tables.get("in_lo", nothing),
            tables.get("in_hi", nothing), tables.get("in_strength", no_floats),
            tables.get("in_bounds", nothing), count, tiles,
        ),
        constants(
            width, parts, group, tokens, sums=wants_sums, scaled=scaled, turned=turned, pdl=pdl
        ),
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )  # fmt: skip
    return inputs


def constants(
    in_features: int, parts: int, group: int, tokens: int, *,
    sums: bool, scaled: bool, turned: bool, pdl: bool,
) -> dict[str, Any]:  # fmt: skip
    """The kernel's constants."""
    return dict(
        K=in_features, PARTS=parts, GROUP=group, TOKENS=tokens, BT=BLOCK, SUMS=sums,
        SCALED=scaled, TURNED=turned, PDL=pdl,
    )  # fmt: skip

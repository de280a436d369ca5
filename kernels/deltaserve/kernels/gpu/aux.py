"""The launch of aux_kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.bit.words import ROWS
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.aux_kernel import aux_kernel
from deltaserve.kernels.gpu.config import AuxConfig, is_hopper
from deltaserve.kernels.gpu.inputs import Inputs
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.sparse import panels, sell
from deltaserve.kernels.table import Group

DEPTH = 8
"""Entries of a sparse row that are read at a time."""


def run_aux(
    inputs: Inputs, plan: StepPlan, group: Group, arena: Arena, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Returns h, float32 [h_split, width, padded], and the planes of ready deltas, float32
    [planes, padded, N], both flat; what no item wrote holds anything."""
    x, aux, t = inputs.x, plan.aux, plan.tables
    outputs = sum(group.out_features)
    h = workspace.take("h", aux.h_split * max(plan.width, 8) * plan.padded)
    planes = workspace.take("planes", plan.planes * plan.padded * outputs)
    column_type = torch.int16 if group.in_features <= 1 << 16 else torch.int32
    pdl = gpu.overlaps(x.device)
    launch(
        aux_kernel,
        (plan.programs,),
        (
            t["items"], plan.n_items, x, inputs.turned, inputs.biases,
            arena.view(x.dtype),
            arena.view(torch.int32), arena.view(torch.float32), arena.view(column_type),
            h, planes, t["page_a"], t["page_col"], t["page_lo"], t["page_hi"], t["page_scale"],
            t["entries"], t["strengths"], x.shape[0], plan.tiles, plan.width // 8,
        ),
        constants(group, aux, plan.tiling.tokens, gpu.arch(x.device), pdl),
        aux.num_warps,
        aux.num_stages,
        pdl,
    )  # fmt: skip
    return h, planes


def constants(group: Group, aux: AuxConfig, tokens: int, arch: int, pdl: bool) -> dict[str, Any]:
    """The kernel's constants: facts of the base and of the number of tokens."""
    return dict(
        N=sum(group.out_features), K=group.in_features, DT=gpu.unpacked_type(group.dtype),
        BM=aux.block, TOKENS=tokens, ROWS=aux.rows, BK_SHRINK=aux.bk_shrink,
        H_SPLIT=aux.h_split, BN=panels.TILE, BN_BIT=ROWS, BK_BIT=aux.bk_bit, BT=aux.gathers,
        C=sell.ROWS, DEPTH=DEPTH, EVEN_K=group.in_features % 256 == 0, PACKED=gpu.packs(),
        HOPPER=is_hopper(arch), PDL=pdl,
    )  # fmt: skip

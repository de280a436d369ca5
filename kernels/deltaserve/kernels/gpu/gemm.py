"""The launch of gemm_kernel: which configuration, which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.config import GemmConfig, GroupKey, gemm_config
from deltaserve.kernels.gpu.gemm_kernel import gemm_kernel
from deltaserve.kernels.gpu.inputs import Inputs
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.sums import Sums
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.gpu.workspace import Workspace

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """What the epilogue does after the deltas.

    activation: "silu" or "gelu_tanh" of gate and up, two equal parts of a group or the halves of
    its only one: y is ``activation(gate) * up`` [M, N / 2]. residual: added to y, of y's shape and
    dtype. y: where to write, which may be the residual, else a new tensor. sums: where to write
    sums of y, over powers of two of columns, at most those of a program.
    """

    activation: str | None = None
    residual: Tensor | None = None
    y: Tensor | None = None
    sums: Sums | None = None

    def check(self, parts: Sequence[int]) -> None:
        """Raises ValueError if the group cannot have this activation, or these sums."""
        if self.activation is None:
            if self.sums is not None and len(parts) > 1:
                raise ValueError("sums of y are over columns of one part")
            return
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f'activation is "{self.activation}"; it must be one of {", ".join(ACTIVATIONS)}'
            )
        if not can_gate(parts):
            raise ValueError(
                f"an activation needs gate and up, two equal parts or halves of one, not {parts}"
            )


def can_gate(parts: Sequence[int]) -> bool:
    """Whether a group may be gate and up."""
    return parts[0] == parts[1] if len(parts) == 2 else len(parts) == 1 and parts[0] % 2 == 0


def choose(weights: Weights, tokens: int, gated: bool = False) -> GemmConfig:
    """The table's configuration, made to fit what the base needs."""
    config = gemm_config(weights.key(gated), tokens, gpu.arch(weights.device))
    return fitted(config, weights.format, weights.dtype, weights.whole_zeros)


def fitted(config: GemmConfig, format: str, dtype: torch.dtype, whole_zeros: bool) -> GemmConfig:
    """With the zeros of int4 applied in a way that is exact."""
    if format != "int4":
        return config
    if dtype == torch.float32:
        return replace(config, how="after")  # 1024 + q and back costs float32 its last digits
    return config if whole_zeros else replace(config, how="sums")


def tile_rows(config: GemmConfig, gated: bool) -> int:
    """Columns of y that a program makes."""
    return config.bn // 2 if gated else config.bn


def run_gemm(
    inputs: Inputs,
    h: Tensor,
    planes: Tensor,
    weights: Weights,
    parts: Sequence[int],
    plan: StepPlan | None,
    config: GemmConfig,
    arena: Arena | None,
    workspace: Workspace,
    output: Output,
) -> Tensor:
    """Returns y [M, N], or [M, N / 2] with an activation."""
    output.check(parts)
    count = inputs.x.shape[0]
    width = weights.out_features // (2 if output.activation else 1)
    y = output.y
    if y is None:
        y = inputs.x.new_empty(count, width)
    rows = tile_rows(config, output.activation is not None)
    tiles = column_tiles(tuple(parts), rows, output.activation is not None, inputs.x.device)
    columns, down = len(tiles), inputs.padded // config.bm
    split = config.split_k
    partial = config.bm * config.bn * columns * down * split if split > 1 else 1
    t = plan.tables if plan else {}
    ints, floats = workspace.take("nothing", 1, torch.int32), workspace.take("nothing", 1)
    groups = -(-weights.in_features // (inputs.step or config.bk))
    sums = output.sums
    pdl = gpu.overlaps(inputs.x.device) and plan is not None
    launch(
        gemm_kernel,
        (-(-count // config.bm), columns * split),
        (
            inputs.base, inputs.scales, inputs.sums, weights.weight, weights.scale, weights.zero,
            weights.bias, y, output.residual, None if sums is None else sums.values,
            workspace.take("partial", partial),
            workspace.take("counters", columns * down, torch.int32), tiles,
            arena.view(inputs.x.dtype) if arena else inputs.x,
            arena.view(torch.float32) if arena else floats, h, planes,
            t.get("page_b", ints), t.get("page_col", ints), t.get("page_lo", ints),
            t.get("page_hi", ints), t.get("page_bounds", ints), t.get("vec_offset", ints),
            t.get("vec_lo", ints), t.get("vec_hi", ints), t.get("vec_strength", floats),
            t.get("vec_bounds", ints), t.get("plane_count", ints),
            count, inputs.tiles, plan.width // 8 if plan else 0,
            count if inputs.apart else 0, groups if inputs.apart else 0,
            0 if sums is None else sums.padded,
        ),
        constants(
            weights.key(), weights.dtype, tuple(parts), config, tokens=inputs.tokens,
            h_split=plan.aux.h_split if plan else 0, activation=output.activation,
            bias=weights.bias is not None, residual=output.residual is not None, pdl=pdl,
            step=inputs.step, y_step=0 if sums is None else sums.step, apart=inputs.apart,
        ),
        config.num_warps,
        config.num_stages,
        pdl,
    )  # fmt: skip
    return y


def constants(
    key: GroupKey, dtype: torch.dtype, parts: tuple[int, ...], config: GemmConfig, *,
    tokens: int, h_split: int, activation: str | None, bias: bool, residual: bool, pdl: bool,
    step: int = 0, y_step: int = 0, apart: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The kernel's constants: facts of the base and of the launch, none of an adapter. h_split: 0
    without adapters. step: columns of the sums of x, 0 for those of a step. y_step: of the sums of
    y, 0 for none. apart: whether the parts have inputs of their own."""
    rows = tile_rows(config, activation is not None)
    starts = [sum(parts[:i]) for i in range(len(parts))]
    tiled = (key.out_features // 2,) if activation else parts
    part1, part2 = [*starts[1:3], key.out_features, key.out_features][:2]
    return dict(
        N=key.out_features, K=key.in_features, PARTS=len(parts), PART1=part1, PART2=part2,
        FORMAT=key.format, STAGES=config.num_stages,
        GROUP=key.group_size or 1, HOW=config.how, DT=gpu.unpacked_type(dtype),
        BM=config.bm, BN=config.bn, BK=config.bk, SPLIT_K=config.split_k, TOKENS=tokens,
        ROWS=32 if config.bm >= 128 else 64, H_SPLIT=max(h_split, 1), ACTIVATION=activation,
        SUM=step or config.summed(key.format, key.group_size) or config.bk, Y_SUM=y_step,
        APART=apart and activation is not None and len(parts) == 2,
        EVEN_N=len(parts) <= 3 and all(n % rows == 0 for n in tiled),
        EVEN_K=key.in_features % (config.bk * config.split_k) == 0,
        HAS_BIAS=bias, RESIDUAL=residual, ADAPTERS=h_split > 0,
        PACKED=gpu.packs(), PDL=pdl,
    )  # fmt: skip


@cache
def column_tiles(parts: tuple[int, ...], rows: int, gated: bool, device: torch.device) -> Tensor:
    """int32 [tiles, 4]: (part, number in it, first column of the part, rows of the part). A tile
    lies in one part; gated: the tiles of the gate stand for both."""
    found = []
    start = 0
    for part, size in enumerate((sum(parts) // 2,) if gated else parts):
        found += [(part, i, start, size) for i in range(-(-size // rows))]
        start += size
    return torch.tensor(found, dtype=torch.int32, device=device)

"""What a group's launches are given beside x, and the launch of inputs_kernel, which makes it where
no kernel before has, and of quantize_kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from deltaserve.kernels.bit.words import offsets
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.config import WHOLE, GemmConfig
from deltaserve.kernels.gpu.inputs_kernel import inputs_kernel
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.quantize_kernel import quantize_kernel
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.sums import Sums
from deltaserve.kernels.gpu.weights import Weights
from deltaserve.kernels.gpu.workspace import Workspace

BLOCK = 16
"""Tokens of one program."""


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """x: what the adapters read, [M, K]. base: what the base reads, [M, K] or [parts, M, K], in the
    order of the weight's columns; of a base in whole numbers int8, K rounded up to 128, with
    scales, float32 [parts or 1, padded], of the tokens.
    sums: float32 [parts or 1, K / step, padded]; turned: [K, padded]; biases: float32 [K / 128,
    padded]. step: columns of a sum, 0 if there are none. padded: tokens in whole tiles of `tokens`.
    apart: whether base and sums have one copy per part."""

    x: Tensor
    base: Tensor
    scales: Tensor
    sums: Tensor
    turned: Tensor
    biases: Tensor
    step: int
    tiles: int
    tokens: int
    apart: bool

    @property
    def padded(self) -> int:
        return self.tiles * self.tokens


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a group's launches want of its input x [count, width]. step: columns of the base's steps
    whose sums it reads, 0 for none. tiles, tokens: see `Inputs`. parts: of the group. order: of the
    weight's columns, see `Weights`. whole: whether the base reads x in 8 bits, and sums of that."""

    count: int
    width: int
    parts: int
    step: int
    tiles: int
    tokens: int
    uses: Uses
    order: Tensor | None = None
    whole: bool = False

    @property
    def padded(self) -> int:
        return self.tiles * self.tokens

    @property
    def step_of_x(self) -> int:
        """`step`, for the kernel that makes x: 0 if the base reads x in another order or in 8 bits,
        as its sums are not x's."""
        return 0 if self.order is not None or self.whole else self.step

    @property
    def copied(self) -> bool:
        """Whether the base reads other numbers than x's."""
        return self.uses.scaled or self.order is not None

    @property
    def copies(self) -> int:
        return self.parts if self.uses.apart else 1

    @property
    def something(self) -> bool:
        """Whether anything beside x is wanted."""
        uses = self.uses
        return bool(self.whole or self.step or self.copied or uses.turned or uses.biased)

    def room(self, x: Tensor, step: int, sums: Tensor | None, workspace: Workspace) -> Inputs:
        """Places for it. step: columns of a sum. sums: those there are already."""
        uses, padded = self.uses, self.padded
        if sums is None:
            size = self.copies * -(-self.width // step) * padded if step else 1
            sums = workspace.take("sums", size)
        base, scales = x, sums
        if self.whole:
            numbers = self.copies * self.count * (-(-self.width // 128) * 128)
            base = workspace.take("whole", numbers, torch.int8)
            scales = workspace.take("scales", self.copies * padded)
        elif self.copied:
            base = workspace.take("scaled", self.copies * x.numel(), x.dtype)
        return Inputs(
            x=x,
            base=base,
            scales=scales,
            sums=sums,
            turned=workspace.take("turned", self.width * padded if uses.turned else 1, x.dtype),
            biases=workspace.take("biases", -(-self.width // 128) * padded if uses.biased else 1),
            step=step,
            tiles=self.tiles,
            tokens=self.tokens,
            apart=uses.apart,
        )


def wanted(
    count: int, weights: Weights, plan: StepPlan | None, config: GemmConfig, parts: int
) -> Wanted:
    """Of a step of so many tokens."""
    tokens = plan.tiling.tokens if plan else max(config.bm, 16)
    return Wanted(
        count=count,
        width=weights.in_features,
        parts=parts,
        step=config.summed(weights.format, weights.group_size),
        tiles=plan.tiles if plan else -(-count // tokens),
        tokens=tokens,
        uses=plan.uses if plan else Uses(),
        order=weights.order,
        whole=weights.format in WHOLE,
    )


def run_inputs(
    x: Tensor,
    want: Wanted,
    plan: StepPlan | None,
    arena: Arena | None,
    workspace: Workspace,
    sums: Sums | None = None,
) -> Inputs:
    """x: [count, width], contiguous. sums: those of x, if whoever made it took them, which is of no
    use to a base that reads x in another order. One launch, or none if nothing else is wanted; one
    more for a base in whole numbers."""
    if want.whole:
        unrounded = replace(want, step=0, whole=False)
        return _quantized(run_inputs(x, unrounded, plan, arena, workspace), want, workspace)
    uses = want.uses
    if want.order is not None:
        sums = None
    step = want.step and (sums.step if sums else want.step)
    if sums is not None and want.step and (want.step % sums.step or sums.padded != want.padded):
        raise ValueError(
            f"sums over {sums.step} columns of {sums.padded} tokens; the base wants them over "
            f"{want.step} of {want.padded}"
        )
    given = sums.values if sums is not None and step else None
    inputs = want.room(x, step, None if uses.scaled else given, workspace)
    summing = step if given is None or uses.scaled else 0
    if not (summing or want.copied or uses.turned or uses.biased):
        return inputs
    t = plan.tables if plan else {}
    ints, floats = workspace.take("nothing", 1, torch.int32), workspace.take("nothing", 1)
    pdl = gpu.overlaps(x.device)
    launch(
        inputs_kernel,
        (want.padded // BLOCK, -(-want.width // 128), want.copies),
        (
            x, inputs.base, inputs.sums, floats if given is None else given, inputs.turned,
            inputs.biases, want.order,
            column_offsets(x.dtype, x.device) if uses.biased else floats,
            arena.view(torch.float32) if arena else floats, t.get("in_offset", ints),
            t.get("in_lo", ints), t.get("in_hi", ints), t.get("in_strength", floats),
            t.get("in_bounds", ints), want.count, want.tiles,
        ),
        constants(want, summing, given is not None and summing > 0, pdl),
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )  # fmt: skip
    return inputs


def _quantized(floats: Inputs, want: Wanted, workspace: Workspace) -> Inputs:
    """floats: of the same step, for a base of floats."""
    made = want.room(floats.x, want.step, None, workspace)
    pdl = gpu.overlaps(floats.x.device)
    launch(
        quantize_kernel,
        (want.count, want.copies),
        (floats.base, made.base, made.scales, made.sums, want.count, want.tiles),
        quantize_constants(want, pdl),
        row_warps(want.width),
        num_stages=1,
        pdl=pdl,
    )
    return replace(floats, base=made.base, scales=made.scales, sums=made.sums, step=made.step)


def quantize_constants(want: Wanted, pdl: bool) -> dict[str, Any]:
    """quantize_kernel's constants."""
    return dict(
        K=want.width, BLOCK=row_block(want.width), STEP=want.step, TOKENS=want.tokens, PDL=pdl
    )


def row_block(width: int) -> int:
    """Numbers of a program that has a token's whole row."""
    return max(128, int(triton.next_power_of_2(width)))


def row_warps(width: int, each: int = 8) -> int:
    """each: numbers of a thread, 8 are one of the widest loads of 16-bit types."""
    return max(1, min(32, row_block(width) // (32 * each)))


def constants(want: Wanted, step: int, given: bool, pdl: bool) -> dict[str, Any]:
    """The kernel's constants. step: columns of a sum, 0 for none. given: whether there are sums of
    the unscaled x."""
    uses = want.uses
    return dict(
        K=want.width, PARTS=want.parts, STEP=step, TOKENS=want.tokens, BT=BLOCK,
        SCALED=uses.scaled, TURNED=uses.turned, BIASED=uses.biased, GIVEN=given, PDL=pdl,
    )  # fmt: skip


@cache
def column_offsets(dtype: torch.dtype, device: torch.device) -> Tensor:
    """float32 [128], see bit/words.py."""
    return offsets(dtype).to(device)

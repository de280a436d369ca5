"""The launch of norm_kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.inputs import Inputs, Wanted, column_offsets, row_block, row_warps
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.norm_kernel import BIASED, SCALED, TUNED, TURNED, norm_kernel
from deltaserve.kernels.gpu.norm_tables import Tuned
from deltaserve.kernels.gpu.plan import Uses
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.gpu.workspace import Workspace


@dataclass(frozen=True, eq=False, slots=True)
class Following:
    """The linears that a norm's output goes to: what they want of it, of their step's plan, if they
    have one, and of the arena that its tables point into."""

    want: Wanted
    plan: StepPlan | None = None
    arena: Arena | None = None


def run_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    workspace: Workspace,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    tuned: Tuned | None = None,
    following: Following | None = None,
    out: Tensor | None = None,
) -> Inputs:
    """RMS norm (Zhang and Sennrich 2019) ``x / sqrt(mean(x^2) + eps) * (offset + gain)``, in
    float32, rounded once, in one launch with what the next linears want beside it.

    x: [M, K], contiguous. gain: [K]. residual: [M, K], is added to x in place before. tuned: the
    gains and biases of the step's adapters. Returns inputs whose x is the norm, in `out` [M, K] or
    the workspace.
    """
    count, width = x.shape
    for name, other, shape in (("gain", gain, (width,)), ("residual", residual, (count, width))):
        if other is not None and (other.shape != shape or not other.is_contiguous()):
            raise ValueError(f"{name} is {tuple(other.shape)}; x {(count, width)} needs {shape}")
    if not x.is_contiguous():
        raise ValueError("x must be contiguous: it is updated in place")
    want = following.want if following else alone(count, width)
    if tuned is not None and len(tuned.mixes) < count:
        raise ValueError(f"x has {count} tokens, and the plan {len(tuned.mixes)}")
    plan, arena = (following.plan, following.arena) if following else (None, None)
    if (want.count, want.width) != (count, width):
        raise ValueError(f"the next linears want {(want.count, want.width)}, not {(count, width)}")
    normed = out
    if normed is None:
        normed = workspace.take("normed", x.numel(), x.dtype)[: x.numel()].view(count, width)
    inputs = want.room(normed, want.step, None, workspace)
    t = plan.tables if plan else {}
    ints, floats = workspace.take("nothing", 1, torch.int32), workspace.take("nothing", 1)
    adapters = tuned is not None or plan is not None
    uses = sum(
        bit.value
        for bit, used in (
            (TUNED, tuned is not None),
            (SCALED, want.uses.scaled),
            (TURNED, want.uses.turned),
            (BIASED, want.uses.biased),
        )
        if used
    )
    pdl = gpu.overlaps(x.device)
    launch(
        norm_kernel,
        (want.padded if want.something else count,),
        (
            x, x if residual is None else residual, gain, normed, inputs.base, inputs.scales,
            inputs.sums, inputs.turned, inputs.biases,
            column_offsets(x.dtype, x.device) if want.uses.biased else floats,
            arena.view(torch.float32) if arena else floats,
            tuned.arena.view(torch.float32) if tuned else floats, t.get("in_offset", ints),
            t.get("in_lo", ints), t.get("in_hi", ints), t.get("in_strength", floats),
            t.get("in_bounds", ints), tuned.mixes if tuned else ints,
            tuned.bounds if tuned else ints, tuned.offsets if tuned else ints,
            tuned.strengths if tuned else floats, count, want.tiles, want.copies, uses, eps,
            offset,
        ),
        constants(want, residual is not None, adapters, pdl),
        num_warps=warps(want),
        num_stages=1,
        pdl=pdl,
    )  # fmt: skip
    return inputs


def alone(count: int, width: int) -> Wanted:
    """Nothing beside x."""
    return Wanted(count, width, 1, 0, -(-count // 16), 16, Uses())


def constants(want: Wanted, residual: bool, adapters: bool, pdl: bool) -> dict[str, Any]:
    """The kernel's constants."""
    return dict(
        K=want.width, BLOCK=row_block(want.width), PARTS=want.parts, STEP=want.step,
        WHOLE=want.whole, TOKENS=want.tokens, RESIDUAL=residual, ADAPTERS=adapters, PDL=pdl,
    )  # fmt: skip


def warps(want: Wanted) -> int:
    """With more numbers for a thread, registers spill in the form with adapters."""
    return row_warps(want.width, 4 if want.whole else 8)

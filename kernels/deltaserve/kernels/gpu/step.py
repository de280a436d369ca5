"""StepPlan: a step's tables in device memory, at addresses that a captured graph may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.gpu.config import AuxConfig
from deltaserve.kernels.gpu.plan import Tables, Tiling, Uses

ARRAYS = (
    "items", "entries", "strengths", "page_a", "page_b", "page_col", "page_lo", "page_hi",
    "page_scale", "page_bounds", "vec_offset", "vec_lo", "vec_hi", "vec_strength", "vec_bounds",
    "in_offset", "in_lo", "in_hi", "in_strength", "in_bounds", "plane_count",
)  # fmt: skip
FLOATS = {"strengths", "page_scale", "vec_strength", "in_strength"}
ALIGN = 4
"""Tables start at multiples of 16 bytes."""


EVERYTHING = Uses(scaled=True, apart=False, turned=True, biased=True)
"""But inputs apart, which few adapters want and each module pays for."""


class StepTooLarge(ValueError):
    """A step needs more of a table than the captured graph has room for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Room in a plan that is to be filled again and again: rows of h, planes of ready deltas,
    work items, pages listed, vectors listed, entries of 1-bit and sparse adapters; what may be
    used beside x."""

    width: int
    planes: int
    items: int
    pages: int
    vectors: int
    entries: int
    uses: Uses = EVERYTHING

    def of(self, name: str, size: int) -> int:
        """How long a table may get; `size` if it does not depend on the adapters."""
        if name == "items":
            return self.items * 12
        if name == "entries":
            return self.entries * 4
        if name == "strengths":
            return self.entries
        if name.endswith("bounds") or name == "plane_count":
            return size
        return self.pages if name.startswith("page") else self.vectors


@dataclass(eq=False, slots=True)
class StepPlan:
    """What the launches of one step are given. Its tensors stay where they are when it is filled
    again. tokens: rows of x; tiles: token tiles that the tables are laid out for."""

    tokens: int
    tiles: int
    tiling: Tiling
    aux: AuxConfig
    width: int
    planes: int
    uses: Uses
    programs: int
    limits: Limits | None
    n_items: Tensor
    tables: Mapping[str, Tensor]
    room: Mapping[str, slice]
    buffer: Tensor
    staging: npt.NDArray[np.int32] = field(repr=False)

    @property
    def padded(self) -> int:
        """Tokens rounded up to whole tiles: the row length of h, sums and turned."""
        return self.tiles * self.tiling.tokens


def make(
    tables: Tables, tokens: int, tiles: int, tiling: Tiling, aux: AuxConfig,
    device: torch.device, limits: Limits | None = None,
) -> StepPlan:  # fmt: skip
    """A plan with room for exactly these tables, or for what the limits say."""
    room: dict[str, slice] = {}
    at = ALIGN  # the number of items comes first
    for name in ARRAYS:
        size = getattr(tables, name).size
        length = max(1, limits.of(name, size) if limits else size)
        room[name] = slice(at, at + length)
        at += -(-length // ALIGN) * ALIGN
    staging = np.zeros(at, dtype=np.int32)
    buffer = torch.zeros(at, dtype=torch.int32, device=device)
    floats = buffer.view(torch.float32)
    plan = StepPlan(
        tokens=tokens,
        tiles=tiles,
        tiling=tiling,
        aux=aux,
        width=limits.width if limits else tables.width,
        planes=limits.planes if limits else tables.planes,
        uses=limits.uses if limits else tables.uses,
        programs=tiling.programs if limits else min(tiling.programs, max(1, len(tables.items))),
        limits=limits,
        n_items=buffer[:1],
        tables={n: (floats if n in FLOATS else buffer)[where] for n, where in room.items()},
        room=room,
        buffer=buffer,
        staging=staging,
    )
    fill(plan, tables)
    return plan


def fill(plan: StepPlan, tables: Tables) -> None:
    """Replaces the plan's content; one copy to the device. Raises StepTooLarge."""
    if plan.limits is not None:
        _check(plan, tables)
    staging = plan.staging
    staging[0] = len(tables.items)
    for name, where in plan.room.items():
        array = getattr(tables, name)
        if array.size > where.stop - where.start:
            raise StepTooLarge(
                f"{name} has {array.size} numbers; the plan has room for {where.stop - where.start}"
            )
        staging[where.start : where.start + array.size] = array.reshape(-1).view(np.int32)
    plan.buffer.copy_(torch.from_numpy(staging), non_blocking=True)


def _check(plan: StepPlan, tables: Tables) -> None:
    for name in ("width", "planes"):
        if getattr(tables, name) > getattr(plan, name):
            raise StepTooLarge(
                f"{name} is {getattr(tables, name)}; the plan has room for {getattr(plan, name)}"
            )
    for name in Uses.__slots__:
        if getattr(tables.uses, name) and not getattr(plan.uses, name):
            raise StepTooLarge(f"the step needs {name} inputs; the plan was made without")

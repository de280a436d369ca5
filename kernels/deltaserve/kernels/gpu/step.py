"""StepPlan: a step's tables in device memory, at addresses that a captured graph may keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.gpu.config import AuxConfig
from deltaserve.kernels.gpu.plan import Tables, Tiling, Uses
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.tags import Spots, resolve

ARRAYS = (
    "items", "entries", "strengths", "page_a", "page_b", "page_col", "page_lo", "page_hi",
    "page_scale", "page_bounds", "vec_offset", "vec_lo", "vec_hi", "vec_strength", "vec_bounds",
    "in_offset", "in_lo", "in_hi", "in_strength", "in_bounds", "plane_count",
)  # fmt: skip
OFFSETS = ("entries", "page_a", "page_b", "vec_offset", "in_offset")
"""Where blobs lie: the only tables that differ between layers."""
SHARED = tuple(name for name in ARRAYS if name not in OFFSETS)
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
    again. tokens: rows of x; tiles: token tiles that the tables are laid out for. layers: the plan
    for each of the layers that share it, which differ in `OFFSETS` alone; the first is this one.
    room: numbers of the buffer that hold a table, `OFFSETS` of the first layer, whose like of the
    next lie `stride` numbers further. apart: it has memory of its own."""

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
    stride: int
    buffer: Tensor
    staging: Tensor = field(repr=False)
    apart: bool = True
    layers: Sequence[StepPlan] = ()

    @property
    def padded(self) -> int:
        """Tokens rounded up to whole tiles: the row length of h, sums and turned."""
        return self.tiles * self.tiling.tokens


def make(
    tables: Tables, tokens: int, tiles: int, tiling: Tiling, aux: AuxConfig,
    device: torch.device, spots: Sequence[Spots], limits: Limits | None = None,
    memory: StaticMemory | None = None,
) -> StepPlan:  # fmt: skip
    """A plan with room for exactly these tables, or for what the limits say. spots: where the
    blobs of each layer are. memory: to lie in; what is filled in there is for others to send."""
    room: dict[str, slice] = {}
    at = ALIGN  # the number of items comes first

    def lay(names: Sequence[str]) -> None:
        nonlocal at
        for name in names:
            size = getattr(tables, name).size
            length = max(1, limits.of(name, size) if limits else size)
            room[name] = slice(at, at + length)
            at += -(-length // ALIGN) * ALIGN

    lay(SHARED)
    first = at
    lay(OFFSETS)
    stride = at - first
    count = first + stride * len(spots)
    staging, buffer = (memory or StaticMemory(count, device)).take(count)
    floats = buffer.view(torch.float32)

    def of(layer: int) -> dict[str, Tensor]:
        found = {n: (floats if n in FLOATS else buffer)[room[n]] for n in SHARED}
        for name in OFFSETS:
            where = room[name]
            found[name] = buffer[where.start + layer * stride : where.stop + layer * stride]
        return found

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
        tables=of(0),
        room=room,
        stride=stride,
        buffer=buffer,
        staging=staging,
        apart=memory is None,
    )
    plan.layers = (plan, *(replace(plan, tables=of(i)) for i in range(1, len(spots))))
    fill(plan, tables, spots)
    return plan


def fill(plan: StepPlan, tables: Tables, spots: Sequence[Spots]) -> None:
    """Replaces the plan's content; one copy to the device, unless others send it. Raises
    StepTooLarge, and then the plan holds what it held. spots: as many as it was made with. The last
    step that was given this plan must have been waited for: its copy may still read `staging`."""
    _check(plan, tables)
    staging = plan.staging.numpy()
    staging[0] = len(tables.items)
    for name in SHARED:
        array, start = getattr(tables, name), plan.room[name].start
        staging[start : start + array.size] = array.reshape(-1).view(np.int32)
    offsets = resolve([getattr(tables, name) for name in OFFSETS], spots)
    for name, found in zip(OFFSETS, offsets, strict=True):
        start, size = plan.room[name].start, found.shape[1]
        rows = staging[start : start + plan.stride * (len(spots) - 1) + size]
        np.lib.stride_tricks.as_strided(rows, found.shape, (plan.stride * 4, 4), writeable=True)[
            :
        ] = found
    if plan.apart:
        plan.buffer.copy_(plan.staging, non_blocking=True)


def _check(plan: StepPlan, tables: Tables) -> None:
    for name, where in plan.room.items():
        size, room = getattr(tables, name).size, where.stop - where.start
        if size > room:
            raise StepTooLarge(f"{name} has {size} numbers; the plan has room for {room}")
    if plan.limits is None:
        return
    for name in ("width", "planes"):
        if getattr(tables, name) > getattr(plan, name):
            raise StepTooLarge(
                f"{name} is {getattr(tables, name)}; the plan has room for {getattr(plan, name)}"
            )
    for name in Uses.__slots__:
        if getattr(tables.uses, name) and not getattr(plan.uses, name):
            raise StepTooLarge(f"the step needs {name} inputs; the plan was made without")

"""StepPlan: a step's tables in device memory, at addresses that a captured graph may keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.gpu.config import AuxConfig
from deltaserve.kernels.gpu.plan import Tables, Tiling, Uses
from deltaserve.kernels.gpu.static import StaticMemory

ARRAYS = (
    "items", "entries", "strengths", "page_a", "page_b", "page_col", "page_lo", "page_hi",
    "page_scale", "page_bounds", "vec_offset", "vec_lo", "vec_hi", "vec_strength", "vec_bounds",
    "in_offset", "in_lo", "in_hi", "in_strength", "in_bounds", "plane_count", "gates",
)  # fmt: skip
BY_LAYER = ("entries", "page_a", "page_b", "page_scale", "vec_offset", "in_offset")
"""Where blobs lie, and the scale of pages: the only tables that differ between layers."""
SHARED = tuple(name for name in ARRAYS if name not in BY_LAYER)
FLOATS = {"strengths", "page_scale", "vec_strength", "in_strength"}
ALIGN = 4
"""Tables start at multiples of 16 bytes."""


EVERYTHING = Uses(scaled=True, apart=False, turned=True, biased=True)
"""But inputs apart, which few adapters want and each module pays for, and routers, which cost a
launch."""

PLAIN = Uses()
"""x alone, and what the base wants of it, which the kernel before makes: LoRA and most others."""


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
        if name == "gates":
            return 0
        if name.endswith("bounds") or name == "plane_count":
            return size
        return self.pages if name.startswith("page") else self.vectors


@dataclass(eq=False, slots=True)
class StepPlan:
    """What the launches of one step are given. Its tensors stay where they are when it is filled
    again. tokens: rows of x; tiles: token tiles that the tables are laid out for. gates: entries of
    routers; none where the tables are filled again. layers: the plan for each of the layers that
    share it, which differ in `BY_LAYER` alone; the first is this one. room: numbers of the buffer
    that hold a table, `BY_LAYER` of the first layer, whose like of the next lie `stride` numbers
    further. apart: it has memory of its own."""

    tokens: int
    tiles: int
    tiling: Tiling
    aux: AuxConfig
    width: int
    planes: int
    gates: int
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


@dataclass(frozen=True, eq=False, slots=True)
class Draft:
    """A plan that has no memory yet. layers: that it is for. limits: room for other steps; without,
    there is room for exactly these tables."""

    tables: Tables
    tokens: int
    tiles: int
    tiling: Tiling
    aux: AuxConfig
    layers: int
    limits: Limits | None = None

    def room(self) -> tuple[dict[str, slice], int, int]:
        """(`StepPlan.room`, its stride, numbers in all)."""
        room: dict[str, slice] = {}
        at = start = ALIGN  # the number of items comes first
        for name in (*SHARED, *BY_LAYER):
            if name == BY_LAYER[0]:
                start = at
            size = _size(self.tables, name)
            length = max(1, self.limits.of(name, size) if self.limits else size)
            room[name] = slice(at, at + length)
            at += -(-length // ALIGN) * ALIGN
        return room, at - start, start + (at - start) * self.layers


def make(
    drafts: Sequence[Draft], device: torch.device, memory: StaticMemory | None = None
) -> list[StepPlan]:
    """Plans that lie side by side and come to the device in one copy. memory: to lie in; what is
    filled in there is for others to send."""
    rooms = [draft.room() for draft in drafts]
    own = memory
    if own is None:
        own = StaticMemory(sum(-(-count // ALIGN) * ALIGN for *_, count in rooms), device)
    alone = memory is None and len(drafts) == 1
    plans = []
    for draft, (room, stride, count) in zip(drafts, rooms, strict=True):
        plan = _laid_out(draft, room, stride, *own.take(count), alone)
        write(plan, draft.tables)
        plans.append(plan)
    if memory is None:
        own.send()
    return plans


def _laid_out(
    draft: Draft, room: Mapping[str, slice], stride: int, staging: Tensor, buffer: Tensor,
    apart: bool,
) -> StepPlan:  # fmt: skip
    tables, limits, tiling, layers = draft.tables, draft.limits, draft.tiling, draft.layers
    floats = buffer.view(torch.float32)
    shared = {n: (floats if n in FLOATS else buffer)[room[n]] for n in SHARED}
    start = room[BY_LAYER[0]].start
    rows = buffer[start : start + stride * layers].view(layers, stride)
    columns = []
    for name in BY_LAYER:
        column = rows[:, room[name].start - start : room[name].stop - start]
        column = column.view(torch.float32) if name in FLOATS else column
        empty = limits is None and not _size(tables, name)  # nobody reads it: one is enough
        columns.append((column[0],) * layers if empty else column.unbind(0))
    width, planes, uses = tables.width, tables.planes, tables.uses
    programs = min(tiling.programs, max(1, len(tables.items)))
    if limits is not None:
        width, planes, uses, programs = limits.width, limits.planes, limits.uses, tiling.programs
    plans = [
        StepPlan(
            draft.tokens, draft.tiles, tiling, draft.aux, width, planes, len(tables.gates), uses,
            programs, limits, buffer[:1], {**shared, **dict(zip(BY_LAYER, own, strict=True))}, room,
            stride, buffer, staging, apart,
        )
        for own in zip(*columns, strict=True)
    ]  # fmt: skip
    plans[0].layers = plans
    return plans[0]


def fill(plan: StepPlan, tables: Tables) -> None:
    """Replaces the plan's content; one copy to the device, unless others send it. Raises
    StepTooLarge, and then the plan holds what it held. tables: of as many layers as it was made
    for. The last step that was given this plan must have been waited for: its copy may still read
    `staging`."""
    _check(plan, tables)
    write(plan, tables)
    if plan.apart:
        plan.buffer.copy_(plan.staging, non_blocking=True)


def write(plan: StepPlan, tables: Tables) -> None:
    """Puts tables that fit in the plan's memory on the host."""
    staging = plan.staging.numpy()
    staging[0] = len(tables.items)
    for name in SHARED:
        array, start = getattr(tables, name), plan.room[name].start
        if array.size:
            staging[start : start + array.size] = array.reshape(-1).view(np.int32)
    start, layers = plan.room[BY_LAYER[0]].start, tables.layers
    rows = staging[start : start + plan.stride * layers].reshape(layers, plan.stride)
    for name in BY_LAYER:
        found, at = getattr(tables, name), plan.room[name].start - start
        if len(found):
            rows[:, at : at + len(found)] = found.view(np.int32).T


def _size(tables: Tables, name: str) -> int:
    """Numbers of a table, of one layer."""
    array = getattr(tables, name)
    return len(array) if name in BY_LAYER else array.size


def _check(plan: StepPlan, tables: Tables) -> None:
    for name, where in plan.room.items():
        size, room = _size(tables, name), where.stop - where.start
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

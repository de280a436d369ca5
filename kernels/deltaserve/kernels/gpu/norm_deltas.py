"""GpuNormDeltas: `NormDeltas` on the GPU: gains and biases of norms by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import ALIGN, LINE, Arena
from deltaserve.kernels.gpu.blob import Home, Spot
from deltaserve.kernels.gpu.prepared_norm import GpuPreparedNorm, prepare
from deltaserve.kernels.gpu.step import StepTooLarge
from deltaserve.kernels.norm import NormDeltas, PreparedNorm
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.rms_norm import rms_norm
from deltaserve.kernels.segments import Mix, Segments


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of an adapter in a slot. spot: of the blob. gain, bias: units of 16 bytes behind it."""

    home: Home
    spot: Spot
    gain: int | None
    bias: int | None

    def offset(self, of: str) -> int | None:
        """In units, until the next step."""
        at: int | None = getattr(self, of)
        return None if at is None else self.spot.offset + at


@dataclass(eq=False, slots=True)
class NormPlan:
    """What norm_kernel is given of a step's adapters. Its tensors stay where they are when it is
    filled again. mixes: int32 [padded], of each token, 0 for those whose norm is the base's.
    bounds: int32 [2 (mixes + 1) + 1], of each mix its gains and its biases in the two lists
    offsets, int32 in units of 16 bytes of the arena, and strengths, float32."""

    mixes: Tensor
    bounds: Tensor
    offsets: Tensor
    strengths: Tensor
    buffer: Tensor
    staging: npt.NDArray[np.int32] = field(repr=False)


@dataclass(frozen=True, eq=False, slots=True)
class Tuned:
    """A step's plan of a norm, and the arena that it points into."""

    plan: NormPlan
    arena: Arena


class GpuNormDeltas(NormDeltas):
    """The vectors lie in an arena, where norm_kernel finds them, and `forward`. arena: one of its
    own if not given."""

    def __init__(
        self,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        arena: Arena | None = None,
    ) -> None:
        super().__init__(hidden, dtype, device or gpu.default_device())
        self.arena = arena or Arena(self.device, 1 << 10)
        self._vectors: dict[int, Vectors] = {}

    def prepare(self, primitives: tuple[Primitive, ...]) -> PreparedNorm:
        """See `prepared_norm.prepare`."""
        return prepare(primitives, self.hidden)

    def install(self, slot: int, prepared: PreparedNorm) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread. What is in
        the arena already, or was put there for another slot, is not copied again."""
        assert isinstance(prepared, GpuPreparedNorm)
        self.remove(slot)
        if not prepared.nbytes:
            return
        home = prepared.home
        gain = None if prepared.gain is None else 0
        after = 0 if gain is None else -(-self.hidden * 4 // LINE) * ALIGN
        bias = None if prepared.bias is None else after
        self._prepared[slot] = prepared
        self._vectors[slot] = Vectors(home, home.take(prepared.blob, self.arena), gain, bias)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        super().remove(slot)
        found = self._vectors.pop(slot, None)
        if found is not None:
            found.home.leave(found.spot, self.arena)

    def rms(
        self, x: Tensor, weight: Tensor, offset: float, eps: float, segments: Segments
    ) -> Tensor:
        """The norm of a layer that is not run by norm_kernel: see `NormDeltas.rms`."""

        def norm(x: Tensor, gain: Tensor | None) -> Tensor:
            return rms_norm(x, (weight if gain is None else gain) + offset, eps)

        return self.forward(x, norm, weight, segments)

    def planned(self, segments: Segments, padded: int) -> Tuned:
        """What the kernel is given of a step's adapters."""
        return Tuned(self.plan(segments, padded), self.arena)

    def plan(
        self, segments: Segments, padded: int, *, mixes: int = 0, vectors: int = 0
    ) -> NormPlan:
        """The step's tables on the device. padded: tokens in whole tiles, at least the step's.
        mixes, vectors: room for at least so many, for `replan`."""
        table = self._table(segments)
        rows = 1 + max(mixes, len(table.rows))
        room = max(1, vectors, len(table.offsets))
        sizes = [padded, 2 * rows + 1, room, room]
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes]).tolist()
        buffer = torch.zeros(ends[-1], dtype=torch.int32, device=self.device)
        starts = [0, *ends]
        parts = [buffer[a : a + n] for a, n in zip(starts, sizes, strict=False)]
        plan = NormPlan(
            parts[0], parts[1], parts[2], parts[3].view(torch.float32), buffer,
            np.zeros(ends[-1], dtype=np.int32),
        )  # fmt: skip
        _fill(plan, table)
        return plan

    def replan(self, plan: NormPlan, segments: Segments) -> None:
        """Fills a plan anew; one copy. Raises StepTooLarge."""
        _fill(plan, self._table(segments))

    def _table(self, segments: Segments) -> _Table:
        found = _Table()
        for start, end, mix in segments.runs:
            own = [(self._vectors[slot], w) for slot, w in mix if slot in self._vectors]
            if own:
                found.add(start, end, mix, own)
        return found

    def _installed(self, slot: int) -> PreparedNorm:
        found, floats = self._vectors[slot], self.arena.view(torch.float32)

        def vector(of: str) -> Tensor | None:
            at = found.offset(of)
            return None if at is None else floats[at * 4 : at * 4 + self.hidden]

        return PreparedNorm(vector("gain"), vector("bias"))


class _Table:
    """rows: mix -> its number, from 1."""

    def __init__(self) -> None:
        self.rows: dict[Mix, int] = {}
        self.runs: list[tuple[int, int, int]] = []
        self.bounds = [0, 0, 0]
        self.offsets: list[int] = []
        self.strengths: list[float] = []

    def add(self, start: int, end: int, mix: Mix, own: Sequence[tuple[Vectors, float]]) -> None:
        if mix not in self.rows:
            self.rows[mix] = len(self.rows) + 1
            for name in ("gain", "bias"):
                found = [(at, w) for v, w in own if (at := v.offset(name)) is not None]
                self.offsets += [at for at, _ in found]
                self.strengths += [w for _, w in found]
                self.bounds.append(len(self.offsets))
        self.runs.append((start, end, self.rows[mix]))


def _fill(plan: NormPlan, table: _Table) -> None:
    tokens = max((end for _, end, _ in table.runs), default=0)
    for what, needed, room in (
        ("tokens", tokens, len(plan.mixes)),
        ("mixes", len(table.rows), len(plan.bounds) // 2 - 1),
        ("vectors", len(table.offsets), len(plan.offsets)),
    ):
        if needed > room:
            raise StepTooLarge(f"the step has {needed} {what}; the plan has room for {room}")
    staging, start = plan.staging, plan.buffer.storage_offset()
    staging[:] = 0

    def part(of: Tensor) -> npt.NDArray[np.int32]:
        at = of.storage_offset() - start
        return staging[at : at + len(of)]

    for first, end, row in table.runs:
        part(plan.mixes)[first:end] = row
    part(plan.bounds)[: len(table.bounds)] = table.bounds
    part(plan.offsets)[: len(table.offsets)] = table.offsets
    strengths = np.array(table.strengths, dtype=np.float32)
    part(plan.strengths)[: len(strengths)] = strengths.view(np.int32)
    plan.buffer.copy_(torch.from_numpy(staging), non_blocking=True)

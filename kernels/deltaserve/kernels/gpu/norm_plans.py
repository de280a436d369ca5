"""NormPlans: a step planned once for all norms of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deltaserve.kernels.gpu.arena import NOWHERE, Arena
from deltaserve.kernels.gpu.blob import Home, Spot
from deltaserve.kernels.gpu.norm_tables import NormPlan, NormRoom, NormTable, Tuned
from deltaserve.kernels.gpu.reserved import Reserved
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of an adapter, on one norm. spot: of the blob. gain, bias: units of 16 bytes behind it."""

    home: Home
    spot: Spot
    gain: int | None
    bias: int | None


class NormPlans:
    """Norms of any size over one arena, by number. Mixes, bounds and strengths are the same for all
    of them, so planning takes Python's time once per step, however many there are; where an
    adapter's vectors lie, in every norm, is kept with its slot. Engine thread."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.norms = 0
        self._changes = 0
        self._vectors: dict[int, dict[int, Vectors]] = {}
        self._installed: dict[int, _Installed] = {}
        self._of: object = None
        self._kept: NormPlan | None = None

    def add(self) -> int:
        """One more norm; its number."""
        self._changed()
        self._installed.clear()
        self.norms += 1
        return self.norms - 1

    @property
    def version(self) -> tuple[int, int]:
        """The same as long as nothing is installed, removed or moved."""
        return self._changes, self.arena.moves

    def put(self, norm: int, slot: int, vectors: Vectors) -> None:
        self._vectors.setdefault(slot, {})[norm] = vectors
        self._changed(slot)

    def drop(self, norm: int, slot: int) -> None:
        """Forgets what was put."""
        del self._vectors[slot][norm]
        if not self._vectors[slot]:
            del self._vectors[slot]
        self._changed(slot)

    def act(self, slots: Collection[int], norms: Collection[int] | None = None) -> bool:
        """Whether an adapter in one of the slots tunes a norm, or one of some norms."""
        own = (self._vectors[slot] for slot in slots if slot in self._vectors)
        return any(norms is None or not found.keys().isdisjoint(norms) for found in own)

    def tuned(self, norm: int, segments: Segments) -> Tuned | None:
        """What a norm's launch is given of the step; None if its adapters tune no norm. The first
        norm that is asked has all planned, and brought to the device in one copy, unless the step
        before had the same."""
        if isinstance(segments, Reserved):
            return segments.tuned(norm)
        if not self.act(segments.slots):
            return None
        found: NormPlan | None = segments.plans.get(self)
        if found is None:
            of = segments.runs, segments.tokens, self.version
            if self._kept is None or self._of != of:
                self._of, self._kept = of, self.plan(segments)
            found = segments.plans[self] = self._kept
        return found.of(norm)

    def plan(self, segments: Segments) -> NormPlan:
        """With room for exactly this step."""
        table = self._table(segments)
        room = NormRoom(segments.tokens, len(table.vectors), self.norms)
        memory = StaticMemory(room.count, self.arena.device)
        plan = NormPlan(room, *memory.take(room.count), self.arena)
        plan.write(table)
        memory.send()
        return plan

    def reserve(self, tokens: int, vectors: int, memory: StaticMemory) -> NormPlan:
        """One without adapters, for `replan` to fill; what is filled in is for others to send."""
        room = NormRoom(tokens, vectors, self.norms)
        return NormPlan(room, *memory.take(room.count), self.arena)

    def replan(self, plan: NormPlan, segments: Segments) -> bool:
        """Fills a plan anew; whether the step tunes any norm. Raises StepTooLarge, and then the
        plan is as it was."""
        table = self._table(segments)
        plan.write(table)
        return bool(table.rows)

    def _table(self, segments: Segments) -> NormTable:
        found = NormTable()
        for start, end, mix in segments.runs:
            if mix not in found.rows:
                own = [(self._read(slot), w) for slot, w in mix if slot in self._vectors]
                if not own:
                    continue
                found.add(
                    mix,
                    [(p.gains, w) for p, w in own if p.gains is not None],
                    [(p.biases, w) for p, w in own if p.biases is not None],
                )
            found.runs.append((start, end, found.rows[mix]))
        return found

    def _read(self, slot: int) -> _Installed:
        found = self._installed.get(slot)
        if found is None:
            found = self._installed[slot] = _Installed(self._vectors[slot], self.norms)
        found.follow(self.arena.moves)
        return found

    def _changed(self, slot: int | None = None) -> None:
        self._changes += 1
        self._kept = None
        if slot is not None:
            self._installed.pop(slot, None)


class _Installed:
    """One adapter. gains, biases: int32 [norms], where in the arena they lie, `NOWHERE` where there
    is none; None if it has none at all."""

    def __init__(self, own: Mapping[int, Vectors], norms: int) -> None:
        places = {id(v.spot.place): v.spot.place for v in own.values()}
        number = {key: i for i, key in enumerate(places)}
        self._held_in = list(places.values())
        self._which = np.zeros(norms, dtype=np.int64)
        self._which[list(own)] = [number[id(v.spot.place)] for v in own.values()]
        self._gains = _behind({i: (v.spot, v.gain) for i, v in own.items()}, norms)
        self._biases = _behind({i: (v.spot, v.bias) for i, v in own.items()}, norms)
        self._moves = -1
        self.gains: npt.NDArray[np.int32] | None = None
        self.biases: npt.NDArray[np.int32] | None = None

    def follow(self, moves: int) -> None:
        """Reads anew where the blobs are. moves: of the arena until now."""
        if self._moves == moves:
            return
        self._moves = moves
        starts = np.array([p.offset for p in self._held_in], dtype=np.int32)[self._which]
        self.gains, self.biases = (
            None if behind is None else np.where(behind == NOWHERE, NOWHERE, starts + behind)
            for behind in (self._gains, self._biases)
        )


def _behind(
    vectors: Mapping[int, tuple[Spot, int | None]], norms: int
) -> npt.NDArray[np.int32] | None:
    """int32 [norms]: units behind the start of its place."""
    units = {i: spot.units + at for i, (spot, at) in vectors.items() if at is not None}
    if not units:
        return None
    found = np.full(norms, NOWHERE, dtype=np.int32)
    found[list(units)] = list(units.values())
    return found

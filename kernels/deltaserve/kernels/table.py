"""What every family of primitives shares: a group's layout, and the table slot -> packed items."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from deltaserve.kernels.base import onednn
from deltaserve.kernels.content import content_of
from deltaserve.kernels.segments import Segments

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share their input, their outputs side by side: q, k and v; gate and up."""

    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype

    def columns(self, part: int) -> slice:
        """Where the part's outputs are."""
        start = sum(self.out_features[:part])
        return slice(start, start + self.out_features[part])


class Packed(Protocol):
    """A primitive of one part, made ready for serving."""

    @property
    def part(self) -> int: ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor it keeps in memory."""
        ...


P = TypeVar("P", bound=Packed)


class Table(Generic[P]):
    """slot -> items of one family. Used by the engine thread alone."""

    @property
    def rounds_once(self) -> bool:
        """Whether `add` takes a bfloat16 y and rounds it once, after all adapters of a run."""
        return False

    def __init__(self, group: Group) -> None:
        self.group = group
        self.columns = tuple(group.columns(part) for part in range(len(group.out_features)))
        self.items: dict[int, tuple[P, ...]] = {}

    def install(self, slot: int, items: Sequence[P]) -> None:
        """Replaces what the slot held; no items empties it."""
        if items:
            self.items[slot] = tuple(items)
            self._changed(slot)
        else:
            self.remove(slot)

    def remove(self, slot: int) -> None:
        if self.items.pop(slot, None) is not None:
            self._changed(slot)

    def touches(self, segments: Segments) -> bool:
        """Whether a slot of the step holds items of this family."""
        return not segments.slots.isdisjoint(self.items)

    def entries(self, segments: Segments) -> Iterator[tuple[slice, float, P]]:
        """(tokens, strength, item) for every item of every (run, adapter) entry of the step."""
        for start, end, slot, strength in segments.entries:
            for item in self.items.get(slot, ()):
                yield slice(start, end), strength, item

    def _changed(self, slot: int) -> None:
        """Called after each change of a slot's items."""


def places(tensors: Iterable[Tensor]) -> dict[Hashable, int]:
    """Where the tensors are -> bytes; the same memory under several tensors is there once. What is
    known by its content (`content.canonical`) is known by that, wherever it is."""
    found: dict[Hashable, int] = {}
    for t in tensors:
        size = onednn.nbytes(t)
        found[content_of(t) or (id(t) if t.is_mkldnn else t.data_ptr(), size)] = size
    return found


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors; the same memory under several tensors is counted once."""
    return sum(places(tensors).values())

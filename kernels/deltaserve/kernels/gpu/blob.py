"""Blob: everything that one adapter has in one group, as one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.kernels.gpu.arena import ALIGN, LINE, Arena, Place


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a blob lies: `units` of 16 bytes behind the start of a place that it may share."""

    place: Place
    units: int = 0

    @property
    def offset(self) -> int:
        """In units, now: the arena moves places between steps."""
        return self.place.offset + self.units


@dataclass(slots=True)
class Home:
    """Where a blob is in device memory, if it is; one for all that is prepared over the blob.
    users: slots that have it."""

    spot: Spot | None = None
    users: int = 0

    def take(self, blob: Tensor, arena: Arena) -> Spot:
        """One slot more has the blob, which is copied to the arena if it is not there."""
        if self.spot is None:
            self.spot = Spot(arena.put(blob))
        else:
            self.spot.place.users += 1
        self.users += 1
        return self.spot

    def leave(self, spot: Spot, arena: Arena) -> None:
        """One slot less."""
        self.users -= 1
        if not self.users:
            self.spot = None
        arena.drop(spot.place)


class Blob(Protocol):
    """What was prepared. blob: uint8, in host memory; home: where it lies on the device."""

    @property
    def blob(self) -> Tensor: ...
    @property
    def home(self) -> Home: ...
    @property
    def nbytes(self) -> int: ...


class BlobWriter:
    """Collects tensors; `bytes` is what is copied to the arena, in one go.

    Tensors are told by their offset in the blob, in units of 16 bytes; each starts a cache line.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._units = 0
        self._known: dict[tuple[int, int], int] = {}

    def add(self, tensor: Tensor) -> int:
        """Returns its offset. A tensor given twice is held once."""
        raw = torch.empty(0, dtype=torch.uint8)
        if tensor.numel():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        key = (raw.data_ptr(), raw.numel())
        if raw.numel() and key in self._known:
            return self._known[key]
        offset = self._units
        self._parts.append(raw)
        self._parts.append(torch.zeros(-raw.numel() % LINE, dtype=torch.uint8))
        self._units += -(-raw.numel() // LINE) * ALIGN
        self._known[key] = offset
        return offset

    def bytes(self) -> Tensor:
        """uint8 [n], n a multiple of 128."""
        if not self._parts:
            return torch.empty(0, dtype=torch.uint8)
        return torch.cat(self._parts)

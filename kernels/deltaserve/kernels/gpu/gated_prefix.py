"""GpuGatedPrefixes: `GatedPrefixes` whose keys and values lie in the arena."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltaserve.kernels.gated_prefix import GatedPrefixes
from deltaserve.kernels.gpu.arena import UNIT, Arena
from deltaserve.kernels.gpu.blob import BlobWriter, Home, Spot
from deltaserve.kernels.primitives import GatedPrefix


@dataclass(frozen=True, eq=False, slots=True)
class GpuPreparedPrefix:
    """like: the prefix, without content. units: where the keys of each layer are in the blob, and
    the values of each, in units of 16 bytes. blob: uint8, in host memory. home: where it lies on
    the device."""

    like: GatedPrefix
    units: tuple[tuple[int, ...], tuple[int, ...]]
    blob: Tensor
    home: Home = field(default_factory=Home)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blob,)

    @property
    def nbytes(self) -> int:
        """Exact bytes, padding included."""
        return self.blob.numel()


def prepare(prefix: GatedPrefix) -> GpuPreparedPrefix:
    """Packs what is in the dtype it is served in, in host memory. Any thread."""
    blob = BlobWriter()
    units = tuple(map(blob.add, prefix.keys)), tuple(map(blob.add, prefix.values))
    like = GatedPrefix(*(tuple(t.to("meta") for t in own) for own in (prefix.keys, prefix.values)))
    return GpuPreparedPrefix(like, units, blob.bytes())


class GpuGatedPrefixes(GatedPrefixes):
    """arena: where they lie."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self._spots: dict[int, tuple[GpuPreparedPrefix, Spot]] = {}

    @property
    def slots(self) -> Collection[int]:
        return self._spots.keys()

    def install(self, slot: int, prepared: Any) -> None:
        """See `GatedPrefixes.install`. What is in the arena already, or was put there for another
        slot, is not copied again."""
        assert isinstance(prepared, GpuPreparedPrefix)
        self.remove(slot)
        if prepared.nbytes:
            self._spots[slot] = prepared, prepared.home.take(prepared.blob, self.arena)

    def remove(self, slot: int) -> None:
        if slot in self._spots:
            prepared, spot = self._spots.pop(slot)
            prepared.home.leave(spot, self.arena)

    def _layer(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        prepared, spot = self._spots[slot]

        def held(like: Tensor, units: int) -> Tensor:
            start = (spot.offset + units) * UNIT // like.element_size()
            return self.arena.view(like.dtype)[start : start + like.numel()].view(like.shape)

        like, (keys, values) = prepared.like, prepared.units
        return held(like.keys[layer], keys[layer]), held(like.values[layer], values[layer])

"""Delivery: an adapter on its way to device memory, where all its blobs share one place; the
courier that makes deliveries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from deltaserve.kernels.gpu.arena import UNIT, Arena, OutOfArena, Place
from deltaserve.kernels.gpu.blob import Blob, Home, Spot
from deltaserve.kernels.gpu.staging import Staging


class Delivery:
    """Blobs of one adapter (of all its groups and norms) that are not in the arena yet. Engine
    thread: between two steps, once `arrived`, call `publish`, install what was prepared in slots,
    and call `finish`; or `cancel`, and `finish` once arrived. Raises OutOfArena when made.
    """

    def __init__(self, prepared: Collection[Blob], arena: Arena, staging: Staging) -> None:
        blobs = {id(p.home): p for p in prepared if p.nbytes and p.home.spot is None}
        self._arena = arena
        self._place: Place | None = None
        self._homes: list[tuple[Home, int]] = []
        memory, at = arena.view(torch.uint8)[:0], 0
        if blobs:
            self._place = arena.reserve(sum(p.nbytes for p in blobs.values()))
            arena.hold(self._place, True)  # until the copy is done, and nobody has read it before
            memory = arena.bytes_of(self._place)
        for p in blobs.values():
            self._homes.append((p.home, at // UNIT))
            at += p.nbytes
        self._staging = staging
        self._landing = staging.begin(memory, [p.blob for p in blobs.values()])

    @property
    def arrived(self) -> bool:
        """Asks the device; never waits for it. After `cancel`: nothing is written any more."""
        return self._landing.done

    def cancel(self) -> None:
        """Copy no more of it."""
        self._staging.cancel(self._landing)

    def publish(self) -> None:
        """Tell what was prepared where it lies."""
        assert self.arrived and not self._landing.cancelled
        if self._place is not None:
            self._arena.hold(self._place, False)
            for home, units in self._homes:
                home.spot = Spot(self._place, units)

    def finish(self) -> None:
        """From now on the memory is the slots' that have some of it; nobody's, if none has."""
        assert self.arrived
        if self._place is not None:
            self._arena.hold(self._place, False)
            for home, _ in self._homes:
                if not home.users:
                    home.spot = None
            self._arena.drop(self._place)


class Packed(Protocol):
    """An adapter, packed."""

    @property
    def linears(self) -> Mapping[str, Blob]: ...
    @property
    def norms(self) -> Mapping[str, Blob]: ...
    @property
    def embedding(self) -> Blob | None: ...
    @property
    def gated(self) -> Blob | None: ...


class DeviceCourier:
    """Deliveries to one arena. per_pump: slices that are launched each time it is called,
    between two steps."""

    def __init__(self, arena: Arena, staging: Staging, per_pump: int = 1) -> None:
        self._arena = arena
        self._staging = staging
        self._per_pump = per_pump

    def send(self, prepared: Packed) -> Delivery | None:
        """None while there is no place for it: others that are being copied cannot be moved."""
        try:
            blobs = [*prepared.linears.values(), *prepared.norms.values()]
            blobs += [own for own in (prepared.embedding, prepared.gated) if own is not None]
            return Delivery(blobs, self._arena, self._staging)
        except OutOfArena:
            return None

    def pump(self) -> bool:
        return self._staging.pump(self._per_pump) and not self._staging.full

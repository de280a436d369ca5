"""SharedMemory: one allocation of the device, of the cache at one end and adapters at the other."""

from __future__ import annotations

import torch

from deltaserve.kernels.gpu.arena import LINE, Arena


class SharedMemory:
    """`data`, uint8 of at least `nbytes`, zeros: the cache's from its low end up to a boundary,
    above which the arena lies, at the high end; behind it the arena's zeros and ones. Addresses
    never change, the boundary does.
    """

    def __init__(self, nbytes: int, arena: Arena) -> None:
        nbytes = -(-nbytes // LINE) * LINE
        size = nbytes + arena.neutral
        memory = torch.zeros(size, dtype=torch.uint8, device=arena.device)
        self.data = memory[:nbytes]
        self.boundary = 0
        self._arena = arena
        arena.adopt(memory)

    @property
    def reach(self) -> int:
        """Bytes that the cache can have at most while adapters are on their way."""
        return self.data.numel() - self._arena.stuck

    def divide(self, boundary: int) -> bool:
        """The cache has the first `boundary` bytes from now on; adapters move out of them, in the
        order of the current stream. False, and nothing moves, if they do not fit above, or those on
        their way are in between."""
        if not self._arena.limit(self.data.numel() - boundary):
            return False
        self.boundary = boundary
        return True

    def check_integrity(self) -> None:
        """Raise if a byte is the cache's and an adapter's."""
        self._arena.check_integrity()
        lowest = self.data.numel() - self._arena.end
        if self.boundary > lowest:
            raise AssertionError(f"adapters from {lowest} on, below {self.boundary}")

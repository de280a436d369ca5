"""GpuLayout: what of a GPU decides about memory, without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.gpu.arena import MOST, UNIT
from deltaserve.kernels.gpu.decoding import buckets
from deltaserve.kernels.gpu.graph_bytes import graph_bytes
from deltaserve.kernels.gpu.prepared import prepare
from deltaserve.kernels.table import Group


class GpuLayout:
    """A `Layout`. arch: compute capability, 90 for 9.0."""

    returns_pages = False
    adapter_limit: float = MOST * UNIT
    packed = staticmethod(prepare)

    def __init__(self, arch: int = 90) -> None:
        self.arch = arch

    def graph_bytes(
        self,
        groups: Mapping[Group, int],
        head: Group,
        attention: Collection[AttentionSpec],
        *,
        norms: int,
        most: int,
        max_length: int,
        block_size: int,
    ) -> int:
        return graph_bytes(
            groups, head, attention, buckets(most), norms=norms, max_length=max_length,
            block_size=block_size, arch=self.arch,
        )  # fmt: skip

"""GatedLowRank as pages of 8 rank rows, what lowrank/kernel.py and gated/kernel.py read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaserve.kernels.cast import cast
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.lowrank.pages import Page, pack_lowrank, pack_rows
from deltaserve.kernels.primitives import GatedLowRank, LowRank


@dataclass(frozen=True, slots=True)
class Gate:
    """The router of some experts. pages: of its rows, which make logits and are not expanded.
    first: the number, among the module's pages, of the first one of the experts' rows, `rank` for
    each expert."""

    pages: tuple[Page, ...]
    first: int
    experts: int
    rank: int


def pack_gated(
    primitive: GatedLowRank, first: int, dtype: torch.dtype, blob: BlobWriter
) -> tuple[list[Page], Gate]:
    """(pages of the experts' rows, the router). first: as in `Gate`."""
    experts = len(primitive.gate)
    pages = pack_lowrank(LowRank(primitive.a, primitive.b, primitive.scale), dtype, blob)
    logits = pack_rows(cast(primitive.gate, dtype), blob)
    return pages, Gate(tuple(logits), first, experts, len(primitive.a) // experts)

"""What one adapter has on the token embedding, as one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from deltaserve.kernels import embedding
from deltaserve.kernels.embedding import Rows
from deltaserve.kernels.gpu.arena import NOWHERE
from deltaserve.kernels.gpu.blob import BlobWriter, Home
from deltaserve.kernels.primitives import Primitive


class Kind(IntEnum):
    """What is done with a token's row: it takes the place of the base's; of the base's by a
    strength; is added; is multiplied by a matrix and added."""

    EXACT = 0
    REPLACED = 1
    ADDED = 2
    LOW = 3


@dataclass(frozen=True, slots=True)
class Item:
    """count: of rows, or the rank. index, rows, matrix: where they are in the blob, in units of 16
    bytes: int32 [count], the rows' tokens, ascending, or `NOWHERE` if there is a row for every
    token; [count or vocabulary, hidden], of LOW [vocabulary, rank]; [rank, hidden], of LOW alone.
    """

    kind: Kind
    count: int
    index: int
    rows: int
    matrix: int = 0
    scale: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class GpuPreparedEmbedding:
    """items: those that replace rows come first. blob: uint8, in host memory. home: where it lies
    on the device."""

    items: tuple[Item, ...]
    blob: Tensor
    home: Home = field(default_factory=Home)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blob,)

    @property
    def nbytes(self) -> int:
        """Exact bytes, padding included."""
        return self.blob.numel()


def prepare(
    primitives: tuple[Primitive, ...], vocabulary: int, hidden: int, dtype: torch.dtype
) -> GpuPreparedEmbedding:
    """See `embedding.prepare`."""
    found, blob = embedding.prepare(primitives, vocabulary, hidden, dtype), BlobWriter()

    def item(kind: Kind, rows: Rows) -> Item:
        index = NOWHERE if rows.index is None else blob.add(rows.index.to(torch.int32))
        return Item(kind, len(rows.values), index, blob.add(rows.values))

    items = [item(Kind.REPLACED, rows) for rows in found.replaced]
    items += [item(Kind.ADDED, rows) for rows in found.added]
    items += [
        Item(Kind.LOW, low.a.shape[1], NOWHERE, blob.add(low.a), blob.add(low.b.T), low.scale)
        for low in found.low
    ]
    return GpuPreparedEmbedding(tuple(items), blob.bytes())

"""What one adapter has in one group, packed into a blob, and where in the blob what lies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.bit.words import ROWS, pack_signs
from deltaserve.kernels.cast import cast
from deltaserve.kernels.check import check_linear
from deltaserve.kernels.gated.pages import Gate, pack_gated
from deltaserve.kernels.gpu.blob import BlobWriter, Home
from deltaserve.kernels.gpu.parts import Part, Signs
from deltaserve.kernels.gpu.rows import Rows
from deltaserve.kernels.lowrank.pages import Page, pack_columns, pack_lowrank
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    GatedLowRank,
    LowRank,
    Primitive,
    Replace,
    ReplaceRows,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
)
from deltaserve.kernels.sparse import panels
from deltaserve.kernels.sparse.panels import Panel
from deltaserve.kernels.sparse.sell import entries_of_blocks, pack_entries
from deltaserve.kernels.table import Group

STRUCTURES = 256
"""Different ones that are known at once; one adapter seldom has more than ten."""


@dataclass(frozen=True, eq=False, slots=True)
class GpuPrepared:
    """blob: uint8, in host memory, what is copied to the device as it is; parts: by number; rows:
    of the parts. These two are the same objects in groups that are packed alike, as layers mostly
    are. home: where it lies there."""

    blob: Tensor
    parts: Mapping[int, Part]
    home: Home = field(default_factory=Home)
    rows: Rows = field(init=False)

    def __post_init__(self) -> None:
        parts, rows = _one(tuple(self.parts.items()))
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "rows", rows)

    def only(self, parts: Collection[int]) -> GpuPrepared:
        """Some of its parts, over the same blob."""
        return replace(self, parts={i: p for i, p in self.parts.items() if i in parts})

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blob,)

    @property
    def nbytes(self) -> int:
        """Exact bytes, padding included."""
        return self.blob.numel()


def prepare(parts: Mapping[int, Sequence[Primitive]], group: Group) -> GpuPrepared:
    """Casts to the serving dtype and packs, in host memory. Safe from any thread.

    Raises ValueError for a primitive that linears do not take, or of the wrong shape.
    """
    for part, primitives in parts.items():
        check_linear(part, primitives, group)
    blob = BlobWriter()
    known: list[tuple[Tensor, int]] = []
    packed = {
        part: _part(primitives, group.out_features[part], group, blob, known)
        for part, primitives in sorted(parts.items())
        if primitives
    }
    return GpuPrepared(blob.bytes(), packed)


@lru_cache(maxsize=STRUCTURES)
def _one(parts: tuple[tuple[int, Part], ...]) -> tuple[Mapping[int, Part], Rows]:
    """The same objects for equal ones: they are made, and handed over, once."""
    found = dict(parts)
    return found, Rows.of(found)


def _part(
    primitives: Sequence[Primitive],
    out_features: int,
    group: Group,
    blob: BlobWriter,
    known: list[tuple[Tensor, int]],
) -> Part:
    """known: the input vectors of other parts, which are often the same."""
    pages: list[Page] = []
    gates: list[Gate] = []
    signs: list[Signs] = []
    entries: list[SparseCsr] = []
    found: list[Panel] = []
    factors: list[int] = []
    biases: list[int] = []
    scaled: int | None = None
    replaced: int | None = None
    for p in primitives:
        match p:
            case GatedLowRank():
                own, gate = pack_gated(p, len(pages), group.dtype, blob)
                pages += own
                gates.append(gate)
            case LowRank():
                pages += pack_lowrank(p, group.dtype, blob)
            case SparseCols():
                pages += pack_columns(p, group.dtype, blob)
            case Bit():
                signs.append(_signs(p, group, blob))
            case SparseCsr():
                entries.append(p)
            case SparseBlocks() if not panels.takes(p):
                entries.append(entries_of_blocks(p, out_features))
            case SparseBlocks():
                found.append(panels.pack_blocks(p, out_features, group.dtype, blob))
            case SparseRows(index, values):
                found.append(panels.pack_rows(index, values, out_features, group.dtype, blob))
            case Scale(inputs, outputs):
                if outputs is not None:
                    factors.append(blob.add(_vector(outputs)))
                if inputs is not None:
                    scaled = _shared(_vector(inputs), blob, known)
            case Bias(bias):
                biases.append(blob.add(_vector(bias)))
            case Replace(weight):
                # W' x is a delta beside a base product that counts for nothing.
                replaced = blob.add(torch.zeros(_padded(max(out_features, group.in_features))))
                found.append(panels.pack_rows(None, weight, out_features, group.dtype, blob))
            case ReplaceRows(index, values):
                keep = torch.ones(_padded(out_features))
                keep[index] = 0
                factors.append(blob.add(keep))
                found.append(panels.pack_rows(index, values, out_features, group.dtype, blob))
    sell = None
    if entries:
        sell = pack_entries(entries, out_features, group.in_features, group.dtype, blob)
    return Part(
        tuple(pages), tuple(signs), sell, tuple(found), tuple(factors), tuple(biases), scaled,
        replaced, tuple(gates),
    )  # fmt: skip


def _shared(vector: Tensor, blob: BlobWriter, known: list[tuple[Tensor, int]]) -> int:
    for other, offset in known:
        if torch.equal(other, vector):
            return offset
    known.append((vector, blob.add(vector)))
    return known[-1][1]


def _signs(primitive: Bit, group: Group, blob: BlobWriter) -> Signs:
    scale = cast(primitive.scale, torch.float32)
    return Signs(
        blob.add(pack_signs(primitive.signs, group.in_features, group.dtype)),
        blob.add(F.pad(scale, (0, -scale.shape[1] % ROWS))),
        scale.shape[0],
    )


def _vector(vector: Tensor) -> Tensor:
    """Float32 whatever the compute dtype: vectors are small, and 1 + w (s - 1) must not round."""
    return F.pad(cast(vector, torch.float32), (0, -vector.numel() % 4))


def _padded(n: int) -> int:
    return n + -n % 4

"""LowRank and SparseCols as pages of 8 rank rows, what lowrank/kernel.py reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.gpu.arena import UNIT
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.primitives import LowRank, SparseCols

PAGE = 8


@dataclass(frozen=True, slots=True)
class Page:
    """a, b: offsets. gathers: a's rows pick one column each."""

    a: int
    b: int
    scale: float
    gathers: bool


def pack_lowrank(primitive: LowRank, dtype: torch.dtype, blob: BlobWriter) -> list[Page]:
    """The rank is padded to a multiple of 8 with zeros, and so are in and out."""
    rank = primitive.a.shape[0]
    a = _rows(cast(primitive.a, dtype))
    b = _rows(cast(primitive.b, dtype, transpose=True))
    first_a, first_b = blob.add(a), blob.add(b)
    return [
        Page(first_a + _units(a, p), first_b + _units(b, p), float(primitive.scale), False)
        for p in range(-(-rank // PAGE))
    ]


def pack_rows(a: Tensor, blob: BlobWriter) -> list[Page]:
    """Rows a [r, in] whose h is read by another kernel than the expand."""
    a = _rows(a)
    first = blob.add(a)
    return [Page(first + _units(a, p), 0, 1.0, False) for p in range(a.shape[0] // PAGE)]


def pack_columns(primitive: SparseCols, dtype: torch.dtype, blob: BlobWriter) -> list[Page]:
    """``values x[index]`` is a LowRank whose A picks columns: only their numbers are kept."""
    count = primitive.index.numel()
    if not count:
        return []
    b = _rows(cast(primitive.values, dtype, transpose=True))
    numbers = F.pad(cast(primitive.index, torch.int32), (0, -count % PAGE), value=-1)
    first_a, first_b = blob.add(numbers), blob.add(b)
    return [
        Page(first_a + p * (PAGE * 4 // UNIT), first_b + _units(b, p), 1.0, True)
        for p in range(-(-count // PAGE))
    ]


def _rows(matrix: Tensor) -> Tensor:
    """[r, n] padded to multiples of 8."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % 8, 0, -rows % PAGE)).contiguous()


def _units(matrix: Tensor, page: int) -> int:
    return page * PAGE * matrix.shape[1] * matrix.element_size() // UNIT

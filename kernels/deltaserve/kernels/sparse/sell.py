"""SELL-C-sigma: single entries as sparse/kernel.py reads them (Kreutzer et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltaserve.kernels.cast import cast
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.primitives import SparseBlocks, SparseCsr

ROWS = 32
"""C: rows of a slice."""
WINDOW = 256
"""Sigma: rows are sorted by length within windows of this many, and stay in their window, so that
two adapters can write the same window of rows one after the other."""


@dataclass(frozen=True, slots=True)
class Sell:
    """Offsets of the slices' starts (in units of C entries), the rows' numbers (-1: padding), the
    columns and the values."""

    starts: int
    rows: int
    columns: int
    values: int


def pack_entries(
    matrices: Sequence[SparseCsr],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    blob: BlobWriter,
) -> Sell:
    """The sum of the matrices. A column twice in a row is two terms of its sum."""
    rows = np.concatenate([_rows(m) for m in matrices])
    columns = np.concatenate([m.indices.numpy() for m in matrices])
    values = torch.cat([cast(m.values, dtype) for m in matrices])
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=-(-out_features // ROWS) * ROWS)
    perm = _windows(counts)
    lengths = counts[perm].reshape(-1, ROWS).max(1)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    place = np.empty_like(perm)
    place[perm] = np.arange(len(perm))
    at = place[rows[order]]
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    nth = np.arange(len(rows)) - first[rows[order]]
    target = (starts[at // ROWS] + nth) * ROWS + at % ROWS
    packed_columns = np.zeros(int(starts[-1]) * ROWS, dtype=np.int32)
    packed_columns[target] = columns[order]
    packed_values = torch.zeros(len(packed_columns), dtype=dtype)
    packed_values[torch.from_numpy(target)] = values[torch.from_numpy(order)]
    numbers = np.where(perm < out_features, perm, -1).astype(np.int32)
    return Sell(
        blob.add(torch.from_numpy(starts.astype(np.int32))),
        blob.add(torch.from_numpy(numbers)),
        blob.add(torch.from_numpy(packed_columns.astype(column_type(in_features)))),
        blob.add(packed_values),
    )


def column_type(in_features: int) -> type[np.int32] | type[np.uint16]:
    """16 bits where they are enough."""
    return np.uint16 if in_features <= 1 << 16 else np.int32


def entries_of_blocks(blocks: SparseBlocks, out_features: int) -> SparseCsr:
    """The same numbers as single entries."""
    count, height, width = blocks.values.shape
    index = blocks.index.long()
    rows = index[:, 0, None, None] * height + torch.arange(height)[None, :, None]
    columns = index[:, 1, None, None] * width + torch.arange(width)[None, None, :]
    rows = rows.expand(count, height, width).reshape(-1)
    columns = columns.expand(count, height, width).reshape(-1)
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows, minlength=out_features)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return SparseCsr(indptr, columns[order].int(), blocks.values.reshape(-1)[order])


def _rows(matrix: SparseCsr) -> np.ndarray:
    counts = np.diff(matrix.indptr.numpy())
    return np.repeat(np.arange(len(counts)), counts)


def _windows(counts: np.ndarray) -> np.ndarray:
    """Row numbers, the longest first within each window."""
    window = np.arange(len(counts)) // WINDOW
    return np.lexsort((-counts, window))

"""Panels: whole rows and blocks of numbers, in chunks that sparse/kernel.py reads by tiles of 64
rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.cast import cast
from deltaserve.kernels.gpu.arena import UNIT
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.primitives import SparseBlocks

TILE = 64
CHUNK = 2048
"""Columns of a chunk at most: so many pieces a row's sum can be shared out in."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Offsets of the chunks' starts by tile and of the chunks; `tiles` says how many chunks each
    tile has. The chunks' own offsets are relative to the blob."""

    starts: int
    chunks: int
    tiles: tuple[int, ...]


def takes(blocks: SparseBlocks) -> bool:
    """Whether blocks are large and even enough for panels; single entries are better otherwise."""
    _, height, width = blocks.values.shape
    return height >= 8 and width >= 16 and width % 8 == 0


def pack_rows(
    index: Tensor | None, values: Tensor, out_features: int, dtype: torch.dtype, blob: BlobWriter
) -> Panel:
    """Whole rows: values [n, in] of the rows index [n], or of all rows if it is None."""
    rows, width = values.shape
    held = F.pad(cast(values, dtype), (0, -width % 8)).contiguous()
    offset, stride = blob.add(held), held.shape[1]
    tiles = -(-out_features // TILE)
    spans = [(k, min(CHUNK, width - k)) for k in range(0, width, CHUNK)]
    chunks: list[list[int]] = []
    starts = [0]
    numbers = np.full(tiles * TILE, -1, dtype=np.int32)
    if index is not None:
        numbers[index.numpy()] = np.arange(rows, dtype=np.int32)
    place = -1 if index is None else blob.add(torch.from_numpy(numbers))
    for tile in range(tiles):
        own = numbers[tile * TILE : (tile + 1) * TILE]
        if index is None or (own >= 0).any():
            at = -1 if index is None else place + tile * (TILE * 4 // UNIT)
            for k, count in spans:
                shift = k * held.element_size() // UNIT
                chunks.append([k // 8, -(-count // 8), offset + shift, stride // 8, 0, rows, at, 0])
        starts.append(len(chunks))
    return _panel(starts, chunks, blob)


def pack_blocks(
    primitive: SparseBlocks, out_features: int, dtype: torch.dtype, blob: BlobWriter
) -> Panel:
    """Blocks that `takes` accepts; each is a chunk of every tile it has rows in."""
    _, height, width = primitive.values.shape
    held = cast(primitive.values, dtype).contiguous()
    offset, size = blob.add(held), height * width * held.element_size() // UNIT
    tiles: list[list[list[int]]] = [[] for _ in range(-(-out_features // TILE))]
    for i, (p, q) in enumerate(primitive.index.tolist()):
        lo, hi = p * height, (p + 1) * height
        for tile in range(lo // TILE, -(-hi // TILE)):
            at = offset + i * size
            tiles[tile].append([q * width // 8, width // 8, at, width // 8, lo, hi, -1, 0])
    starts = [0, *np.cumsum([len(t) for t in tiles]).tolist()]
    return _panel(starts, [chunk for tile in tiles for chunk in tile], blob)


def _panel(starts: list[int], chunks: list[list[int]], blob: BlobWriter) -> Panel:
    counts = tuple(b - a for a, b in pairwise(starts))
    return Panel(
        blob.add(torch.tensor(starts, dtype=torch.int32)),
        blob.add(torch.tensor(chunks or [[0] * 8], dtype=torch.int32)),
        counts,
    )

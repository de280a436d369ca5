# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What adapters do to the rows of the token embedding."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.gpu import embedding_tables
from deltaserve.kernels.gpu.arena import NOWHERE
from deltaserve.kernels.gpu.prepared_embedding import Kind

EXACT = tl.constexpr(int(Kind.EXACT))
REPLACED = tl.constexpr(int(Kind.REPLACED))
LOW = tl.constexpr(int(Kind.LOW))
ABSENT = tl.constexpr(NOWHERE)
FIELDS = tl.constexpr(embedding_tables.FIELDS)
RANKS = tl.constexpr(8)
"""Of a matrix that are on their way at once."""


@triton.jit
def embedding_kernel(
    ids, y, weight, arena, arena_int, mixes, bounds, items, factors, multiplier,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (tokens, K / BLOCK rounded up). y [T, K], the base's rows, is changed in place.

    ids: int64 [T]. mixes: int32 [T], of each token; bounds: int32 [mixes + 2], of each mix its
    items; items: int32 [n, 5], kind, count, index, rows, matrix of `Item`, in units of 16 bytes of
    the arena, seen as y's type and as int32; factors: float32 [n], strength times scale. Mix 0 has
    none. multiplier: of the embedding. In float32, rounded once.
    """
    t = tl.program_id(0)
    mix = tl.load(mixes + t)
    first, last = tl.load(bounds + mix), tl.load(bounds + mix + 1)
    if first < last:
        UNIT: tl.constexpr = 128 // arena.dtype.element_ty.primitive_bitwidth
        key = tl.load(ids + t)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < K
        place = y + t.to(tl.int64) * K + at
        total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        for i in range(first, last):
            item = items + i * FIELDS
            kind, count = tl.load(item), tl.load(item + 1)
            rows = arena + tl.load(item + 3).to(tl.int64) * UNIT
            factor = tl.load(factors + i)
            if kind == LOW:
                matrix = arena + tl.load(item + 4).to(tl.int64) * UNIT
                change = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, count, RANKS):
                    r = start + tl.arange(0, RANKS)
                    own = tl.load(rows + key * count + r, mask=r < count, other=0.0)
                    tile = matrix + r[:, None] * K + at[None, :]
                    tile = tl.load(tile, mask=(r < count)[:, None] & inside[None, :], other=0.0)
                    change += tl.sum(own.to(tl.float32)[:, None] * tile.to(tl.float32), axis=0)
                total += change * (factor * multiplier)
            else:
                index = tl.load(item + 2)
                row, found = key, key >= 0
                if index != ABSENT:
                    keys = arena_int + index.to(tl.int64) * 4
                    low, high = count * 0, count
                    while low < high:
                        middle = (low + high) // 2
                        below = tl.load(keys + middle) < key
                        low = tl.where(below, middle + 1, low)
                        high = tl.where(below, high, middle)
                    row = low.to(tl.int64)
                    found = tl.load(keys + low, mask=low < count, other=ABSENT) == key
                if found:
                    own = tl.load(rows + row * K + at, mask=inside, other=0.0).to(tl.float32)
                    if kind == EXACT:
                        total = own * multiplier
                    else:
                        if kind == REPLACED:
                            base = tl.load(weight + key * K + at, mask=inside, other=0.0)
                            own -= base.to(tl.float32)
                        total += own * (factor * multiplier)
        tl.store(place, total.to(y.dtype.element_ty), mask=inside)

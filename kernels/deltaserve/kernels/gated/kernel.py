# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""GatedLowRank in Triton: between shrink and expand, the rows of h that belong to an expert times
what the router gives it."""

from __future__ import annotations

import triton
import triton.language as tl

# Of an entry; its numbers are named where the kernel reads them.
ENTRY = tl.constexpr(8)


@triton.jit
def whole(h, row, live, m, MP, WIDTH, SPLIT: tl.constexpr):
    """A row of h, the pieces of its sum added up."""
    place = h + row * MP + m
    total = tl.load(place, mask=live, other=0.0, cache_modifier=".cg")
    for s in tl.static_range(1, SPLIT):
        total += tl.load(place + s * WIDTH * MP, mask=live, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["TILES", "WIDTH8"])
def gate_kernel(
    h, gates, TILES, WIDTH8, TOKENS: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr
):
    """grid (entries, blocks of BM tokens of a tile). h: float32 [SPLIT, WIDTH, MP].

    gates: int32 [entries, 8] of (tokens from, to, first row of logits, experts, first row of the
    experts, rows of each): tokens of one tile. h of expert i is multiplied by ``softmax(logits)_i``
    in place, every piece of its sum alike.
    """
    MP = TILES * TOKENS
    WIDTH = WIDTH8 * 8
    entry = gates + tl.program_id(0) * ENTRY
    lo, hi, logits = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    experts, rows, rank = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    m = lo // TOKENS * TOKENS + tl.program_id(1) * BM + tl.arange(0, BM)
    live = (m >= lo) & (m < hi)
    top = tl.full((BM,), -float("inf"), tl.float32)
    for i in range(experts):
        top = tl.maximum(top, whole(h, logits + i, live, m, MP, WIDTH, SPLIT))
    total = tl.zeros((BM,), tl.float32)
    for i in range(experts):
        total += tl.exp(whole(h, logits + i, live, m, MP, WIDTH, SPLIT) - top)
    for i in range(experts):
        share = tl.exp(whole(h, logits + i, live, m, MP, WIDTH, SPLIT) - top) / total
        for first in range(0, rank, 8):
            row = first + tl.arange(0, 8)
            place = h + (rows + i * rank + row)[:, None] * MP + m[None, :]
            own = (row < rank)[:, None] & live[None, :]
            for s in tl.static_range(SPLIT):
                piece = place + s * WIDTH * MP
                value = tl.load(piece, mask=own, other=0.0, cache_modifier=".cg")
                tl.store(piece, value * share[None, :], mask=own)

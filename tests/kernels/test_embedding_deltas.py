"""Embedding deltas of both backends against float64 rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_oracle import relative_error

from deltaserve.kernels.embedding import EmbeddingDeltas
from deltaserve.kernels.gpu.arena import Arena
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.primitives import (
    Bias,
    LowRank,
    Primitive,
    Replace,
    ReplaceRows,
    SparseCols,
)
from deltaserve.kernels.segments import Segments

VOCABULARY, HIDDEN = 53, 37
DEVICE = default_device()
RUNS = [
    (1, 2, ((1, 1.0),)),
    (2, 9, ((2, 1.0), (1, -0.5))),
    (9, 30, ((3, 0.25),)),
    (31, 60, ((3, 1.0), (4, 1.0))),
    (60, 70, ((4, 0.5), (3, 0.5))),
    (70, 80, ((4, 1.0),)),
    (80, 81, ((9, 1.0),)),
    (81, 84, ((5, 1.0), (2, 0.5), (1, 2.0))),
]


def gpu(vocabulary: int, hidden: int, dtype: torch.dtype) -> GpuEmbeddingDeltas:
    return GpuEmbeddingDeltas(vocabulary, hidden, dtype, Arena(DEVICE, 1 << 10))


BOTH = pytest.mark.parametrize("make", (EmbeddingDeltas, gpu))


def adapters() -> dict[int, tuple[Primitive, ...]]:
    rows = torch.randperm(VOCABULARY)
    return {
        1: (LowRank(torch.randn(5, VOCABULARY), torch.randn(HIDDEN, 5), 0.7),),
        2: (SparseCols(rows[:20], torch.randn(HIDDEN, 20)),),
        3: (Replace(torch.randn(VOCABULARY, HIDDEN)),),
        4: (
            ReplaceRows(rows[10:30], torch.randn(20, HIDDEN)),
            LowRank(torch.randn(1, VOCABULARY), torch.randn(HIDDEN, 1)),
        ),
        5: (
            ReplaceRows(torch.empty(0, dtype=torch.int64), torch.empty(0, HIDDEN)),
            SparseCols(rows[:1], torch.randn(HIDDEN, 1)),
            SparseCols(rows[5:9], torch.randn(HIDDEN, 4)),
        ),
    }


def changed(p: Primitive, weight: torch.Tensor) -> torch.Tensor:
    """float64 [vocabulary, hidden] of the adapter's own embedding."""
    w = weight.double().clone()
    match p:
        case LowRank(a, b, scale):
            w += scale * (b.double() @ a.double()).T
        case SparseCols(index, values):
            w[index] += values.double().T
        case Replace(new):
            w = new.double()
        case ReplaceRows(index, values):
            w[index] = values.double()
    return w


@pytest.mark.parametrize("multiplier", (1.0, 6.5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@BOTH
def test_rows(make: Any, dtype: torch.dtype, multiplier: float) -> None:
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    deltas = make(VOCABULARY, HIDDEN, dtype)
    held = adapters()
    for slot, primitives in held.items():
        deltas.install(slot, deltas.prepare(primitives))
    segments = Segments(RUNS, 85)
    ids = torch.randint(0, VOCABULARY, (85,))
    base = (weight[ids].float() * multiplier).to(dtype)
    given = (t.to(DEVICE) for t in (ids, base.clone(), weight))
    y = deltas.forward(*given, segments, multiplier).cpu()
    expected = weight.double()[ids] * multiplier
    for start, end, mix in RUNS:
        for slot, strength in mix:
            for p in held.get(slot, ()):
                change = changed(p, weight) - weight.double()
                expected[start:end] += strength * multiplier * change[ids[start:end]]
    assert y.dtype == dtype
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 5e-3)
    for row in (0, 30, 80, 84):
        assert torch.equal(y[row], base[row])


@BOTH
def test_a_replaced_row_is_exact_whatever_the_base(make: Any) -> None:
    new = torch.randn(VOCABULARY, HIDDEN)
    deltas = make(VOCABULARY, HIDDEN, torch.float32)
    deltas.install(1, deltas.prepare((Replace(new),)))
    ids = torch.tensor([3, 5, 7])
    y = torch.full((3, HIDDEN), torch.nan)
    segments = Segments([(0, 2, ((1, 1.0),))], 3)
    out = deltas.forward(ids.to(DEVICE), y.to(DEVICE), y[:0].to(DEVICE), segments).cpu()
    assert torch.equal(out[:2], new[ids[:2]]) and out[2].isnan().all()


@BOTH
def test_life_of_a_slot(make: Any) -> None:
    deltas = make(VOCABULARY, HIDDEN, torch.float32)
    prepared = deltas.prepare((ReplaceRows(torch.tensor([4, 2]), torch.randn(2, HIDDEN)),))
    assert prepared.nbytes == (2 * HIDDEN * 4 + 2 * 8 if make is EmbeddingDeltas else 128 + 384)
    deltas.install(1, prepared)
    deltas.install(2, prepared)
    assert deltas.nbytes == prepared.nbytes
    deltas.remove(1)
    deltas.remove(2)
    deltas.remove(2)
    assert deltas.nbytes == 0


def test_an_arena_that_moves() -> None:
    """Where rows lie is read anew by each step."""
    deltas = gpu(VOCABULARY, HIDDEN, torch.float32)
    news = [torch.randn(VOCABULARY, HIDDEN) for _ in range(3)]
    for slot, new in enumerate(news, 1):
        deltas.install(slot, deltas.prepare((Replace(new),)))
    deltas.arena.adopt(torch.zeros(deltas.arena.used + 256, dtype=torch.uint8, device=DEVICE))
    segments = Segments([(0, 1, ((3, 1.0),)), (1, 3, ((2, 1.0),))], 3)
    ids = torch.tensor([3, 5, 7])
    for gone in (None, 1):
        if gone is not None:  # the others move into its place
            deltas.remove(gone)
            assert deltas.arena.limit(deltas.arena.used)
        y = torch.zeros(3, HIDDEN).to(DEVICE)
        out = deltas.forward(ids.to(DEVICE), y, y[:0], segments).cpu()
        assert torch.equal(out, torch.stack([news[2][3], news[1][5], news[1][7]]))
    deltas.arena.check_integrity()


@BOTH
def test_refusals(make: Any) -> None:
    deltas = make(VOCABULARY, HIDDEN, torch.float32)
    for primitives, message in (
        ((Bias(torch.zeros(HIDDEN)),), "Bias"),
        ((Replace(torch.zeros(HIDDEN, VOCABULARY)),), "Replace.weight"),
        ((ReplaceRows(torch.tensor([VOCABULARY]), torch.zeros(1, HIDDEN)),), "outside"),
        ((Replace(torch.zeros(VOCABULARY, HIDDEN)),) * 2, "more than one"),
    ):
        with pytest.raises(ValueError, match=message):
            deltas.prepare(primitives)

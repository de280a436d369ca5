"""Embedding deltas against float64 rows."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import relative_error

from deltaserve.kernels.embedding import EmbeddingDeltas
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
RUNS = [
    (1, 2, ((1, 1.0),)),
    (2, 9, ((2, 1.0), (1, -0.5))),
    (9, 30, ((3, 0.25),)),
    (31, 60, ((3, 1.0), (4, 1.0))),
    (60, 70, ((4, 0.5), (3, 0.5))),
    (70, 80, ((4, 1.0),)),
    (80, 81, ((9, 1.0),)),
]


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
def test_rows(dtype: torch.dtype, multiplier: float) -> None:
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    deltas = EmbeddingDeltas(VOCABULARY, HIDDEN, dtype)
    held = adapters()
    for slot, primitives in held.items():
        deltas.install(slot, deltas.prepare(primitives))
    segments = Segments(RUNS, 82)
    ids = torch.randint(0, VOCABULARY, (82,))
    base = (weight[ids].float() * multiplier).to(dtype)
    y = deltas.forward(ids, base.clone(), lambda i: weight[i], segments, multiplier)
    expected = weight.double()[ids] * multiplier
    for start, end, mix in RUNS:
        for slot, strength in mix:
            for p in held.get(slot, ()):
                change = changed(p, weight) - weight.double()
                expected[start:end] += strength * multiplier * change[ids[start:end]]
    assert y.dtype == dtype
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 5e-3)
    for row in (0, 30, 80, 81):
        assert torch.equal(y[row], base[row])


def test_a_replaced_row_is_exact_whatever_the_base() -> None:
    new = torch.randn(VOCABULARY, HIDDEN)
    deltas = EmbeddingDeltas(VOCABULARY, HIDDEN, torch.float32)
    deltas.install(1, deltas.prepare((Replace(new),)))
    ids = torch.tensor([3, 5, 7])
    y = torch.full((3, HIDDEN), torch.nan)
    out = deltas.forward(ids, y, lambda i: y[:0], Segments([(0, 2, ((1, 1.0),))], 3))
    assert torch.equal(out[:2], new[ids[:2]]) and out[2].isnan().all()


def test_life_of_a_slot() -> None:
    deltas = EmbeddingDeltas(VOCABULARY, HIDDEN, torch.float32)
    prepared = deltas.prepare((ReplaceRows(torch.tensor([4, 2]), torch.randn(2, HIDDEN)),))
    assert prepared.nbytes == 2 * HIDDEN * 4 + 2 * 8
    deltas.install(1, prepared)
    deltas.install(2, prepared)
    assert deltas.nbytes == prepared.nbytes
    deltas.remove(1)
    deltas.remove(2)
    deltas.remove(2)
    assert deltas.nbytes == 0


def test_refusals() -> None:
    deltas = EmbeddingDeltas(VOCABULARY, HIDDEN, torch.float32)
    for primitives, message in (
        ((Bias(torch.zeros(HIDDEN)),), "Bias"),
        ((Replace(torch.zeros(HIDDEN, VOCABULARY)),), "Replace.weight"),
        ((ReplaceRows(torch.tensor([VOCABULARY]), torch.zeros(1, HIDDEN)),), "outside"),
        ((Replace(torch.zeros(VOCABULARY, HIDDEN)),) * 2, "more than one"),
    ):
        with pytest.raises(ValueError, match=message):
            deltas.prepare(primitives)

"""What preparing holds, shares and refuses."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import random_primitive, relative_error, served

from deltaserve.kernels.base import make_linear
from deltaserve.kernels.cast import cast
from deltaserve.kernels.check import composable
from deltaserve.kernels.linear import LinearDeltas
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
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
from deltaserve.kernels.segments import Segments

OUT, IN = 40, 64


def linear_deltas(dtype: torch.dtype = torch.float32) -> LinearDeltas:
    return LinearDeltas(IN, (OUT, OUT), dtype)


def test_bytes_of_each_family() -> None:
    for kind, expected in (
        ("low", (3 * IN + OUT * 3) * 4),
        ("bias", OUT * 4),
        ("output", OUT * 4),
    ):
        p = random_primitive(kind, OUT, IN)
        assert linear_deltas().prepare({0: (p,)}).nbytes == expected, kind
    # oneDNN pads rows, which counts: 64 of them need none.
    whole = LinearDeltas(IN, (64,), torch.float32).prepare({0: (Replace(torch.ones(64, IN)),)})
    assert whole.nbytes == 64 * IN * 4
    bits = Bit(torch.zeros(1, 48, IN // 8, dtype=torch.uint8), torch.ones(1, 48))
    assert LinearDeltas(IN, (48,), torch.bfloat16).prepare({0: (bits,)}).nbytes == 48 * (
        IN // 8 + 4
    )
    low = linear_deltas(torch.bfloat16).prepare({0: (random_primitive("low", OUT, IN),)})
    assert low.nbytes == (3 * IN + OUT * 3) * 2


def test_bfloat16_factors_stay_so_in_float32() -> None:
    p = LowRank(torch.randn(4, IN).bfloat16(), torch.randn(OUT, 4).bfloat16())
    assert linear_deltas().prepare({1: (p,)}).nbytes == 2 * 4 * (IN + OUT)


def test_shared_memory_is_counted_once() -> None:
    a = torch.randn(4, IN)
    parts = {i: (LowRank(a, torch.randn(OUT, 4)),) for i in range(2)}
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        deltas = linear_deltas(dtype)
        prepared = deltas.prepare(parts)
        assert prepared.nbytes == (4 * IN + 2 * 4 * OUT) * size
        again = linear_deltas(dtype).prepare(parts)
        assert {id(t) for t in again.tensors()} & {id(t) for t in prepared.tensors()}
        deltas.install(1, prepared)
        deltas.install(5, prepared)
        assert deltas.nbytes == prepared.nbytes


def test_cast_does_not_confuse_memory_that_was_given_away() -> None:
    for _ in range(50):
        source = torch.randn(64, 64)
        assert torch.equal(cast(source, torch.bfloat16), source.bfloat16())
        del source


def test_parts_with_inputs_of_their_own(backend: str) -> None:
    deltas = linear_deltas()
    held: dict[int, dict[int, tuple[Primitive, ...]]] = {
        1: {0: (Scale(input=torch.rand(IN)),)},
        2: {0: (Scale(input=torch.rand(IN)),), 1: (Scale(input=torch.rand(IN)),)},
    }
    same = torch.rand(IN)
    held[3] = {i: (Scale(input=same.clone()),) for i in range(2)}
    for slot, parts in held.items():
        deltas.install(slot, deltas.prepare(parts))
    weight, bias = torch.randn(2 * OUT, IN), torch.randn(2 * OUT)
    base = make_linear(weight, bias, dtype=torch.float32)
    for runs in (
        [(0, 2, ((3, 1.0),)), (3, 4, ((3, 0.5),))],
        [(0, 2, ((1, 1.0),)), (2, 3, ((2, 0.5),)), (4, 9, ((3, 1.0), (1, 0.5)))],
    ):
        segments = Segments(runs, 10)
        x = torch.randn(10, IN)
        y = deltas.forward(x, base, segments)
        for part in range(2):
            rows = slice(part * OUT, (part + 1) * OUT)
            own = {slot: parts.get(part, ()) for slot, parts in held.items()}
            expected = served(x, weight[rows], bias[rows], own, segments)
            assert relative_error(y[:, rows], expected) < 2e-6


def test_several_of_a_family_on_one_part(backend: str) -> None:
    kinds = ("csr", "csr", "bit", "bit", "bias", "bias", "low", "low", "rows", "rows")
    primitives = tuple(random_primitive(k, OUT, IN, rank=i + 1) for i, k in enumerate(kinds))
    deltas = linear_deltas()
    deltas.install(1, deltas.prepare({1: primitives}))
    weight = torch.randn(2 * OUT, IN)
    segments = Segments([(0, 1, ((1, 1.0),)), (2, 20, ((1, -0.5),))], 20)
    x = torch.randn(20, IN)
    y = deltas.forward(x, make_linear(weight, None, dtype=torch.float32), segments)
    expected = served(x, weight[OUT:], None, {1: primitives}, segments)
    assert relative_error(y[:, OUT:], expected) < 2e-6


@pytest.mark.parametrize(
    "primitives, message",
    [
        ((LowRank(torch.ones(2, IN + 1), torch.ones(OUT, 2)),), "LowRank.a"),
        ((LowRank(torch.ones(2, IN), torch.ones(OUT, 3)),), "LowRank.b"),
        ((Bit(torch.zeros(1, OUT, 3, dtype=torch.uint8), torch.ones(1, OUT)),), "Bit.signs"),
        (
            (SparseCsr(torch.zeros(OUT + 1).long(), torch.tensor([IN]).int(), torch.ones(1)),),
            "indices",
        ),
        ((SparseRows(torch.tensor([OUT]), torch.ones(1, IN)),), "outside"),
        ((SparseCols(torch.tensor([-1]), torch.ones(OUT, 1)),), "outside"),
        ((SparseBlocks(torch.tensor([[0, 0]]), torch.ones(1, 3, 2)),), "3x2"),
        ((SparseBlocks(torch.tensor([[0, 32]]), torch.ones(1, 2, 2)),), "outside"),
        ((Scale(input=torch.ones(OUT)),), "Scale.input"),
        ((Scale(output=torch.ones(IN)),), "Scale.output"),
        ((Bias(torch.ones(IN)),), "Bias"),
        ((Replace(torch.ones(IN, OUT)),), "Replace.weight"),
        ((ReplaceRows(torch.tensor([1]), torch.ones(2, IN)),), "ReplaceRows"),
        ((Scale(output=torch.ones(OUT)),) * 2, "more than one Scale"),
        ((Replace(torch.ones(OUT, IN)),) * 2, "more than one Replace"),
        ((Replace(torch.ones(OUT, IN)), Scale(output=torch.ones(OUT))), "beside"),
    ],
)
def test_refusals(primitives: tuple[Primitive, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_deltas().prepare({0: primitives})
    with pytest.raises(ValueError, match="part is 2"):
        linear_deltas().prepare({2: (Bias(torch.ones(OUT)),)})


def test_composable() -> None:
    inputs, outputs = Scale(input=torch.ones(IN)), Scale(output=torch.ones(OUT))
    both = Scale(torch.ones(IN), torch.ones(OUT))
    low = random_primitive("low", OUT, IN)
    assert composable([((inputs, low), 0.5), ((inputs,), 2.0)]) is None
    assert composable([((outputs, low), 0.5), ((outputs,), 2.0)]) is None
    assert composable([((both,), 1.0), ((low,), 0.3)]) is None
    assert composable([((both,), 0.5)]) is not None
    assert composable([((both,), 1.0), ((outputs,), 1.0)]) is not None
    assert composable([((inputs,), 1.0), ((outputs,), 1.0)]) is not None

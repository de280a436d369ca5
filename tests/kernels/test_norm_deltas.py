"""Norm deltas against float64."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import torch
from kernel_oracle import relative_error
from torch import Tensor

from deltaserve.kernels.norm import NormDeltas
from deltaserve.kernels.primitives import Bias, LowRank, Replace
from deltaserve.kernels.rms_norm import rms_norm
from deltaserve.kernels.segments import Segments

Held: TypeAlias = dict[int, tuple[Replace | Bias, ...]]
HIDDEN = 37
RUNS = [
    (1, 2, ((1, 1.0),)),
    (2, 5, ((2, 0.5), (1, -0.5))),
    (6, 7, ((1, 1.0),)),
    (7, 9, ((3, 2.0),)),
    (9, 11, ((7, 1.0),)),
]


def installed(dtype: torch.dtype) -> tuple[Held, NormDeltas]:
    held: Held = {
        1: (Replace(torch.rand(HIDDEN) + 0.5), Bias(torch.randn(HIDDEN))),
        2: (Replace(torch.rand(HIDDEN)),),
        3: (Bias(torch.randn(HIDDEN)),),
    }
    deltas = NormDeltas(HIDDEN, dtype)
    for slot, primitives in held.items():
        deltas.install(slot, deltas.prepare(primitives))
    return held, deltas


def tuned(unit: Tensor, weight: Tensor, held: Held, offset: float = 0.0) -> Tensor:
    """unit: float64 [T, ..., hidden], normed without a gain."""
    expected = unit * (weight.double() + offset)
    for start, end, mix in RUNS:
        g, b = weight.double().clone(), torch.zeros(HIDDEN).double()
        for slot, strength in mix:
            for p in held.get(slot, ()):
                if isinstance(p, Replace):
                    g += strength * (p.weight.double() - weight.double())
                else:
                    b += strength * p.bias.double()
        expected[start:end] = unit[start:end] * (g + offset) + b
    return expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gain_and_bias(dtype: torch.dtype) -> None:
    gain = torch.rand(HIDDEN).to(dtype) + 0.5

    def norm(x: Tensor, other: Tensor | None) -> Tensor:
        g = gain if other is None else other
        return (torch.nn.functional.rms_norm(x.double(), (HIDDEN,)) * g.double()).to(dtype)

    held, deltas = installed(dtype)
    x = torch.randn(12, HIDDEN).to(dtype)
    y = deltas.forward(x, norm, gain, Segments(RUNS, 12))
    unit = torch.nn.functional.rms_norm(x.double(), (HIDDEN,))
    expected = tuned(unit, gain, held)
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 5e-3)
    plain = norm(x, None)
    for row in (0, 5, 9, 10, 11):
        assert torch.equal(y[row], plain[row])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("each", (1, 3))
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_rms_norms(each: int, offset: float, dtype: torch.dtype) -> None:
    if offset and dtype == torch.bfloat16:
        pytest.skip("1 + weight would be rounded, so such norms are not proven to be RMS norms")
    weight, eps = torch.rand(HIDDEN).to(dtype) + 0.5, 1e-3
    held, deltas = installed(dtype)
    x = torch.randn(12, each, HIDDEN).to(dtype)
    y = deltas.rms(x, weight, offset, eps, Segments(RUNS, 12)).double()
    unit = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), eps=eps)
    expected = tuned(unit, weight, held, offset)
    assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 5e-3)
    plain = rms_norm(x, weight + offset, eps).double()
    for row in (0, 5, 9, 10, 11):
        assert torch.equal(y[row], plain[row])


def test_life_of_a_slot_and_refusals() -> None:
    deltas = NormDeltas(HIDDEN, torch.float32)
    prepared = deltas.prepare((Replace(torch.ones(HIDDEN)),))
    assert prepared.nbytes == HIDDEN * 4
    deltas.install(1, prepared)
    assert deltas.nbytes == HIDDEN * 4
    deltas.remove(1)
    assert deltas.nbytes == 0
    with pytest.raises(ValueError, match="LowRank"):
        deltas.prepare((LowRank(torch.ones(1, HIDDEN), torch.ones(HIDDEN, 1)),))
    with pytest.raises(ValueError, match=r"Replace\.weight"):
        deltas.prepare((Replace(torch.ones(HIDDEN + 1)),))

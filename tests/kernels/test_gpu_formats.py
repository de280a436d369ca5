"""Every form that checkpoints hold weights in, on the GPU beside adapters, against float64 on the
weights that a CPU serves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_rig import GpuRig
from kernel_oracle import random_primitive

from deltaserve.kernels.base import BaseLinear, Int4Linear, PermutedLinear
from deltaserve.kernels.gpu import device
from deltaserve.kernels.segments import Segments

INNER, OUTS = 200, (37, 20)
FAMILIES = {1: ("low", "input"), 2: ("bit", "csr", "output"), 3: ("replace", "bias")}
MIXED = Segments([(1, 2, ((1, 1.0),)), (2, 4, ((2, 0.5), (1, 0.5))), (5, 6, ((3, 1.0),))], 7)


def int4(dtype: torch.dtype, group: int, *, whole: bool = True) -> BaseLinear:
    out, groups = sum(OUTS), -(-INNER // group)
    q = torch.randint(0, 16, (out, INNER), dtype=torch.uint8)
    zero = 6 + 4 * torch.rand(out, groups)
    scale = (torch.rand(out, groups) + 0.5) / (5 * INNER**0.5)
    bias = torch.randn(out)
    return Int4Linear(q, scale, zero.round() if whole else zero, bias, dtype, group)


def ordered(linear: BaseLinear) -> BaseLinear:
    return PermutedLinear(linear, torch.randperm(INNER))


FORMS: dict[str, Callable[[torch.dtype], BaseLinear]] = {
    "int4 ordered": lambda dtype: ordered(int4(dtype, 32)),
    "int4 ordered, broken zeros": lambda dtype: ordered(int4(dtype, 64, whole=False)),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_beside_adapters(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, with the instructions that a GPU runs, a few tokens and many."""
    monkeypatch.setattr(device, "packs", lambda: True)
    adapters = {
        slot: {p: tuple(random_primitive(k, n, INNER) for k in kinds) for p, n in enumerate(OUTS)}
        for slot, kinds in FAMILIES.items()
    }
    rig = GpuRig(INNER, OUTS, dtype, adapters, held=FORMS[form](dtype))
    rig.check(MIXED)
    rig.check(Segments([(0, 1, ((1, 1.0),))], 40))

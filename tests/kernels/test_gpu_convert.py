"""Quantized linears in the GPU's layouts hold the very weights that loading gave them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve.kernels.backend import UnsupportedWeights
from deltaserve.kernels.base import (
    BaseLinear,
    ByteLinear,
    Code4Linear,
    DenseLinear,
    Int4Linear,
    PermutedLinear,
    make_linear,
)
from deltaserve.kernels.gpu.convert import held_on_gpu
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.workspace import Workspace

OUT, INNER = 40, 208
DTYPE = torch.float32


def int4(group: int, *, whole: bool = True) -> BaseLinear:
    groups = -(-INNER // group)
    q = torch.randint(0, 16, (OUT, INNER), dtype=torch.uint8)
    zero = torch.rand(OUT, groups) * 15
    scale = torch.rand(OUT, groups) + 0.5
    return Int4Linear(q, scale, zero.round() if whole else zero, None, DTYPE, group)


def octets(group: int, kind: torch.dtype, *, zeros: bool = False, shift: float = 0.0) -> BaseLinear:
    groups = -(-INNER // group)
    q = torch.randint(-127, 128, (OUT, INNER)).to(kind)
    zero = torch.full((OUT, groups), shift) if zeros else None
    return ByteLinear(q, torch.rand(OUT, groups) + 0.5, zero, torch.randn(OUT), DTYPE, group)


def permuted() -> BaseLinear:
    return PermutedLinear(int4(32), torch.randperm(INNER))


KEPT = {
    "dense": lambda: DenseLinear(torch.randn(OUT, INNER), torch.randn(OUT), DTYPE),
    "int8": lambda: make_linear(torch.randn(OUT, INNER), None, dtype=DTYPE, quantize="int8"),
    **{f"int4 of {n}": lambda n=n: int4(n) for n in (8, 16, 32, 40, 64, 96, 128, 192, 256)},
    "int4 with broken zeros": lambda: int4(64, whole=False),
    "bytes": lambda: octets(INNER, torch.int8),
    "fp8": lambda: octets(INNER, torch.float8_e4m3fn),
    "permuted": permuted,
    "codes": lambda: Code4Linear(
        torch.randint(0, 16, (OUT, INNER), dtype=torch.uint8), torch.randn(16),
        torch.rand(OUT, -(-INNER // 64)), None, DTYPE, 64,
    ),
    "scales of 32": lambda: octets(32, torch.int8),
    "scales of 16": lambda: octets(16, torch.float8_e4m3fn),
    "zeros": lambda: octets(96, torch.int8, zeros=True, shift=-128),
}  # fmt: skip
REFUSED = {
    "scales for 4 inputs each": lambda: octets(4, torch.int8),
    "8-bit floats with zeros": lambda: octets(INNER, torch.float8_e4m3fn, zeros=True),
    "zeros of up to 0.5 from": lambda: octets(64, torch.int8, zeros=True, shift=0.5),
    "zeros of up to 129 from": lambda: octets(64, torch.int8, zeros=True, shift=129),
}


def moved(linear: BaseLinear) -> BaseLinear:
    device = default_device()
    return held_on_gpu(linear, device, Workspace(device))


@pytest.mark.parametrize("kind", KEPT)
def test_the_weights_stay_what_they_were(kind: str) -> None:
    linear = KEPT[kind]()
    on_gpu = moved(linear)
    weight: Tensor = linear.weight()
    assert torch.equal(on_gpu.weight(), weight)
    assert torch.equal(on_gpu.weight_rows(3, 7), weight[3:7])
    x = torch.randn(3, INNER)
    want = x.double() @ weight.double().T
    if linear.bias is not None:
        want += linear.bias.double()
    y = on_gpu(x.to(default_device())).cpu().double()
    assert (y - want).norm() < 3e-6 * want.norm()


@pytest.mark.parametrize(
    "quantize, group", [("int8", 64), ("int4", 8), ("int4", 40), ("int4", 64), ("int4", 256)]
)
def test_tokens_in_8_bits_are_those_of_the_cpu(quantize: str, group: int) -> None:
    """With biases."""
    weight, bias = torch.randn(OUT, INNER), torch.randn(OUT)
    linear = make_linear(
        weight, bias, dtype=DTYPE, quantize=quantize, group_size=group, activations="int8"
    )
    on_gpu = moved(linear)
    assert on_gpu.rounds_inputs and torch.equal(on_gpu.weight(), linear.weight())
    x = torch.randn(9, INNER)
    want = linear(x).double()
    y = on_gpu(x.to(default_device())).cpu().double()
    assert (y - want).norm() < 3e-6 * want.norm()


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_layout_is_refused(reason: str) -> None:
    with pytest.raises(UnsupportedWeights, match=reason):
        moved(REFUSED[reason]())

"""Every form that checkpoints hold weights in, on the GPU beside adapters, against float64 on the
weights that a CPU serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_rig import TOLERANCE, GpuRig
from kernel_oracle import random_primitive, relative_error

from deltaserve.kernels.base import (
    BaseLinear,
    ByteLinear,
    Code4Linear,
    Int4Linear,
    PermutedLinear,
)
from deltaserve.kernels.base.float_kernel import float_product
from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.convert import held_on_gpu
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.segments import Segments

INNER, OUTS = 136, (21, 12)
FAMILIES = {1: ("low", "input"), 2: ("bit", "csr", "output")}
MIXED = Segments([(1, 2, ((1, 1.0),)), (2, 4, ((2, 0.5), (1, 0.5)))], 5)


def int4(dtype: torch.dtype, group: int, *, whole: bool = True) -> BaseLinear:
    out, groups = sum(OUTS), -(-INNER // group)
    q = torch.randint(0, 16, (out, INNER), dtype=torch.uint8)
    zero = 6 + 4 * torch.rand(out, groups)
    scale = (torch.rand(out, groups) + 0.5) / (5 * INNER**0.5)
    bias = torch.randn(out)
    return Int4Linear(q, scale, zero.round() if whole else zero, bias, dtype, group)


def codes(dtype: torch.dtype, group: int) -> BaseLinear:
    """Codes that 16 bits do not hold."""
    out = sum(OUTS)
    q = torch.randint(0, 16, (out, INNER), dtype=torch.uint8)
    scale = (torch.rand(out, -(-INNER // group)) + 0.5) / INNER**0.5
    return Code4Linear(q, torch.randn(16), scale, torch.randn(out), dtype, group)


def octets(
    dtype: torch.dtype, group: int, kind: torch.dtype = torch.int8, zeros: bool = False
) -> BaseLinear:
    out, groups = sum(OUTS), -(-INNER // group)
    q = torch.randint(-128, 128, (out, INNER)).clamp(-127 if kind != torch.int8 else -128).to(kind)
    zero = torch.randint(-128, 129, (out, groups)).float() if zeros else None
    scale = (torch.rand(out, groups) + 0.5) / (74 * INNER**0.5)
    return ByteLinear(q, scale, zero, torch.randn(out), dtype, group)


def ordered(linear: BaseLinear) -> BaseLinear:
    return PermutedLinear(linear, torch.randperm(INNER))


FORMS: dict[str, Callable[[torch.dtype], BaseLinear]] = {
    "int4 of 8": lambda dtype: int4(dtype, 8),
    "int4 of 16, broken zeros": lambda dtype: int4(dtype, 16, whole=False),
    "int4 of 40": lambda dtype: int4(dtype, 40),
    "int4 ordered": lambda dtype: ordered(int4(dtype, 32)),
    "int4 ordered, broken zeros": lambda dtype: ordered(int4(dtype, 64, whole=False)),
    "codes of 64": lambda dtype: codes(dtype, 64),
    "codes of 8, ordered": lambda dtype: ordered(codes(dtype, 8)),
    "bytes of 48": lambda dtype: octets(dtype, 48),
    "bytes of 128 with zeros": lambda dtype: octets(dtype, 128, zeros=True),
    "bytes of rows with zeros": lambda dtype: octets(dtype, INNER, zeros=True),
    "bytes of 24 with zeros": lambda dtype: octets(dtype, 24, zeros=True),
    "fp8 of 128": lambda dtype: octets(dtype, 128, torch.float8_e4m3fn),
    "fp8 of 16": lambda dtype: octets(dtype, 16, torch.float8_e4m3fn),
}
IN_FLOAT32 = ("int4 of 16, broken zeros", "codes of 8, ordered", "bytes of rows with zeros")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.bfloat16) for form in FORMS), *((form, torch.float32) for form in IN_FLOAT32)],
    ids=str,
)
def test_beside_adapters(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, with the instructions that a GPU runs; and tiles for many tokens."""
    monkeypatch.setattr(device, "packs", lambda: True)
    adapters = {
        slot: {p: tuple(random_primitive(k, n, INNER) for k in kinds) for p, n in enumerate(OUTS)}
        for slot, kinds in FAMILIES.items()
    }
    rig = GpuRig(INNER, OUTS, dtype, adapters, held=FORMS[form](dtype))
    rig.check(MIXED)
    x = rig.x(33)
    expected = torch.cat(rig.parts(x, Segments([], 33)), 1)
    assert relative_error(rig.base(x).cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_codes_keep_every_bit(dtype: torch.dtype) -> None:
    """Of weights that are alike but for their last bits, what is left when they cancel."""
    q = torch.arange(16, dtype=torch.uint8).expand(3, 16)
    code = 1 + torch.arange(16) * 2.0**-23
    linear = Code4Linear(q, code, torch.ones(3, 2), None, dtype, 8)
    x = torch.zeros(15, 16)
    x[:, 0], x[range(15), range(1, 16)] = -1, 1
    place = default_device()
    y = held_on_gpu(linear, place, Workspace(place))(x.to(place, dtype))
    assert torch.equal(y.cpu().double(), (code[1:] - code[0]).double()[:, None].expand(15, 3))


@triton.jit
def last_tile(x, weight, y, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [16, 16]: the base product of the last rows, over the last columns."""
    r = tl.arange(0, 16)
    n = N - 16 + r
    acc = float_product(
        x, x, weight, x, x, n, n < N, r, K - 32, K, 1, 16, N, K, "dense", 1, "sums", tl.float16,
        16, 16, 32, 32, 1, True, True, False,
    )  # fmt: skip
    tl.store(y + r[:, None] * 16 + r[None, :], acc)


@pytest.mark.skipif(default_device().type == "cuda", reason="takes 8 GiB, which only a file has")
def test_a_head_of_more_weights_than_numbers_of_32_bits_tell(tmp_path: Path) -> None:
    """As Command R+'s, of 256000 by 12288. Where a place wraps around, there are zeros."""
    rows, width = (1 << 11) + 16, 1 << 20
    memory = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=2 * rows * width)
    weight = torch.from_numpy(memory)[rows * width :].view(rows, width)
    weight[-16:, -32:] = torch.randn(16, 32)
    x, y = torch.zeros(1, width, dtype=torch.float16), torch.zeros(16, 16)
    x[0, -32:] = torch.randn(32)
    last_tile[(1,)](x, weight, y, rows, width)
    torch.testing.assert_close(y[:, 0], weight[-16:, -32:].float() @ x[0, -32:].float())

"""Linears of the kinds that only quantized checkpoints bring, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import relative_error
from torch import Tensor

from deltaserve.kernels.base import ByteLinear, Code4Linear, concat

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
TOKENS = (0, 1, 2, 5, 6, 7, 16, 33)
E4M3 = torch.float8_e4m3fn


def bytes_of(kind: torch.dtype, out: int, inner: int) -> Tensor:
    """Every value of the kind, the subnormal floats included."""
    codes = torch.randint(0, 256, (out, inner), dtype=torch.uint8)
    if kind == E4M3:
        codes[codes & 0x7F == 0x7F] = 3
    return codes.view(kind)


def e4m3(code: int) -> float:
    """OCP 8-bit floating point specification 1.0, table 1."""
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 0:
        return float(sign * mantissa / 8 * 2.0**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "no zeros"])
@pytest.mark.parametrize("kind", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize(
    ("out", "inner", "group"),
    [(100, 37, 37), (37, 100, 32), (130, 333, 128), (1, 1, 1), (70, 50, 7), (64, 256, 128)],
)
def test_bytes(
    out: int, inner: int, group: int, kind: torch.dtype, zeros: bool, dtype: torch.dtype
) -> None:
    groups = -(-inner // group)
    q, scale = bytes_of(kind, out, inner), torch.rand(out, groups) + 0.1
    zero = torch.randint(-9, 9, (out, groups)).float() if zeros else None
    bias = torch.randn(out) if out > 1 else torch.zeros(1)  # where a sum may cancel
    linear = ByteLinear(q, scale, zero, bias, dtype, group)
    index = torch.arange(inner) // group
    values = q.double() if kind == torch.int8 else torch.tensor([e4m3(c) for c in range(256)])
    if kind == E4M3:
        values = values.double()[q.view(torch.uint8).long()]
    weight = (values - (0 if zero is None else zero[:, index])) * scale.double()[:, index]
    assert relative_error(linear.weight(), weight) < 1e-7
    for tokens in TOKENS:
        x = torch.randn(tokens, inner).to(dtype)
        y = linear(x)
        assert y.shape == (tokens, out) and y.dtype == dtype
        if tokens:
            wanted = x.double() @ weight.T + bias.to(dtype).double()
            assert relative_error(y, wanted) < TOLERANCE[dtype]


def test_each_float_of_8_bits() -> None:
    codes = [c for c in range(256) if c & 0x7F != 0x7F]
    q = torch.tensor(codes, dtype=torch.uint8).view(E4M3)[:, None]
    linear = ByteLinear(q, torch.ones(len(codes), 1), None, None, torch.float32, 1)
    assert linear(torch.ones(1, 1))[0].tolist() == [e4m3(c) for c in codes]


def test_joined_bytes() -> None:
    parts = [
        ByteLinear(bytes_of(E4M3, n, 50), torch.rand(n, 4), None, None, torch.float32, 13)
        for n in (20, 33)
    ]
    joined = concat(parts)
    assert torch.equal(joined.weight(), torch.cat([p.weight() for p in parts]))
    zero = torch.zeros(5, 4)
    other = ByteLinear(bytes_of(E4M3, 5, 50), torch.rand(5, 4), zero, None, torch.float32, 13)
    again = concat([other, other]).held()
    assert set(again) == {"q", "scale", "zero"} and again["zero"].shape == (10, 4)
    with pytest.raises(ValueError, match="cannot join"):
        concat([*parts, other])


def test_what_bytes_are_not() -> None:
    q, scale = bytes_of(torch.int8, 4, 10), torch.rand(4, 2)
    with pytest.raises(ValueError, match="uint8"):
        ByteLinear(q.view(torch.uint8), scale, None, None, torch.float32, 5)
    with pytest.raises(ValueError, match="scale has shape"):
        ByteLinear(q, scale, None, None, torch.float32, 4)
    with pytest.raises(ValueError, match="zero has shape"):
        ByteLinear(q, scale, scale[:, :1], None, torch.float32, 5)
    with pytest.raises(ValueError, match="group_size is 0"):
        ByteLinear(q, scale, None, None, torch.float32, 0)
    with pytest.raises(ValueError, match="not numbers"):
        bad = torch.full((4, 10), 0xFF, dtype=torch.uint8).view(E4M3)
        ByteLinear(bad, scale, None, None, torch.float32, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out", "inner", "group"), [(100, 37, 64), (37, 100, 32), (130, 333, 128), (64, 256, 64)]
)
def test_codes(out: int, inner: int, group: int, dtype: torch.dtype) -> None:
    q = torch.randint(0, 16, (out, inner), dtype=torch.uint8)
    code, bias = torch.randn(16), torch.randn(out)
    scale = torch.rand(out, -(-inner // group)) + 0.1
    linear = Code4Linear(q, code, scale, bias, dtype, group)
    weight = code.double()[q.long()] * scale.double()[:, torch.arange(inner) // group]
    assert relative_error(linear.weight(), weight) < 1e-7
    for tokens in TOKENS:
        x = torch.randn(tokens, inner).to(dtype)
        y = linear(x)
        assert y.shape == (tokens, out) and y.dtype == dtype
        if tokens:
            wanted = x.double() @ weight.T + bias.to(dtype).double()
            assert relative_error(y, wanted) < TOLERANCE[dtype]
    held = linear.held()
    again = Code4Linear(held["q"], held["code"], held["scale"], held["bias"], dtype, group)
    assert torch.equal(again.weight(), linear.weight()) and again.nbytes == linear.nbytes
    joined = concat([linear, again])
    assert torch.equal(joined.weight(), torch.cat([linear.weight()] * 2))
    other = Code4Linear(q, code * 2, scale, None, dtype, group)
    with pytest.raises(ValueError, match="cannot join"):
        concat([linear, other])


def test_what_codes_are_not() -> None:
    q, scale = torch.zeros(4, 16, dtype=torch.uint8), torch.rand(4, 2)
    with pytest.raises(ValueError, match="code"):
        Code4Linear(q, torch.zeros(15), scale, None, torch.float32, 8)
    with pytest.raises(ValueError, match="scale"):
        Code4Linear(q, torch.zeros(16), scale, None, torch.float32, 16)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        Code4Linear(q + 16, torch.zeros(16), scale, None, torch.float32, 8)

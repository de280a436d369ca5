"""Base linears of every kind against float64, and what they say of themselves."""

from __future__ import annotations

import pytest
import torch
from kernel_oracle import relative_error

from deltaserve.kernels.base import (
    BaseLinear,
    DenseLinear,
    Int4Linear,
    Int8Linear,
    PermutedLinear,
    concat,
    dequantize,
    make_linear,
    quantize,
)
from deltaserve.kernels.native import library

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("none", "int8", "int4")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SHAPES = [(100, 37), (37, 100), (333, 333), (1, 1), (16, 64), (130, 1030)]
TOKENS = (0, 1, 2, 3, 5, 6, 7, 16, 33, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("out, inner", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind: str, out: int, inner: int, bias: bool, dtype: torch.dtype) -> None:
    given = torch.randn(out) if bias else None
    linear = make_linear(torch.randn(out, inner), given, dtype=dtype, quantize=kind)
    weight = linear.weight().double()
    assert weight.shape == (out, inner) == (linear.out_features, linear.in_features)
    b = torch.zeros(out).double() if given is None else given.to(dtype).double()
    for tokens in TOKENS:
        x = torch.randn(tokens, inner).to(dtype)
        y = linear(x)
        assert y.shape == (tokens, out) and y.dtype == dtype
        if tokens:
            assert relative_error(y, x.double() @ weight.T + b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out, inner", [(100, 37), (64, 768), (130, 200)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_int8_activations(kind: str, out: int, inner: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(out, inner), torch.randn(out)
    linear = make_linear(weight, bias, dtype=dtype, quantize=kind, activations="int8")
    plain = make_linear(weight, bias, dtype=dtype, quantize=kind)
    assert torch.equal(linear.weight(), plain.weight())
    for tokens in (*TOKENS[1:], 1030):
        x = torch.randn(tokens, inner).to(dtype)
        x[0] = 0
        step = x.float().abs().amax(1, keepdim=True) / 127
        seen = (x.double() / step).nan_to_num().round() * step
        expected = seen @ linear.weight().double().T + bias.to(dtype)
        y = linear(x)
        assert relative_error(y, expected) < max(TOLERANCE[dtype], 1e-4)
        if library() is not None:
            assert torch.equal(linear(x[-1:])[0], y[-1]), "a token depends on its neighbours"


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_token_stays_alone_in_8_bits(kind: str, bad: float) -> None:
    linear = make_linear(
        torch.randn(40, 50), None, dtype=torch.float32, quantize=kind, activations="int8"
    )
    x = torch.randn(3, 50)
    x[2] *= 1e-42
    good = linear(x)
    x[1, 7] = bad
    y = linear(x)
    assert not y[1].isfinite().any() and torch.equal(y[[0, 2]], good[[0, 2]])
    assert good[2].abs().max() < 1e-30


@pytest.mark.parametrize("group", (8, 32, 64, 128))
@pytest.mark.parametrize("inner", (37, 64, 200, 256))
def test_int4_groups(inner: int, group: int) -> None:
    w = torch.randn(40, inner) * torch.rand(40, 1) + 0.3
    linear = make_linear(w, None, dtype=torch.float32, quantize="int4", group_size=group)
    assert relative_error(linear.weight(), w) < 0.12
    x = torch.randn(5, inner)
    assert relative_error(linear(x), x.double() @ linear.weight().double().T) < 2e-6


def test_scales_and_zeros_that_bfloat16_cannot_hold() -> None:
    q = torch.randint(0, 16, (20, 70), dtype=torch.uint8)
    scale, zero = torch.rand(20, 2) + 0.1, torch.rand(20, 2) * 15
    linear = Int4Linear(q, scale, zero, None, torch.float32, 64)
    torch.testing.assert_close(linear.weight(), dequantize(q, scale, zero, 64), rtol=0, atol=0)
    x = torch.randn(4, 70)
    assert relative_error(linear(x), x.double() @ linear.weight().double().T) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_held_rebuilds_the_linear(kind: str, dtype: torch.dtype) -> None:
    bias = torch.randn(60)
    linear = make_linear(torch.randn(60, 100), bias, dtype=dtype, quantize=kind)
    held = linear.held()
    assert torch.equal(held["bias"], bias.to(dtype))
    again: BaseLinear
    if kind == "none":
        again = DenseLinear(held["weight"], held["bias"], dtype)
    elif kind == "int8":
        again = Int8Linear(held["q"], held["scale"], held["bias"], dtype)
    else:
        again = Int4Linear(held["q"], held["scale"], held["zero"], held["bias"], dtype)
    assert torch.equal(again.weight(), linear.weight())
    x = torch.randn(3, 100).to(dtype)
    assert torch.equal(again(x), linear(x))
    assert again.nbytes == linear.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concat(kind: str, dtype: torch.dtype) -> None:
    sizes = (37, 16, 50)
    parts = [
        make_linear(
            torch.randn(n, 100), torch.randn(n) if n > 20 else None, dtype=dtype, quantize=kind
        )
        for n in sizes
    ]
    joined = concat(parts)
    assert torch.equal(joined.weight(), torch.cat([p.weight() for p in parts]))
    x = torch.randn(5, 100).to(dtype)
    expected = torch.cat([p(x) for p in parts], 1)
    assert relative_error(joined(x), expected) < TOLERANCE[dtype]
    assert concat(parts[:1]) is parts[0]


@pytest.mark.parametrize("kind", KINDS)
def test_permuted(kind: str) -> None:
    """The columns come in another order, the bias, the weight and the sum do not change."""
    order = torch.randperm(100)
    whole, bias = torch.randn(30, 100), torch.randn(30)
    plain = make_linear(whole[:, order], bias, dtype=torch.float32, quantize=kind)
    linear = PermutedLinear(plain, order)
    assert torch.equal(linear.weight()[:, order], plain.weight())
    x = torch.randn(4, 100)
    expected = x.double() @ linear.weight().double().T + bias
    assert relative_error(linear(x), expected) < 2e-6
    assert linear.nbytes == plain.nbytes + 800 and linear.bias is plain.bias
    assert torch.equal(linear.held()["order"], order)
    other = make_linear(torch.randn(20, 100), None, dtype=torch.float32, quantize=kind)
    joined = concat([linear, PermutedLinear(other, order)])
    parts = torch.cat([linear.weight(), PermutedLinear(other, order).weight()])
    assert torch.equal(joined.weight(), parts)
    assert joined.bias is not None and torch.equal(joined.bias[:30], bias)
    with pytest.raises(ValueError, match="cannot join"):
        concat([linear, PermutedLinear(other, order.flip(0))])
    alone = PermutedLinear(other, order)
    alone.set_bias(torch.ones(20))
    assert other.bias is not None and alone.nbytes == other.nbytes + 800
    with pytest.raises(ValueError, match="each input once"):
        PermutedLinear(plain, order.clamp_max(98))
    with pytest.raises(ValueError, match="shape"):
        PermutedLinear(plain, order[1:])


def test_concat_refuses_unlike_linears() -> None:
    one = make_linear(torch.randn(8, 16), None, dtype=torch.float32)
    for other in (
        make_linear(torch.randn(8, 16), None, dtype=torch.bfloat16),
        make_linear(torch.randn(8, 16), None, dtype=torch.float32, quantize="int8"),
        make_linear(torch.randn(8, 24), None, dtype=torch.float32),
    ):
        with pytest.raises(ValueError, match="cannot join"):
            concat([one, other])


def test_bytes() -> None:
    w, bias = torch.randn(64, 128), torch.randn(64)
    assert make_linear(w, bias, dtype=torch.float32).nbytes == 64 * 128 * 4 + 64 * 4
    assert make_linear(w, bias, dtype=torch.bfloat16).nbytes == 64 * 128 * 2 + 64 * 2
    int8 = make_linear(w, None, dtype=torch.float32, quantize="int8")
    assert int8.nbytes == 64 * 128 + 64 * 4
    int4 = make_linear(w, None, dtype=torch.float32, quantize="int4", group_size=32)
    assert int4.nbytes == 64 * 128 // 2 + 64 * 4 * (2 + 2)


def test_quantization_rounds_to_nearest() -> None:
    w = torch.randn(50, 200)
    eight = quantize(w, 8)
    error = (dequantize(eight["q"], eight["scale"], None) - w).abs()
    assert bool((error <= eight["scale"][:, None] * 0.5001).all())
    four = quantize(w, 4, 32)
    again = dequantize(four["q"], four["scale"], four["zero"], 32)
    plain = (w.view(50, -1, 25).amax(-1) - w.view(50, -1, 25).amin(-1)).mean() / 15 / 12**0.5
    assert float((again - w).square().mean().sqrt()) < 1.2 * float(plain)
    zeros = quantize(torch.zeros(3, 40), 4)
    assert not dequantize(zeros["q"], zeros["scale"], zeros["zero"], 64).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantize": "int3"}, "int3"),
        ({"quantize": "int4", "group_size": 20}, "20"),
        ({"activations": "int8"}, "int8"),
        ({"dtype": torch.float16}, "float16"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_linear(torch.randn(8, 16), None, **{"dtype": torch.float32, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([[1.0, torch.nan]]), 8)

"""The GPU's base linears: packing, formats, odd sizes, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_rig import DTYPES, TOLERANCE
from kernel_oracle import in_8_bits, relative_error

from deltaserve.kernels.base import dequantize, words
from deltaserve.kernels.bit.words import pack_signs, places
from deltaserve.kernels.gpu import device
from deltaserve.kernels.gpu.base import GpuLinear, concat, make_linear
from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.primitives import pack_signs as pack_bits

FORMATS = ("none", "int8", "fp8", "int4")


@pytest.mark.parametrize("inner", (128, 100, 5, 300))
def test_words_hold_every_weight(inner: int) -> None:
    nibbles = torch.randint(0, 16, (37, inner), dtype=torch.uint8)
    octets = torch.randint(0, 256, (37, inner), dtype=torch.uint8)
    assert torch.equal(words.unpack_nibbles(words.pack_nibbles(nibbles), inner), nibbles)
    assert torch.equal(words.unpack_bytes(words.pack_bytes(octets), inner), octets)
    assert torch.equal(words.unpack_half_bytes(words.pack_half_bytes(nibbles), inner), nibbles)
    signed = octets.view(torch.int8)
    assert torch.equal(words.unpack_whole_bytes(words.pack_whole_bytes(signed), inner), signed)


def test_where_a_weight_lies_in_its_word() -> None:
    """Column 42 is in slice 2 of 16 columns; there it is the even one of lane 1's upper pair."""
    q = torch.zeros(3, 128, dtype=torch.uint8)
    q[2, 42] = 5
    nibbles = words.pack_nibbles(q)
    assert nibbles[1, 2, 1] == 5 << 4 and nibbles.count_nonzero() == 1
    octets = words.pack_bytes(q)
    assert octets[2, 2, 1] == 5 << 8 and octets.count_nonzero() == 1
    halves = words.pack_half_bytes(q)  # of chunk 1: byte 10 - 8 of lane 2, lower half
    assert halves[1, 2, 2] == 5 << 16 and halves.count_nonzero() == 1
    whole = words.pack_whole_bytes(q)
    assert whole[2, 2, 10] == 5 and whole.count_nonzero() == 1
    # Pair 2 s + half = 5 of bf16 is bit 14, shifted by 2: of rows of -1, the one +1 is a set bit;
    # pair 4 is bit 15 shifted by 2, where a set bit means -1.
    signs = pack_signs(pack_bits(q > 0)[None], 128, torch.bfloat16)
    assert signs.shape == (1, 1, 128, 4)
    assert (signs[0, 0, 2, 1] ^ signs[0, 0, 2, 0]) == 1 << 12
    q[2, 42], q[2, 34] = 0, 5
    signs = pack_signs(pack_bits(q > 0)[None], 128, torch.bfloat16)
    assert (signs[0, 0, 2, 1] ^ signs[0, 0, 2, 0]) == 1 << 13 and signs[0, 0, 2, 0] >> 13 & 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sign_has_a_bit_of_its_own(dtype: torch.dtype) -> None:
    """Of 200 columns, row r has the one +1 in column r; row 200 has none."""
    found = pack_signs(pack_bits(torch.eye(201)[None, :, :200] > 0), 200, dtype)
    assert found.shape == (1, 2, 256, 4) and found.dtype == torch.int32
    changed = (found[0] ^ found[0, :, 200:201])[:, :200].numpy().view("u4")
    assert np.count_nonzero(changed) == 200
    for column in range(200):
        chunk, at = divmod(column, 128)
        pair, lane, half = at // 8, at % 8 // 2, at % 2
        shift, bit = places(dtype)[pair]
        assert changed[chunk, column, lane] == 1 << (bit - shift + 16 * half)
        assert (found[0, chunk, column, lane] >> (bit - shift + 16 * half) & 1) == (bit != 15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out, inner", [(100, 37), (37, 200), (1, 1), (192, 256)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("packs", (True, False), ids=("packed", "plain"))
def test_product(
    packs: bool,
    format: str,
    out: int,
    inner: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "packs", lambda: packs)
    bias = torch.randn(out) if inner != 200 else None
    linear = make_linear(torch.randn(out, inner), bias, dtype=dtype, quantize=format)
    weight = linear.weight().cpu().double()
    assert weight.shape == (out, inner) == (linear.out_features, linear.in_features)
    b = 0 if linear.bias is None else linear.bias.cpu().double()
    for tokens in (0, 1, 5, 18):
        x = torch.randn(tokens, inner).to(linear.device, dtype)
        y = linear(x)
        assert y.shape == (tokens, out) and y.dtype == dtype
        if tokens:
            expected = x.cpu().double() @ weight.T + b
            assert relative_error(y.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "out, inner, group", [(100, 37, 8), (37, 200, 64), (1, 1, 128), (192, 256, 256), (40, 300, -1)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ("int8", "int4"))
def test_product_of_whole_numbers(
    format: str, dtype: torch.dtype, out: int, inner: int, group: int
) -> None:
    """The largest of a token is 127, its half a tie; a token's result is its own."""
    bias = torch.randn(out) if inner != 200 else None
    linear = make_linear(
        torch.randn(out, inner), bias, dtype=dtype, quantize=format, group_size=group,
        activations="int8",
    )  # fmt: skip
    weight = linear.weight().cpu().double()
    b = 0 if linear.bias is None else linear.bias.cpu().double()
    for tokens in (0, 1, 5, 70):
        x = torch.randn(tokens, inner).to(dtype)
        if tokens > 2:
            x[1], x[2] = 0, 1e-38
            x[:, 0] = 2 * x[:, inner // 2]
        y = linear(x.to(linear.device)).cpu()
        assert y.shape == (tokens, out) and y.dtype == dtype
        if tokens:
            expected = in_8_bits(x.double(), dtype) @ weight.T + b
            assert relative_error(y, expected) < TOLERANCE[dtype]
    again = x.to(linear.device)
    for bad in ("nan", "inf"):
        again[3, inner // 2] = float(bad)
        found = linear(again).cpu()
        assert not found[3].isfinite().any()
        assert torch.equal(torch.cat((found[:3], found[4:])), torch.cat((y[:3], y[4:])))


@pytest.mark.parametrize("group", (32, 64, 128, 256, -1))
def test_int4_groups(group: int) -> None:
    w = torch.randn(40, 300) * torch.rand(40, 1) + 0.3
    linear = make_linear(w, None, dtype=torch.float16, quantize="int4", group_size=group)
    assert relative_error(linear.weight().cpu(), w) < 0.2
    x = torch.randn(5, 300).to(linear.device, torch.float16)
    assert relative_error(linear(x).cpu(), x.cpu().double() @ linear.weight().double().T) < 1e-3


@pytest.mark.parametrize("tokens", (3, 70))
def test_zeros_that_are_not_whole(tokens: int) -> None:
    """HQQ's."""
    q = torch.randint(0, 16, (20, 200), dtype=torch.uint8)
    scale, zero = torch.rand(20, 2) + 0.1, torch.rand(20, 2) * 15
    held = {"q": q, "scale": scale, "zero": zero}
    linear = GpuLinear(held, "int4", torch.float16, 128)
    weight = dequantize(q, scale, zero, 128)
    torch.testing.assert_close(linear.weight(), weight, rtol=0, atol=0)
    torch.testing.assert_close(linear.weight_rows(7, 19), weight[7:19], rtol=0, atol=0)
    x = torch.randn(tokens, 200).to(linear.device, torch.float16)
    assert relative_error(linear(x).cpu(), x.cpu().double() @ linear.weight().double().T) < 1e-3


def test_no_more_rows_are_unpacked_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of q, k and v costs its own share of their common weight."""
    unpack, seen = words.unpack_nibbles, []
    monkeypatch.setattr(
        words, "unpack_nibbles", lambda q, n: seen.append(len(q[0])) or unpack(q, n)
    )
    linear = make_linear(torch.randn(96, 130), None, dtype=torch.bfloat16, quantize="int4")
    assert linear.weight_rows(32, 48).shape == (16, 130) and seen == [16]


@pytest.mark.parametrize(
    "format, activations", [*((f, "float") for f in FORMATS), ("int8", "int8"), ("int4", "int8")]
)
def test_held_rebuilds_the_linear_and_concat_joins(format: str, activations: str) -> None:
    dtype = torch.float16
    parts = [
        make_linear(torch.randn(n, 100), torch.randn(n) if n > 20 else None, dtype=dtype,
                    quantize=format, activations=activations)
        for n in (37, 16, 50)
    ]  # fmt: skip
    again = GpuLinear(parts[0].held(), parts[0].format, dtype, parts[0].group_size)
    assert torch.equal(again.weight(), parts[0].weight()) and again.nbytes == parts[0].nbytes
    joined = concat(parts)
    assert torch.equal(joined.weight(), torch.cat([p.weight() for p in parts]))
    assert torch.equal(joined.weight_rows(37, 53), parts[1].weight())
    x = torch.randn(5, 100).to(default_device(), dtype)
    assert relative_error(joined(x).cpu(), torch.cat([p(x) for p in parts], 1).cpu()) < 1e-3
    assert concat(parts[:1]) is parts[0]


@pytest.mark.parametrize("packs", (True, False), ids=("packed", "plain"))
def test_every_number_of_a_format_is_exact(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "packs", lambda: packs)
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits.view(torch.float8_e4m3fn).float().isfinite()
    q = torch.where(finite, bits, torch.zeros_like(bits)).reshape(8, 32)
    for dtype in DTYPES[1:]:
        linear = GpuLinear({"q": q, "scale": torch.ones(8)}, "fp8", dtype)
        y = linear(torch.eye(32).to(linear.device, dtype))
        assert torch.equal(y.T.float().cpu(), q.view(torch.float8_e4m3fn).float())
        q8 = torch.arange(-128, 128).to(torch.int8).reshape(8, 32)
        linear = GpuLinear({"q": q8, "scale": torch.ones(8)}, "int8", dtype)
        assert torch.equal(linear(torch.eye(32).to(linear.device, dtype)).T.cpu(), q8.to(dtype))


def test_bytes_are_those_of_the_format() -> None:
    n, k = 128, 512
    w = torch.randn(n, k)
    sizes = {f: make_linear(w, None, dtype=torch.float16, quantize=f).nbytes for f in FORMATS}
    assert sizes["none"] == n * k * 2
    assert sizes["int8"] == sizes["fp8"] == n * k + n * 4
    assert sizes["int4"] <= n * k // 2 + n * (k // 128) * (4 + 2)


def test_what_is_refused() -> None:
    w = torch.randn(8, 256)
    with pytest.raises(ValueError, match='quantize is "int3"'):
        make_linear(w, None, dtype=torch.float16, quantize="int3")
    with pytest.raises(ValueError, match='activations "int8" with quantize "fp8"'):
        make_linear(w, None, dtype=torch.float16, quantize="fp8", activations="int8")
    with pytest.raises(ValueError, match="group_size is 96"):
        make_linear(w, None, dtype=torch.float16, quantize="int4", group_size=96)
    with pytest.raises(ValueError, match="not finite"):
        make_linear(w * torch.inf, None, dtype=torch.float16, quantize="fp8")
    with pytest.raises(ValueError, match="dtype is torch"):
        make_linear(w, None, dtype=torch.float64)
    one = make_linear(w, None, dtype=torch.float16)
    with pytest.raises(ValueError, match="cannot join dense in"):
        concat([one, make_linear(w, None, dtype=torch.float16, quantize="int8")])

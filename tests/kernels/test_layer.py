"""What lies between a layer's linears, against its formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve.kernels.layer import add_norm, rotate_write, silu_mul
from deltaserve.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def close(got: Tensor, want: Tensor) -> None:
    tolerance = 3e-6 if got.dtype == torch.float32 else 2**-7.9
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (300, 333), (0, 8)])
def test_add_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    gain = torch.randn(shape[1]).to(dtype)
    total = x + residual
    y = add_norm(x, residual, gain, 1e-5)
    assert torch.equal(x, total)
    wide = total.double()
    close(y, wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (5, 37), (64, 1000), (0, 8)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, int], scale: float) -> None:
    gate, up = (torch.randn(shape).to(dtype) * scale for _ in range(2))
    got = silu_mul(torch.cat((gate, up), 1))
    close(got, torch.nn.functional.silu(gate.double()) * up.double())


def test_silu_mul_passes_on_what_is_not_finite() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0, -200.0, 1.0, 1.0, float("nan"), 1.0]])
    y = silu_mul(x)[0]
    assert y.isnan().tolist() == [True, False, True, False] and y[1] == torch.inf


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turned"),
    [(12, 12, 64, 64), (8, 2, 16, 16), (6, 3, 40, 20), (4, 1, 128, 32)],
)
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_rotate_write(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turned: int, tokens: int
) -> None:
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    cosine, sine = (torch.randn(tokens, turned).to(dtype) for _ in range(2))
    keys, values = (torch.zeros(tokens + 9, kv_heads, dim, dtype=dtype) for _ in range(2))
    cells = torch.randperm(tokens + 9)[:tokens]
    parts = qkv.double().view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
    q, k = (rotated(p, cosine.double(), sine.double()) for p in parts[:2])
    rotate_write(qkv, heads, cosine, sine, keys, values, cells)
    got = qkv.view(tokens, -1, dim)
    close(got[:, :heads], q)
    close(got[:, heads : heads + kv_heads], k)
    close(keys[cells], k)
    assert torch.equal(values[cells].double(), parts[2])
    others = torch.ones(tokens + 9, dtype=torch.bool)
    others[cells] = False
    assert not keys[others].any() and not values[others].any()


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned = cosine.shape[1]
    head, tail = x[..., :turned], x[..., turned:]
    half = torch.cat((-head[..., turned // 2 :], head[..., : turned // 2]), -1)
    return torch.cat((head * cosine[:, None] + half * sine[:, None], tail), -1)

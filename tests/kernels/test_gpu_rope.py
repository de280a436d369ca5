"""The GPU's rotary embedding and cache writes, beside float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_rig import DTYPES, TOLERANCE
from kernel_oracle import relative_error
from torch import Tensor

from deltaserve.kernels.gpu.device import default_device
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.rope import HeadNorms, rope_write
from deltaserve.kernels.primitives import Bias, Replace
from deltaserve.kernels.segments import Segments

DEVICE = default_device()
SIZE = 3
"""Cells of a block."""


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """float64 [T, heads, dim]."""
    turned = cosine.shape[1]
    head, tail = x[..., :turned], x[..., turned:]
    half = torch.cat((-head[..., turned // 2 :], head[..., : turned // 2]), -1)
    return torch.cat((head * cosine[:, None] + half * sine[:, None], tail), -1)


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turned"),
    [(3, 3, 64, 64), (8, 2, 16, 16), (6, 3, 40, 20), (4, 1, 128, 32), (32, 4, 128, 128)],
)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("how", ["plain", "norms"])
def test_rope_write(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turned: int, tokens: int, how: str
) -> None:
    qkv = draw(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    cosine, sine = (draw(tokens, turned, dtype=dtype) for _ in range(2))
    count = tokens + 4
    cache = draw(count, 4, SIZE, kv_heads, dim, dtype=dtype)  # two layers side by side
    keys, values = cache[:, 2], cache[:, 3]
    cells = torch.randperm(count * SIZE)[:tokens].to(DEVICE)
    cells[tokens // 2] = -1
    norms = None
    q, k, v = qkv.double().cpu().view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
    if how == "norms":
        norms = HeadNorms(draw(dim, dtype=dtype), draw(dim, dtype=dtype), 1e-5)
        q, k = normed(q, norms.query, 1e-5), normed(k, norms.key, 1e-5)
    q, k = (rotated(x, cosine.double().cpu(), sine.double().cpu()) for x in (q, k))
    written, before = cells[cells >= 0], cache.clone()
    rope_write(qkv, heads, cosine, sine, keys, values, cells, norms)
    got = qkv.view(tokens, -1, dim)
    close(got, torch.cat((q, k, v), 1))
    assert torch.equal(got[:, heads + kv_heads :].double().cpu(), v)
    rows = cells >= 0
    block, row = written // SIZE, written % SIZE
    before[block, 2, row] = got[rows][:, heads : heads + kv_heads]
    before[block, 3, row] = got[rows][:, heads + kv_heads :]
    assert torch.equal(cache, before)


def close(got: Tensor, want: Tensor) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double().cpu(), want, rtol=eps, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "turned"), [(32, 32), (40, 20)])
def test_norms_of_heads_that_adapters_tune(dtype: torch.dtype, dim: int, turned: int) -> None:
    heads, tokens = 3, 6
    gains = [draw(dim, dtype=dtype) for _ in range(2)]
    own = [
        {1: (Replace(torch.randn(dim)),), 2: (Bias(torch.randn(dim)), Replace(torch.randn(dim)))},
        {2: (Replace(torch.randn(dim)),), 3: (Bias(torch.randn(dim)),)},
    ]
    segments = Segments([(0, 1, ((1, 1.0),)), (2, 4, ((2, 0.5), (1, 0.3))), (5, 6, ((3, 2.0),))], 6)
    deltas = []
    for primitives in own:
        deltas.append(GpuNormDeltas(dim, dtype))
        for slot, p in primitives.items():
            deltas[-1].install(slot, deltas[-1].prepare(p))
    qkv = draw(tokens, (heads + 2) * dim, dtype=dtype)
    cosine, sine = (draw(tokens, turned, dtype=dtype) for _ in range(2))
    keys, values = (torch.zeros(tokens, 1, 1, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    parts = list(qkv.double().cpu().view(tokens, -1, dim).split((heads, 1, 1), 1))
    for i in range(2):
        for row in range(tokens):
            gain, bias = gains[i].double().cpu(), torch.zeros(dim).double()
            mix = next((m for start, end, m in segments.runs if start <= row < end), ())
            for p, w in ((p, w) for slot, w in mix for p in own[i].get(slot, ())):
                if isinstance(p, Bias):
                    bias += w * p.bias.double()
                else:
                    gain = gain + w * (p.weight.double() - gains[i].double().cpu())
            parts[i][row] = normed(parts[i][row], gain + 1, 1e-5) + bias
        parts[i] = rotated(parts[i], cosine.double().cpu(), sine.double().cpu())
    planned = tuple(d.planned(segments) for d in deltas)
    given = qkv.clone()
    for tuned in (None, planned):
        before, qkv = qkv, given.clone()
        norms = HeadNorms(gains[0], gains[1], 1e-5, 1.0, tuned)
        cells = torch.arange(tokens, device=DEVICE)
        rope_write(qkv, heads, cosine, sine, keys, values, cells, norms)
    assert relative_error(qkv.view(tokens, -1, dim).cpu(), torch.cat(parts, 1)) < TOLERANCE[dtype]
    assert torch.equal(qkv[[1, 4]], before[[1, 4]]) and not torch.equal(qkv, before)


def test_cells_and_rotations_of_other_types() -> None:
    """The rotation in float32 beside 16-bit heads, as some models make it; cells as int32."""
    qkv, (cosine, sine) = draw(3, 5 * 32, dtype=torch.float16), torch.randn(2, 3, 32)
    keys, values = (torch.zeros(7, 1, 1, 32, dtype=torch.float16, device=DEVICE) for _ in range(2))
    q = rotated(qkv.double().cpu().view(3, 5, 32)[:, :4], cosine.double(), sine.double())
    cells = torch.tensor([6, 0, -1], dtype=torch.int32, device=DEVICE)
    rope_write(qkv, 3, cosine.to(DEVICE), sine.to(DEVICE), keys, values, cells)
    close(qkv.view(3, 5, 32)[:, :4], q)
    assert torch.equal(values[[6, 0], 0, 0], qkv.view(3, 5, 32)[:2, 4]) and not values[1:6].any()


def test_no_tokens() -> None:
    none, keys = torch.zeros(0, 48), torch.zeros(2, 1, 1, 16)
    rope_write(none, 1, none[:, :16], none[:, :16], keys, keys, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(3, 100)}, "do not fit 4 heads"),
        ({"cells": torch.zeros(2, dtype=torch.int64)}, "2 cells"),
        ({"values": torch.zeros(7, 1, 2, 16)}, "do not fit"),
        ({"cosine": torch.zeros(3, 15), "sine": torch.zeros(3, 15)}, "even number"),
        ({"cosine": torch.zeros(3, 18), "sine": torch.zeros(3, 18)}, "at most 16"),
        ({"keys": torch.zeros(7, 1, 1, 16).half()}, "one dtype"),
        ({"keys": torch.zeros(7, 2, 1, 16)[:, :1]}, "values of"),
        ({"sine": torch.zeros(3, 16).half()}, "likewise"),
        ({"qkv": torch.zeros(96, 3).T}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "qkv": torch.zeros(3, 96),
        "heads": 4,
        "cosine": torch.zeros(3, 16),
        "sine": torch.zeros(3, 16),
        "keys": torch.zeros(7, 1, 1, 16),
        "values": torch.zeros(7, 1, 1, 16),
        "cells": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        rope_write(**{**given, **change})

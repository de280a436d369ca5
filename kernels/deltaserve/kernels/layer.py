"""What a decoder layer does between its linears, in one native call each.

Every function wants tensors of one dtype, float32 or bfloat16, contiguous, and the native kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltaserve.kernels.native import library


def add_norm(x: Tensor, residual: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``x += residual`` in place; returns the RMS norm of the sum (Zhang and Sennrich 2019).

    x, residual: [T, n]; gain: [n].
    """
    y = torch.empty_like(x)
    _native()["ds_add_norm"](
        x.data_ptr(),
        residual.data_ptr(),
        x.dtype == torch.bfloat16,
        *x.shape,
        gain.data_ptr(),
        eps,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, Shazeer 2020) of x [T, 2 n], the gates first: [T, n]."""
    rows, width = x.shape
    y = x.new_empty(rows, width // 2)
    _native()["ds_silu_mul"](
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        rows,
        width // 2,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def rotate_write(
    qkv: Tensor,
    heads: int,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
) -> None:
    """Rotary position embedding (Su et al. 2021, in halves) of the queries and keys in place, then
    keys and values into the cache.

    qkv: [T, (heads + 2 kv_heads) * dim]. cosine, sine: [T, turned], the first `turned` elements of
    a head are turned. keys, values: [cells, kv_heads, dim]. cells: int64 [T].
    """
    _, kv_heads, dim = keys.shape
    _native()["ds_rotate_write"](
        qkv.data_ptr(),
        qkv.dtype == torch.bfloat16,
        qkv.shape[0],
        heads,
        kv_heads,
        dim,
        cosine.data_ptr(),
        sine.data_ptr(),
        cosine.shape[-1],
        keys.data_ptr(),
        values.data_ptr(),
        cells.data_ptr(),
        torch.get_num_threads(),
    )


def _native() -> dict[str, Callable[..., int]]:
    lib = library()
    assert lib is not None
    return lib

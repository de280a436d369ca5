"""Attention of decoding sequences on the CPU, without gathering keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.native import library


def paged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """One query per sequence; None where there are no native kernels.

    query: [heads, rows, key_dim], last stride 1. keys, values: [cells, kv_heads, dim], contiguous,
    of the query's dtype, float32 or bfloat16. tables: int64 [rows, width], the blocks of each
    sequence in order. lengths: int64 [rows], the cells that it has, its newest one included.
    window: a query sees itself and the window - 1 cells before it. softcap: logits become
    ``softcap * tanh(logits / softcap)``. sinks: one more logit per head [heads], without a value.
    Returns [rows, heads, value_dim].
    """
    lib = library()
    if lib is None or query.dtype not in (torch.float32, torch.bfloat16) or query.stride(2) != 1:
        return None
    heads, rows, dim = query.shape
    out = query.new_empty(rows, heads, values.shape[2])
    sinks = None if sinks is None else sinks.float().contiguous()
    failed = lib["ds_attention"](
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        query.dtype == torch.bfloat16,
        heads,
        keys.shape[1],
        dim,
        values.shape[2],
        rows,
        tables.data_ptr(),
        tables.shape[1],
        block_size,
        lengths.data_ptr(),
        scale,
        window or 0,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the logits of attention")
    return out

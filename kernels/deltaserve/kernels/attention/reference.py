"""The semantics, in plain PyTorch, to be read."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """query: [rows, heads, key_dim]; keys, values: [cells, kv_heads, dim]; tables: int64
    [rows, width]; lengths: [rows]; sinks: [heads]. Returns [rows, heads, value_dim]."""
    group = query.shape[1] // keys.shape[1]
    outputs = []
    for q, table, length in zip(query, tables, lengths.tolist(), strict=True):
        at = torch.arange(0 if window is None else max(0, length - window), length)
        cells = table[at // block_size] * block_size + at % block_size
        k = keys[cells].repeat_interleave(group, 1)  # [n, heads, dim]
        v = values[cells].repeat_interleave(group, 1)
        logits = torch.einsum("hd,nhd->hn", q, k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None].to(logits.dtype)], -1)
        p = torch.softmax(logits, -1)[:, : len(at)]
        outputs.append(torch.einsum("hn,nhd->hd", p, v))
    return torch.stack(outputs)

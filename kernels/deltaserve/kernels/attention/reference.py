"""The semantics, in plain PyTorch, to be read."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    tables: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query: [T, heads, key_dim]; keys, values: [cells, kv_heads, dim]; query_start: [rows + 1];
    lengths: [rows]; tables: [rows, width]; sinks: [heads]. Queries query_start[i] and on are the
    last tokens of sequence i. Returns [T, heads, value_dim]; zeros where a row is no sequence's."""
    group = query.shape[1] // keys.shape[1]
    out = query.new_zeros(*query.shape[:2], values.shape[2])
    for i, length in enumerate(lengths.tolist()):
        start, stop = query_start[i : i + 2].tolist()
        position = torch.arange(length - (stop - start), length)[:, None]
        at = torch.arange(length)
        seen = at <= position  # [q, n]
        if window is not None:
            seen &= at > position - window
        cells = tables[i, at // block_size] * block_size + at % block_size
        alive = seen.any(0)[:, None, None]
        k = keys[cells].where(alive, 0).repeat_interleave(group, 1)  # [n, heads, dim]
        v = values[cells].where(alive, 0).repeat_interleave(group, 1)
        logits = torch.einsum("qhd,nhd->hqn", query[start:stop], k) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks[:, None, None].to(logits.dtype).expand(-1, stop - start, 1)
            logits = torch.cat([logits, sink], -1)
        p = torch.softmax(logits, -1)[..., :length]
        out[start:stop] = torch.einsum("hqn,nhd->qhd", p, v)
    return out


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
    """query: [rows, heads, key_dim], one of each sequence; the rest as `paged_attention` has it.
    Returns [rows, heads, value_dim]."""
    start = torch.arange(len(query) + 1)
    return paged_attention(
        query, keys, values, start, lengths, tables, block_size, scale, window, softcap, sinks
    )

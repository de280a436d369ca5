"""Paged attention as transformers' modeling code calls it: write the step's keys and values to the
cache, then let every token attend to its own sequence, and to a gated prefix if its adapter has
one. CPU backend: a native kernel for decoding sequences, torch's SDPA for prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from deltaserve.kernels.attention.cpu import paged_decode
from deltaserve.server.model.context import AttentionStep, ForwardContext, KVStore, PrefillChunk
from deltaserve.server.model.gated_prefix import add_gated

ATTENTION = "deltaserve"
"""The name under which the function is registered with transformers."""

GATHER_BYTES = 8 << 20
"""Up to this much gathered K (and as much V) all decodes share one padded gather; above it each
request gathers its own: big fresh allocations page-fault (33 ms against 6 at 8 x 2048 tokens)."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, H, Dv].

    sliding_window: a token sees itself and the window - 1 tokens before it. softcap: logits become
    ``softcap * tanh(logits / softcap)``. s_aux: one attention sink logit per head [H].
    """
    ctx: ForwardContext = module.ctx  # type: ignore[assignment]
    step, kv = ctx.attention, ctx.kv
    assert step is not None and kv is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    kv.keys[layer].index_copy_(0, step.cells, key[0].transpose(0, 1))
    kv.values[layer].index_copy_(0, step.cells, value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = How(scale, sliding_window, softcap, s_aux)
    return attend(query, key, value, ctx, layer, how).unsqueeze(0), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, ctx: ForwardContext, layer: int, how: How
) -> Tensor:
    """Attention of the step's tokens, whose keys and values are in the cache already. Shapes as
    `paged_attention` takes them; returns [T, H, Dv]."""
    step, kv = ctx.attention, ctx.kv
    assert step is not None and kv is not None
    keys, values = kv.keys[layer], kv.values[layer]
    if step.decodes and not step.chunks:
        out = _decode(query, keys, values, step, kv, how)
    else:
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if step.decodes:
            out[: step.decodes] = _decode(query, keys, values, step, kv, how)
        for chunk in step.chunks:
            out[chunk.start : chunk.end] = _prefill(query, key, value, keys, values, chunk, kv, how)
    if ctx.gated_prefixes:
        add_gated(out, query[0], layer, ctx.gated_prefixes, ctx.segments, how.scale)
    return out


AttentionInterface.register(ATTENTION, paged_attention)


class How:
    """What one layer's attention is like."""

    __slots__ = ("scale", "sinks", "softcap", "special", "window")

    def __init__(
        self, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> None:
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.sinks = sinks
        self.special = softcap is not None or sinks is not None  # SDPA knows neither


def _decode(
    query: Tensor, keys: Tensor, values: Tensor, step: AttentionStep, kv: KVStore, how: How
) -> Tensor:
    """One query per sequence: [n, H, Dv]. Without native kernels, over gathered K and V: the query
    heads that share a KV head become query rows, so K and V are not repeated (SDPA's enable_gqa
    with one row is 7-20x slower in bf16)."""
    n, heads = step.decodes, query.shape[1]
    kv_heads, dim = keys.shape[1], keys.shape[2]
    native = paged_decode(
        query[0, :, :n],
        keys,
        values,
        step.tables,
        step.lengths_tensor,
        kv.block_size,
        how.scale,
        how.window,
        how.softcap,
        how.sinks,
    )
    if native is not None:
        return native
    q = query[0, :, :n].transpose(0, 1)
    width = step.tables.shape[1]
    gathered = n * width * kv.block_size * kv_heads * dim * keys.element_size()
    if gathered > GATHER_BYTES and not how.special:
        return torch.cat([_decode_one(q[i], keys, values, step, kv, how, i) for i in range(n)])
    paged_k = keys.view(kv.blocks, kv.block_size, kv_heads, dim)
    paged_v = values.view(kv.blocks, kv.block_size, kv_heads, values.shape[2])
    flat = step.tables.view(-1)
    k = paged_k.index_select(0, flat).view(n, -1, kv_heads, dim).transpose(1, 2)
    v = paged_v.index_select(0, flat).view(n, -1, kv_heads, values.shape[2]).transpose(1, 2)
    mask = step.masks.get(how.window)
    if mask is None:
        mask = step.masks[how.window] = _decode_mask(step.lengths_tensor, k.shape[2], how.window)
    unseen = ~mask.transpose(2, 3)  # may hold a failed request's NaN, which no mask stops
    k.masked_fill_(unseen, 0)
    v.masked_fill_(unseen, 0)
    if how.special:
        return _explicit(q.unsqueeze(2), k, v, mask, how).squeeze(2)
    grouped = q.reshape(n, kv_heads, heads // kv_heads, dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=how.scale)
    return out.reshape(n, heads, -1)


def _decode_mask(lengths: Tensor, width: int, window: int | None) -> Tensor:
    """bool [n, 1, 1, width]: the cells of its sequence that each query sees."""
    position = torch.arange(width)
    mask = position[None] < lengths[:, None]
    if window is not None:
        mask &= position[None] >= lengths[:, None] - window
    return mask[:, None, None]


def _decode_one(
    q: Tensor, keys: Tensor, values: Tensor, step: AttentionStep, kv: KVStore, how: How, i: int
) -> Tensor:
    """q [H, D] of decode row i -> [1, H, Dv]."""
    length = step.lengths[i]
    first = 0 if how.window is None else max(0, length - how.window)
    used = step.tables[i, first // kv.block_size : -(-length // kv.block_size)]
    lo, hi = first % kv.block_size, length - first // kv.block_size * kv.block_size
    k = _gather(keys, used, kv)[lo:hi].transpose(0, 1).unsqueeze(0)
    v = _gather(values, used, kv)[lo:hi].transpose(0, 1).unsqueeze(0)
    grouped = q.reshape(1, k.shape[1], -1, q.shape[-1])
    out = F.scaled_dot_product_attention(grouped, k, v, scale=how.scale)
    return out.reshape(1, q.shape[0], -1)


def _gather(cells: Tensor, blocks: Tensor, kv: KVStore) -> Tensor:
    """[blocks.len * block_size, heads, dim]: the cells of the blocks, in order."""
    paged = cells.view(kv.blocks, kv.block_size, cells.shape[1], cells.shape[2])
    return paged.index_select(0, blocks).flatten(0, 1)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: PrefillChunk,
    kv: KVStore,
    how: How,
) -> Tensor:
    """The chunk's queries against its sequence: [end - start, H, Dv]."""
    q = query[:, :, chunk.start : chunk.end]
    rows, total = chunk.end - chunk.start, chunk.past + chunk.end - chunk.start
    if chunk.past == 0:
        k, v = key[:, :, chunk.start : chunk.end], value[:, :, chunk.start : chunk.end]
    else:
        k = _gather(keys, chunk.blocks, kv)[:total].transpose(0, 1).unsqueeze(0)
        v = _gather(values, chunk.blocks, kv)[:total].transpose(0, 1).unsqueeze(0)
    if chunk.past == 0 and not how.special and (how.window is None or rows <= how.window):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=how.scale, enable_gqa=True
        )
    else:
        row = torch.arange(chunk.past, total)[:, None]
        column = torch.arange(total)[None]
        mask = column <= row
        if how.window is not None:
            mask &= column > row - how.window
        if how.special:
            out = _explicit(q, k, v, mask, how)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask[None, None], scale=how.scale, enable_gqa=True
            )
    return out[0].transpose(0, 1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: How) -> Tensor:
    """Attention written out, for what SDPA cannot express. q [B, H, Q, D] -> [B, H, Q, Dv]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        logits = torch.tanh(logits / how.softcap) * how.softcap
    logits = logits.masked_fill(~mask, float("-inf"))
    if how.sinks is None:
        return torch.softmax(logits.float(), -1).to(q.dtype) @ v
    sink = how.sinks.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
    joined = torch.cat([logits, sink], -1).float()
    return torch.softmax(joined, -1)[..., :-1].to(q.dtype) @ v

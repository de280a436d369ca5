"""Attention of a step on the CPU: a native kernel for decoding sequences, torch's SDPA for
prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve.kernels.attention.cpu import paged_decode
from deltaserve.kernels.attention.step import AttentionStep, How, Span

GATHER_BYTES = 8 << 20
"""Up to this much gathered K (and as much V) all decodes share one padded gather; above it each
request gathers its own: big fresh allocations page-fault (33 ms against 6 at 8 x 2048 tokens)."""


@dataclass(slots=True)
class PrefillChunk:
    """Rows [start, end) of the step are `end - start` consecutive tokens of one sequence.

    past: tokens of the sequence before them, all in the cache. blocks: int64 [n], the blocks that
    hold the sequence's tokens up to and with this chunk.
    """

    start: int
    end: int
    past: int
    blocks: Tensor


@dataclass(slots=True)
class CpuStep(AttentionStep):
    """The first `decodes` rows are one token each of as many sequences; lengths: their sequences'
    lengths with that token; tables: int64 [decodes, max blocks], padded with 0. masks: made once
    per step and window."""

    cells: Tensor
    decodes: int
    lengths: list[int]
    lengths_tensor: Tensor
    tables: Tensor
    chunks: list[PrefillChunk]
    block_size: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: Sequence[Span], decodes: int, block_size: int) -> Self:
        """decodes: so many of the spans, the first ones, are one token each."""
        size = block_size
        lengths = [span.past + 1 for span in spans[:decodes]]
        width = max((-(-n // size) for n in lengths), default=0)
        tables = np.zeros((decodes, width), dtype=np.int64)
        cells = []
        for i, length in enumerate(lengths):
            used = -(-length // size)
            tables[i, :used] = spans[i].blocks[:used]
        if lengths:
            starts = np.array(lengths, dtype=np.int64) - 1
            block = tables[np.arange(decodes), starts // size]
            cells.append(torch.from_numpy(block * size + starts % size))
        chunks, at = [], decodes
        for past, count, blocks in spans[decodes:]:
            held = np.array(blocks[: -(-(past + count) // size)])
            cells.append(torch.from_numpy(cells_of(held, size, past, past + count)))
            chunks.append(PrefillChunk(at, at + count, past, torch.from_numpy(held)))
            at += count
        return cls(
            cells=torch.cat(cells),
            decodes=decodes,
            lengths=lengths,
            lengths_tensor=torch.tensor(lengths, dtype=torch.int64),
            tables=torch.from_numpy(tables),
            chunks=chunks,
            block_size=size,
        )

    def write(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        keys.index_copy_(0, self.cells, key[0].transpose(0, 1))
        values.index_copy_(0, self.cells, value[0].transpose(0, 1))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: How
    ) -> Tensor:
        if self.decodes and not self.chunks:
            return self._decode(query, keys, values, how)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if self.decodes:
            out[: self.decodes] = self._decode(query, keys, values, how)
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.end)
            out[rows] = self._prefill(query, key, value, keys, values, chunk, how)
        return out

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """One query per sequence: [n, H, Dv]. Without native kernels, over gathered K and V: the
        query heads that share a KV head become query rows, so K and V are not repeated (SDPA's
        enable_gqa with one row is 7-20x slower in bf16)."""
        n, heads = self.decodes, query.shape[1]
        kv_heads, dim = keys.shape[1], keys.shape[2]
        native = paged_decode(
            query[0, :, :n],
            keys,
            values,
            self.tables,
            self.lengths_tensor,
            self.block_size,
            how.scale,
            how.window,
            how.softcap,
            how.sinks,
        )
        if native is not None:
            return native
        q = query[0, :, :n].transpose(0, 1)
        width = self.tables.shape[1]
        gathered = n * width * self.block_size * kv_heads * dim * keys.element_size()
        if gathered > GATHER_BYTES and not how.special:
            return torch.cat([self._decode_one(q[i], keys, values, how, i) for i in range(n)])
        flat = self.tables.view(-1)
        k = self._gather(keys, flat).view(n, -1, kv_heads, dim).transpose(1, 2)
        v = self._gather(values, flat).view(n, -1, kv_heads, values.shape[2]).transpose(1, 2)
        mask = self.masks.get(how.window)
        if mask is None:
            mask = _decode_mask(self.lengths_tensor, k.shape[2], how.window)
            self.masks[how.window] = mask
        unseen = ~mask.transpose(2, 3)  # may hold a failed request's NaN, which no mask stops
        k.masked_fill_(unseen, 0)
        v.masked_fill_(unseen, 0)
        if how.special:
            return _explicit(q.unsqueeze(2), k, v, mask, how).squeeze(2)
        grouped = q.reshape(n, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=how.scale)
        return out.reshape(n, heads, -1)

    def _decode_one(self, q: Tensor, keys: Tensor, values: Tensor, how: How, i: int) -> Tensor:
        """q [H, D] of decode row i -> [1, H, Dv]."""
        length, size = self.lengths[i], self.block_size
        first = 0 if how.window is None else max(0, length - how.window)
        used = self.tables[i, first // size : -(-length // size)]
        lo, hi = first % size, length - first // size * size
        k = self._gather(keys, used)[lo:hi].transpose(0, 1).unsqueeze(0)
        v = self._gather(values, used)[lo:hi].transpose(0, 1).unsqueeze(0)
        grouped = q.reshape(1, k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(grouped, k, v, scale=how.scale)
        return out.reshape(1, q.shape[0], -1)

    def _gather(self, cells: Tensor, blocks: Tensor) -> Tensor:
        """[blocks.len * block_size, heads, dim]: the cells of the blocks, in order."""
        paged = cells.view(-1, self.block_size, cells.shape[1], cells.shape[2])
        return paged.index_select(0, blocks).flatten(0, 1)

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        chunk: PrefillChunk,
        how: How,
    ) -> Tensor:
        """The chunk's queries against its sequence: [end - start, H, Dv]."""
        q = query[:, :, chunk.start : chunk.end]
        rows, total = chunk.end - chunk.start, chunk.past + chunk.end - chunk.start
        if chunk.past == 0:
            k, v = key[:, :, chunk.start : chunk.end], value[:, :, chunk.start : chunk.end]
        else:
            k = self._gather(keys, chunk.blocks)[:total].transpose(0, 1).unsqueeze(0)
            v = self._gather(values, chunk.blocks)[:total].transpose(0, 1).unsqueeze(0)
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


def cells_of(
    blocks: npt.NDArray[np.int64], size: int, start: int, end: int
) -> npt.NDArray[np.int64]:
    """int64 [end - start]: the cells of a sequence's tokens [start, end)."""
    at = np.arange(start, end)
    found: npt.NDArray[np.int64] = blocks[at // size].astype(np.int64) * size + at % size
    return found


def _decode_mask(lengths: Tensor, width: int, window: int | None) -> Tensor:
    """bool [n, 1, 1, width]: the cells of its sequence that each query sees."""
    position = torch.arange(width)
    mask = position[None] < lengths[:, None]
    if window is not None:
        mask &= position[None] >= lengths[:, None] - window
    return mask[:, None, None]


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

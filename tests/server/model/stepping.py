"""Runs given sequences through a BaseModel step by step: chunks of prompts and decodes mixed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaserve.kernels.attention.step import Span
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.server.model import BaseModel
from deltaserve.server.model.context import KVStore

BLOCK_SIZE = 4


@dataclass
class Sequence:
    """logits: of the tokens whose positions are in `at`."""

    ids: Tensor
    mix: Mix = ()
    done: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.ids) - self.done


class Stepper:
    """Owns the cache. Blocks are handed out interleaved, so that no sequence's are contiguous."""

    def __init__(self, model: BaseModel, blocks: int = 64) -> None:
        self.model = model
        of = model.attention, blocks, BLOCK_SIZE, model.dtype, model.ctx.backend
        model.ctx.kv = KVStore.zeros(*of)
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def step(self, plan: list[tuple[Sequence, int]]) -> None:
        """Computes the next `count` tokens of each sequence. The logits of the later half of them
        go to the sequence, so that the rows of lm_head are others than those of the layers."""
        decodes = [(s, n) for s, n in plan if n == 1 and s.done]
        chunked = [(s, n) for s, n in plan if not (n == 1 and s.done)]
        order = decodes + chunked
        for s, n in order:
            while len(s.blocks) * BLOCK_SIZE < s.done + n:
                s.blocks.append(self.free.pop())
        positions = torch.cat([torch.arange(s.done, s.done + n) for s, n in order])
        ids = torch.cat([s.ids[s.done : s.done + n] for s, n in order])
        ctx = self.model.ctx
        spans = [Span(s.done, n, s.blocks) for s, n in order]
        ctx.attention = ctx.backend.attention(spans, len(decodes), BLOCK_SIZE)
        ctx.segments = Segments.of([s.mix for s, n in order for _ in range(n)])
        counts = [n - n // 2 for _, n in order]
        ctx.logit_segments = Segments.of(
            [s.mix for (s, _), k in zip(order, counts, strict=True) for _ in range(k)]
        )
        ends = torch.tensor([n for _, n in order]).cumsum(0).tolist()
        wanted = torch.cat([torch.arange(e - k, e) for e, k in zip(ends, counts, strict=True)])
        logits = self.model.forward(ids, positions, wanted)
        for (s, n), rows in zip(order, logits.split(counts), strict=True):
            s.done += n
            s.at.extend(range(s.done - len(rows), s.done))
            s.logits.append(rows)

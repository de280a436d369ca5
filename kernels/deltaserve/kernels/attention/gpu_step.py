"""Attention of a step on the GPU: decoding sequences and prompts in the same launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deltaserve.kernels.attention.cpu_step import cells_of
from deltaserve.kernels.attention.gpu import paged_attention, write_cells
from deltaserve.kernels.attention.step import AttentionStep, How, Span
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.gpu.static import ALIGN, StaticMemory


class GpuStep(AttentionStep):
    """tables: of the spans, each a sequence of its own."""

    def __init__(self, cells: Tensor, tables: AttentionTables) -> None:
        self.cells = cells
        self.tables = tables

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int, device: torch.device) -> Self:
        """With room for this step alone, brought to the device in one copy."""
        queries = [span.tokens for span in spans]
        lengths = [span.past + span.tokens for span in spans]
        used = [-(-n // block_size) for n in lengths]
        blocks = [span.blocks[:n] for span, n in zip(spans, used, strict=True)]
        bounds = len(spans), max(lengths), block_size
        sizes = 2 * sum(queries), AttentionTables.numbers(*bounds)
        memory = StaticMemory(sum(size + -size % ALIGN for size in sizes), device)
        (own, cells), (words, held) = map(memory.take, sizes)
        AttentionTables.over(words, *bounds, max(queries)).fill(queries, lengths, blocks)
        np.concatenate(
            [_new_cells(s, block_size) for s in spans], out=own.view(torch.int64).numpy()
        )
        memory.send()
        tables = AttentionTables.over(held, *bounds, max(queries))
        return cls(cells.view(torch.int64), tables)

    def write(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        rows = key[0].transpose(0, 1), value[0].transpose(0, 1)
        write_cells(keys, values, *rows, self.cells)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: How
    ) -> Tensor:
        return paged_attention(
            query[0].transpose(0, 1),
            keys,
            values,
            self.tables,
            how.scale,
            how.window,
            how.softcap,
            how.sinks,
        )


def _new_cells(span: Span, block_size: int) -> npt.NDArray[np.int64]:
    """Of its tokens, found from the blocks that hold those alone: there may be thousands before."""
    first = span.past // block_size
    past = span.past - first * block_size
    end = past + span.tokens
    held = np.array(span.blocks[first : first - (-end // block_size)])
    return cells_of(held, block_size, past, end)

"""Attention of a step on the GPU: decoding sequences and prompts in the same launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from deltaserve.kernels.attention.cpu_step import cells_of
from deltaserve.kernels.attention.gpu import paged_attention, write_cells
from deltaserve.kernels.attention.step import AttentionStep, How, Span
from deltaserve.kernels.attention.tables import AttentionTables


class GpuStep(AttentionStep):
    """tables: of the spans, each a sequence of its own."""

    def __init__(self, cells: Tensor, tables: AttentionTables) -> None:
        self.cells = cells
        self.tables = tables

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int, device: torch.device) -> Self:
        """With room for this step alone."""
        queries = [span.tokens for span in spans]
        lengths = [span.past + span.tokens for span in spans]
        used = [-(-n // block_size) for n in lengths]
        blocks = [span.blocks[:n] for span, n in zip(spans, used, strict=True)]
        cells = np.concatenate(
            [
                cells_of(np.array(held), block_size, past, past + count)
                for (past, count, _), held in zip(spans, blocks, strict=True)
            ]
        )
        tables = AttentionTables.allocate(
            len(spans), max(lengths), block_size, max(queries), device
        )
        tables.fill(queries, lengths, blocks)
        return cls(torch.from_numpy(cells).to(device), tables)

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

"""AttentionTables: which cells the sequences of a step own, in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """What attention must know of a step, at addresses that a CUDA graph can keep.

    Tensors are int32, on one device. rows [1]: how many sequences there are. query_start
    [max_rows + 1]: tokens of sequence i are rows query_start[i]..query_start[i + 1] of the step.
    lengths [max_rows]: its cells, those of the step's tokens included. tables [max_rows, width], of
    any strides: the blocks that hold them, in order. What lies past the rows or the blocks in use
    may hold anything. The bounds are of every step that the tables will hold: max_queries tokens
    and max_length cells of one sequence.
    """

    rows: Tensor
    query_start: Tensor
    lengths: Tensor
    tables: Tensor
    block_size: int
    max_queries: int
    max_length: int

    @property
    def max_rows(self) -> int:
        return self.tables.shape[0]

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        max_length: int,
        block_size: int,
        max_queries: int,
        device: torch.device | str,
    ) -> AttentionTables:
        """Tables of a step without sequences, in one piece of memory."""
        count = cls.numbers(max_rows, max_length, block_size)
        held = torch.zeros(count, dtype=torch.int32, device=device)
        return cls.over(held, max_rows, max_length, block_size, max_queries)

    @staticmethod
    def numbers(max_rows: int, max_length: int, block_size: int) -> int:
        """Of 32 bits, that they are."""
        return 2 + max_rows * (2 + -(-max_length // block_size))

    @classmethod
    def over(
        cls, held: Tensor, max_rows: int, max_length: int, block_size: int, max_queries: int
    ) -> AttentionTables:
        """In memory of somebody else, int32 [numbers], zeros for a step without sequences."""
        width = -(-max_length // block_size)
        rows, start, lengths, tables = torch.split(
            held, [1, max_rows + 1, max_rows, max_rows * width]
        )
        table = tables.view(max_rows, width)
        return cls(rows, start, lengths, table, block_size, max_queries, max_length)

    def fill(
        self, queries: Sequence[int], lengths: Sequence[int], blocks: Sequence[Sequence[int]]
    ) -> None:
        """Sets the step's sequences: the tokens, cells and blocks of each.

        Raises ValueError if they do not fit the bounds, or a sequence has fewer cells than tokens
        or fewer blocks than cells."""
        if not len(queries) == len(lengths) == len(blocks) <= self.max_rows:
            raise ValueError(
                f"{len(queries)} queries, {len(lengths)} lengths and {len(blocks)} lists of blocks "
                f"for at most {self.max_rows} sequences"
            )
        table = np.zeros((len(blocks), self.tables.shape[1]), dtype=np.int32)
        for i, (n, length, held) in enumerate(zip(queries, lengths, blocks, strict=True)):
            if not 0 <= n <= min(length, self.max_queries) or length > self.max_length:
                raise ValueError(
                    f"sequence {i} has {n} tokens and {length} cells; at most {self.max_queries} "
                    f"and {self.max_length} fit, and tokens are among the cells"
                )
            used = -(-length // self.block_size)
            if len(held) < used:
                raise ValueError(f"sequence {i} has {len(held)} blocks for {length} cells")
            table[i, :used] = held[:used]
        start = torch.tensor([0, *accumulate(queries)], dtype=torch.int32)
        self.tables[: len(blocks)].copy_(torch.from_numpy(table))
        self.lengths[: len(lengths)].copy_(torch.tensor(lengths, dtype=torch.int32))
        self.query_start[: len(start)].copy_(start)
        self.rows.fill_(len(queries))

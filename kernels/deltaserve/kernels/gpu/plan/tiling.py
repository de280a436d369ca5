"""How a step's work is cut, and what every part of the planner shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from deltaserve.kernels.gpu.aux_kernel import ITEM
from deltaserve.kernels.gpu.rows import Ints

Table: TypeAlias = dict[str, Any]
"""Some fields of `Tables`."""
Index: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the step's work is cut; the launches' constants, fixed by the number of tokens.

    tokens: of a tile of the base GEMM. block: tokens of an item. rows: rank rows of a shrink item.
    h_split: pieces that a shrink's sum is shared out in. depth: columns of a 1-bit step. gathers:
    tokens of a sparse item. programs: how many run at once, what work is spread over.
    """

    tokens: int
    block: int
    rows: int
    h_split: int
    depth: int
    gathers: int
    programs: int


def work_items(columns: Sequence[Ints | Index | int], count: int) -> Ints:
    """[count, 12] from the item's numbers, arrays or one for all."""
    items = np.zeros((count, ITEM.value), dtype=np.int32)
    for i, column in enumerate(columns):
        items[:, i] = column
    return items


NO_ITEMS = np.zeros((0, ITEM.value), dtype=np.int32)


def repeated(counts: Index) -> tuple[Index, Index]:
    """Of `counts[i]` copies of each i: i, and the number of the copy, from 0."""
    ends = np.cumsum(counts)
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (ends - counts)[of]


def bounds(keys: Index, count: int) -> Ints:
    """int32 [count + 1]: where in ascending keys those of each number below `count` begin."""
    return np.searchsorted(keys, np.arange(count + 1)).astype(np.int32)


def sort(keys: Index) -> Index:
    """The order of the keys, not negative; equal ones stay in theirs."""
    if len(keys) and keys.max() < 1 << 16:
        keys = keys.astype(np.uint16)  # numpy sorts these by radix
    return np.argsort(keys, kind="stable")

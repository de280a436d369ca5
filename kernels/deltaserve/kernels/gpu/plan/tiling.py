"""How a step's work is cut, and what every part of the planner shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve.kernels.gpu.aux_kernel import ITEM
from deltaserve.kernels.gpu.installed import Installed, Ints

Slots = Mapping[int, Installed]
Table = dict[str, Any]
"""Some fields of `Tables`."""


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


def work_items(columns: Sequence[Ints | int], count: int) -> Ints:
    """[count, 12] from the item's numbers, arrays or one for all."""
    items = np.zeros((count, ITEM.value), dtype=np.int32)
    for i, column in enumerate(columns):
        items[:, i] = column
    return items


NO_ITEMS = np.zeros((0, ITEM.value), dtype=np.int32)


def token_tiles(start: int, end: int, tiling: Tiling) -> range:
    """The token tiles that a run has tokens in."""
    return range(start // tiling.tokens, (end - 1) // tiling.tokens + 1)

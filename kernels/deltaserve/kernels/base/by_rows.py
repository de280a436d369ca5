"""The product where there are no native kernels: some rows of the weight dequantized at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 256
"""Bounds the temporary to 2 MiB at 2048 inputs. A multiple of 16, the rows of a packed block."""


def by_rows(
    x: Tensor,
    rows_of: Callable[[int, int], Tensor],
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """x: [T, in], of the dtype that is multiplied in. rows_of: start, end -> float [end - start,
    in] of the weight. Returns [T, out] of `dtype`."""
    y = torch.empty(x.shape[0], out_features, dtype=dtype)
    for start in range(0, out_features, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, out_features)
        part = None if bias is None else bias[start:end].to(x.dtype)
        y[:, start:end] = F.linear(x, rows_of(start, end).to(x.dtype), part)
    return y

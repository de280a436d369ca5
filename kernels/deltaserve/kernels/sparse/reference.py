"""What the sparse primitives mean, in plain PyTorch: as the dense matrix they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.primitives import Sparse, SparseBlocks, SparseCols, SparseCsr, SparseRows


def dense(primitive: Sparse, out_features: int, in_features: int) -> Tensor:
    """The delta as float64 [out, in]."""
    d = torch.zeros(out_features, in_features, dtype=torch.float64)
    match primitive:
        case SparseCsr(indptr, indices, values):
            rows = torch.repeat_interleave(torch.arange(out_features), indptr.diff())
            d[rows, indices.long()] = values.double()
        case SparseRows(index, values):
            d[index] = values.double()
        case SparseCols(index, values):
            d[:, index] = values.double()
        case SparseBlocks(index, values):
            _, height, width = values.shape
            for (p, q), block in zip(index.tolist(), values.double(), strict=True):
                d[p * height : (p + 1) * height, q * width : (q + 1) * width] = block
    return d


def delta(primitive: Sparse, x: Tensor, out_features: int) -> Tensor:
    """x: [T, in]. Returns the delta [T, out] in x's dtype, which should be float32 or float64."""
    return x @ dense(primitive, out_features, x.shape[1]).to(x.dtype).T

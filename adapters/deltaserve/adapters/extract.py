"""Making primitives from a base weight and the weight after fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.primitives import Bit, SparseCsr, pack_signs


def bitdelta_from(base_weight: Tensor, tuned_weight: Tensor) -> Bit:
    """BitDelta (Liu et al. 2024): the sign of the delta times its mean magnitude.

    Both weights [out, in]. ``scale = mean |dW|``, the minimizer of ||dW - scale * sign(dW)||_F,
    and a delta of 0 counts as +1, as in the authors' code (FasterDecoding/BitDelta, diff.py).
    """
    delta = tuned_weight.detach().float() - base_weight.detach().float()
    scale = delta.abs().mean().expand(1, delta.shape[0]).contiguous()
    return Bit(pack_signs(delta >= 0).unsqueeze(0), scale)


def sparse_from(delta: Tensor) -> SparseCsr:
    """The non-zero elements of ``delta [out, in]``, in its dtype."""
    delta = delta.detach()
    present = delta != 0
    indptr = torch.zeros(delta.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(present.sum(1), 0, out=indptr[1:])
    return SparseCsr(indptr, present.nonzero()[:, 1].to(torch.int32), delta[present].contiguous())

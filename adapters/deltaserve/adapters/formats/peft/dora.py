"""DoRA (Liu et al. 2024): ``W' = rho * (W + s B A)`` row by row, ``rho = m / ||W + s B A||``."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048
"""Rows of W at a time, so that no second W is ever made."""


def magnitude_factor(weight: Tensor, a: Tensor, b: Tensor, scale: float, m: Tensor) -> Tensor:
    """rho [out] of ``weight`` [out, in], a [r, in], b [out, r] and the magnitudes m [out].

    As in peft/tuners/lora/dora.py; for an embedding ``weight`` is its transpose [hidden, vocab].
    """
    norms = []
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        delta = b[rows].float() @ a.float()
        norms.append(torch.linalg.vector_norm(weight[rows].float() + scale * delta, dim=1))
    return m.float() / torch.cat(norms)

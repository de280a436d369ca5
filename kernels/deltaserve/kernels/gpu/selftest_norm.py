"""A norm by itself against its meaning in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.primitives import Bias, Replace
from deltaserve.kernels.segments import Segments

EPS = 1e-5
TOKENS = 6


def results(
    hidden: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, as found, as expected): the base, and tokens of an adapter beside others."""
    gain, own, bias = (0.5 + torch.rand(hidden) for _ in range(3))
    gain = gain.to(dtype)
    deltas = GpuNormDeltas(hidden, dtype, device)
    deltas.install(1, deltas.prepare((Replace(own), Bias(bias))))
    x = (5 * torch.randn(TOKENS, hidden)).to(dtype)
    wide = x.double()
    wide = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    base = wide * gain.double()
    tuned = wide * (gain + 0.5 * (own - gain)).double() + 0.5 * bias.double()
    for segments in (Segments([], TOKENS), Segments([(2, 4, ((1, 0.5),))], TOKENS)):
        found = deltas.rms(x.to(device), gain.to(device), 0.0, EPS, segments)
        rows = [0, 1, 4, 5]
        yield "the base", found[rows], base[rows]
    yield "tuned tokens", found[2:4], tuned[2:4]

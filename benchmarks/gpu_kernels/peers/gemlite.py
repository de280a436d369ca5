"""gemlite's int4 linear: weights of 4 bits, activations of 16, the tiles of its own H100 table."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from gpu_kernels.data import DEVICE, DTYPE
from gpu_kernels.peers.quantized import Int4
from gpu_kernels.peers.work import Work, load, stand_in

NAME = "gemlite 0.6.0"


def int4(folder: Path, x: Tensor, weight: Int4, copies: int) -> Work:
    """A shape that its table does not list is tuned at the first call, as in its own use."""
    helper = _helper(folder)
    maker = helper.A16W4_HQQ_INT(device=str(DEVICE), dtype=DTYPE)
    held = [
        maker.from_weights(weight.values.clone(), weight.scales, weight.zeros)
        for _ in range(copies)
    ]
    first = held[0]
    nbytes = sum(t.numel() * t.element_size() for t in (first.W_q, first.scales, first.zeros))
    return Work([lambda m=m: m(x) for m in held], lambda: None, nbytes)


@functools.lru_cache
def _helper(folder: Path) -> Any:
    if "tqdm" not in sys.modules:
        try:
            import tqdm  # noqa: F401
        except ImportError:
            stand_in("tqdm", {"tqdm": iter})
    core = load(folder, "gemlite", "core")
    core.GemLiteLinear.load_config(str(folder / "gemlite" / "configs" / "h100.json"))
    return load(folder, "gemlite", "helper")

"""LoRA initializations that take their first B A out of the base weight, made plain LoRA again.

Training saw ``W - s B0 A0 + s B A``. On the base as it is that is a LoRA of rank 2 r,
``s [B, -B0] [A; A0]``. B0 and A0 are computed again from W as PEFT does at load
(peft/tuners/lora/layer.py, ``pissa_init`` and ``olora_init``); only the product matters, so the
signs of singular vectors do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def initial_factors(init: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r], float32, of ``weight`` [out, in].

    init: ``pissa`` (Meng et al. 2024): ``s B0 A0`` is the best approximation of rank r.
    ``olora`` (Büyükakyüz 2024): B0 A0 is the first r columns of Q times the first r rows of R.
    """
    weight = weight.float()
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root

"""BitDelta's binary_bmm: one sign plane per adapter, the same number of tokens for each."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.kernels.primitives import Bit
from gpu_kernels.data import DEVICE, ON_GPU, Problem
from gpu_kernels.peers.work import AbsentError, Work, load, stand_in

NAME = "BitDelta binary_bmm"


def bit(folder: Path, problem: Problem, copies: int) -> Work:
    """The parts of a group are one product here (its own code makes one each), and the scale is one
    fused operation. In float16, which it writes whatever it is given."""
    stand_in("bitdelta", {}, folder / "bitdelta")
    module = load(folder, "bitdelta", "binary_gemm_kernel")
    if not ON_GPU:  # the interpreter cannot time candidates, and there is no device to enter
        module.binary_bmm_kernel.configs = module.binary_bmm_kernel.configs[-1:]
        torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment, misc]
    adapters, tokens = len(problem.adapters), len(problem.batch)
    if any(problem.batch.count(i) * adapters != tokens for i in range(adapters)):
        raise AbsentError("it takes the same number of tokens for every adapter")
    words, scale = _stacks(problem)
    weights = [words.clone() for _ in range(copies)]
    x = problem.x.half().view(adapters, -1, problem.group.in_features)
    y = torch.zeros(tokens, problem.group.out_features, dtype=torch.float16, device=DEVICE)

    def call(i: int) -> Tensor:
        y.view(adapters, -1, y.shape[1]).addcmul_(module.binary_bmm(x, weights[i]), scale)
        return y

    nbytes = 4 * words.numel() + 2 * scale.numel()
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def _stacks(problem: Problem) -> tuple[Tensor, Tensor]:
    """int32 [adapters, in / 32, out], bit j of word k for input 32 k + j, and float16 [adapters, 1,
    out]."""
    words, scales = [], []
    for adapter in problem.adapters:
        planes = [p for part in adapter for p in adapter[part] if isinstance(p, Bit)]
        rows = torch.cat([p.signs[0].contiguous().view(torch.int32) for p in planes])
        words.append(rows.T)
        scales.append(torch.cat([p.scale[0] for p in planes]))
    return torch.stack(words).contiguous().to(DEVICE), torch.stack(scales)[:, None].half().to(
        DEVICE
    )

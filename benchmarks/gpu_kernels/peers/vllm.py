"""vLLM's LoRA operations in Triton: lora_shrink, then lora_expand into y."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaserve.kernels.primitives import LowRank
from gpu_kernels.data import DEVICE, DTYPE, Problem
from gpu_kernels.peers.work import Work, load, stand_in

NAME = "vLLM 0.33.0"
OPS = "vllm.lora.ops.triton_ops"


def lora(folder: Path, problem: Problem, copies: int) -> Work:
    """Ranks are padded to the largest, as its pool is; strengths are in B, as its loader does."""
    shrink, expand, utils, metadata = _modules(folder)
    utils._LORA_A_PTR_DICT.clear()  # keyed by address, and addresses are used again
    utils._LORA_B_PTR_DICT.clear()
    a, b = _stacks(problem)
    weights = [([t.clone() for t in a], [t.clone() for t in b]) for _ in range(copies)]
    tokens, adapters = len(problem.batch), len(problem.adapters)
    mapping = torch.tensor(problem.batch, dtype=torch.int32, device=DEVICE)
    meta = metadata.LoRAKernelMeta.make(adapters, tokens, device=DEVICE)
    meta.prepare_tensors(mapping)
    args = meta.meta_args(tokens, True)  # a graph for each number of active adapters: its best
    rank = a[0].shape[-2]
    h = torch.empty(len(a), tokens, rank, dtype=torch.float32, device=DEVICE)
    y = torch.zeros(tokens, problem.group.out_features, dtype=DTYPE, device=DEVICE)

    def call(i: int) -> Tensor:
        shrink._lora_shrink(problem.x, weights[i][0], h, *args, 1.0)
        expand._lora_expand(h, weights[i][1], y, *args, offset_start=0, add_inputs=True)
        return y

    nbytes = sum(t.numel() * t.element_size() for t in [*a, *b])
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def _stacks(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Per part A [adapters, 1, rank, in] and B [adapters, 1, out, rank]."""
    group, adapters = problem.group, problem.adapters
    rank = max(p.a.shape[0] for ad in adapters for (p,) in ad.values() if isinstance(p, LowRank))
    a = [torch.zeros(len(adapters), 1, rank, group.in_features, dtype=DTYPE) for _ in group.parts]
    b = [torch.zeros(len(adapters), 1, out, rank, dtype=DTYPE) for out in group.parts]
    for i, adapter in enumerate(adapters):
        for part, (p,) in adapter.items():
            assert isinstance(p, LowRank)
            a[part][i, 0, : len(p.a)] = p.a
            b[part][i, 0, :, : len(p.a)] = p.b * p.scale
    return [t.to(DEVICE) for t in a], [t.to(DEVICE) for t in b]


@functools.lru_cache
def _modules(folder: Path) -> tuple[Any, Any, Any, Any]:
    root = folder / "vllm"
    stand_in("vllm", {}, root)
    stand_in("vllm.lora", {}, root / "lora")
    stand_in("vllm.lora.ops", {}, root / "lora" / "ops")
    stand_in(OPS, {}, root / "lora" / "ops" / "triton_ops")
    settings = SimpleNamespace(
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=False,
    )
    stand_in("vllm.envs", vars(settings))
    stand_in("vllm.logger", {"init_logger": _logger})
    stand_in("vllm.triton_utils", {"tl": tl, "triton": triton})
    stand_in("vllm.platforms", {"current_platform": _Platform()})
    stand_in("vllm.utils", {}, root / "utils")
    stand_in("vllm.utils.math_utils", {"next_power_of_2": triton.next_power_of_2})
    stand_in(
        "vllm.utils.torch_utils",
        {"async_tensor_h2d": torch.tensor, "direct_register_custom_op": _not_registered},
    )
    names = ("lora_shrink_op", "lora_expand_op", "utils", "lora_kernel_metadata")
    shrink, expand, utils, metadata = (load(folder, OPS, name) for name in names)
    return shrink, expand, utils, metadata


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_device_capability(self, least: int) -> bool:
        return self.is_cuda() and _capability() >= least

    def is_device_capability(self, exact: int) -> bool:
        return self.is_cuda() and _capability() == exact


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _logger(name: str) -> logging.Logger:
    logger: Any = logging.getLogger(name)
    logger.info_once = logger.info
    logger.warning_once = logger.debug
    return logger  # type: ignore[no-any-return]


def _not_registered(**kwargs: object) -> None:
    raise AttributeError("called directly")

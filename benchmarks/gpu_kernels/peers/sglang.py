"""SGLang's LoRA kernels: the "csgmv" backend (chunks of a sorted batch) and the "triton" one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.primitives import LowRank
from gpu_kernels.data import DEVICE, DTYPE, Problem
from gpu_kernels.peers.work import Work, load, stand_in

CSGMV = "SGLang 0.5.23 csgmv"
TRITON = "SGLang 0.5.23 triton"
DENSE = "sglang.kernels.ops.lora.dense"


def csgmv(folder: Path, problem: Problem, copies: int) -> Work:
    stand_ins(folder)
    shrink = load(folder, DENSE, "chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    expand = load(folder, DENSE, "chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
    parts = problem.group.parts
    chunk = 128 if len(problem.batch) >= 256 else 32 if len(problem.batch) >= 64 else 16
    info = _info(problem, _chunks(problem, chunk), chunk)
    bounds = torch.tensor([sum(parts[:i]) for i in range(len(parts) + 1)], dtype=torch.int32)
    on_device = bounds.to(DEVICE)

    def run(a: Tensor, b: Tensor, y: Tensor) -> None:
        h = shrink(problem.x, a, info, len(parts))
        expand(h, b, info, on_device, max(parts), y, slice_offsets_cpu=bounds)

    return _work(problem, copies, run)


def triton(folder: Path, problem: Problem, copies: int) -> Work:
    """At decode its tokens are merged into one segment per adapter of the pool."""
    stand_ins(folder)
    lora_a = load(folder, DENSE, "sgemm_lora_a").sgemm_lora_a_fwd
    plain = load(folder, DENSE, "sgemm_lora_b").sgemm_lora_b_fwd
    qkv = load(folder, DENSE, "qkv_lora_b").qkv_lora_b_fwd
    gate_up = load(folder, DENSE, "gate_up_lora_b").gate_up_lora_b_fwd
    parts = problem.group.parts
    info = _info(problem, _merged(problem), len(problem.batch))
    bounds = torch.tensor([sum(parts[:i]) for i in range(len(parts) + 1)], dtype=torch.int32)
    bounds = bounds.to(DEVICE)

    def run(a: Tensor, b: Tensor, y: Tensor) -> None:
        h = lora_a(problem.x, a, info, len(parts))
        if len(parts) == 1:
            plain(h, b, info, y)
        elif len(parts) == 2:
            gate_up(h, b, info, parts[0], y)
        else:
            qkv(h, b, info, bounds, max(parts), y, n_slices=len(parts))

    return _work(problem, copies, run)


def _work(problem: Problem, copies: int, run: Callable[[Tensor, Tensor, Tensor], None]) -> Work:
    a, b = stacks(problem)
    weights = [(a.clone(), b.clone()) for _ in range(copies)]
    shape = (len(problem.batch), problem.group.out_features)
    y = torch.zeros(shape, dtype=DTYPE, device=DEVICE)

    def call(i: int) -> Tensor:
        run(*weights[i], y)
        return y

    nbytes = 2 * (a.numel() + b.numel())
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def stacks(problem: Problem) -> tuple[Tensor, Tensor]:
    """A [slots, parts * rank, in], an adapter's rows without gaps, and B [slots, out, rank]. The
    last slot is the base's, of rank 0."""
    group, slots = problem.group, len(problem.adapters) + 1
    parts = len(group.parts)
    rank = max(ranks(problem))
    a = torch.zeros(slots, parts * rank, group.in_features, dtype=DTYPE)
    b = torch.zeros(slots, group.out_features, rank, dtype=DTYPE)
    for i, adapter in enumerate(problem.adapters):
        for part, (p,) in adapter.items():
            assert isinstance(p, LowRank)
            r, start = len(p.a), sum(group.parts[:part])
            a[i, part * r : (part + 1) * r] = p.a
            b[i, start : start + group.parts[part], :r] = p.b
    return a.to(DEVICE), b.to(DEVICE)


def ranks(problem: Problem) -> list[int]:
    """Of every slot."""
    found = [len(p.a) for ad in problem.adapters for p in ad[0] if isinstance(p, LowRank)]
    return [*found, 0]


def scales(problem: Problem) -> list[float]:
    """Of every slot."""
    found = [p.scale for ad in problem.adapters for p in ad[0] if isinstance(p, LowRank)]
    return [*found, 0.0]


def _slots(problem: Problem) -> list[int]:
    """The slot of each token, base tokens in the last one."""
    return [len(problem.adapters) if s < 0 else s for s in problem.batch]


def _chunks(problem: Problem, size: int) -> list[tuple[int, int]]:
    """(slot, tokens) of each segment of at most `size` tokens of one slot, in sorted order."""
    found: list[tuple[int, int]] = []
    for slot in sorted(_slots(problem)):
        if found and found[-1][0] == slot and found[-1][1] < size:
            found[-1] = (slot, found[-1][1] + 1)
        else:
            found.append((slot, 1))
    return found


def _merged(problem: Problem) -> list[tuple[int, int]]:
    slots = _slots(problem)
    return [(slot, slots.count(slot)) for slot in range(len(problem.adapters) + 1)]


def _info(problem: Problem, segments: list[tuple[int, int]], max_len: int) -> SimpleNamespace:
    """The fields of its LoRABatchInfo that these kernels read."""

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    lengths = [n for _, n in segments]
    order = torch.tensor(_slots(problem)).argsort(stable=True)
    return SimpleNamespace(
        use_cuda_graph=False,
        bs=len(segments),
        num_segments=len(segments),
        seg_indptr=int32([sum(lengths[:i]) for i in range(len(lengths) + 1)]),
        seg_lens=int32(lengths),
        weight_indices=int32([slot for slot, _ in segments]),
        lora_ranks=int32(ranks(problem)),
        scalings=torch.tensor(scales(problem), device=DEVICE),
        max_len=max_len,
        permutation=order.to(torch.int32).to(DEVICE),
    )


@functools.lru_cache
def stand_ins(folder: Path) -> None:
    root = folder / "sglang"
    for name in ("", ".kernels", ".kernels.ops", ".kernels.ops.lora", ".kernels.ops.lora.dense"):
        stand_in("sglang" + name, {}, root.joinpath(*name.split(".")[1:]))
    off = SimpleNamespace(get=lambda: False)
    switches = SimpleNamespace(
        SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off
    )
    stand_in("sglang.srt", {}, root / "srt")
    stand_in("sglang.srt.environ", {"envs": switches})
    stand_in("sglang.srt.lora", {}, root / "srt" / "lora")
    stand_in("sglang.srt.lora.utils", {"LoRABatchInfo": Any})
    stand_in(
        "sglang.srt.utils",
        {
            "get_device_name": _device_name,
            "cached_triton_kernel": lambda key: lambda kernel: kernel,
        },
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"

"""What torch brings along: cuBLAS, tinygemm, cuSPARSE, and LoRA as two batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.primitives import LowRank, SparseCsr
from gpu_kernels.data import DEVICE, DTYPE, ON_GPU, Problem, primitive_delta
from gpu_kernels.peers.quantized import Int4
from gpu_kernels.peers.work import AbsentError, Work
from gpu_kernels.shapes import QUANTIZED_GROUP

CUBLAS = "cuBLAS 16-bit"
TINYGEMM = "tinygemm (torch) int4"
CUSPARSE = "cuSPARSE (torch) CSR"
BMM = "torch baddbmm"
DENSE = "cuBLAS, dense deltas"
MOST_DENSE = 16 << 30
"""Bytes that dense deltas may take."""


def cublas(x: Tensor, weight: Tensor, copies: int) -> Work:
    """weight: [out, in] of x's dtype."""
    weights = [weight.clone() for _ in range(copies)]
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    calls = [lambda w=w: torch.mm(x, w.T, out=y) for w in weights]
    return Work(calls, y.zero_, 2 * weight.numel())


def tinygemm(x: Tensor, weight: Int4, copies: int) -> Work:
    """Its formula is ``(value - 8) * scale + zero``, so the zero points are rewritten."""
    scales = weight.scales.T
    zeros = ((8 - weight.zeros.float()) * weight.scales.float()).to(DTYPE).T
    meta = torch.stack([scales, zeros], 2).contiguous().bfloat16()
    values, x = weight.values, x.bfloat16()
    ops = torch.ops.aten
    if ON_GPU:
        words = ops._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], 8)
        run = ops._weight_int4pack_mm
    else:
        words = ops._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        run = ops._weight_int4pack_mm_for_cpu
    held = [(words.clone(), meta.clone()) for _ in range(copies)]
    calls = [lambda w=w, m=m: run(x, w, QUANTIZED_GROUP, m) for w, m in held]
    nbytes = words.numel() * words.element_size() + 2 * meta.numel()
    return Work(calls, lambda: None, nbytes)


def lora(problem: Problem, copies: int) -> Work:
    """Two batched products a part, for adapters of one rank with as many tokens each."""
    adapters = _of_equal_runs(problem)
    stacks: list[tuple[Tensor, Tensor]] = []
    for part in range(len(problem.group.parts)):
        found = [p for ad in problem.adapters for p in ad[part] if isinstance(p, LowRank)]
        if len({p.a.shape for p in found}) > 1:
            raise AbsentError("one batched product takes adapters of one rank")
        a = torch.stack([p.a.T * p.scale for p in found]).contiguous().to(DEVICE)
        stacks.append((a, torch.stack([p.b.T for p in found]).contiguous().to(DEVICE)))
    held = [[(a.clone(), b.clone()) for a, b in stacks] for _ in range(copies)]
    x = problem.x.view(adapters, -1, problem.group.in_features)
    y = torch.zeros(len(problem.batch), problem.group.out_features, dtype=DTYPE, device=DEVICE)
    columns = y.view(adapters, -1, y.shape[1]).split(problem.group.parts, 2)

    def call(i: int) -> Tensor:
        for (a, b), column in zip(held[i], columns, strict=True):
            column.baddbmm_(torch.bmm(x, a), b)
        return y

    nbytes = 2 * sum(a.numel() + b.numel() for a, b in stacks)
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def sparse(problem: Problem, copies: int) -> Work:
    """One product of a CSR matrix and x per adapter, the parts of the group in one matrix."""
    dtype = DTYPE if ON_GPU else torch.float32
    matrices = [_csr(problem, i, dtype) for i in range(len(problem.adapters))]
    held = [[m.clone() for m in matrices] for _ in range(copies)]
    y = torch.zeros(len(problem.batch), problem.group.out_features, dtype=dtype, device=DEVICE)
    runs = []
    for slot in range(len(problem.adapters)):
        start, count = problem.batch.index(slot), problem.batch.count(slot)
        runs.append((slice(start, start + count), problem.x[start : start + count].to(dtype).T))

    def call(i: int) -> Tensor:
        for matrix, (rows, x) in zip(held[i], runs, strict=True):
            y[rows] += torch.sparse.mm(matrix, x).T
        return y

    nbytes = sum(m.values().numel() * (m.values().element_size() + 4) for m in matrices)
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def dense(problem: Problem, copies: int) -> Work:
    """Every delta as a 16-bit matrix: one batched product a part. Of one primitive a part."""
    adapters = _of_equal_runs(problem)
    group, x = problem.group, problem.x.view(adapters, -1, problem.group.in_features)
    copies = min(copies, MOST_DENSE // (2 * adapters * group.weights))
    if not copies:
        raise AbsentError("dense deltas do not fit in memory")
    identity = torch.eye(group.in_features, device=DEVICE).double()
    first: list[Tensor] = []
    for part, out in enumerate(group.parts):
        each = [
            primitive_delta(p, identity, out).to(DTYPE)
            for adapter in problem.adapters
            for p in adapter[part]
        ]
        first.append(torch.stack(each))
    held = [first, *([t.clone() for t in first] for _ in range(copies - 1))]
    y = torch.zeros(len(problem.batch), group.out_features, dtype=DTYPE, device=DEVICE)
    columns = y.view(adapters, -1, y.shape[1]).split(group.parts, 2)

    def call(i: int) -> Tensor:
        for weight, column in zip(held[i], columns, strict=True):
            column.baddbmm_(x, weight)
        return y

    nbytes = 2 * sum(t.numel() for t in first)
    return Work([lambda i=i: call(i) for i in range(copies)], y.zero_, nbytes)


def _csr(problem: Problem, slot: int, dtype: torch.dtype) -> Tensor:
    group = problem.group
    parts = [p for part in range(len(group.parts)) for p in problem.adapters[slot][part]]
    found = [p for p in parts if isinstance(p, SparseCsr)]
    pointers, seen = [torch.zeros(1, dtype=torch.int64)], 0
    for p in found:
        pointers.append(p.indptr[1:] + seen)
        seen += len(p.indices)
    return torch.sparse_csr_tensor(
        torch.cat(pointers).int().to(DEVICE),
        torch.cat([p.indices for p in found]).int().to(DEVICE),
        torch.cat([p.values for p in found]).to(DEVICE, dtype),
        (group.out_features, group.in_features),
    )


def _of_equal_runs(problem: Problem) -> int:
    adapters = len(problem.adapters)
    if any(problem.batch.count(i) * adapters != len(problem.batch) for i in range(adapters)):
        raise AbsentError("one batched product takes as many tokens for every adapter")
    return adapters

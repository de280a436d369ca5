"""The launch of rope_kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deltaserve.kernels.attention.blocks import block_step, step_unit
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.norm_tables import Tuned
from deltaserve.kernels.gpu.rope_kernel import rope_kernel

TILE_ELEMENTS = 2048
"""Of one program: enough for wide loads by 4 warps, few enough that one token fills several."""


@dataclass(frozen=True, eq=False, slots=True)
class HeadNorms:
    """RMS norms of each head's query and key before they are turned, with gains ``offset + query``
    and ``offset + key`` [dim]. tuned: of either, if the step has adapters that tune one."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float = 0.0
    tuned: tuple[Tuned, Tuned] | None = None

    def arguments(self) -> tuple[Any, ...]:
        """What the kernel is given of them: the same names for the queries and for the keys."""
        found: list[Any] = []
        for i, gain in enumerate((self.query, self.key)):
            tables: list[Any] = [None] * 5
            if self.tuned is not None:
                own, floats = self.tuned[i], self.tuned[i].arena.view(torch.float32)
                tables = [floats, own.mixes, own.bounds, own.offsets, own.strengths]
            found += [gain, *tables]
        return tuple(found)


def rope_write(
    qkv: Tensor,
    heads: int,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Rotary position embedding (Su et al. 2021, in halves) of the queries and keys in place, then
    keys and values into the cache, in one launch whose grid follows from the shapes alone.

    qkv: [T, (heads + 2 kv_heads) * dim]. cosine, sine: [T, turned], of one dtype; of a head the
    first `turned` elements are turned. keys, values: [blocks, block_size, kv_heads, dim], of qkv's
    dtype, as in `attention.blocks` and of the same strides. cells: int32 or int64 [T], ``block *
    block_size + offset``; -1 writes nothing. The others are contiguous. Raises ValueError for what
    does not fit.
    """
    _, block_size, kv_heads, dim = keys.shape
    tokens, turned = cosine.shape
    _check(qkv, heads, cosine, sine, keys, values, cells)
    if not tokens:
        return
    tuned = norms is not None and norms.tuned is not None
    pdl = gpu.overlaps(qkv.device)
    how = constants(heads, kv_heads, dim, turned, block_size, norms is not None, tuned, pdl)
    tiles = -(-(heads + 2 * kv_heads) // how["TILE"])
    of_norms = norms.arguments() if norms else (None,) * 12
    eps, offset = (norms.eps, norms.offset) if norms else (0.0, 0.0)
    launch(
        rope_kernel,
        (tokens, tiles),
        (qkv, cosine, sine, keys, values, block_step(keys), cells, eps, offset, *of_norms),
        how,
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )


def constants(
    heads: int,
    kv_heads: int,
    dim: int,
    turned: int,
    block_size: int,
    normed: bool,
    tuned: bool,
    pdl: bool,
) -> dict[str, Any]:
    """The kernel's constants. normed: whether heads go through norms. tuned: whether adapters tune
    those."""
    tile = min(
        int(triton.next_power_of_2(heads + 2 * kv_heads)),
        max(1, TILE_ELEMENTS // int(triton.next_power_of_2(dim))),
    )
    return dict(
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, TURNED=turned, TILE=tile,
        HALVES=int(triton.next_power_of_2(turned // 2)),
        REST=int(triton.next_power_of_2(dim - turned)) if turned < dim else 0,
        BLOCK_SIZE=block_size, STEP=step_unit(block_size, kv_heads * dim), NORMED=normed,
        TUNED=tuned, PDL=pdl,
    )  # fmt: skip


def _check(
    qkv: Tensor,
    heads: int,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
) -> None:
    tokens, turned = cosine.shape
    kv_heads, dim = keys.shape[2:]
    width = (heads + 2 * kv_heads) * dim
    if qkv.shape != (tokens, width) or keys.shape != values.shape or len(cells) != tokens:
        raise ValueError(
            f"qkv {tuple(qkv.shape)}, {tokens} rotations, {len(cells)} cells, keys "
            f"{tuple(keys.shape)} and values {tuple(values.shape)} do not fit {heads} heads"
        )
    if turned % 2 or not 0 < turned <= dim or sine.shape != cosine.shape:
        raise ValueError(
            f"cosine {tuple(cosine.shape)} and sine {tuple(sine.shape)}: an even number of "
            f"elements, at most {dim} of a head, is turned"
        )
    if {keys.dtype, values.dtype} != {qkv.dtype} or sine.dtype != cosine.dtype:
        raise ValueError(
            f"qkv {qkv.dtype}, keys {keys.dtype}, values {values.dtype}: one dtype for all; "
            f"cosine {cosine.dtype} and sine {sine.dtype}: likewise"
        )
    if not all(t.is_contiguous() for t in (qkv, cosine, sine, cells)):
        raise ValueError("qkv, cosine, sine and cells must be contiguous")
    if block_step(values) != block_step(keys):
        raise ValueError(f"keys of strides {keys.stride()} and values of {values.stride()}")

"""Attention on a GPU: any mix of decoding sequences and chunks of prompts in one call.

Grids follow from captured maxima alone and counts are read from device memory, so a CUDA graph of
a step serves every step that fits its maxima.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from deltaserve.kernels.attention.blocks import block_step
from deltaserve.kernels.attention.cells import write_kernel
from deltaserve.kernels.attention.decode import decode_kernel, reduce_kernel
from deltaserve.kernels.attention.launch import (
    MAX_SPLITS,
    Launch,
    Shape,
    Splits,
    decode_splits,
    logit_factors,
    write_launch,
)
from deltaserve.kernels.attention.prefill import prefill_kernel
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.gpu.device import COMPUTE_DTYPES, multiprocessors
from deltaserve.kernels.gpu.launch import launch
from deltaserve.kernels.gpu.sums import Sums


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    steps: AttentionTables,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
    sums: Sums | None = None,
) -> Tensor:
    """Every query attends to the cells of its sequence up to its own.

    query: [T, heads, key_dim], the tokens of sequence i in rows query_start[i]..query_start[i + 1];
    they own the last cells of the sequence. keys [blocks, block_size, kv_heads, key_dim], values
    [blocks, block_size, kv_heads, value_dim]: as in `blocks`, of the query's dtype (float32,
    float16 or bfloat16); heads is a multiple of kv_heads. scale: > 0. window: a query sees itself
    and the window - 1 cells before it. softcap: logits become ``softcap * tanh(logits / softcap)``.
    sinks: one more logit per head [heads], without a value. splits: programs that share a decoding
    sequence and KV head; by default what suits `steps`' bounds. sums: where to write those of out
    as [T, heads * value_dim], whose step divides value_dim and is a power of two. Cells that a
    sequence does not own are never read.

    Returns out [T, heads, value_dim], a new tensor if none is given; rows of no sequence are left
    as they were. Raises ValueError if shapes, dtypes or layouts do not fit.
    """
    out = query.new_empty(*query.shape[:2], values.shape[3]) if out is None else out
    _check(query, keys, values, out, sinks, steps.block_size)
    for name, number in (("scale", scale), ("window", window), ("softcap", softcap)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}; it must be above 0")
    shape = Shape(query.shape[1], keys.shape[2], keys.shape[3], values.shape[3], steps.block_size)
    query, step = _token_rows(query, shape.query_unit)
    sequences = (steps.query_start, steps.lengths, steps.tables, steps.rows)
    distances = (block_step(keys), block_step(values))
    read = (query, keys, values, *distances, sinks, *sequences)
    how = (*logit_factors(scale, softcap), window or 0, *steps.tables.stride(), step)
    forms = {"WINDOW": window is not None, "SOFTCAP": softcap is not None, "SUM": 0}
    padded = 0
    if sums is not None:
        _check_sums(sums, shape)
        forms["SUM"], padded = sums.step, sums.padded
    outs = (out, None if sums is None else sums.values, padded)
    if steps.max_queries > 1:
        prefill = shape.prefill(query.element_size())
        grid = (len(query) // prefill.tokens + steps.max_rows, shape.kv_programs)
        _launch(prefill_kernel, grid, (*outs, *read, *how), prefill, forms)
    if splits is None:
        split = _default_splits(shape, steps, window, query)
    else:
        split = Splits(max(1, min(splits, MAX_SPLITS)), 1)
    _decode(shape, steps, split, outs, read, how, forms)
    return out


def _decode(
    shape: Shape,
    steps: AttentionTables,
    split: Splits,
    outs: tuple[Tensor, Tensor | None, int],
    read: tuple[Tensor | int | None, ...],
    how: tuple[float, ...],
    forms: dict[str, int],
) -> None:
    """The sequences of one query. outs, read, how: the arguments that all attention kernels
    share."""
    out = outs[0]
    rows, programs = steps.max_rows, split.programs
    planes = stats = None
    if programs > 1:
        planes = out.new_empty(programs, rows, shape.heads, shape.value_dim, dtype=torch.float32)
        stats = out.new_empty(programs, rows, shape.heads, 2, dtype=torch.float32)
    grid = (rows, shape.kv_programs, programs)
    arguments = (*outs, planes, stats, *read, *how, split.tiles)
    size = out.element_size()
    _launch(decode_kernel, grid, arguments, shape.decode(size), {"SPLIT": programs > 1, **forms})
    if programs > 1:
        sinks, window = read[5], how[2]
        parts = (*outs, planes, stats, sinks, steps.query_start, steps.lengths, steps.rows)
        fewer = {name: forms[name] for name in ("SUM", "WINDOW")}
        arguments = (*parts, window, programs, split.tiles)
        _launch(reduce_kernel, (rows, shape.heads), arguments, shape.reduce(size), fewer)


def write_cells(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, cells: Tensor) -> None:
    """Writes the step's keys and values to the cache.

    keys [blocks, block_size, kv_heads, key_dim], values [blocks, block_size, kv_heads, value_dim]:
    as in `blocks`. key [T, kv_heads, key_dim], value [T, kv_heads, value_dim]: of the same dtypes.
    cells: int32 or int64 [T], contiguous, the cell of each token, ``block * block_size + offset``;
    -1 writes nothing. Raises ValueError if shapes, dtypes or layouts do not fit.
    """
    if key.shape[1:] != keys.shape[2:] or value.shape[1:] != values.shape[2:]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} for cells of "
            f"{tuple(keys.shape[2:])} and {tuple(values.shape[2:])}"
        )
    if not len(key) == len(value) == len(cells):
        raise ValueError(f"{len(key)} keys, {len(value)} values and {len(cells)} cells")
    if key.dtype != keys.dtype or value.dtype != values.dtype:
        raise ValueError(f"key is {key.dtype}, its cache {keys.dtype}")
    if values.shape[:2] != keys.shape[:2] or not cells.is_contiguous():
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must have the same blocks, "
            "and cells be contiguous"
        )
    if not len(cells):
        return
    _, size, kv_heads, key_dim = keys.shape
    how = write_launch(kv_heads, key_dim, values.shape[3], size)
    key, key_step = _token_rows(key, how.constants["KEY_UNIT"])
    value, value_step = _token_rows(value, how.constants["VALUE_UNIT"])
    distances = (block_step(keys), block_step(values))
    arguments = (keys, values, key, value, cells, key_step, value_step, *distances)
    _launch(write_kernel, (len(cells),), arguments, how, {})


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | float | None, ...],
    how: Launch,
    forms: dict[str, int],
) -> None:
    launch(kernel, grid, arguments, {**how.constants, **forms}, how.num_warps, how.num_stages)


def _default_splits(
    shape: Shape, steps: AttentionTables, window: int | None, query: Tensor
) -> Splits:
    longest = steps.max_length if window is None else min(steps.max_length, window)
    tile = shape.block_n(query.element_size())
    programs = steps.max_rows * shape.kv_programs
    return decode_splits(programs, longest, tile, multiprocessors(query.device))


def sum_step(value_dim: int, step: int) -> int:
    """The columns of the sums that attention can take for linears that want them over `step`, a
    power of two; 0 if its heads cannot be cut like that."""
    found = gcd(value_dim, step)
    return found if found >= 16 else 0


def _token_rows(x: Tensor, unit: int) -> tuple[Tensor, int]:
    """x [T, heads, dim] with the heads of a token side by side, copied if they are not, and the
    stride between tokens in units."""
    _, heads, dim = x.shape
    packed = x.stride(2) == 1 and (heads == 1 or x.stride(1) == dim) and x.stride(0) % unit == 0
    if not packed or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x, x.stride(0) // unit


def _check_sums(sums: Sums, shape: Shape) -> None:
    if sum_step(shape.value_dim, sums.step) != sums.step:
        raise ValueError(f"sums over {sums.step} columns of heads of {shape.value_dim}")


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    sinks: Tensor | None,
    block_size: int,
) -> None:
    tokens, heads, dim = query.shape
    size, kv_heads, key_dim = keys.shape[1:]
    if query.dtype not in COMPUTE_DTYPES or {keys.dtype, values.dtype, out.dtype} != {query.dtype}:
        raise ValueError(
            f"query {query.dtype}, keys {keys.dtype}, values {values.dtype}, out {out.dtype}: "
            "one of float32, float16 and bfloat16 for all"
        )
    if (
        heads % kv_heads
        or (size, key_dim) != (block_size, dim)
        or values.shape[:3] != keys.shape[:3]
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} in blocks of {block_size} do not fit"
        )
    if out.shape != (tokens, heads, values.shape[3]):
        raise ValueError(f"out is {tuple(out.shape)}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks are {tuple(sinks.shape)}; one for each of {heads} heads")
    if not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError("out must be contiguous and aligned to 16 bytes")

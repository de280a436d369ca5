# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Writing a step's keys and values to the cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(to, source, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < WIDTH)
        tl.store(to + at, x, mask=at < WIDTH)


@triton.jit(do_not_specialize=["cells", "key_step", "value_step", "key_block", "value_block"])
def write_kernel(
    keys, values, key, value, cells, key_step, value_step, key_block, value_block,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_STEP: tl.constexpr,
):  # fmt: skip
    """Copies a token's key and value, of all KV heads, to its cell. key_block, value_block: from
    block to block, in KEY_STEP and VALUE_STEP elements. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells + token).to(tl.int64)
    if cell < 0:
        return
    block, row = cell // BLOCK_SIZE, cell % BLOCK_SIZE
    keys += block * (key_block * KEY_STEP) + row * KEY_WIDTH
    values += block * (value_block * VALUE_STEP) + row * VALUE_WIDTH
    _copy(keys, key + token * key_step * KEY_UNIT, KEY_WIDTH, BLOCK)
    _copy(values, value + token * value_step * VALUE_UNIT, VALUE_WIDTH, BLOCK)

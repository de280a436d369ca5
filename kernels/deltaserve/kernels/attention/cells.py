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


@triton.jit(do_not_specialize=["cells", "key_step", "value_step"])
def write_kernel(
    keys, values, key, value, cells, key_step, value_step,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies a token's key and value, of all KV heads, to its cell. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells + token).to(tl.int64)
    if cell < 0:
        return
    _copy(keys + cell * KEY_WIDTH, key + token * key_step * KEY_UNIT, KEY_WIDTH, BLOCK)
    _copy(values + cell * VALUE_WIDTH, value + token * value_step * VALUE_UNIT, VALUE_WIDTH, BLOCK)

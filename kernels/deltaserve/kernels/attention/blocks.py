"""Blocks: a layer's keys or values as kernels find them.

[blocks, block_size, kv_heads, dim]: a block's cells lie one after the other, the next block's at
any distance. So a cache may hold all layers of a block in one piece of memory.
"""

from __future__ import annotations

from math import gcd

from torch import Tensor


def step_unit(block_size: int, width: int) -> int:
    """Elements in which the distance between blocks of cells of `width` is counted: the compiler
    then sees that blocks are aligned, without a promise about an argument."""
    return gcd(16, block_size * width)


def block_step(x: Tensor) -> int:
    """The distance between blocks in units. Raises ValueError if x is not what is said above, or
    not aligned to 16 bytes."""
    _, size, heads, dim = x.shape
    step, unit = x.stride(0), step_unit(size, heads * dim)
    if x.stride()[1:] != (heads * dim, dim, 1) or x.data_ptr() % 16 or (step % unit and len(x) > 1):
        raise ValueError(
            f"blocks of keys and values must be contiguous and aligned to 16 bytes; they are "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    return step // unit

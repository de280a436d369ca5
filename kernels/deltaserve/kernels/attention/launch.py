"""How attention's kernels are compiled and launched for a model's heads."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import triton

from deltaserve.kernels.attention.blocks import step_unit

LOG2E = 1.4426950408889634
MAX_SPLITS = 64
"""Programs that may share one decoding sequence and KV head."""
TILE_BYTES = 32 << 10
"""Of K and V that one iteration takes; pipelining holds two or three times that."""
LONG = 4096
"""Cells that one program may take while others have less: a wait of about 30 us."""


class Launch(NamedTuple):
    """constants: `tl.constexpr` arguments of a kernel. tokens: the queries of one tile."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int
    tokens: int = 1


class Splits(NamedTuple):
    """programs: that share a decoding sequence and KV head. tiles: the least that one is given."""

    programs: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model, or of some of its layers. block_size: cells of a block."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def head_tile(self) -> int:
        """Heads of a group that one program takes: all, up to 32."""
        return -(-self.group // -(-self.group // 32))

    @property
    def kv_programs(self) -> int:
        return self.kv_heads * -(-self.group // self.head_tile)

    @property
    def query_unit(self) -> int:
        """Elements in which the stride between tokens is counted: the compiler then sees that rows
        are aligned, without a promise about an argument."""
        return gcd(16, self.key_dim)

    def decode(self, element_size: int) -> Launch:
        rows = max(16, triton.next_power_of_2(self.head_tile))
        warps = 8 if element_size == 4 else 4
        return Launch(self._constants(rows, self.block_n(element_size)), warps, 5)

    def prefill(self, element_size: int) -> Launch:
        """As large a tile as registers hold on every architecture. Products of float32 are made
        without matrix instructions, which takes more of them."""
        widest = max(_padded(self.key_dim), _padded(self.value_dim))
        even = self.key_dim % 16 == self.value_dim % 16 == 0
        rows = 128 if 32 < widest <= 128 and even else 64
        rows, cells = (32, 16) if element_size == 4 or widest > 256 else (rows, 32)
        constants = self._constants(rows, min(cells, self.block_n(element_size)))
        warps = 4 if widest <= 32 else 8
        return Launch(constants, warps, 3, rows // self.head_tile)

    def reduce(self, element_size: int) -> Launch:
        constants = {
            "HEADS": self.heads,
            "VALUE_DIM": self.value_dim,
            "BN": self.block_n(element_size),
            "BV": _padded(self.value_dim),
            "BS": 8,
            "MAX_SPLITS": MAX_SPLITS,
        }
        return Launch(constants, max(2, _padded(self.value_dim) // 64), 1)

    def block_n(self, element_size: int) -> int:
        """Cells of a tile."""
        cell = (_padded(self.key_dim) + _padded(self.value_dim)) * element_size
        return max(16, min(64, 1 << (TILE_BYTES // cell).bit_length() - 1))

    def _constants(self, rows: int, cells: int) -> dict[str, int]:
        return {
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_SIZE": self.block_size,
            "KEY_STEP": step_unit(self.block_size, self.kv_heads * self.key_dim),
            "VALUE_STEP": step_unit(self.block_size, self.kv_heads * self.value_dim),
            "HEAD_TILE": self.head_tile,
            "UNIT": self.query_unit,
            "BM": rows,
            "BN": cells,
            "BK": _padded(self.key_dim),
            "BV": _padded(self.value_dim),
        }


def logit_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): inner turns the product of a query and a key into the argument of the power
    of two within tanh, outer what comes of that, or the product itself, into a logit in base 2."""
    if softcap is None:
        return 0.0, scale * LOG2E
    return 2 * LOG2E * scale / softcap, softcap * LOG2E


def write_launch(kv_heads: int, key_dim: int, value_dim: int, block_size: int) -> Launch:
    """Of the kernel that writes cells."""
    widest = kv_heads * max(key_dim, value_dim)
    block = min(1024, max(16, triton.next_power_of_2(widest)))
    constants = {
        "KEY_WIDTH": kv_heads * key_dim,
        "VALUE_WIDTH": kv_heads * value_dim,
        "KEY_UNIT": gcd(16, key_dim),
        "VALUE_UNIT": gcd(16, value_dim),
        "BLOCK": block,
        "BLOCK_SIZE": block_size,
        "KEY_STEP": step_unit(block_size, kv_heads * key_dim),
        "VALUE_STEP": step_unit(block_size, kv_heads * value_dim),
    }
    return Launch(constants, max(1, block // 256), 1)


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def decode_splits(programs: int, longest: int, tile: int, processors: int) -> Splits:
    """How a decoding sequence is shared out, from what is known at capture.

    programs: without splits. longest: cells that a query may see. tile: cells of a tile.
    processors: of the device, each of which holds two programs. Few programs are split until they
    fill the device; many, until none has more than LONG cells, but then the short are not cut up.
    """
    fill = -(-2 * processors // programs)
    even = -(-longest // LONG)
    shared = max(1, min(max(fill, even), MAX_SPLITS, -(-longest // tile)))
    return Splits(shared, 1 if fill >= even else max(1, 256 // tile))

"""How kernels are cut: from the committed table of the GPU's architecture, else by one rule.

Nothing is tuned while serving. `deltaserve tune` measures and writes a table, sm_90.json and the
like, to the user's cache folder, which comes before the committed ones in configs/; tables are
read once. Their keys are "format group in out[ gated]", then the token bucket; their values the
fields of `GemmConfig`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deltaserve.kernels.cache import folder as cache_folder

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
"""What numbers of tokens are rounded up to, for tables and graphs; above, to multiples of 256."""

FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Of gemm_kernel: tile of tokens, rows, columns; pieces of the sum; how zeros of int4 are
    applied (see `product`)."""

    bm: int
    bn: int
    bk: int
    split_k: int = 1
    how: str = "sums"
    num_warps: int = 4
    num_stages: int = 4

    def summed(self, format: str, group_size: int) -> int:
        """Columns of the sums of x that the product reads; 0 for none."""
        reads = format == "w4a8" or (format == "int4" and self.how == "sums")
        return min(self.bk, group_size) if reads else 0


@dataclass(frozen=True, slots=True)
class AuxConfig:
    """Of aux_kernel: tokens of an item, rank rows and columns of a shrink step, pieces of its sum,
    columns of a 1-bit step, tokens of a sparse item."""

    block: int
    rows: int = 64
    bk_shrink: int = 128
    h_split: int = 1
    bk_bit: int = 256
    gathers: int = 8
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What a table knows a base linear by."""

    format: str
    group_size: int
    in_features: int
    out_features: int
    gated: bool = False

    def __str__(self) -> str:
        gated = " gated" if self.gated else ""
        return f"{self.format} {self.group_size} {self.in_features} {self.out_features}{gated}"


def bucket(tokens: int) -> int:
    """The number of tokens that a step of so many is planned for."""
    for b in BUCKETS:
        if tokens <= b:
            return b
    return -(-tokens // 256) * 256


def gemm_config(key: GroupKey, tokens: int, arch: int) -> GemmConfig:
    """The table's, or the rule's."""
    found = table(arch).get(str(key), {}).get(str(bucket(tokens)))
    return GemmConfig(**found) if found else rule(key, tokens, arch)


def measured(key: GroupKey, arch: int) -> list[int]:
    """The numbers of tokens that the table has something about."""
    return [int(tokens) for tokens in table(arch).get(str(key), {})]


def is_hopper(arch: int) -> bool:
    """Whether the matrix instruction takes operands out of shared memory by itself, of which there
    is much then: Hopper's, and that of the Blackwell of data centres (sm_100 to sm_110). The other
    Blackwell, sm_120, has the instruction of sm_80 and the memory of sm_89."""
    return 90 <= arch < 120


def rule(key: GroupKey, tokens: int, arch: int) -> GemmConfig:
    """Without a measurement: small token tiles while the weights' bytes are the cost, then square
    ones. Where the matrix instruction is not Hopper's, its operands are all registers, and tiles
    half as large are what fits without spilling."""
    many, hopper = bucket(tokens), is_hopper(arch)
    wide = key.format != "code4" and (key.gated or key.out_features >= 16384)
    deep = depth(key)
    if many <= 32:
        bm = 8 if many <= 8 else 16 if many <= 16 else 32
        bn, bk = 128 if wide else 64, 64 if key.format == "dense" else deep
        warps = 8 if wide and not hopper and key.format != "dense" else 4
        stages = 3 if key.format == "code4" else _stages(key, bm, bn, bk, arch)
        return GemmConfig(bm, bn, bk, 1, "sums", warps, stages)
    deep = 64 if key.format == "dense" else deep
    if key.format == "code4":  # the three numbers of a code take registers, its float32 memory
        return GemmConfig(64, 64, deep, 1, "after", 8, 3)
    if many <= 64:
        if wide:
            return GemmConfig(64, 128, deep, 1, "after", 8, 3)
        return GemmConfig(64, 64, deep, 1, "after", 4, 3)
    if hopper:
        return GemmConfig(128, 128, deep, 1, "after", 8, 3)
    if BITS[key.format] == 8:
        return GemmConfig(64, 128, min(deep, 64), 1, "after", 8, 3)
    return GemmConfig(128, 64, deep, 1, "after", 8, 3)


def depth(key: GroupKey) -> int:
    """Columns of the deepest step: within a group of the base, if that has 32 or more."""
    return max(32, min(128, key.group_size)) if key.group_size else 128


BITS = {
    "dense": 16, "int8": 8, "uint8": 8, "fp8": 8, "int4": 4, "code4": 4, "w8a8": 8, "w4a8": 4,
}  # fmt: skip
"""Of a weight."""

WHOLE = ("w8a8", "w4a8")
"""Formats whose inputs are 8 bits a token, and that are multiplied in whole numbers."""

IN_FLIGHT = 5 << 20
"""Bytes of weights that have to be on their way for the memory to be busy: its rate times its
latency, here an H200's 4.3 TB/s and, assumed, 1 us."""


def _stages(key: GroupKey, bm: int, bn: int, bk: int, arch: int) -> int:
    """As many as it takes for all tiles together to keep the memory busy, within half of the
    shared memory that a multiprocessor has."""
    weights, x = bk * bn * BITS[key.format] // 8, bk * bm * (1 if key.format in WHOLE else 2)
    tiles = max(1, key.out_features // bn)
    wanted = 1 + -(-IN_FLIGHT // (tiles * weights))
    room = (112 if is_hopper(arch) else 48 if arch in (86, 89) or arch >= 120 else 80) << 10
    return max(3, min(wanted, room // (weights + x), 10))


def aux_config(tokens: int, in_features: int, arch: int) -> AuxConfig:
    """By rule: what decides is how few tokens there are, and the registers where it is not Hopper's
    matrix instruction."""
    many = bucket(tokens)
    bits = 256 if is_hopper(arch) and -(-in_features // 128) % 2 == 0 else 128
    gathers = 1 if many <= 2 else 8
    split = 4 if many <= 16 else 2 if many <= 32 else 1
    if not is_hopper(arch):
        return AuxConfig(16, h_split=split, bk_bit=bits, gathers=gathers, num_stages=2)
    if many <= 16:
        return AuxConfig(16, h_split=split, bk_bit=bits, gathers=gathers, num_stages=4)
    if many <= 32:
        return AuxConfig(32, h_split=split, bk_bit=128, gathers=gathers)
    return AuxConfig(64, h_split=1, bk_bit=128, gathers=gathers, num_warps=8)


@cache
def table(arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The measurements for an architecture, the user's over the committed ones."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in (FOLDER, user_folder()):
        path = folder / f"sm_{arch}.json"
        if path.exists():
            for key, by_tokens in json.loads(path.read_text())["gemm"].items():
                found.setdefault(key, {}).update(by_tokens)
    return found


def user_folder() -> Path:
    """Where `deltaserve tune` writes."""
    return cache_folder() / "configs"


def write_table(
    arch: int, found: dict[GroupKey, dict[int, GemmConfig]], about: dict[str, str], folder: Path
) -> Path:
    """Adds measurements to a table; about: GPU, versions, date of these."""
    path = folder / f"sm_{arch}.json"
    gemm = json.loads(path.read_text())["gemm"] if path.exists() else {}
    for key, by in found.items():
        new = {str(tokens): asdict(config) for tokens, config in sorted(by.items())}
        gemm[str(key)] = {**gemm.get(str(key), {}), **new}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "gemm": gemm}, indent=1) + "\n")
    return path

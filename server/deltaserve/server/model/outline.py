"""What a base takes in memory, from its config and the headers of its files: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaserve.adapters.checkpoint import Checkpoint, open_files
from deltaserve.adapters.safetensors_header import BASE_DTYPES, TensorEntry
from deltaserve.kernels.table import Group
from deltaserve.server.model.loader import (
    Quantize,
    Skeleton,
    check_stored,
    checkpoint_folder,
    schemes_for,
    skeleton_of,
)
from deltaserve.server.model.quantized import Format
from deltaserve.server.model.quantized.packed import FLOATS
from deltaserve.server.model.quantizer import Scheme


@dataclass(frozen=True, slots=True)
class Outline:
    """groups: the linears that adapters act on, lm_head left out: each group, which of its parts
    have a bias, and how many there are of it. weights: bytes, to a few percent."""

    skeleton: Skeleton
    groups: Mapping[tuple[Group, tuple[bool, ...]], int]
    weights: int


def outline(
    path: str | Path,
    *,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    group_size: int | None = None,
    max_length: int | None = None,
    allow_untested: bool = False,
) -> Outline:
    """The base as `load` would hold it. Raises what `load` raises."""
    folder = checkpoint_folder(Path(path))
    skeleton = skeleton_of(folder, dtype, max_length, allow_untested)
    if skeleton.stored is not None:
        check_stored(folder, skeleton.stored, quantize)
    report, modules = skeleton.report, skeleton.modules
    groups: Counter[tuple[Group, tuple[bool, ...]]] = Counter()
    for names in report.groups:
        if report.head not in names and report.by_token.issuperset(names):
            parts = tuple(modules[name].out_features for name in names)
            biased = tuple(modules[name].has_bias for name in names)
            groups[Group(modules[names[0]].in_features, parts, dtype), biased] += 1
    schemes = schemes_for(skeleton, dtype, quantize, group_size, "float", True)
    return Outline(skeleton, groups, _weights(folder, skeleton, schemes, dtype))


def _weights(
    folder: Path, skeleton: Skeleton, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> int:
    """Every tensor of the files in `dtype`, but for the linears that are held in fewer bits, and
    a tied lm_head, which is laid out once more for its product."""
    with open_files(folder, ("model",)) as fds:
        entries = Checkpoint(folder, fds, BASE_DTYPES).entries
    if skeleton.stored is not None:
        return _stored(entries, skeleton.stored, dtype)
    total = sum(math.prod(e.shape) for e in entries.values()) * dtype.itemsize
    for names in skeleton.report.groups:
        for name in names:
            module = skeleton.modules[name]
            dense = module.in_features * module.out_features * dtype.itemsize
            scheme = schemes.get(name)
            held = dense if scheme is None else _held(module.in_features, scheme)
            if scheme is not None:
                held *= module.out_features
            total += held if name in skeleton.tied else held - dense
    return total


def _stored(entries: Mapping[str, TensorEntry], stored: Format, dtype: torch.dtype) -> int:
    """Packed tensors are held in about their bytes, but for a float32 scale and zero where they
    have a scale; the others in `dtype`."""
    packed = {f"{m}.{part}" for m, parts in stored.modules(entries).items() for part in parts}
    total = 0
    for name, e in entries.items():
        each = e.dtype.itemsize if name in packed else dtype.itemsize
        if name in packed and e.dtype in FLOATS:
            each = 8
        total += math.prod(e.shape) * each
    return total


def _held(width: int, scheme: Scheme) -> int:
    """Bytes of one output row of a quantized linear, with its scales and zeros."""
    if scheme.bits == 8:
        return width + 4
    return -(-width // 2) + 4 * -(-width // scheme.group_size)

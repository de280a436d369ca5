"""The tables of a step: which tokens which adapters' memory is for. Built on the host, once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaserve.kernels.gpu.installed import Floats, Ints
from deltaserve.kernels.gpu.plan.deltas import DeltaItems
from deltaserve.kernels.gpu.plan.lowrank import lowrank_tables
from deltaserve.kernels.gpu.plan.tiling import Slots, Tiling
from deltaserve.kernels.gpu.plan.vectors import input_vectors, output_vectors
from deltaserve.kernels.gpu.tags import Tagged
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group


@dataclass(frozen=True, slots=True)
class Uses:
    """What the step wants beside x: scaled inputs, apart for each module, x turned for sparse
    slices, the biases of 1-bit deltas."""

    scaled: bool = False
    apart: bool = False
    turned: bool = False
    biased: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """Everything that the launches read of the step, in host memory. width: rows of h. Offsets
    in the arena are tagged (see tags.py)."""

    items: Ints
    entries: Tagged
    strengths: Floats
    page_a: Tagged
    page_b: Tagged
    page_col: Ints
    page_lo: Ints
    page_hi: Ints
    page_scale: Floats
    page_bounds: Ints
    vec_offset: Tagged
    vec_lo: Ints
    vec_hi: Ints
    vec_strength: Floats
    vec_bounds: Ints
    in_offset: Tagged
    in_lo: Ints
    in_hi: Ints
    in_strength: Floats
    in_bounds: Ints
    plane_count: Ints
    width: int
    planes: int
    uses: Uses


def build(
    group: Group,
    slots: Slots,
    segments: Segments,
    tiles: int,
    tiling: Tiling,
    apart: bool = False,
) -> Tables:
    """tiles: token tiles that the tables are laid out for, at least those of the step. apart: list
    the modules' inputs apart even where they are the same."""
    pages, shrinks, width = lowrank_tables(group, slots, segments, tiles, tiling)
    work = DeltaItems(group, slots, segments, tiles, tiling)
    vectors = output_vectors(group, slots, segments, tiles, tiling)
    inputs, apart = input_vectors(group, slots, segments, tiles, tiling, apart)
    # The longest items first: what is left at the end should be short.
    items = np.concatenate([work.bits, work.panels, work.sells, shrinks])
    return Tables(
        items=items,
        entries=np.array(work.entries, dtype=np.int64).reshape(-1, 4),
        strengths=np.array(work.strengths, dtype=np.float32),
        **pages,
        **vectors,
        **inputs,
        plane_count=work.count,
        width=width,
        planes=int(work.count.max(initial=0)),
        uses=Uses(
            scaled=len(inputs["in_offset"]) > 0,
            apart=apart,
            turned=tiling.gathers > 1 and len(work.sells) > 0,
            biased=len(work.bits) > 0,
        ),
    )

"""The tables of a step: which tokens which adapters' memory is for. Built on the host, once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaserve.kernels.gpu.plan.adapters import Adapters
from deltaserve.kernels.gpu.plan.deltas import DeltaItems
from deltaserve.kernels.gpu.plan.lowrank import gate_entries, lowrank_tables
from deltaserve.kernels.gpu.plan.tiling import Tiling
from deltaserve.kernels.gpu.plan.vectors import input_vectors, output_vectors
from deltaserve.kernels.gpu.rows import Floats, Ints
from deltaserve.kernels.table import Group


@dataclass(frozen=True, slots=True)
class Uses:
    """What the step wants beside x: scaled inputs, apart for each module, x turned for sparse
    slices, the biases of 1-bit deltas. gated: rows of h are weighed by routers."""

    scaled: bool = False
    apart: bool = False
    turned: bool = False
    biased: bool = False
    gated: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """Everything that the launches read of the step, in host memory. width: rows of h. entries,
    page_a, page_b, vec_offset and in_offset say where in the arena what lies: [n, layers], and
    page_scale is of each layer too; the rest is the same for all layers."""

    items: Ints
    entries: Ints
    strengths: Floats
    page_a: Ints
    page_b: Ints
    page_col: Ints
    page_lo: Ints
    page_hi: Ints
    page_scale: Floats
    page_bounds: Ints
    vec_offset: Ints
    vec_lo: Ints
    vec_hi: Ints
    vec_strength: Floats
    vec_bounds: Ints
    in_offset: Ints
    in_lo: Ints
    in_hi: Ints
    in_strength: Floats
    in_bounds: Ints
    plane_count: Ints
    gates: Ints
    width: int
    planes: int
    uses: Uses

    @property
    def layers(self) -> int:
        return int(self.page_a.shape[1])


def build(
    group: Group, adapters: Adapters, tiles: int, tiling: Tiling, apart: bool = False
) -> Tables:
    """tiles: token tiles that the tables are laid out for, at least those of the step. apart: list
    the modules' inputs apart even where they are the same."""
    pages, shrinks, width = lowrank_tables(group, adapters, tiles, tiling)
    work = DeltaItems(group, adapters, tiles, tiling)
    gates = gate_entries(adapters, tiling)
    vectors = output_vectors(group, adapters, tiles)
    inputs, apart = input_vectors(group, adapters, tiles, apart)
    # The longest items first: what is left at the end should be short.
    items = np.concatenate([work.bits, work.panels, work.sells, shrinks])
    return Tables(
        items=items,
        entries=work.entries,
        strengths=work.strengths,
        **pages,
        **vectors,
        **inputs,
        plane_count=work.count,
        gates=gates,
        width=width,
        planes=int(work.count.max(initial=0)),
        uses=Uses(
            scaled=len(inputs["in_offset"]) > 0,
            apart=apart,
            turned=tiling.gathers > 1 and len(work.sells) > 0,
            biased=len(work.bits) > 0,
            gated=len(gates) > 0,
        ),
    )

"""Where in an adapter's blob what lies: offsets in units of 16 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.kernels.gated.pages import Gate
from deltaserve.kernels.lowrank.pages import Page
from deltaserve.kernels.sparse.panels import Panel
from deltaserve.kernels.sparse.sell import Sell


@dataclass(frozen=True, slots=True)
class Signs:
    """Offsets of the words of all sign planes and of their scales, float32."""

    words: int
    scales: int
    planes: int


@dataclass(frozen=True, slots=True)
class Part:
    """One module. factors, biases, input: offsets of float32 vectors, of outputs, outputs and
    inputs. replaced: of zeros, as long as the longer of the two, for a weight that takes the base's
    place. gates: the routers of some of the pages."""

    pages: tuple[Page, ...] = ()
    signs: tuple[Signs, ...] = ()
    sell: Sell | None = None
    panels: tuple[Panel, ...] = ()
    factors: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()
    input: int | None = None
    replaced: int | None = None
    gates: tuple[Gate, ...] = ()

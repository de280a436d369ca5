"""Reserved: the segments of a captured step, whose adapters are not known yet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.embedding_tables import EmbeddingPlan
from deltaserve.kernels.gpu.layers import LayerPlans
from deltaserve.kernels.gpu.norm_tables import Tuned
from deltaserve.kernels.gpu.step import StepPlan
from deltaserve.kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class Family:
    """Groups of one shape in every layer. base: of any of them. gated: as in `plan`."""

    layers: LayerPlans
    base: GpuLinear
    gated: bool = False


PlansOf: TypeAlias = Callable[[Hashable, Family], Sequence[StepPlan]]


class Reserved(Segments):
    """Linears, norms that are run by norm_kernel and the token embedding take the plans that are
    laid out here for any adapters, whatever is installed. To all else it is a step of the base:
    adapters that act there cannot be in it. plans: a family by its name -> the plan of each of its
    layers. tuned: a norm by its number -> its plan; None in a step without adapters that tune one.
    embedded: of the embedding; None if no adapter can change it."""

    def __init__(
        self,
        tokens: int,
        plans: PlansOf,
        tuned: Callable[[int], Tuned | None],
        embedded: EmbeddingPlan | None = None,
    ) -> None:
        super().__init__((), tokens)
        self.reserved = plans
        self.tuned = tuned
        self.embedded = embedded

    def __bool__(self) -> bool:
        return True

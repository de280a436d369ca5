"""GpuNormDeltas: `NormDeltas` on the GPU: gains and biases of norms by token."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu.arena import ALIGN, LINE, Arena
from deltaserve.kernels.gpu.norm import run_norm
from deltaserve.kernels.gpu.norm_plans import NormPlans, Vectors
from deltaserve.kernels.gpu.norm_tables import Tuned
from deltaserve.kernels.gpu.prepared_norm import GpuPreparedNorm, prepare
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.norm import NormDeltas, PreparedNorm
from deltaserve.kernels.primitives import Primitive
from deltaserve.kernels.rms_norm import rms_norm
from deltaserve.kernels.segments import Segments


class GpuNormDeltas(NormDeltas):
    """The vectors lie in an arena, where norm_kernel finds them, and `forward`. plans: of all norms
    of the model, and their arena; of its own if not given. workspace: likewise. number: among
    those of `plans`."""

    by_token = True

    def __init__(
        self,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        plans: NormPlans | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(hidden, dtype, device or gpu.default_device())
        self.plans = plans or NormPlans(Arena(self.device, 1 << 10))
        self.arena = self.plans.arena
        self.number = self.plans.add()
        self._workspace = workspace or Workspace(self.device)
        self._vectors: dict[int, Vectors] = {}

    def prepare(self, primitives: tuple[Primitive, ...]) -> PreparedNorm:
        """See `prepared_norm.prepare`."""
        return prepare(primitives, self.hidden)

    def install(self, slot: int, prepared: PreparedNorm) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread. What is in
        the arena already, or was put there for another slot, is not copied again."""
        assert isinstance(prepared, GpuPreparedNorm)
        self.remove(slot)
        if not prepared.nbytes:
            return
        home = prepared.home
        gain = None if prepared.gain is None else 0
        after = 0 if gain is None else -(-self.hidden * 4 // LINE) * ALIGN
        bias = None if prepared.bias is None else after
        self._prepared[slot] = prepared
        found = Vectors(home, home.take(prepared.blob, self.arena), gain, bias)
        self._vectors[slot] = found
        self.plans.put(self.number, slot, found)

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        super().remove(slot)
        found = self._vectors.pop(slot, None)
        if found is not None:
            self.plans.drop(self.number, slot)
            found.home.leave(found.spot, self.arena)

    def rms(
        self, x: Tensor, weight: Tensor, offset: float, eps: float, segments: Segments
    ) -> Tensor:
        """See `NormDeltas.rms`. x of two dimensions, one launch, whatever the step."""
        if x.dim() == 2 and x.dtype == weight.dtype:
            return run_norm(
                x.contiguous(), weight, eps, self._workspace, offset=offset,
                tuned=self.planned(segments), out=torch.empty_like(x),
            ).x  # fmt: skip

        def norm(x: Tensor, gain: Tensor | None) -> Tensor:
            return rms_norm(x, (weight if gain is None else gain) + offset, eps)

        return self.forward(x, norm, weight, segments)

    def planned(self, segments: Segments) -> Tuned | None:
        """What the norm's launch is given of a step's adapters; None if they tune no norm."""
        return self.plans.tuned(self.number, segments)

    def _installed(self, slot: int) -> PreparedNorm:
        found, floats = self._vectors[slot], self.arena.view(torch.float32)

        def vector(units: int | None) -> Tensor | None:
            at = None if units is None else 4 * (found.spot.offset + units)
            return None if at is None else floats[at : at + self.hidden]

        return PreparedNorm(vector(found.gain), vector(found.bias))

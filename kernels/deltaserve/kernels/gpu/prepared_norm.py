"""What one adapter has on one norm, as one piece of memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from deltaserve.kernels import norm
from deltaserve.kernels.gpu.blob import BlobWriter, Home
from deltaserve.kernels.norm import PreparedNorm
from deltaserve.kernels.primitives import Primitive


@dataclass(frozen=True, eq=False, slots=True)
class GpuPreparedNorm(PreparedNorm):
    """blob: uint8, in host memory: gain and bias, as far as there are any, each from a cache line
    on. home: where it lies on the device."""

    blob: Tensor
    home: Home = field(default_factory=Home)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blob,)

    @property
    def nbytes(self) -> int:
        """Exact bytes, padding included."""
        return self.blob.numel()


def prepare(primitives: tuple[Primitive, ...], hidden: int) -> GpuPreparedNorm:
    """See `norm.prepare`."""
    found, writer = norm.prepare(primitives, hidden), BlobWriter()
    for vector in found.tensors():
        writer.add(vector)
    return GpuPreparedNorm(found.gain, found.bias, writer.bytes())

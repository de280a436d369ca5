"""Backend: what computes a step, and the forms in which it wants weights, adapters and the cache.

Everything above this room is written against it once. `cpu_backend.py` computes in host memory,
`gpu/backend.py` on a GPU, with Triton; `devices.py` opens one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from deltaserve.kernels.attention.step import AttentionSpec, AttentionStep, Span
from deltaserve.kernels.base import BaseLinear
from deltaserve.kernels.captured import Graphs, StepTensors
from deltaserve.kernels.decoder import DecoderLayer, LayerParts
from deltaserve.kernels.gated_prefix import GatedPrefixes
from deltaserve.kernels.norm import NormDeltas, PreparedNorm
from deltaserve.kernels.primitives import GatedPrefix, Primitive
from deltaserve.kernels.segments import Segments
from deltaserve.kernels.table import Group


class DeviceUnavailable(RuntimeError):
    """This machine, or this build of torch, has no such device; the message says which."""


class KernelError(RuntimeError):
    """A kernel computes wrongly on this device, or does not run; the message names it."""


class UnsupportedWeights(ValueError):
    """The backend cannot compute with weights held like that; the message says what it can."""


class Prepared(Protocol):
    """What one adapter has somewhere, ready to be installed."""

    @property
    def nbytes(self) -> int:
        """Exact bytes, shared memory counted once."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor it keeps in memory."""
        ...


class PreparedDeltas(Prepared, Protocol):
    """On one group of linears."""

    def only(self, parts: Collection[int]) -> PreparedDeltas:
        """What it has on some parts of the group, over the same tensors."""
        ...


Pack: TypeAlias = Callable[[Mapping[int, tuple[Primitive, ...]], Group], PreparedDeltas]
"""Casts and packs the primitives of each part of a group for serving, in host memory; a function
that another process finds by its name. Safe from any thread. Raises ValueError for a primitive that
the group does not take."""


PackNorm: TypeAlias = Callable[[tuple[Primitive, ...], int], PreparedNorm]
"""The same for a norm, of a gain of such a size."""


PackEmbedding: TypeAlias = Callable[[tuple[Primitive, ...], int, int, torch.dtype], Prepared]
"""The same for the token embedding, of a weight [vocabulary, hidden]; its output's dtype."""


PackPrefix: TypeAlias = Callable[[GatedPrefix], Prepared]
"""The same for a gated prefix, which is in the dtype it is served in. Raises nothing."""


class Deltas(Protocol):
    """What a step's adapters do to one group of linears that share their input."""

    group: Group

    def prepare(self, parts: Mapping[int, tuple[Primitive, ...]]) -> PreparedDeltas:
        """The backend's `packed`."""
        ...

    def install(self, slot: int, prepared: Any) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread."""
        ...

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        ...

    @property
    def nbytes(self) -> int:
        """Exact bytes installed."""
        ...

    def is_native(self, slot: int) -> bool:
        """Whether the call that runs all layers natively does all that the slot's adapter does."""
        ...

    def forward(self, x: Tensor, base: Any, segments: Segments) -> Tensor:
        """x: [T, in]. Returns [T, sum of out_features] of x's dtype. Tokens without an adapter get
        exactly what they get in a step without any."""
        ...


class EmbeddingDeltas(Protocol):
    """What a step's adapters do to the token embedding. by_token: whether steps launch the same
    whatever its adapters are."""

    by_token: bool

    def install(self, slot: int, prepared: Any) -> None:
        """Publishes an adapter in a slot, in place of what the slot held. Engine thread."""
        ...

    def remove(self, slot: int) -> None:
        """Empties a slot; an empty one may be removed again."""
        ...

    def forward(
        self,
        ids: Tensor,
        y: Tensor,
        weight: Tensor,
        segments: Segments,
        multiplier: float = 1.0,
    ) -> Tensor:
        """ids: int64 [T]; y: the base's output [T, hidden], which is changed in place and returned.
        weight: the base's [vocabulary, hidden], not multiplied. multiplier: the module's own
        factor."""
        ...


class SharedMemory(Protocol):
    """One allocation for the cache, at its low end, and adapters, at the other. Engine thread,
    between two steps.

    data: all of it, uint8. boundary: bytes that are the cache's.
    """

    data: Tensor
    boundary: int

    @property
    def reach(self) -> int:
        """Bytes that the cache can have at most while adapters are on their way."""
        ...

    def divide(self, boundary: int) -> bool:
        """The cache has the first `boundary` bytes from now on; adapters are moved out of them.
        False, and nothing moves, if they do not fit above, or those on their way are in between."""
        ...

    def check_integrity(self) -> None:
        """Raise if a byte is the cache's and an adapter's."""
        ...


class Parcel(Protocol):
    """One adapter on its way to the device. Engine thread, between two steps: once it has arrived,
    `publish`, install it in slots, `finish`; or `cancel`, and `finish` once arrived."""

    @property
    def arrived(self) -> bool:
        """Asks, never waits. After `cancel`: nothing is written any more."""
        ...

    def cancel(self) -> None:
        """Bring no more of it."""
        ...

    def publish(self) -> None:
        """It may be read from now on."""
        ...

    def finish(self) -> None:
        """Its memory is that of the slots it is in; nobody's, if it is in none."""
        ...


class Courier(Protocol):
    """What brings packed adapters to the device, beside the steps. Engine thread."""

    def send(self, prepared: Any) -> Parcel | None:
        """Take a place for it and begin. None if there is room by bytes, but others on their way
        are in between: try again after a step."""
        ...

    def pump(self) -> bool:
        """A bounded piece of work; returns at once. Whether there is more that can be done now:
        if not, whatever is still on its way comes without help."""
        ...


class Layout(Protocol):
    """What of a backend a plan of its memory must know. returns_pages: memory comes and goes by the
    page (`pages.Pages`); elsewhere cache and adapters lie in one allocation, `Backend.shared`, of
    which adapters can have `adapter_limit` bytes."""

    returns_pages: bool
    adapter_limit: float

    @property
    def packed(self) -> Pack:
        """What makes of an adapter what `Deltas.install` takes."""
        ...

    def graph_bytes(
        self,
        groups: Mapping[Group, int],
        head: Group,
        attention: Collection[AttentionSpec],
        *,
        norms: int,
        most: int,
        max_length: int,
        block_size: int,
    ) -> int:
        """A bound of what `Backend.graphs` take, beside what a step takes. groups: linears that
        adapters act on, and how many layers have each; head: the last one, which makes logits.
        norms: that adapters act on."""
        ...


class Backend(Layout, Protocol):
    """name: of the device, as `--device` calls it. device: where every tensor of a step is.
    fuses: what lies between a decoder layer's linears may be computed by `layer.py`. forks: a
    forked process can read the base's weights."""

    name: str
    device: torch.device
    forks: bool

    @property
    def fuses(self) -> bool: ...

    def dense(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> BaseLinear:
        """weight: [out, in] of any float dtype, in host memory or on the device."""
        ...

    def linear(self, held: BaseLinear) -> BaseLinear:
        """A quantized linear, as this backend computes it. Raises UnsupportedWeights."""
        ...

    def deltas(self, in_features: int, out_features: Sequence[int], dtype: torch.dtype) -> Deltas:
        """For one group of linears of the model."""
        ...

    @property
    def packed_norm(self) -> PackNorm:
        """What makes of an adapter what `norm_deltas` take."""
        ...

    def norm_deltas(self, hidden: int, dtype: torch.dtype) -> NormDeltas:
        """For one norm."""
        ...

    @property
    def packed_embedding(self) -> PackEmbedding:
        """What makes of an adapter what `embedding_deltas` take."""
        ...

    def embedding_deltas(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> EmbeddingDeltas:
        """For the token embedding."""
        ...

    @property
    def packed_prefix(self) -> PackPrefix:
        """What makes of an adapter what `gated_prefixes` take."""
        ...

    def gated_prefixes(self) -> GatedPrefixes:
        """For a model's attention."""
        ...

    def layer(self, parts: LayerParts) -> DecoderLayer | None:
        """A decoder layer in this backend's own launches. None if it has none for such parts."""
        ...

    def attention(self, spans: Sequence[Span], decodes: int, block_size: int) -> AttentionStep:
        """For one step. decodes: so many of the spans, the first ones, are one token each."""
        ...

    def shared(self, nbytes: int) -> SharedMemory | None:
        """Takes memory for the cache and for adapters; None where `returns_pages`."""
        ...

    def free_bytes(self) -> int:
        """Of the memory that cache and adapters are in."""
        ...

    def courier(self) -> Courier | None:
        """What brings adapters to their end of `shared`; None where they are served from where
        they were packed."""
        ...

    def make_ready(
        self,
        linears: Iterable[tuple[Any, Group | None]],
        attention: Iterable[AttentionSpec],
        layers: Iterable[tuple[DecoderLayer, int]],
        norms: Iterable[NormDeltas],
        dtype: torch.dtype,
        *,
        max_tokens: int,
        block_size: int,
        progress: Callable[[float, str], None],
    ) -> None:
        """Compile what a loaded model's steps need, and test it. linears: each group's base with
        its shape, None where no adapter may act on it. layers: those that this backend runs, each
        with the elements of a head that its positions turn. norms: of all RMS norms that adapters
        act on, those of layers too. max_tokens: of a step. progress: called
        with the share done (0 to 1) and what is done now. Raises KernelError."""
        ...

    def graphs(
        self,
        forward: Callable[[StepTensors], None],
        *,
        vocabulary: int,
        most: int,
        max_length: int,
        block_size: int,
        progress: Callable[[float, str], None],
    ) -> Graphs | None:
        """Captures decoding steps of up to `most` tokens, with room for sequences of `max_length`,
        so that they are launched at once: the cache and the courier's memory must be where they
        stay. forward: computes one, without looking at what adapters there are. None where steps
        are launched one kernel after the other, or this model's have to be, which is logged."""
        ...

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory of what nobody writes to any more, made beside the steps. From any
        thread."""
        ...

    def works(self) -> bool:
        """Whether it still computes, asked after something has failed; waits for the device. What
        breaks a GPU's context, as a kernel that reads where nothing is, breaks it for good."""
        ...

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins a copy to host memory, in the order of the steps. -> waits for it and for all
        before it, and returns it."""
        ...

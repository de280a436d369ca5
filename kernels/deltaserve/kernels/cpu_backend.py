"""CpuBackend: steps computed in host memory, with native code where there is some."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from typing import Any

import psutil
import torch
from torch import Tensor

from deltaserve.kernels import embedding, norm
from deltaserve.kernels.attention.cpu_step import CpuStep
from deltaserve.kernels.attention.step import AttentionSpec, AttentionStep, Span
from deltaserve.kernels.backend import Courier, Deltas, SharedMemory
from deltaserve.kernels.base import BaseLinear, DenseLinear
from deltaserve.kernels.captured import Graphs, StepTensors
from deltaserve.kernels.decoder import DecoderLayer, LayerParts
from deltaserve.kernels.embedding import EmbeddingDeltas
from deltaserve.kernels.gated_prefix import GatedPrefixes, PreparedPrefix
from deltaserve.kernels.linear import LinearDeltas, prepare
from deltaserve.kernels.native import library
from deltaserve.kernels.norm import NormDeltas
from deltaserve.kernels.table import Group


class CpuBackend:
    """See `Backend`."""

    name = "cpu"
    device = torch.device("cpu")
    forks = True
    returns_pages = True
    packed = staticmethod(prepare)
    packed_norm = staticmethod(norm.prepare)
    packed_embedding = staticmethod(embedding.prepare)
    packed_prefix = PreparedPrefix
    adapter_limit: float = inf

    @property
    def fuses(self) -> bool:
        return library() is not None

    def dense(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> BaseLinear:
        return DenseLinear(weight, bias, dtype)

    def linear(self, held: BaseLinear) -> BaseLinear:
        return held

    def deltas(self, in_features: int, out_features: Sequence[int], dtype: torch.dtype) -> Deltas:
        return LinearDeltas(in_features, out_features, dtype)

    def norm_deltas(self, hidden: int, dtype: torch.dtype) -> NormDeltas:
        return NormDeltas(hidden, dtype)

    def embedding_deltas(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> EmbeddingDeltas:
        return EmbeddingDeltas(vocabulary, hidden, dtype)

    def gated_prefixes(self) -> GatedPrefixes:
        return GatedPrefixes()

    def layer(self, parts: LayerParts) -> DecoderLayer | None:
        return None

    def attention(self, spans: Sequence[Span], decodes: int, block_size: int) -> AttentionStep:
        return CpuStep.of(spans, decodes, block_size)

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def shared(self, nbytes: int) -> SharedMemory | None:
        return None

    def courier(self) -> Courier | None:
        return None

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
        """Nothing is compiled here."""

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
        return None

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
        return 0

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor

    def works(self) -> bool:
        return True

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

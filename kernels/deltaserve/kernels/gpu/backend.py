"""TritonBackend: steps computed by the Triton kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from torch import Tensor

from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.step import AttentionSpec, AttentionStep, Span
from deltaserve.kernels.backend import Courier, Deltas, DeviceUnavailable
from deltaserve.kernels.base import BaseLinear
from deltaserve.kernels.captured import Graphs, StepTensors
from deltaserve.kernels.decoder import DecoderLayer, LayerParts
from deltaserve.kernels.gpu import device as gpu
from deltaserve.kernels.gpu import gated_prefix, prepared_embedding, prepared_norm
from deltaserve.kernels.gpu.arena import MOST, UNIT, Arena
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.capture import Capture, CudaCapture, NotCapturable
from deltaserve.kernels.gpu.convert import held_on_gpu
from deltaserve.kernels.gpu.decoding import DecodeGraphs, buckets
from deltaserve.kernels.gpu.delivery import DeviceCourier
from deltaserve.kernels.gpu.embedding import GpuEmbeddingDeltas
from deltaserve.kernels.gpu.gated_prefix import GpuGatedPrefixes
from deltaserve.kernels.gpu.graph_bytes import graph_bytes
from deltaserve.kernels.gpu.layer import GpuLayer
from deltaserve.kernels.gpu.layer_variants import spec_of_layer
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.norm_deltas import GpuNormDeltas
from deltaserve.kernels.gpu.norm_plans import NormPlans
from deltaserve.kernels.gpu.prepared import prepare
from deltaserve.kernels.gpu.ready import make_ready
from deltaserve.kernels.gpu.shared import SharedMemory
from deltaserve.kernels.gpu.stacks import Stacks
from deltaserve.kernels.gpu.staging import Staging
from deltaserve.kernels.gpu.streams import streams, to_host
from deltaserve.kernels.gpu.variants import spec_of
from deltaserve.kernels.gpu.workspace import Workspace
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.kernels.norm import NormDeltas
from deltaserve.kernels.table import Group

log = logging.getLogger(__name__)

OLDEST = 80
"""Compute capability from which on there is bfloat16 in matrix instructions."""


class TritonBackend:
    """device: the current GPU; in Triton's interpreter, host memory. For one model: its groups
    share an arena, the plans of a step and, as they run one after the other, a workspace. capture:
    None where nothing can be captured."""

    name = "cuda"
    fuses = False
    returns_pages = False
    packed = staticmethod(prepare)
    packed_norm = staticmethod(prepared_norm.prepare)
    packed_embedding = staticmethod(prepared_embedding.prepare)
    packed_prefix = staticmethod(gated_prefix.prepare)
    adapter_limit: float = MOST * UNIT

    def __init__(self) -> None:
        """Raises DeviceUnavailable for a GPU that is too old."""
        self.device = gpu.default_device()
        if gpu.arch(self.device) < OLDEST:
            raise DeviceUnavailable(
                f"cuda: {torch.cuda.get_device_name(self.device)} has compute capability "
                f"{gpu.arch(self.device) / 10}; the kernels need {OLDEST / 10} or more"
            )
        self.forks = self.device.type == "cpu"
        self.arena = Arena(self.device)
        self.workspace = Workspace(self.device)
        self._stacks = Stacks()
        self._embedding: GpuEmbeddingDeltas | None = None
        self._norms = NormPlans(self.arena)
        cuda = self.device.type == "cuda"
        self.capture: Capture | None = CudaCapture(self.device) if cuda else None

    def dense(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> BaseLinear:
        held = {"weight": weight.detach()}
        if bias is not None:
            held["bias"] = bias.detach()
        return GpuLinear(held, "dense", dtype, device=self.device, workspace=self.workspace)

    def linear(self, held: BaseLinear) -> BaseLinear:
        return held_on_gpu(held, self.device, self.workspace)

    def deltas(self, in_features: int, out_features: Sequence[int], dtype: torch.dtype) -> Deltas:
        made = GpuLinearDeltas(
            in_features, out_features, dtype, device=self.device, arena=self.arena,
            workspace=self.workspace, planner=self._stacks,
        )  # fmt: skip
        self._stacks.add(made)
        return made

    def norm_deltas(self, hidden: int, dtype: torch.dtype) -> NormDeltas:
        return GpuNormDeltas(
            hidden, dtype, self.device, plans=self._norms, workspace=self.workspace
        )

    def embedding_deltas(
        self, vocabulary: int, hidden: int, dtype: torch.dtype
    ) -> GpuEmbeddingDeltas:
        self._embedding = GpuEmbeddingDeltas(vocabulary, hidden, dtype, self.arena)
        return self._embedding

    def gated_prefixes(self) -> GpuGatedPrefixes:
        return GpuGatedPrefixes(self.arena)

    def layer(self, parts: LayerParts) -> DecoderLayer | None:
        return GpuLayer(parts, self.workspace) if GpuLayer.takes(parts) else None

    def attention(self, spans: Sequence[Span], decodes: int, block_size: int) -> AttentionStep:
        return GpuStep.of(spans, block_size, self.device)

    def shared(self, nbytes: int) -> SharedMemory:
        return SharedMemory(nbytes, self.arena)

    def free_bytes(self) -> int:
        if self.device.type == "cpu":
            return int(psutil.virtual_memory().available)
        torch.cuda.empty_cache()  # what loading and the self-test have used and given back
        return int(torch.cuda.mem_get_info(self.device)[0])

    def courier(self) -> Courier:
        thread = ThreadPoolExecutor(1, "deltaserve-staging", initializer=compute_alone)
        return DeviceCourier(self.arena, Staging(streams(self.device), submit=thread.submit))

    def make_ready(
        self,
        linears: Iterable[tuple[GpuLinear, Group | None]],
        attention: Iterable[AttentionSpec],
        layers: Iterable[tuple[DecoderLayer, int]],
        norms: Iterable[NormDeltas],
        dtype: torch.dtype,
        *,
        max_tokens: int,
        block_size: int,
        progress: Callable[[float, str], None],
    ) -> None:
        own, inside = set(), set()
        for layer, turned in layers:
            assert isinstance(layer, GpuLayer)
            own.add(spec_of_layer(layer, turned, block_size))
            parts = layer.parts
            inside |= {id(linear.base) for linear in parts.linears}
            inside |= {id(norm.deltas) for norm in (*parts.norms, *(parts.head_norms or ()))}
        alone = {deltas.hidden for deltas in norms if id(deltas) not in inside}
        specs = {spec_of(base, group) for base, group in linears if id(base) not in inside}
        embeddings = {self._embedding.hidden} if self._embedding is not None else set()
        make_ready(
            specs, set(attention), own, alone, embeddings, dtype, self.device, max_tokens,
            block_size, progress,
        )  # fmt: skip

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
        if self.capture is None:
            return None
        try:
            found = DecodeGraphs(
                forward,
                self.capture,
                self.workspace,
                vocabulary=vocabulary,
                most=most,
                max_length=max_length,
                block_size=block_size,
                norms=self._norms,
                embedding=self._embedding,
                progress=progress,
            )
        except NotCapturable as error:
            log.warning("steps are launched kernel by kernel: %s", error)
            return None
        log.info("decoding steps are captured; their tables take %d bytes", found.nbytes)
        return found

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
        if self.capture is None:
            return 0
        return graph_bytes(
            groups, head, attention, buckets(most), norms=norms, max_length=max_length,
            block_size=block_size, arch=gpu.arch(self.device),
        )  # fmt: skip

    def to_host(self, tensor: Tensor) -> Tensor:
        return to_host(tensor)

    def works(self) -> bool:
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                log.critical("the GPU: %s", error)
                return False
        return True

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        if x.device.type != "cuda":
            return x.cpu
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def arrived() -> Tensor:
            event.synchronize()
            return host

        return arrived

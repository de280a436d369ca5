"""The plan of a tier's memory: what there is, what is shared out, and what of it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from deltaserve.kernels.backend import Layout
from deltaserve.kernels.cpu_backend import CpuBackend
from deltaserve.kernels.table import Group
from deltaserve.server.config import AdapterConfig, ConfigError, EngineConfig
from deltaserve.server.engine.adapter_sizes import Groups, adapter_sizes
from deltaserve.server.engine.kv_pool import KVShape
from deltaserve.server.model.probe import LayerAttention

SHARE = 0.6
"""Of the memory that is free once the base is loaded and a step has what it computes with, unless
the operator gives a number. The rest is for adapters on their way in, and for everybody else."""


@dataclass(frozen=True, slots=True)
class Base:
    """What of a base decides about memory. weights: its bytes. norms: how many there are."""

    weights: int
    attention: tuple[LayerAttention, ...]
    groups: Groups
    norms: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    max_length: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Adapters of one kind on all linears. count: how many fit together beside a request of the
    greatest length. kv_tokens: room in the cache beside half of them."""

    kind: str
    nbytes: int
    count: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """In bytes, but for `blocks`, the cache's blocks at most, and max_length, in tokens.

    weights: of the base. free: beside them. step: what one step computes with, at most, and what
    captured steps keep. budget: cache blocks and adapters together. kv_most, kv_floor: blocks at
    most, and those that adapters never take: of a request of the greatest length. adapter_most:
    what they may take.
    """

    weights: int
    free: int
    step: int
    budget: int
    shape: KVShape
    blocks: int
    kv_most: int
    kv_floor: int
    adapter_most: int
    max_length: int
    fits: tuple[Fit, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens in the cache while no adapter is in memory."""
        return self.blocks * self.shape.block_size

    def kv_tokens_beside(self, adapter_bytes: int) -> int:
        """Tokens in the cache beside so many bytes of adapters."""
        blocks = self.shape.fitting(self.budget - adapter_bytes)
        return min(blocks, self.blocks) * self.shape.block_size


def plan_memory(
    base: Base,
    config: EngineConfig,
    adapters: AdapterConfig,
    free: int,
    *,
    backend: Layout | None = None,
) -> MemoryPlan:
    """free: bytes that are free once the base is loaded. backend: the CPU if it is not given.
    ConfigError for what cannot be."""
    backend = backend or CpuBackend()
    shape = KVShape.of(base.attention, config.block_size, base.dtype, by_page=backend.returns_pages)
    step = step_bytes(base, config) + graph_bytes(base, config, backend)
    longest = shape.blocks(base.max_length)
    useful = longest * config.max_sequences
    if config.kv_cache_bytes is not None:
        useful = max(1, min(useful, config.kv_cache_bytes // shape.block))
    floor = shape.bytes(min(longest, useful))
    budget, flag = _budget(config, adapters, shape.bytes(useful), max(0, free - step))
    if budget + step > free:
        raise ConfigError(
            f"{flag}: a step computes with up to {step} bytes beside it, and {free} are free; "
            f"leave it at {max(0, free - step)} or less"
        )
    if floor > budget:
        fits = shape.fitting(budget) * shape.block_size
        shorter = f"lower --max-length to {fits} or " if fits > 1 else ""
        raise ConfigError(
            f"{flag}: one request of the greatest length, {base.max_length} tokens, takes {floor} "
            f"bytes of keys and values; {shorter}give --memory {floor} or more"
        )
    most = [budget - floor, backend.adapter_limit]
    if adapters.bytes is not None:
        most.append(adapters.bytes)
    blocks = min(useful, shape.fitting(budget))
    plan = MemoryPlan(
        weights=base.weights,
        free=free,
        step=step,
        budget=budget,
        shape=shape,
        blocks=blocks,
        kv_most=shape.bytes(blocks),
        kv_floor=floor,
        adapter_most=int(min(most)),
        max_length=base.max_length,
    )
    return _with_fits(plan, adapter_sizes(base.groups, backend))


def _budget(config: EngineConfig, adapters: AdapterConfig, kv: int, free: int) -> tuple[int, str]:
    """-> bytes, and the flag that says so."""
    if config.memory is not None:
        return config.memory, f"--memory {config.memory}"
    if config.kv_cache_bytes is not None and adapters.bytes is not None:
        flags = f"--kv-cache-bytes {config.kv_cache_bytes} and --adapter-bytes {adapters.bytes}"
        return kv + adapters.bytes, flags
    budget = int(free * SHARE)
    return budget, f"--memory auto, which is {budget} here"


def _with_fits(plan: MemoryPlan, sizes: Mapping[str, int]) -> MemoryPlan:
    fits = []
    for kind, nbytes in sizes.items():
        count = plan.adapter_most // nbytes if nbytes else 0
        tokens = plan.kv_tokens_beside(nbytes * ((count + 1) // 2))
        fits.append(Fit(kind, nbytes, count, tokens))
    return replace(plan, fits=tuple(fits))


def step_bytes(base: Base, config: EngineConfig) -> int:
    """A bound of what one step takes beside weights and cache: the rows of the residual stream, the
    widest group of linears with its sum in float32, a prompt's mask, keys and values gathered for
    it, attention written out where SDPA cannot say it, and logits of every row with a copy."""
    rows, size = max(config.max_batch_tokens, config.max_sequences), base.dtype.itemsize
    widest = max((g.in_features + 2 * sum(g.out_features) for g, _ in base.groups), default=0)
    layers = 4 * rows * (4 * base.hidden + widest)
    attention = 0
    for la in base.attention:
        mask = rows * base.max_length
        gathered = 2 * base.max_length * la.kv_heads * (la.key_dim + la.value_dim) * size
        special = la.softcap is not None or la.has_sinks
        written = 3 * 4 * mask * la.q_heads if special else 0
        attention = max(attention, 5 * mask + gathered + written)
    return layers + attention + rows * base.vocabulary * (size + 8)


def graph_bytes(base: Base, config: EngineConfig, backend: Layout) -> int:
    """A bound of what captured decoding steps take; 0 where there are none."""
    if config.enforce_eager:
        return 0
    groups: Counter[Group] = Counter()
    for (group, _), count in base.groups.items():
        groups[group] += count
    return backend.graph_bytes(
        groups,
        Group(base.hidden, (base.vocabulary,), base.dtype),
        {la.spec for la in base.attention},
        norms=base.norms,
        most=config.most_decodes,
        max_length=base.max_length,
        block_size=config.block_size,
    )

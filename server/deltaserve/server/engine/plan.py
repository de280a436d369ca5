"""The plan of a tier's memory: what is shared out, and what adapters cannot take from the cache."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.server.config import AdapterConfig, ConfigError, EngineConfig
from deltaserve.server.engine.kv_pool import KVShape

SHARE = 0.6
"""Of the memory that is free once the base is loaded, unless the operator gives a number. The rest
is for what a step computes with and for adapters on their way in."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """In bytes, but for `blocks`, the cache's blocks at most.

    budget: cache blocks and adapters together. kv_most, kv_floor: blocks at most, and those that
    adapters never take: a sequence of the greatest length. adapter_cap: None for all but that.
    """

    budget: int
    blocks: int
    kv_most: int
    kv_floor: int
    adapter_cap: int | None


def plan_memory(
    shape: KVShape, config: EngineConfig, adapters: AdapterConfig, max_length: int, free: int
) -> MemoryPlan:
    """free: bytes that are free once the base is loaded. ConfigError for what cannot be."""
    longest = shape.blocks(max_length)
    useful = longest * config.max_sequences
    if config.kv_cache_bytes is not None:
        useful = max(1, min(useful, config.kv_cache_bytes // shape.block))
    floor = shape.bytes(min(longest, useful))
    budget = config.memory
    if budget is None:
        budget = int(free * SHARE)
        if config.kv_cache_bytes is not None and adapters.bytes is not None:
            budget = shape.bytes(useful) + adapters.bytes
    if budget > free:
        raise ConfigError(
            f"--memory {budget}: {free} bytes are free; give at most {int(free * SHARE)}"
        )
    if floor > budget:
        fits = (budget // (shape.extent * shape.block) * shape.extent - 1) * shape.block_size
        raise ConfigError(
            f"--memory {budget}: a request of the greatest length, {max_length} tokens, takes "
            f"{floor} bytes of keys and values; lower --max-length"
            + (f" to {fits}" if fits > 1 else "")
            + f" or give at least --memory {floor}"
        )
    blocks = min(useful, budget // (shape.extent * shape.block) * shape.extent - 1)
    return MemoryPlan(budget, blocks, shape.bytes(blocks), floor, adapters.bytes)

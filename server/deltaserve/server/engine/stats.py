"""What the engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.plan import MemoryPlan
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment.

    running, waiting: requests. running_adapters, waiting_adapters: names, sorted, without
    repetition. prefix_hits, prefix_queries: prompt tokens found and looked up in the prefix cache.
    kv_blocks_idle: used by no sequence, kept in case their content is wanted again; with memory
    now are kv_blocks_there, `kv_bytes` of it. memory_budget: bytes of blocks and adapters together.
    Counters (prefix_*, preemptions, steps, adapter_loads, adapter_evictions) run since the start.
    virtual_lag: seconds of service between the most and the least served tenant that waits.
    on_device: adapters are served from a device's memory, adapter_bytes_device of it; those of
    adapter_bytes_host are kept beside for when they are wanted again. Else host memory is the one.
    """

    running: int = 0
    waiting: int = 0
    virtual_lag: float = 0.0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_block_size: int = 0
    kv_blocks_idle: int = 0
    kv_blocks_there: int = 0
    kv_bytes: int = 0
    memory_budget: int = 0
    adapter_bytes_host: int = 0
    adapter_bytes_device: int = 0
    on_device: bool = False
    adapter_bytes_budget: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    prefix_hits: int = 0
    prefix_queries: int = 0
    preemptions: int = 0
    steps: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0

    @property
    def adapter_bytes(self) -> int:
        """Of the budget."""
        return self.adapter_bytes_device if self.on_device else self.adapter_bytes_host

    @property
    def memory_by_use(self) -> dict[str, int]:
        """Bytes of the budget: blocks that sequences use, blocks kept for later, blocks that are
        empty, adapters, and what is free."""
        per_block = self.kv_bytes / max(1, self.kv_blocks_there)
        used, idle = (int(n * per_block) for n in (self.kv_blocks_used, self.kv_blocks_idle))
        return {
            "kv_used": used,
            "kv_idle": idle,
            "kv_empty": self.kv_bytes - used - idle,
            "adapters": self.adapter_bytes,
            "free": self.memory_budget - self.kv_bytes - self.adapter_bytes,
        }


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is served; the same for the engine's whole life.

    base: the model's name, the first of its names; requests may call it by any of them. folder: of
    its checkpoint, as the server was told it. fingerprint, held_fingerprint: as in `BaseSpec`.
    quantization: ``none``, or e.g. ``int4-g64``. max_length: tokens that fit, prompt and answer
    together. formats: adapter formats that can be loaded.
    """

    base: str
    names: tuple[str, ...]
    folder: str
    architecture: str
    fingerprint: str
    held_fingerprint: str
    quantization: str
    dtype: str
    device: str
    max_length: int
    vocab_size: int
    memory: MemoryPlan
    eos_token_ids: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()


def engine_stats(
    scheduler: Scheduler, adapters: AdapterCache, inbox: int, steps: int
) -> EngineStats:
    """As it is now; from any thread. inbox: requests that the scheduler does not know yet."""
    s, blocks = scheduler, scheduler.blocks
    running, waiting = list(s.running), list(s.waiting)
    return EngineStats(
        running=len(running),
        waiting=len(waiting) + inbox,
        virtual_lag=s.virtual_lag,
        kv_blocks_total=blocks.total,
        kv_blocks_used=blocks.used,
        kv_block_size=blocks.block_size,
        kv_blocks_idle=blocks.idle,
        kv_blocks_there=blocks.there,
        kv_bytes=blocks.memory.ledger.kv,
        memory_budget=blocks.memory.ledger.budget,
        adapter_bytes_host=adapters.kept_bytes if adapters.on_device else adapters.used_bytes,
        adapter_bytes_device=adapters.used_bytes if adapters.on_device else 0,
        on_device=adapters.on_device,
        adapter_bytes_budget=adapters.budget,
        running_adapters=_names(running),
        waiting_adapters=_names(waiting),
        prefix_hits=blocks.hit_tokens,
        prefix_queries=blocks.query_tokens,
        preemptions=s.preemptions,
        steps=steps,
        adapter_loads=adapters.loads,
        adapter_evictions=adapters.evictions,
    )


def _names(sequences: list[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({a.name for s in sequences for a in s.held}))

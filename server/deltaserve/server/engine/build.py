"""From a Config to an engine: load the base, plan the memory, wire the parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal, cast

import torch

from deltaserve.adapters.formats.detect import NAMES
from deltaserve.kernels.backend import DeviceUnavailable, KernelError
from deltaserve.kernels.devices import open_backend
from deltaserve.server.config import AdapterConfig, Config, ConfigError, EngineConfig
from deltaserve.server.engine.adapter_cache import AdapterCache
from deltaserve.server.engine.backlog import Backlog
from deltaserve.server.engine.block_pool import BlockPool
from deltaserve.server.engine.cost import CostModel
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.host_tier import HostTier
from deltaserve.server.engine.kv_cache import BlockManager
from deltaserve.server.engine.kv_pool import KVPool
from deltaserve.server.engine.loader_process import Forked, Fresh, LoaderProcesses, Way
from deltaserve.server.engine.make import Make
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.engine.observer import NullObserver, Observer
from deltaserve.server.engine.own_text import OwnTexts
from deltaserve.server.engine.plan import Base, MemoryPlan, plan_memory
from deltaserve.server.engine.recipe import Recipe, locator, make_here
from deltaserve.server.engine.runner import ModelRunner
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.speculation import Speculator
from deltaserve.server.engine.stats import EngineInfo
from deltaserve.server.engine.text import Text
from deltaserve.server.model import BaseModel
from deltaserve.server.model import load as load_base
from deltaserve.server.model.fused_gpu import fused_layers
from deltaserve.server.model.loader import Quantize


def build_engine(
    config: Config,
    observer: Observer,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Engine, Text]:
    """Load the base and return an engine that is ready to be started. Slow."""
    m = config.model
    try:
        backend = open_backend(m.device)
    except DeviceUnavailable as error:
        raise ConfigError(f"--device {error}") from error
    if m.threads is not None:
        torch.set_num_threads(m.threads)
    model = load_base(
        m.base,
        dtype=getattr(torch, m.dtype),
        quantize=cast(Quantize, m.quantize),
        group_size=m.group_size,
        activations=cast(Literal["float", "int8"], m.activations),
        max_length=config.engine.max_length,
        allow_untested=m.allow_untested,
        progress=progress,
        backend=backend,
    )
    try:
        backend.make_ready(
            [
                (g.base, None if g.deltas is None else g.deltas.group)
                for g in model.modules.groups.values()
            ],
            {la.spec for la in model.attention},
            [(fused.layer, fused.turned) for fused in fused_layers(model.model)],
            [norm.deltas for norm in model.modules.norms.values() if norm.is_rms],
            model.dtype,
            max_tokens=max(config.engine.max_batch_tokens, config.engine.max_sequences),
            block_size=config.engine.block_size,
            progress=progress or (lambda share, what: None),
        )
    except KernelError as error:
        raise ConfigError(f"--device {m.device}: {error}") from error
    text = Text(m.base)
    engine = make_engine(
        model,
        config.engine,
        config.adapters,
        observer=observer,
        text=text,
        progress=progress,
        names=m.served_names,
    )
    return engine, text


def make_engine(
    model: BaseModel,
    config: EngineConfig,
    adapters: AdapterConfig,
    *,
    observer: Observer | None = None,
    text: Text | None = None,
    progress: Callable[[float, str], None] | None = None,
    names: tuple[str, ...] = (),
) -> Engine:
    """An engine over a loaded base, not started yet. text: None gives outputs without text.
    progress: of what is captured. names: what requests call the base; none for its folder."""
    backend = model.ctx.backend
    observer = observer if observer is not None else NullObserver()
    if config.max_length is not None:
        model.max_length = min(model.max_length, config.max_length)
    plan = plan_memory(base_of(model), config, adapters, backend.free_bytes(), backend=backend)
    ledger = Ledger(plan.budget, kv_floor=plan.kv_floor, adapter_cap=plan.adapter_most)
    pool = _pool(model, plan, ledger)
    manager = BlockManager(
        plan.blocks + 1, config.block_size, prefix_cache=config.prefix_cache, memory=pool.memory
    )
    courier = backend.courier()
    if courier is None and adapters.host_bytes:
        raise ConfigError(
            f"--host-adapter-bytes {adapters.host_bytes}: on --device {backend.name} adapters are "
            "in the host's memory already; leave it out, or give more --memory"
        )
    made: list[Engine] = []
    cache = AdapterCache(
        model,
        _make(adapters, model, plan.adapter_most),
        ledger=ledger,
        wake=lambda: made[0].wake(),
        observer=observer,
        loaders=adapters.loaders,
        courier=courier,
        host_tier=HostTier(adapters.host_bytes) if adapters.host_bytes else None,
    )
    if text is not None:
        cache.read_texts(OwnTexts(text, locator(adapters, plan.adapter_most), model.vocab_size))
    spec = model.spec
    names = names or (spec.name,)
    info = EngineInfo(
        base=names[0],
        names=names,
        folder=spec.name,
        architecture=str((spec.config.get("architectures") or ["unknown"])[0]),
        fingerprint=spec.fingerprint,
        held_fingerprint=spec.held_fingerprint,
        quantization=spec.quantization,
        dtype=str(model.dtype).removeprefix("torch."),
        device=backend.name,
        max_length=model.max_length,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(model.eos_token_ids),
        formats=NAMES,
        memory=plan,
    )
    cost = CostModel(model.nbytes)
    scheduler = Scheduler(
        manager,
        config.max_batch_tokens,
        config.max_sequences,
        cost=cost,
        inter_token_target=config.inter_token_target,
    )
    scheduler.speculator = Speculator(manager, cost, model.max_length, config.speculate)
    runner = ModelRunner(model, pool.store)
    if not config.enforce_eager:
        try:
            runner.capture(config.most_decodes, progress or (lambda share, what: None))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--memory {plan.budget}: it leaves no room to capture decoding steps; give less, "
                "lower --max-sequences, or launch steps kernel by kernel with --enforce-eager"
            ) from error
    made.append(
        Engine(
            model,
            runner,
            scheduler,
            cache,
            observer,
            info,
            tokenizer=text.backend if text is not None else None,
            backlog=Backlog(config.max_queue, config.max_queue_per_flow),
            max_wait=config.max_wait,
        )
    )
    return made[0]


def _pool(model: BaseModel, plan: MemoryPlan, ledger: Ledger) -> KVPool | BlockPool:
    backend, blocks = model.ctx.backend, plan.blocks + 1
    of = model.attention, blocks, plan.shape.block_size, model.dtype, ledger
    memory = backend.shared(plan.budget)
    return KVPool(*of) if memory is None else BlockPool(*of, memory)


def base_of(model: BaseModel) -> Base:
    """What the memory plan needs to know of it."""
    modules = model.spec.modules
    served = [g for g in model.modules.groups.values() if not g.logits]
    return Base(
        weights=model.nbytes,
        attention=model.attention,
        groups=Counter(
            (g.deltas.group, tuple(modules[name].has_bias for name in g.names))
            for g in served
            if g.deltas is not None
        ),
        norms=len(model.modules.norms),
        hidden=model.spec.hidden_size,
        vocabulary=model.vocab_size,
        dtype=model.dtype,
        max_length=model.max_length,
    )


def _make(config: AdapterConfig, model: BaseModel, budget: int) -> Make:
    here = make_here(config, model.spec, model, budget)
    if not config.loader_processes:
        return here
    way: Way = Forked(here)
    if not model.ctx.backend.forks:
        way = Fresh(Recipe.of(config, model.spec, model.packer, budget), model.spec)
    return LoaderProcesses(way, config.loader_cores, config.loader_nice)

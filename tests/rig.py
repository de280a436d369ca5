"""A running engine over a tiny base, for tests in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltaserve.kernels.backend import Backend
from deltaserve.server.config import AdapterConfig, EngineConfig
from deltaserve.server.engine.build import make_engine
from deltaserve.server.engine.core import AdapterRef, Request, SamplingParams
from deltaserve.server.engine.engine import Engine
from deltaserve.server.engine.text import Text
from deltaserve.server.model import BaseModel, load

_ids = itertools.count()


def load_base(
    folder: Path,
    *,
    dtype: str = "float32",
    quantize: str = "none",
    backend: Backend | None = None,
    activations: str = "float",
) -> BaseModel:
    return load(
        folder, dtype=getattr(torch, dtype), quantize=quantize, group_size=32, backend=backend,
        activations=activations,
    )  # fmt: skip


@contextmanager
def running(
    model: BaseModel,
    roots: Sequence[Path],
    *,
    adapter_bytes: int | None = None,
    text: bool = True,
    adapters: Mapping[str, Any] | None = None,
    **config: object,
) -> Iterator[Engine]:
    """Small steps on purpose: prompts are cut up, blocks are many. text: there is a tokenizer.
    adapters: more of its AdapterConfig."""
    given = {
        "max_batch_tokens": 24,
        "block_size": 8,
        "kv_cache_bytes": 8 << 20,
        "max_sequences": 64,
        **config,
    }
    engine = make_engine(
        model,
        EngineConfig(**given),  # type: ignore[arg-type]
        AdapterConfig(roots=tuple(roots), bytes=adapter_bytes, **(adapters or {})),
        text=Text(model.folder) if text else None,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown()


def request(
    prompt: Sequence[int],
    adapters: Sequence[tuple[str, float]] | str = (),
    **sampling: object,
) -> Request:
    """Greedy, 12 tokens, logprobs on, unless told otherwise."""
    if isinstance(adapters, str):
        adapters = [(adapters, 1.0)] if adapters else []
    given = {"max_tokens": 12, "ignore_eos": True, "logprobs": 0, **sampling}
    return Request(
        f"r{next(_ids)}",
        tuple(prompt),
        SamplingParams(**given),  # type: ignore[arg-type]
        tuple(AdapterRef(name, strength) for name, strength in adapters),
    )

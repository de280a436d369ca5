"""AttentionStep: where a step's tokens go and what they attend to, whatever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """`tokens` consecutive ones of one sequence. past: its tokens before them, all in the cache.
    blocks: at least those that hold its tokens up to and with these, in order."""

    past: int
    tokens: int
    blocks: Sequence[int]


class How:
    """What one layer's attention is like. window: a token sees itself and the window - 1 tokens
    before it. softcap: logits become ``softcap * tanh(logits / softcap)``. sinks: one more logit
    per head [heads], without a value."""

    __slots__ = ("scale", "sinks", "softcap", "special", "window")

    def __init__(
        self, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> None:
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.sinks = sinks
        self.special = softcap is not None or sinks is not None  # SDPA knows neither


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of some layers of a model, of which kernels are compiled. window, softcap: as
    `How` has them. sinks: whether there are any."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class AttentionStep(ABC):
    """Made once per step (`Backend.attention`), read by every layer. The step's rows are the tokens
    of its spans, one after the other.

    cells: int64 [T], the cache cell (block * block_size + offset) each token is written to. keys,
    values of its methods: a layer's cells, [cells, kv_heads, dim] in the compute dtype.
    """

    cells: Tensor

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        """key [1, kv_heads, T, key_dim] and value [1, kv_heads, T, value_dim] into the cache."""

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: How
    ) -> Tensor:
        """Every token attends to its sequence up to itself, whose keys and values are in the cache
        already. query [1, heads, T, key_dim]; key, value as `write` takes them. Returns
        [T, heads, value_dim]."""

"""Rotary embeddings whose frequencies follow the longest position of the batch.

There one request would change another's keys. Below the length that the model was first trained
for nothing changes, so they are served with their frequencies pinned: the original ones up to that
length, and for ``longrope`` the long ones everywhere if a longer limit is asked for.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltaserve.server.model.errors import UnsupportedModel

PINNED = "pinned"
FOLLOWING = frozenset({"dynamic", "longrope"})


def max_length(config: PreTrainedConfig, asked: int | None) -> int:
    """The most tokens of one request: what is asked for, within what the model can do."""
    text = config.get_text_config()
    limit = next(
        (
            int(v)
            for n in ("max_position_embeddings", "n_positions", "max_seq_len")
            if isinstance(v := getattr(text, n, None), int)
        ),
        None,
    )
    if limit is None:
        raise UnsupportedModel("config.json has no max_position_embeddings")
    default = limit
    if kinds := _kinds(text):
        default = min(limit, _original(text))
        if "dynamic" in kinds:
            limit = default
    if asked is not None and not 0 < asked <= limit:
        raise UnsupportedModel(f"max_length {asked}: the model takes 1 to {limit} tokens")
    return default if asked is None else asked


def pin(model: nn.Module, config: PreTrainedConfig, length: int) -> None:
    """Makes the frequencies of every rotary embedding independent of the batch."""
    text = config.get_text_config()
    kinds = _kinds(text)
    if not kinds:
        return
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and FOLLOWING & set(kind.values()):
            raise UnsupportedModel(f"rope types {kind}: per layer and following the length")
        if kind not in FOLLOWING:
            continue
        if kind == "longrope" and length > _original(text):
            init = ROPE_INIT_FUNCTIONS["longrope"]
            device = module.inv_freq.device
            frequencies, _ = init(text, device, seq_len=_original(text) + 1)
            module.inv_freq = frequencies
        module.rope_type = PINNED  # type: ignore[assignment]


def _kinds(text: Any) -> set[str]:
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope] if "rope_type" in rope else list(rope.values())
    return {r["rope_type"] for r in each if isinstance(r, dict) and "rope_type" in r} & FOLLOWING


def _original(text: Any) -> int:
    rope = getattr(text, "rope_parameters", None) or {}
    found = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    return int(found)

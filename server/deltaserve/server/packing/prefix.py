"""Virtual tokens of an adapter, checked against the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.kernels.primitives import AnyPrefix, GatedPrefix, PromptEmbeddings


@dataclass(frozen=True, slots=True)
class Layer:
    """Keys and values that an attention layer keeps of a token."""

    layer_idx: int
    kv_heads: int
    key_dim: int
    value_dim: int


def fit(
    prefix: AnyPrefix | None, layers: Sequence[Layer], hidden: int, dtype: torch.dtype
) -> AnyPrefix | None:
    """The prefix in the dtype it is served in. Raises InvalidAdapter if its shapes are not the
    base's."""
    if prefix is None:
        return None
    if isinstance(prefix, PromptEmbeddings):
        found = tuple(prefix.embeddings.shape)
        if len(found) != 2 or found[1] != hidden:
            raise InvalidAdapter(f"prompt embeddings have shape {found}, must be [n, {hidden}]")
        return PromptEmbeddings(prefix.embeddings.to(dtype).contiguous())
    if len(prefix.keys) != len(layers) or len(prefix.values) != len(layers):
        raise InvalidAdapter(
            f"the prefix has keys for {len(prefix.keys)} and values for {len(prefix.values)} "
            f"layers, the base has {len(layers)}"
        )
    for layer, key, value in zip(layers, prefix.keys, prefix.values, strict=True):
        n = (key if isinstance(prefix, GatedPrefix) else prefix.keys[0]).shape[0]
        for what, tensor, dim in (("keys", key, layer.key_dim), ("values", value, layer.value_dim)):
            want = (n, layer.kv_heads, dim)
            if tuple(tensor.shape) != want:
                raise InvalidAdapter(
                    f"the prefix's {what} of layer {layer.layer_idx} have shape "
                    f"{tuple(tensor.shape)}, must be {want}"
                )
    return type(prefix)(
        keys=tuple(t.to(dtype).contiguous() for t in prefix.keys),
        values=tuple(t.to(dtype).contiguous() for t in prefix.values),
    )

"""Before a server is ready: its kernels compiled, and found to be right on its device."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from deltaserve.kernels.attention import variants as attention_variants
from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.gpu import selftest, selftest_embedding, selftest_layer
from deltaserve.kernels.gpu.config import BUCKETS
from deltaserve.kernels.gpu.device import arch as arch_of
from deltaserve.kernels.gpu.device import interpreted
from deltaserve.kernels.gpu.form import Form
from deltaserve.kernels.gpu.layer_variants import LayerSpec, of_layer, of_norm
from deltaserve.kernels.gpu.precompile import precompile
from deltaserve.kernels.gpu.selftest import self_test
from deltaserve.kernels.gpu.variant import Variant
from deltaserve.kernels.gpu.variants import GroupSpec, embedding_variant, of_group

COMPILING = 0.95
"""Share of the time that compiling takes where nothing is in the cache, for the progress."""


def make_ready(
    groups: Collection[GroupSpec],
    attention: Collection[AttentionSpec],
    layers: Collection[LayerSpec],
    norms: Collection[int],
    embeddings: Collection[int],
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    block_size: int,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> None:
    """Compiles what steps of up to `max_tokens` tokens launch, on all processors, as far as it is
    not in Triton's cache; then tests the kernels. groups, attention, layers: of the model, each
    kind once; groups: those that no layer has as its own. norms: sizes of those that no layer has;
    embeddings: of their rows. block_size: cells of a block. progress: called with the share done (0
    to 1) and what is done now. Raises KernelError.
    """
    if not interpreted():
        kinds = groups, attention, layers, norms, embeddings
        found = variants(*kinds, dtype, arch_of(device), max_tokens, block_size)

        def say(done: int, count: int, name: str) -> None:
            progress(COMPILING * done / count, f"compiling kernels: {done} of {count}")

        progress(0.0, "compiling kernels")
        precompile(found, arch_of(device), progress=say)
    progress(COMPILING, "testing kernels")
    self_test(
        dtype,
        device,
        _forms(groups, layers),
        sorted(attention, key=str),
        block_size,
        sorted(layers, key=repr),
        sorted(norms),
    )
    progress(1.0, "testing kernels")


def variants(
    groups: Collection[GroupSpec],
    attention: Collection[AttentionSpec],
    layers: Collection[LayerSpec],
    norms: Collection[int],
    embeddings: Collection[int],
    dtype: torch.dtype,
    arch: int,
    max_tokens: int,
    block_size: int,
) -> list[Variant]:
    """What serving launches, and the self-test before it."""
    forms = _forms(groups, layers)
    buckets = (*BUCKETS, *range(512, max_tokens + 256, 256))
    found = [v for spec in groups for v in of_group(spec, buckets, arch)]
    for spec in selftest.specs(forms, dtype):
        found += of_group(spec, selftest.BUCKETS, arch)
    for layer in layers:
        found += of_layer(layer, buckets, arch)
    for layer in selftest_layer.layer_specs(layers, dtype):
        found += of_layer(layer, selftest.BUCKETS, arch)
    for hidden in norms:
        found += of_norm(hidden, dtype)
    found += [embedding_variant(size, dtype) for size in {*embeddings, selftest_embedding.HIDDEN}]
    for kind in attention:
        found += attention_variants.variants(
            kind.heads,
            kind.kv_heads,
            kind.key_dim,
            kind.value_dim,
            block_size,
            dtype,
            windowed=(kind.window is not None,),
            softcap=kind.softcap is not None,
            sinks=dtype if kind.sinks else None,
        )
    return list({v.identity: v for v in found}.values())


def _forms(groups: Collection[GroupSpec], layers: Collection[LayerSpec]) -> list[Form]:
    every = [*groups, *(group for layer in layers for group in layer.groups)]
    return sorted({Form.of(spec) for spec in every})

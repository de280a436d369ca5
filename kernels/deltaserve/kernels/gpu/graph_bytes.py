"""What captured decoding steps take of the device's memory, before there are any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deltaserve.kernels.attention.launch import decode_splits
from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.gpu.config import aux_config
from deltaserve.kernels.gpu.embedding_tables import EmbeddingRoom
from deltaserve.kernels.gpu.graphs import default_limits, embedding_items, norm_vectors
from deltaserve.kernels.gpu.norm_tables import NormRoom
from deltaserve.kernels.gpu.step import ARRAYS, BY_LAYER
from deltaserve.kernels.table import Group

TILE = 128
"""Tokens of a tile at most, to whose multiples a step is padded, and columns of one."""
SMALLEST = 8
"""Columns of the smallest groups of a base."""

LEAST = 16
"""Tokens of a tile at least."""
PROCESSORS = 160
"""Of a GPU, at most."""
SLACK = 1.25
"""On what is between a graph's inputs and outputs, for the pieces that its allocator rounds to."""


def graph_bytes(
    groups: Mapping[Group, int],
    head: Group,
    attention: Iterable[AttentionSpec],
    buckets: Iterable[int],
    *,
    norms: int,
    max_length: int,
    block_size: int,
    arch: int,
) -> int:
    """A bound. groups: linears that take adapters, and how many layers have each; head: the last
    one, which makes logits; norms: of the model. What the driver keeps of a graph is not in it.
    Those for plain adapters take nothing else: they read the tables of those for any, and write
    where they do."""
    buckets, vocabulary = sorted(buckets), sum(head.out_features)
    largest, size = buckets[-1], head.dtype.itemsize
    shapes = {**groups, head: 1}
    static = workspace = 0
    kept: dict[str, int] = {}
    for tokens in reversed(buckets):
        steps = 4 * (6 * tokens + 2 + tokens * (2 + -(-max_length // block_size)) + 8)
        static += 2 * steps + sum(_tables(tokens, g, n) for g, n in shapes.items())
        static += 4 * (NormRoom(tokens, norm_vectors(tokens), norms).count + LEAST)
        static += 4 * (EmbeddingRoom(tokens, embedding_items(tokens)).count + LEAST)
        for group in shapes:
            for name, nbytes in _workspace(tokens, group, arch).items():
                if nbytes > kept.get(name, 0):  # the smaller one stays, for graphs that have it
                    kept[name] = nbytes
                    workspace += nbytes
    results = largest * (4 * vocabulary + 3 * 8)
    widest = max(g.in_features + 2 * sum(g.out_features) for g in shapes)
    hidden = head.in_features
    between = 4 * largest * (4 * hidden + widest) + largest * vocabulary * (size + 8)
    split = max((a.heads * (a.value_dim + 2) for a in attention), default=0)
    between += 4 * split * max(n * _splits(n, max_length) for n in buckets)
    return static + workspace + results + int(SLACK * between)


def _splits(tokens: int, max_length: int) -> int:
    """Pieces that attention cuts a sequence into, at most."""
    return decode_splits(tokens, max_length, LEAST, PROCESSORS).programs


def _tables(tokens: int, group: Group, layers: int) -> int:
    """Of `StepPlan`, for so many layers."""
    limits = default_limits(tokens, sum(group.out_features))
    padded, parts = _padded(tokens), len(group.out_features)
    bounds = max(2 * parts * (padded // LEAST) + 1, parts * padded)
    count = 8
    for name in ARRAYS:
        count += (limits.of(name, bounds) + 4) * (layers if name in BY_LAYER else 1)
    return 4 * count


def _workspace(tokens: int, group: Group, arch: int) -> dict[str, int]:
    """Of `Workspace`, by the names of its buffers."""
    limits = default_limits(tokens, sum(group.out_features))
    padded, width, size = _padded(tokens), group.in_features, group.dtype.itemsize
    # groups of the base, attention and the gated product leave sums over as few columns as this
    sums = 4 * padded * -(-width // SMALLEST)
    return {
        "h": 4 * aux_config(tokens, width, arch).h_split * limits.width * padded,
        "planes": 4 * limits.planes * padded * sum(group.out_features),
        "sums": sums,
        "given": sums,
        "scaled": padded * width * size,
        "turned": padded * width * size,
        "whole": padded * (-(-width // TILE) * TILE),
        "scales": 4 * padded,
        "normed": padded * width * size,
        "biases": 4 * padded * -(-width // TILE),
        "others": 1 << 16,
    }


def _padded(tokens: int) -> int:
    return -(-tokens // TILE) * TILE if tokens > 64 else -(-tokens // 64) * 64

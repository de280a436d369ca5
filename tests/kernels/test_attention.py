"""Paged attention of decoding sequences against the float64 reference."""

import pytest
import torch

from deltaserve.kernels.attention import cpu, reference
from deltaserve.kernels.native import library

needs_native = pytest.mark.skipif(library() is None, reason="no C compiler")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(12, 12, 64, 64), (8, 2, 16, 16), (4, 4, 24, 40), (6, 3, 100, 130), (32, 8, 128, 128)],
)
@pytest.mark.parametrize("how", ["plain", "window", "softcap", "sinks", "all"])
def test_agrees_with_the_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, key_dim: int, value_dim: int, how: str
) -> None:
    generator = torch.Generator().manual_seed(heads + key_dim)
    block, blocks = 4, 60
    lengths = torch.tensor([1, 2, 7, 33, 64])
    width = 16
    order = torch.randperm(blocks - 1, generator=generator) + 1
    tables = torch.zeros(len(lengths), width, dtype=torch.int64)
    at = 0
    for i, length in enumerate(lengths.tolist()):
        used = -(-length // block)
        tables[i, :used] = order[at : at + used]
        at += used

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    keys, values = (
        random(blocks * block, kv_heads, key_dim),
        random(blocks * block, kv_heads, value_dim),
    )
    held = torch.zeros(blocks * block, dtype=torch.bool)
    for table, length in zip(tables, lengths.tolist(), strict=True):
        cells = torch.arange(length)
        held[table[cells // block] * block + cells % block] = True
    keys[~held] = values[~held] = float("nan")  # what is not the sequence's is never read
    query = random(len(lengths), heads, key_dim)
    options = {
        "window": 5 if how in ("window", "all") else None,
        "softcap": 3.0 if how in ("softcap", "all") else None,
        "sinks": random(heads) if how in ("sinks", "all") else None,
    }
    want = reference.paged_decode(
        query.double(),
        keys.double(),
        values.double(),
        tables,
        lengths,
        block,
        0.3,
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )
    transposed = query.transpose(0, 1)  # as the modeling code gives it
    got = cpu.paged_decode(transposed, keys, values, tables, lengths, block, 0.3, **options)
    assert got is not None
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert (got.double() - want).abs().max() <= tolerance * max(1.0, want.abs().max())


@needs_native
def test_large_logits_do_not_overflow() -> None:
    keys = torch.randn(64, 1, 16) * 100
    values = torch.randn(64, 1, 16)
    query = torch.randn(1, 1, 16) * 100
    tables, lengths = torch.arange(4)[None], torch.tensor([64])
    got = cpu.paged_decode(query, keys, values, tables, lengths, 16, 1.0)
    want = reference.paged_decode(
        query.double(), keys.double(), values.double(), tables, lengths, 16, 1.0
    )
    assert got is not None and (got - want).abs().max() < 1e-4

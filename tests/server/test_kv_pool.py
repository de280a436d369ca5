"""The cache's memory is really taken and given back, and reads as zeros when it comes anew."""

import psutil
import pytest
import torch

from deltaserve.kernels.pages import PAGE, Pages
from deltaserve.server.engine.kv_cache import BlockManager
from deltaserve.server.engine.kv_pool import KVPool, KVShape
from deltaserve.server.engine.memory import Ledger
from deltaserve.server.model.probe import LayerAttention

MIB = 1 << 20


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def layers(*shapes: tuple[int, int, int]) -> list[LayerAttention]:
    """(heads, key_dim, value_dim) of each."""
    return [
        LayerAttention(i, heads, heads, key, value, None, None, False, 1.0)
        for i, (heads, key, value) in enumerate(shapes)
    ]


def test_pages_take_memory_when_written_and_give_it_back() -> None:
    before = resident()
    pages = Pages(256 * MIB)
    tensor = pages.tensor(0, (64, MIB), torch.float32)
    assert resident() - before < 16 * MIB
    tensor[8:40] = 7.0
    assert 112 * MIB < resident() - before < 160 * MIB
    pages.drop(8 * 4 * MIB, 32 * 4 * MIB)
    assert resident() - before < 64 * MIB
    assert not tensor[8:32].any() and (tensor[32:40] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shapes", [[(2, 16, 16)] * 2, [(3, 24, 40)], [(8, 128, 128)], [(1, 96, 64), (4, 64, 64)]]
)
def test_an_extent_is_whole_pages_and_touches_no_other(
    shapes: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    found = layers(*shapes)
    shape = KVShape.of(found, 8, dtype)
    blocks = 3 * shape.extent + 1  # the last extent is not a whole one
    ledger = Ledger(shape.bytes(blocks))
    pool = KVPool(found, blocks, 8, dtype, ledger)
    assert pool.memory.extent_bytes == shape.extent * shape.block
    assert pool.memory.extent_bytes % PAGE == 0
    held = [*pool.store.keys.values(), *pool.store.values.values()]
    for tensor in held:
        tensor.fill_(1)
    cells = shape.extent * 8
    for extent in (1, 3):
        pool.memory.drop(extent)
    for tensor in held:
        zero = (tensor == 0).flatten(1).all(1)
        one = (tensor == 1).flatten(1).all(1)
        assert one[:cells].all() and one[2 * cells : 3 * cells].all()
        assert zero[cells : 2 * cells].all() and zero[3 * cells :].all()


def test_a_cache_that_shrinks_gives_its_memory_back() -> None:
    found = layers(*[(8, 64, 64)] * 4)
    ledger = Ledger(96 * MIB, kv_floor=4 * MIB)
    shape = KVShape.of(found, 16, torch.float32)
    blocks = 80 * MIB // shape.block
    pool = KVPool(found, blocks, 16, torch.float32, ledger)
    manager = BlockManager(blocks, 16, memory=pool.memory)
    before = resident()
    taken = [manager.take() for _ in range(manager.available)]
    for tensor in (*pool.store.keys.values(), *pool.store.values.values()):
        tensor.fill_(1)
    assert 72 * MIB < resident() - before < 100 * MIB
    manager.release(taken)
    for offer in ledger.idle_blocks():
        ledger.evict(offer)
    assert resident() - before < 16 * MIB and ledger.kv < MIB
    manager.check_integrity()
    again = [manager.take() for _ in range(20)]
    assert not pool.store.keys[2][again[-1] * 16 :][:16].any()

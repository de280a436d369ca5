"""Blocks are neither lost nor shared by mistake; prefixes are found only under their own key."""

import random

import pytest

from deltaserve.server.engine.kv_cache import BlockManager, OutOfBlocks, block_hash, chain_root


def test_takes_and_releases_every_block() -> None:
    manager = BlockManager(5, 4)
    blocks = [manager.take() for _ in range(4)]
    assert sorted(blocks) == [1, 2, 3, 4]  # block 0 pads tables and is never given away
    with pytest.raises(OutOfBlocks):
        manager.take()
    manager.release(blocks)
    assert manager.available == 4
    manager.check_integrity()


def published(manager: BlockManager, root: bytes, tokens: list[int]) -> list[int]:
    parent, blocks = root, []
    for i in range(len(tokens) // manager.block_size):
        part = tokens[i * manager.block_size : (i + 1) * manager.block_size]
        parent = block_hash(parent, part)
        blocks.append(manager.take())
        manager.publish(blocks[-1], parent)
    return blocks


def test_finds_the_longest_prefix_of_the_same_root() -> None:
    manager = BlockManager(10, 2)
    root = chain_root("base", "adapter a")
    blocks = published(manager, root, [1, 2, 3, 4, 5, 6])
    manager.release(blocks)
    found, hashes = manager.match(root, [1, 2, 3, 4, 9, 9, 9], 6)
    assert found == blocks[:2] and len(hashes) == 2
    assert manager.match(chain_root("base", "adapter b"), [1, 2, 3, 4], 4) == ([], [])
    assert manager.match(root, [1, 2, 3, 4], 3)[0] == blocks[:1]  # no more than the limit
    manager.release([*found, blocks[0]])
    manager.check_integrity()


def test_fields_of_the_root_cannot_run_into_each_other() -> None:
    assert chain_root("ab", "c") != chain_root("a", "bc")
    assert chain_root("ab") != chain_root("ab", "")


def test_evicts_the_end_of_the_least_recently_used_prefix_first() -> None:
    manager = BlockManager(4, 1)
    root = chain_root()
    manager.release(published(manager, root, [7, 8, 9]))
    manager.take()
    assert len(manager.match(root, [7, 8, 9], 3)[0]) == 2


def test_forgotten_blocks_are_not_found() -> None:
    manager = BlockManager(4, 1)
    root = chain_root()
    blocks = published(manager, root, [7, 8])
    manager.forget(blocks)
    assert manager.match(root, [7, 8], 2)[0] == []
    manager.release(blocks)
    manager.check_integrity()
    assert manager.available == 3


def test_keeps_its_books_under_random_use() -> None:
    rng = random.Random(0)
    manager = BlockManager(24, 2)
    held: list[list[int]] = []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            manager.release(held.pop(rng.randrange(len(held))))
        else:
            root = chain_root(str(rng.randrange(3)))
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            blocks, hashes = manager.match(root, tokens, len(tokens) - 1)
            parent = hashes[-1] if hashes else root
            try:
                for i in range(len(blocks), len(tokens) // 2):
                    blocks.append(manager.take())
                    parent = block_hash(parent, tokens[2 * i : 2 * i + 2])
                    manager.publish(blocks[-1], parent)
            except OutOfBlocks:
                manager.release(blocks)
                continue
            if rng.random() < 0.1:
                manager.forget(blocks)
            held.append(blocks)
        manager.check_integrity()
    for blocks in held:
        manager.release(blocks)
    assert manager.available == manager.total

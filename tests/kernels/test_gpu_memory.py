"""The arena that adapters lie in, and the blobs that are copied there."""

from __future__ import annotations

import random

import pytest
import torch

from deltaserve.kernels.gpu.arena import UNIT, Arena, OutOfArena
from deltaserve.kernels.gpu.blob import BlobWriter
from deltaserve.kernels.gpu.device import default_device


def content(arena: Arena, offset: int, size: int) -> torch.Tensor:
    start = offset * UNIT
    return arena.view(torch.uint8)[start : start + size].cpu()


def test_blobs_keep_their_content_whatever_comes_and_goes() -> None:
    arena = Arena(default_device(), 1 << 12)
    held: dict[int, torch.Tensor] = {}
    choice = random.Random(0)
    for _ in range(300):
        if held and choice.random() < 0.45:
            offset = choice.choice(list(held))
            arena.drop(offset)
            del held[offset]
        else:
            blob = torch.randint(0, 256, (choice.randint(1, 3000),), dtype=torch.uint8)
            offset = arena.put(blob)
            assert offset not in held and offset % 8 == 0
            held[offset] = blob
        for offset, blob in held.items():
            assert torch.equal(content(arena, offset, blob.numel()), blob)
    for offset in held:
        arena.drop(offset)
    assert arena.used == 0
    arena.grows = False
    arena.put(torch.zeros(arena.units * UNIT, dtype=torch.uint8))  # the free ranges joined up


def test_an_arena_that_may_not_grow() -> None:
    arena = Arena(default_device(), 1 << 12, grows=False)
    arena.put(torch.zeros(3000, dtype=torch.uint8))
    with pytest.raises(OutOfArena, match="2048 bytes do not fit in an arena of 4096 of which 3072"):
        arena.put(torch.zeros(2000, dtype=torch.uint8))
    arena.put(torch.zeros(1024, dtype=torch.uint8))


def test_a_blob_holds_a_tensor_once() -> None:
    writer = BlobWriter()
    a = torch.arange(10, dtype=torch.float32)
    first, second, again = writer.add(a), writer.add(a + 1), writer.add(a)
    assert (first, second, again) == (0, 8, 0)
    blob = writer.bytes()
    assert blob.numel() == 256
    assert torch.equal(blob[128:168].view(torch.float32), a + 1)
    assert BlobWriter().bytes().numel() == 0

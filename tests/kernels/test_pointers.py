"""Tables of pointers hold what was put, however slots come and go."""

from __future__ import annotations

import ctypes
import random

import numpy as np

from deltaserve.kernels.native.library import Table
from deltaserve.kernels.native.pointers import PointerTable

FIELDS = (("at", "u8"), ("column", "i8"), ("rank", "i4"), ("scale", "f4"), ("bf16", "i4"))


class Row(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_uint64),
        ("column", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int32),
    )


def seen(table: PointerTable) -> dict[int, list[tuple[float, ...]]]:
    """As native code reads it: the rows of the slots that have some."""
    held = Table.from_address(table.address)
    slots = held.slots
    starts = (ctypes.c_int32 * slots).from_address(held.first)
    counts = (ctypes.c_int32 * slots).from_address(held.count)
    most = max(s + n for s, n in zip(starts, counts, strict=True))
    every = (Row * most).from_address(held.items)
    return {
        slot: [
            tuple(getattr(row, name) for name, _ in FIELDS)
            for row in every[starts[slot] : starts[slot] + counts[slot]]
        ]
        for slot in range(slots)
        if counts[slot]
    }


def test_slots_hold_what_was_put_last() -> None:
    draws = random.Random()
    table, expected = PointerTable(FIELDS), dict[int, list[tuple[float, ...]]]()
    for _ in range(600):
        slot = draws.randrange(1, draws.choice((4, 12, 40)))
        rows = [
            (
                draws.getrandbits(64),
                draws.randrange(-(2**40), 2**40),
                draws.randrange(2**31),
                float(np.float32(draws.gauss(0, 3))),
                draws.random() < 0.5,
            )
            for _ in range(draws.choice((0, 0, 1, 2, 3, 7)))
        ]
        table.put(slot, rows)
        expected[slot] = rows
        assert seen(table) == {s: r for s, r in expected.items() if r}


def test_adapters_that_come_and_go_take_the_rows_of_those_before() -> None:
    table = PointerTable(FIELDS)
    for i in range(300):
        table.put(1 + i % 5, [(i, 0, 1, 1.0, 0)] * 2)
        table.put(1 + (i + 1) % 5, [])
        if i == 10:
            rows = Table.from_address(table.address).items
    assert Table.from_address(table.address).items == rows
    assert seen(table)[1 + 299 % 5][0][0] == 299

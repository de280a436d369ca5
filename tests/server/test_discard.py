"""Memory that adapters leave is given back in pieces, and all of it."""

from __future__ import annotations

import itertools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from serving import until

from deltaserve.kernels.primitives import PrefixKV
from deltaserve.server.engine import discard
from deltaserve.server.packing.prepared import PreparedAdapter


def test_the_lock_is_given_up_every_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (100, 3 << 18, 5, 1 << 19, 1 << 18, 7, 1 << 10)  # float32s
    keys, values = (tuple(torch.zeros(1, 1, n) for n in sizes) for _ in range(2))
    prepared = PreparedAdapter("d", {}, {}, None, PrefixKV(keys, values), None)
    left = [weakref.ref(t) for t in (*keys, *values)]
    alive = [sum(r().nbytes for r in left if r() is not None)]  # type: ignore[union-attr]
    largest = max(r().nbytes for r in left)  # type: ignore[union-attr]
    del keys, values
    go = threading.Event()

    def given_up(seconds: float) -> None:
        assert seconds == 0 and go.wait(30)
        alive.append(sum(r().nbytes for r in left if r() is not None))  # type: ignore[union-attr]

    monkeypatch.setattr(discard, "time", SimpleNamespace(sleep=given_up))
    thread = discard.Discard()
    thread(prepared)
    del prepared
    go.set()
    until(lambda: all(r() is None for r in left), "all of it is gone")
    thread.close()
    steps = [a - b for a, b in itertools.pairwise(alive)]
    assert len(steps) >= 6 and max(steps) < discard.BYTES + largest

"""Python's garbage collector, kept from making a step late."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled() -> Iterator[None]:
    """Once everything that lasts is there: what is alive now is not looked at again while this
    lasts. The objects of the libraries and the model alone take a full collection a few hundred
    milliseconds, under the interpreter's lock, and every few adapters loaded would bring one
    about."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

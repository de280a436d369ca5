"""From a path to an Adapter: open, detect, lower, check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import BaseSpec
from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.formats.detect import detect
from deltaserve.adapters.intern import intern
from deltaserve.adapters.lowering import Lowering
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.adapters.shape_check import check_modules, check_prefix

Known: TypeAlias = Callable[[int, Callable[[], str]], Adapter | None]
"""Bytes of the tensor files, and what gives their digest -> the adapter, if it is there lowered."""


def load(
    path: str | Path, base: BaseSpec, options: LoadOptions = DEFAULT, known: Known | None = None
) -> Adapter:
    """Read the adapter at ``path`` and lower it for ``base``; the files are closed afterwards.
    known: asked first.

    Raises `AdapterError` and its kin, never anything else for what a file holds. Slow (disk,
    hashing, at times linear algebra): not for the engine thread.
    """
    with Checkpoint.open(path) as checkpoint:
        form, config = detect(checkpoint, base)

        def digest() -> str:
            return checkpoint.digest({**config, **options.content()})

        if known is not None and (found := known(checkpoint.nbytes, digest)) is not None:
            return found
        work = Lowering(checkpoint, config, base, options)
        form.lower(work)
        work.note_errors()
        modules = work.result()
        check_modules(modules, base)
        if work.prefix is not None:
            check_prefix(work.prefix, base)
        modules, prefix = intern(modules, work.prefix)
        return Adapter(
            digest=digest(),
            format=form.name,
            modules=modules,
            prefix=prefix,
            invocation=work.invocation,
            source_bytes=checkpoint.nbytes,
            base_fingerprint=work.base_fingerprint,
            notes=tuple(work.notes),
        )

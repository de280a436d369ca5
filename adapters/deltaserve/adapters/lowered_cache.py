"""LoweredCache: lowered adapters on disk, so that what was slow to lower is lowered once.

An entry is a folder in the delta format with `ENTRY` beside it, which says what the adapter is and
by which digests the entry is known to be whole. It is named after the adapter's digest, what it was
lowered for and how. Only what comes back from it exactly is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.base import BaseSpec
from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.delta_file import write_delta
from deltaserve.adapters.errors import AdapterError
from deltaserve.adapters.load import load
from deltaserve.adapters.options import LoadOptions
from deltaserve.kernels.primitives import AnyPrefix, Primitive

log = logging.getLogger(__name__)

ENTRY = "entry.json"
READ_BYTES = 300e6
"""Bytes of an entry that are read, hashed and checked in a second, carefully guessed."""
LEAST_SECONDS = 0.2
HALF_LIFE = 86400.0
"""Seconds without use after which an entry is worth half."""
ABANDONED = 3600.0
"""Seconds after which what was being written by a process that died is removed."""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    nbytes: int
    value: float


class LoweredCache:
    """For one base, in a folder that servers of this machine may share. limit: bytes of all
    entries. any_base: adapters are loaded with `LoadOptions.allow_base_mismatch`, whatever theirs
    say. Any thread and process; what goes wrong on disk is logged and is a miss."""

    def __init__(self, folder: Path, limit: int, base: BaseSpec, *, any_base: bool = False) -> None:
        self.folder, self.limit = folder, limit
        self._base = base
        self._any_base = any_base

    def find(self, digest: str, options: LoadOptions) -> Adapter | None:
        """The adapter of this digest as `load` gave it; its files are not looked at."""
        for path in self.folder.glob(f"{self._key(digest, options)}-*"):
            return self._read(path, digest)
        return None

    def find_unread(
        self, source_bytes: int, digest: Callable[[], str], options: LoadOptions
    ) -> Adapter | None:
        """The same for files whose digest is not known yet: it is asked for if there is an entry
        made from as many bytes."""
        if not any(self.folder.glob(f"*-{source_bytes}")):
            return None
        return self.find(digest(), options)

    def holds(self, adapter: Adapter, options: LoadOptions) -> bool:
        return (self.folder / self._name(adapter, options)).exists()

    def worthwhile(self, adapter: Adapter, seconds: float) -> bool:
        """Whether lowering it, which took so many seconds, costs more than reading an entry."""
        nbytes = adapter.nbytes
        slow = seconds > LEAST_SECONDS + 2 * nbytes / READ_BYTES
        return slow and nbytes <= self.limit and bool(self._base.held_fingerprint)

    def keep(self, adapter: Adapter, options: LoadOptions, seconds: float) -> bool:
        """Keep it if that is worthwhile. False if it is not, or it cannot be kept exactly."""
        name = self._name(adapter, options)
        if not self.worthwhile(adapter, seconds) or (self.folder / name).exists():
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        except OSError as error:
            log.warning("the adapter cache %s cannot be written: %s", self.folder, error)
            return False
        try:
            if not self._write(fresh / name, adapter, seconds):
                return False
            with self._locked():
                self._make_room(_size(fresh / name))
                os.rename(fresh / name, self.folder / name)
            return True
        except OSError as error:
            log.warning("adapter %s was not kept in %s: %s", adapter.digest[:16], fresh, error)
            return False
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _name(self, adapter: Adapter, options: LoadOptions) -> str:
        return f"{self._key(adapter.digest, options)}-{adapter.source_bytes}"

    def _key(self, digest: str, options: LoadOptions) -> str:
        """The digest covers what else in the options changes the content."""
        base = self._base
        any_base = self._any_base or options.allow_base_mismatch
        what = [digest, any_base, base.fingerprint, base.held_fingerprint]
        return hashlib.sha256(json.dumps([*what, _version()]).encode()).hexdigest()[:40]

    def _write(self, path: Path, adapter: Adapter, seconds: float) -> bool:
        try:
            write_delta(path, adapter.modules, kind="lowered", prefix=adapter.prefix)
            found = load(path, self._base)
        except (AdapterError, ValueError) as error:  # the format cannot hold it
            log.info("adapter %s is not kept on disk: %s", adapter.digest[:16], error)
            return False
        order = {name: [type(p).__name__ for p in ps] for name, ps in adapter.modules.items()}
        modules = _ordered(found.modules, order)
        if modules is None or not _same(adapter, modules, found.prefix):
            log.info("adapter %s is not kept on disk: it is not exact there", adapter.digest[:16])
            return False
        entry = {
            "digest": adapter.digest,
            "content": _content(path),
            "format": adapter.format,
            "order": order,
            "invocation": list(adapter.invocation),
            "source_bytes": adapter.source_bytes,
            "base_fingerprint": adapter.base_fingerprint,
            "notes": list(adapter.notes),
            "seconds": round(seconds, 3),
        }
        text = json.dumps({**entry, "check": _check(entry)})
        (path / ENTRY).write_text(text)
        return True

    def _read(self, path: Path, digest: str) -> Adapter | None:
        try:
            entry = json.loads((path / ENTRY).read_text())
            whole = entry.pop("check") == _check(entry) and entry["digest"] == digest
            if not whole or _content(path) != entry["content"]:
                raise ValueError("it is damaged")
            found = load(path, self._base)
            modules = _ordered(found.modules, entry["order"])
            if modules is None:
                raise ValueError("it holds other modules")
            os.utime(path / ENTRY)
        except (AdapterError, OSError, ValueError, KeyError, AttributeError) as error:
            if not path.exists():
                return None  # it has just been evicted
            log.warning("%s is dropped from the adapter cache: %s", path, error)
            self._drop(path)
            return None
        return replace(
            found,
            digest=digest,
            format=entry["format"],
            modules=modules,
            invocation=tuple(entry["invocation"]),
            source_bytes=entry["source_bytes"],
            base_fingerprint=entry["base_fingerprint"],
            notes=tuple(entry["notes"]),
        )

    def _make_room(self, need: int) -> None:
        """Drop the entries that save the fewest seconds for their bytes, long unused ones first."""
        now, entries = time.time(), []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError, ValueError, KeyError):
                age = now - path.stat().st_mtime
                if path.name.startswith(".new-"):
                    if age > ABANDONED:
                        shutil.rmtree(path, ignore_errors=True)
                elif path.is_dir():
                    entries.append(self._entry(path, now))
        used = sum(e.nbytes for e in entries)
        for entry in sorted(entries, key=lambda e: e.value):
            if used + need <= self.limit:
                return
            self._drop(entry.path)
            used -= entry.nbytes

    def _entry(self, path: Path, now: float) -> _Entry:
        nbytes = _size(path)
        seconds = float(json.loads((path / ENTRY).read_text())["seconds"])
        age = max(0.0, now - (path / ENTRY).stat().st_mtime)
        return _Entry(path, nbytes, seconds / max(1, nbytes) * 0.5 ** (age / HALF_LIFE))

    def _drop(self, path: Path) -> None:
        """Gone at once for who looks for it, then for good."""
        with contextlib.suppress(OSError):
            away = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            os.rename(path, away / path.name)
            shutil.rmtree(away, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, of all processes."""
        import fcntl  # not on every system

        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _version() -> str:
    """Of what lowers: another may do it otherwise."""
    try:
        return version("deltaserve")
    except PackageNotFoundError:
        return ""


def _content(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.digest(json.loads((path / "delta_config.json").read_text()))


def _check(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _ordered(
    modules: Mapping[str, tuple[Primitive, ...]], order: Mapping[str, list[str]]
) -> Mapping[str, tuple[Primitive, ...]] | None:
    """In the order of classes in each module, and of modules, that the adapter had."""
    if modules.keys() != order.keys():
        return None
    found = {}
    for name, classes in order.items():
        by_class = {type(p).__name__: p for p in modules[name]}
        if sorted(by_class) != sorted(classes):
            return None
        found[name] = tuple(by_class[c] for c in classes)
    return found


def _same(
    adapter: Adapter, modules: Mapping[str, tuple[Primitive, ...]], prefix: AnyPrefix | None
) -> bool:
    """Field by field, bit by bit."""
    pairs: list[tuple[Any, Any]] = [(adapter.prefix, prefix)]
    for name, group in adapter.modules.items():
        pairs += zip(group, modules[name], strict=True)
    return all(
        type(a) is type(b)
        and (a is None or all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)))
        for a, b in pairs
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)

"""Checkpoint: the tensor and config files of one adapter, read lazily and checked as read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.adapters.errors import (
    AdapterNotFound,
    InvalidAdapter,
    MalformedAdapter,
    SourceForbidden,
)
from deltaserve.adapters.finite import finite
from deltaserve.adapters.json_file import read_object
from deltaserve.adapters.marks import read_as
from deltaserve.adapters.plain_file import open_plain
from deltaserve.adapters.safetensors_header import DTYPES, MAX_TENSORS, TensorEntry, read_header

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_SHARDS = 256
INDEX_SUFFIX = ".safetensors.index.json"
TENSOR_FILES = ("delta_model", "adapter_model", "model", "diff")
"""Stems of the safetensors file looked for in a folder, first found wins."""


class Checkpoint:
    """Tensors by name from one safetensors file or from the shards of an index.

    The files stay open as long as the ``with`` of `open` lasts, so what was checked is what is
    read, even if a path is replaced meanwhile. `tensor` copies, so nothing it returns depends on
    the file.
    """

    def __init__(
        self, path: Path, fds: Mapping[str, int], dtypes: Mapping[str, torch.dtype] = DTYPES
    ) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, Any] = {}
        self._fds = dict(fds)
        self._owner: dict[str, int] = {}
        self._hashes: dict[str, bytes] = {}
        for name, fd in self._fds.items():
            entries, metadata = read_header(fd, name, dtypes)
            twice = entries.keys() & self.entries.keys()
            if twice:
                raise MalformedAdapter(f"{name}: tensor {min(twice)!r} is in another shard too")
            self.entries.update(entries)
            if len(self.entries) > MAX_TENSORS:
                raise MalformedAdapter(f"{path}: more than {MAX_TENSORS} tensors in its shards")
            self.metadata.update(metadata)
            self._owner.update(dict.fromkeys(entries, fd))

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[Checkpoint]:
        """The checkpoint at ``path``, a safetensors file or a folder that holds one."""
        with open_files(Path(path)) as fds:
            yield cls(Path(path), fds)

    @property
    def nbytes(self) -> int:
        """Size of the tensor files."""
        return sum(os.fstat(fd).st_size for fd in self._fds.values())

    def tensor(self, name: str) -> Tensor:
        """A fresh copy of one tensor, which knows its digest (`marks`); `InvalidAdapter` if a float
        in it is not finite."""
        entry = self.entries[name]
        value = self._read(name).view(entry.dtype).reshape(entry.shape)
        if value.is_floating_point() and not finite(value):
            raise InvalidAdapter(
                f"{self.path}: tensor {name!r} holds values that are not finite", field=name
            )
        read_as(value, self._hashes[name])
        return value

    def digest(self, config: Mapping[str, Any]) -> str:
        """sha256 (hex) over the config and every tensor's name, dtype, shape and bytes."""
        total = hashlib.sha256(_canonical(dict(config)))
        for name in sorted(self.entries):
            entry = self.entries[name]
            if name not in self._hashes:
                self._read(name)
            total.update(_canonical([name, str(entry.dtype), list(entry.shape)]))
            total.update(self._hashes[name])
        return total.hexdigest()

    def _read(self, name: str) -> Tensor:
        """Its bytes, uint8. The pages are first touched while reading, which leaves other threads
        their turn; a buffer that Python fills with zeros would not."""
        entry = self.entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        while done < entry.nbytes:
            count = os.preadv(self._owner[name], [view[done:]], entry.offset + done)
            if count == 0:
                raise MalformedAdapter(f"{self.path}: truncated while being read")
            done += count
        found = hashlib.sha256(view).digest()
        if self._hashes.setdefault(name, found) != found:
            raise MalformedAdapter(f"{self.path}: tensor {name!r} changed while being read")
        return data


@contextmanager
def open_files(path: Path, stems: Sequence[str] = TENSOR_FILES) -> Iterator[dict[str, int]]:
    """File name -> descriptor, open for reading, of the safetensors files at ``path``; in a
    folder those of the first of ``stems`` that is there."""
    fds: dict[str, int] = {}
    try:
        for file in _tensor_files(path, stems):
            fds[str(file)] = open_plain(file)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def _tensor_files(path: Path, stems: Sequence[str]) -> list[Path]:
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_refusal(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _shards(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AdapterNotFound(f"{path}: no such file or folder")
    for stem in stems:
        if (file := path / f"{stem}.safetensors").exists():
            return [file]
        if (index := path / f"{stem}{INDEX_SUFFIX}").exists():
            return _shards(index)
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_refusal(file)
    wanted = ", ".join(f"{stem}.safetensors" for stem in stems)
    raise AdapterNotFound(f"{path}: holds none of {wanted}")


def _shards(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise MalformedAdapter(f"{index}: weight_map must map tensor names to file names")
    files = []
    if len(set(names.values())) > MAX_SHARDS:
        raise MalformedAdapter(f"{index}: more than {MAX_SHARDS} shards")
    for name in sorted(set(names.values())):
        file = index.parent / name
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise SourceForbidden(f"{index}: shard {name[:200]!r} is not a plain file name")
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_refusal(file)
        if not file.exists():
            raise AdapterNotFound(f"{index}: shard {name!r} is missing")
        files.append(file)
    return files


def _pickle_refusal(file: Path) -> MalformedAdapter:
    return MalformedAdapter(
        f"{file}: a pickle file can run code when read; store it as safetensors", field=file.name
    )

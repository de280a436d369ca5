"""Digests of a base checkpoint's tensors, by which an adapter says what base it was made for."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.adapters.checkpoint import open_files
from deltaserve.adapters.safetensors_header import BASE_DTYPES, TensorEntry, read_header

CHUNK = 8 << 20
THREADS = 4


def tensor_digests(folder: str | Path) -> dict[str, str]:
    """Tensor name -> blake2b-128 (hex) over its dtype, shape and bytes, for every tensor of a
    safetensors file or folder. Memory stays bounded: the bytes are hashed out of the file map."""
    digests: dict[str, str] = {}
    with open_files(Path(folder), ("model",)) as fds, ThreadPoolExecutor(THREADS) as pool:
        for name, fd in fds.items():
            entries, _ = read_header(fd, name, BASE_DTYPES)
            if not entries:
                continue
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data:
                jobs = {k: pool.submit(_digest, data, entry) for k, entry in entries.items()}
                digests.update({k: job.result() for k, job in jobs.items()})
    return digests


def tensor_digest(value: Tensor) -> str:
    """What `tensor_digests` gives for a tensor of this dtype, shape and content."""
    found = _start(value.dtype, value.shape)
    found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _start(dtype: torch.dtype, shape: Sequence[int]) -> hashlib.blake2b:
    what = json.dumps([str(dtype).removeprefix("torch."), list(shape)]).encode()
    return hashlib.blake2b(what, digest_size=16)


def _digest(data: mmap.mmap, entry: TensorEntry) -> str:
    found = _start(entry.dtype, entry.shape)
    with memoryview(data) as view:
        for start in range(entry.offset, entry.offset + entry.nbytes, CHUNK):
            end = min(start + CHUNK, entry.offset + entry.nbytes)
            found.update(view[start:end])
    return found.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """One blake2b-128 (hex) over the sorted (name, digest) pairs; names in one checkpoint are
    unique, so the order of shards does not matter."""
    text = json.dumps(sorted(digests.items()), separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()

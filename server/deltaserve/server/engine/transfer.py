"""Objects that hold tensors, from one process of this machine to another.

The pickle holds places instead of tensors; their bytes lie in a file in memory (memfd), one storage
after the other, so that they can be read straight to where they stay. A tensor whose content is
alive in the receiving process already is that one there (`kernels.content`).
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaserve.adapters.marks import content_digest
from deltaserve.kernels.base import onednn
from deltaserve.kernels.content import canonical, living

HEAD = struct.Struct("<QQ")
"""Bytes of the pickled places, and of the pickled object."""
PIECES = 512
"""Buffers of one call of preadv or pwritev; systems take 1024."""


class Place(NamedTuple):
    """One tensor; a tuple, as hundreds of them are unpickled under the interpreter's lock. storage:
    its number, -1 for one without content (on the meta device). packed: it is to be packed by
    oneDNN. content: what `canonical` calls it, if it can be shared."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    packed: bool = False
    content: str = ""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.places: list[Place] = []
        self.storages: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._storage_numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # their ids are not to be given to others

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._kept.append(obj)
            self._numbers[id(obj)] = len(self.places)
            self.places.append(self._place(obj))
        return self._numbers[id(obj)]

    def _place(self, tensor: Tensor) -> Place:
        packed = tensor.is_mkldnn
        dense = onednn.unpack(tensor).detach()
        shape, stride = tuple(dense.shape), tuple(dense.stride())
        if dense.is_meta:
            return Place(-1, dense.dtype, shape, stride, 0)
        storage = dense.untyped_storage()
        whole = dense.is_contiguous() and storage.nbytes() == dense.numel() * dense.element_size()
        key = storage.data_ptr()
        if key not in self._storage_numbers or not storage.nbytes():
            self._storage_numbers[key] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8).set_(storage))
        return Place(
            self._storage_numbers[key],
            dense.dtype,
            shape,
            stride,
            int(dense.storage_offset()),
            packed,
            content_digest(dense) if whole and not packed else "",
        )


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        found: Tensor = self._tensors[pid]
        return found


def send(connection: socket.socket, value: Any) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    sizes = [s.numel() for s in pickler.storages]
    places = pickle.dumps((pickler.places, sizes), protocol=5)
    head = HEAD.pack(len(places), file.tell())
    if sum(sizes):
        fd = os.memfd_create("deltaserve-adapter", os.MFD_CLOEXEC)
        try:
            _move(os.pwritev, fd, pickler.storages)
            socket.send_fds(connection, [head], [fd])
        finally:
            os.close(fd)
    else:
        connection.sendall(head)
    connection.sendall(places)
    connection.sendall(file.getbuffer())


def receive(connection: socket.socket) -> Any:
    """EOFError if the other end is closed."""
    head, fds, _, _ = socket.recv_fds(connection, HEAD.size, 1)
    try:
        if not head:
            raise EOFError
        head += _exactly(connection, HEAD.size - len(head))
        sizes = HEAD.unpack(head)
        places, storages = pickle.loads(_exactly(connection, sizes[0]))
        found = _tensors(places, storages, fds[0] if fds else -1)
        return _Unpickler(io.BytesIO(_exactly(connection, sizes[1])), found).load()
    finally:
        for fd in fds:
            os.close(fd)


def _tensors(places: Sequence[Place], sizes: Sequence[int], fd: int) -> list[Tensor]:
    known = {i: living(p.content) for i, p in enumerate(places) if p.content}
    used = {p.storage for i, p in enumerate(places) if known.get(i) is None}
    storages = [torch.empty(n if i in used else 0, dtype=torch.uint8) for i, n in enumerate(sizes)]
    at = 0
    start, run = 0, list[Tensor]()
    for i, size in enumerate(sizes):  # neighbours are read by one call
        if i in used:
            start = start if run else at
            run.append(storages[i])
        elif run:
            _move(os.preadv, fd, run, start)
            run = []
        at += size
    if run:
        _move(os.preadv, fd, run, start)
    return [_tensor(place, known.get(i), storages) for i, place in enumerate(places)]


def _tensor(place: Place, known: Tensor | None, storages: Sequence[Tensor]) -> Tensor:
    if known is not None:
        return known
    if place.storage < 0:
        return torch.empty_strided(
            place.shape, place.stride, dtype=place.dtype, device=torch.device("meta")
        )
    made = torch.empty(0, dtype=place.dtype).set_(
        storages[place.storage].untyped_storage(), place.offset, place.shape, place.stride
    )
    if place.packed:
        return onednn.pack(made)
    return canonical(made, place.content) if place.content else made


def _move(call: Any, fd: int, tensors: Sequence[Tensor], at: int = 0) -> None:
    """Read or write all of them, one after the other."""
    views = [t.numpy().data for t in tensors if t.numel()]
    while views:
        count = call(fd, views[:PIECES], at)
        if not count:
            raise EOFError
        at += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data

"""Objects that hold tensors, from one process of this machine to another.

The pickle holds numbers instead of tensors; their bytes lie in a file in memory (memfd), those of
one dtype and shape side by side, so that one operation makes all of these, without the
interpreter's lock. A tensor whose content is alive in the receiving process already is that one
there (`kernels.content`).

What it takes the receiver is little: the tensors of an adapter are a few operations, and the
objects around them are made without a call of Python's own for each of their fields.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import accumulate
from types import MemberDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaserve.adapters.marks import content_digest
from deltaserve.kernels.base import onednn
from deltaserve.kernels.content import canonical, living

HEAD = struct.Struct("<QQ")
"""Bytes of the pickled layout, and of the pickled object."""
PIECES = 512
"""Buffers of one call of pwritev; systems take 1024."""
SCRATCH = 1 << 20
"""Bytes that are read at once before tensors are made of them; they stay in a processor's cache."""
READ = b"r"
"""Says that the file was read, so that its sender, which has the time, is the last to close it."""


class Stack(NamedTuple):
    """Contiguous tensors of one dtype and shape, each with a storage of its own. at: where the
    first begins in the file; the others follow. numbers, contents: of each, what the pickle and
    `canonical` call it."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    numbers: list[int]
    contents: list[str]


class Place(NamedTuple):
    """Any other tensor. storage: its number, -1 for one without content (on the meta device).
    packed: it is to be packed by oneDNN. content: what `canonical` calls it, empty if it is not to
    be shared."""

    number: int
    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    packed: bool
    content: str


class Layout(NamedTuple):
    """tensors: their number. storages: those of `places`: (where it begins in the file, bytes)."""

    tensors: int
    stacks: list[Stack]
    places: list[Place]
    storages: list[tuple[int, int]]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []  # held: their ids are not to be given to others
        self._numbers: dict[int | tuple[Any, ...], int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        # Two without content that look the same are the same.
        key = (obj.dtype, *obj.shape, *obj.stride()) if obj.is_meta else id(obj)
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[key]

    def reducer_override(self, obj: Any) -> Any:
        if not is_dataclass(obj) or isinstance(obj, type) or _setters(type(obj)) is None:
            return NotImplemented
        return _remake, (type(obj), *(getattr(obj, field.name) for field in fields(obj)))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        found: Tensor = self._tensors[pid]
        return found


@cache
def _setters(kind: type) -> tuple[Callable[[Any, Any], None], ...] | None:
    """What sets each field of a dataclass, frozen or not; None if not all of them have slots."""
    found = [getattr(kind, field.name, None) for field in fields(kind)]
    slots = [slot for slot in found if isinstance(slot, MemberDescriptorType)]
    return tuple(slot.__set__ for slot in slots) if len(slots) == len(found) else None


def _remake(kind: type, *values: Any) -> Any:
    """A third of the time of what dataclasses with slots do themselves."""
    made: Any = object.__new__(kind)
    for put, value in zip(_setters(kind) or (), values, strict=True):
        put(made, value)
    return made


def send(connection: socket.socket, value: Any, *, shared: bool = True) -> None:
    """Returns once the other end has the tensors; EOFError if it is closed before. shared: those of
    a content that is alive there are not made once more."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    layout, pieces = _lay_out(pickler.tensors, shared)
    first = pickle.dumps(layout, protocol=5)
    rest = b"".join((first, file.getbuffer()))
    head = HEAD.pack(len(first), len(rest) - len(first))
    if not pieces:
        connection.sendall(head + rest)
        return
    fd = os.memfd_create("deltaserve-adapter", os.MFD_CLOEXEC)
    try:
        _write(fd, pieces)
        socket.send_fds(connection, [head], [fd])
        connection.sendall(rest)
        _exactly(connection, len(READ))
    finally:
        os.close(fd)


def receive(connection: socket.socket) -> Any:
    """EOFError if the other end is closed."""
    head, fds, _, _ = socket.recv_fds(connection, HEAD.size, 1)
    try:
        if not head:
            raise EOFError
        head += _exactly(connection, HEAD.size - len(head))
        first, second = HEAD.unpack(head)
        layout: Layout = pickle.loads(_exactly(connection, first))
        pickled = _exactly(connection, second)
        found = _tensors(layout, fds[0] if fds else -1)
    finally:
        for fd in fds:
            os.close(fd)
    if fds:
        connection.sendall(READ)
    return _Unpickler(io.BytesIO(pickled), found).load()


def _lay_out(tensors: Sequence[Tensor], shared: bool) -> tuple[Layout, list[Tensor]]:
    """Where they are, and the bytes of the file, one piece after the other."""
    dense = [onednn.unpack(t).detach() for t in tensors]
    users: dict[int, list[int]] = {}
    for i, t in enumerate(dense):
        if not t.is_meta:
            users.setdefault(t.untyped_storage().data_ptr(), []).append(i)
    stacks: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
    others = list[int]()
    for i, t in enumerate(dense):
        alone = shared and not (t.is_meta or tensors[i].is_mkldnn) and _whole(t)
        if alone and len(users[t.untyped_storage().data_ptr()]) == 1:
            stacks.setdefault((t.dtype, tuple(t.shape)), []).append(i)
        else:
            others.append(i)
    # Wide ones first: each begins at a multiple of its items' size.
    ordered = sorted(stacks.items(), key=lambda stack: -stack[0][0].itemsize)
    pieces = [dense[i].view(-1).view(torch.uint8) for _, numbers in ordered for i in numbers]
    sizes = [len(numbers) * dense[numbers[0]].nbytes for _, numbers in ordered]
    starts = list(accumulate(sizes, initial=0))
    made = [
        Stack(at, *kind, numbers, [content_digest(dense[i]) for i in numbers])
        for at, (kind, numbers) in zip(starts, ordered, strict=False)
    ]
    at = starts[-1]
    places, storages, known = list[Place](), list[tuple[int, int]](), dict[int, int]()
    for i in others:
        t, storage = dense[i], -1
        if not t.is_meta:
            held = t.untyped_storage()
            if held.nbytes() == 0 or held.data_ptr() not in known:
                known[held.data_ptr()] = len(storages)
                storages.append((at, held.nbytes()))
                pieces.append(torch.empty(0, dtype=torch.uint8).set_(held))
                at += held.nbytes()
            storage = known[held.data_ptr()]
        shape, stride, offset = tuple(t.shape), tuple(t.stride()), int(t.storage_offset())
        packed = tensors[i].is_mkldnn
        hashed = shared and not (t.is_meta or packed) and _whole(t)
        content = content_digest(t) if hashed else ""
        places.append(Place(i, storage, t.dtype, shape, stride, offset, packed, content))
    return Layout(len(dense), made, places, storages), [p for p in pieces if p.numel()]


def _whole(tensor: Tensor) -> bool:
    """Whether it is all of its storage, in order."""
    size = tensor.numel() * tensor.element_size()
    return bool(size) and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == size


def _tensors(layout: Layout, fd: int) -> list[Tensor]:
    found: list[Any] = [None] * layout.tensors
    storages = [_read(fd, torch.empty(n, dtype=torch.uint8), at) for at, n in layout.storages]
    for place in layout.places:
        found[place.number] = _tensor(place, storages)
    scratch = torch.empty(SCRATCH if layout.stacks else 0, dtype=torch.uint8)
    for stack in layout.stacks:
        for number, tensor in zip(stack.numbers, _stacked(stack, fd, scratch), strict=True):
            found[number] = tensor
    return found


def _stacked(stack: Stack, fd: int, scratch: Tensor) -> list[Tensor]:
    count, numel = len(stack.numbers), torch.Size(stack.shape).numel()
    size = numel * stack.dtype.itemsize
    known = living(stack.contents)
    missing = [i for i, tensor in enumerate(known) if tensor is None]
    if len(missing) < count or size > SCRATCH // 4:
        made = [
            _read(fd, torch.empty(stack.shape, dtype=stack.dtype), stack.at + i * size)
            for i in missing
        ]
    else:
        made = []
        unbind: Any = torch.unbind_copy  # typed as if it returned nothing
        buffer, most = scratch.view(stack.dtype), SCRATCH // size
        for i in range(0, count, most):
            part = min(most, count - i)
            some = _read(fd, buffer[: part * numel], stack.at + i * size)
            made += unbind(some.view(part, *stack.shape))
    for i, tensor in zip(missing, made, strict=True):
        known[i] = canonical(tensor, stack.contents[i])
    return [tensor for tensor in known if tensor is not None]


def _tensor(place: Place, storages: Sequence[Tensor]) -> Tensor:
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


def _read(fd: int, into: Tensor, at: int) -> Tensor:
    """into: contiguous; filled, and returned."""
    if not into.numel():
        return into
    view = into.view(-1).view(torch.uint8).numpy().data
    while view:
        count = os.preadv(fd, [view], at)
        if not count:
            raise EOFError
        view, at = view[count:], at + count
    return into


def _write(fd: int, pieces: Sequence[Tensor]) -> None:
    """One after the other."""
    views = [piece.numpy().data for piece in pieces]
    at = 0
    while views:
        count = os.pwritev(fd, views[:PIECES], at)
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

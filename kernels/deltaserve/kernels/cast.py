"""Casting an adapter's tensors for serving, once for each tensor that modules share."""

from __future__ import annotations

import threading
import weakref
from typing import TypeAlias

import torch
from torch import Tensor

from deltaserve.kernels.content import canonical, content_of

Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
Key: TypeAlias = tuple[str | Place, torch.dtype, bool]

# Reentrant: the garbage collector may run `_forget` on a thread that holds it.
_lock = threading.RLock()
_known: dict[Key, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}


def cast(source: Tensor, dtype: torch.dtype, *, transpose: bool = False) -> Tensor:
    """The tensor in `dtype`, contiguous, transposed if asked for; itself if it is that already.

    The same memory cast twice gives the same tensor while both live: VeRA's one pair of matrices
    stays one pair over all modules, though each module may bring its own view of it. A tensor of
    known content (`content.canonical`) gives the same as long as the result lives, though the
    adapter that brought the content first may have been dropped since.
    """
    if source.dtype == dtype and not transpose and source.is_contiguous():
        return source
    content = content_of(source)
    place = (source.data_ptr(), source.shape, source.stride(), source.dtype)
    key = (content or place, dtype, transpose)
    with _lock:
        known = _known.get(key)
        if known is not None:
            # The address may have been given to another tensor, unless the first one still lives.
            origin, made = known[0](), known[1]()
            if made is not None and (content or origin is not None):
                return made
    result = source.to(dtype)
    result = result.T.contiguous() if transpose else result.contiguous()
    if content:
        result = canonical(result, f"{content} as {dtype}{', transposed' if transpose else ''}")
    with _lock:
        _known[key] = (weakref.ref(source), weakref.ref(result))
        weakref.finalize(result, _forget, key)
    return result


def _forget(key: Key) -> None:
    with _lock:
        known = _known.get(key)
        if known is not None and known[1]() is None:
            del _known[key]

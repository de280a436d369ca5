"""One tensor for each content, as long as somebody holds it.

Adapters of one family bring equal tensors: a frozen A, projections that all layers share, the
support of a sparse mask. The table holds them weakly, so what no adapter uses any more is gone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

from torch import Tensor

# Reentrant: the garbage collector may run a reference's callback on a thread that holds it.
_lock = threading.RLock()
_MARK = "_deltaserve_content"


class _Known(weakref.ref[Tensor]):
    __slots__ = ("content",)
    content: str


_known: dict[str, _Known] = {}


def canonical(tensor: Tensor, content: str) -> Tensor:
    """The living tensor that was first given with this ``content``, a digest of dtype, shape and
    bytes; ``tensor`` itself if there is none. Nobody may change it from now on. Any thread."""
    with _lock:
        known = _known.get(content)
        first = None if known is None else known()
        if first is not None:
            return first
        setattr(tensor, _MARK, content)
        _known[content] = reference = _Known(tensor, _forget)
        reference.content = content
        return tensor


def living(contents: Iterable[str]) -> list[Tensor | None]:
    """The living tensor of each of these contents, where there is one. Any thread."""
    with _lock:
        found = [_known.get(content) for content in contents]
        return [None if known is None else known() for known in found]


def content_of(tensor: Tensor) -> str | None:
    """The content that `canonical` was told of this tensor, if it was."""
    content: str | None = getattr(tensor, _MARK, None)
    return content


def _forget(reference: weakref.ref[Tensor]) -> None:
    assert isinstance(reference, _Known)
    with _lock:
        if _known.get(reference.content) is reference:
            del _known[reference.content]

"""One tensor for each content, as long as somebody holds it.

Adapters of one family bring equal tensors: a frozen A, projections that all layers share, the
support of a sparse mask. The table holds them weakly, so what no adapter uses any more is gone.
"""

from __future__ import annotations

import threading
import weakref

from torch import Tensor

# Reentrant: the garbage collector may run a reference's callback on a thread that holds it.
_lock = threading.RLock()
_known: dict[str, weakref.ref[Tensor]] = {}
_MARK = "_deltaserve_content"


def canonical(tensor: Tensor, content: str) -> Tensor:
    """The living tensor that was first given with this ``content``, a digest of dtype, shape and
    bytes; ``tensor`` itself if there is none. Nobody may change it from now on. Any thread."""

    def forget(reference: weakref.ref[Tensor]) -> None:
        with _lock:
            if _known.get(content) is reference:
                del _known[content]

    with _lock:
        known = _known.get(content)
        first = None if known is None else known()
        if first is not None:
            return first
        setattr(tensor, _MARK, content)
        _known[content] = weakref.ref(tensor, forget)
        return tensor


def living(content: str) -> Tensor | None:
    """The living tensor of this content, if there is one. Any thread."""
    with _lock:
        known = _known.get(content)
        return None if known is None else known()


def content_of(tensor: Tensor) -> str | None:
    """The content that `canonical` was told of this tensor, if it was."""
    content: str | None = getattr(tensor, _MARK, None)
    return content

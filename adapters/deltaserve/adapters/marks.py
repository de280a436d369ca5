"""The content of a tensor that was hashed when it was read: it need not be hashed again."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import torch
from torch import Tensor

Mark: TypeAlias = tuple[bytes, int]

_MARK = "_deltaserve_bytes"


def read_as(value: Tensor, digest: bytes) -> None:
    """Remember the sha256 of its bytes, as long as it is not written to."""
    if not value.is_inference():  # those do not count what is written to them
        setattr(value, _MARK, (digest, value._version))


def content_digest(value: Tensor) -> str:
    """A digest of dtype, shape and bytes (contiguous); the hash is taken if it is not known."""
    mark: Mark | None = getattr(value, _MARK, None)
    if mark is not None and mark[1] == value._version:
        digest = mark[0]
    else:
        digest = hashlib.sha256(value.detach().view(-1).view(torch.uint8).numpy().data).digest()
    return f"{value.dtype} {list(value.shape)} {digest.hex()}"

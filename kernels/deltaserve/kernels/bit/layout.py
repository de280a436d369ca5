"""The order of sign bits that the native kernel reads; native/bit.c says why."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
CHUNK_WORDS = 16


def pack(signs: Tensor) -> Tensor:
    """uint8 [p, out, ceil(in / 8)] -> int32 [p, words]: chunks of 512 inputs, in them blocks of 16
    rows, in them [word][row]. Rows are padded to 16 and inputs to 32."""
    planes, out, nbytes = signs.shape
    padded = F.pad(signs, (0, -nbytes % 4, 0, -out % LANES)).contiguous()
    words = padded.view(torch.int32).view(planes, -1, LANES, padded.shape[2] // 4)
    chunks = torch.split(words, CHUNK_WORDS, dim=3)
    return torch.cat([c.transpose(2, 3).reshape(planes, -1) for c in chunks], 1)

"""Tagged offsets: where something is in an adapter's blob, and in whose.

Planning does not need to know where blobs lie. It writes offsets as ``owner << 32 | units in the
blob`` (int64; owner 0: a plain number), so that one plan serves every layer whose adapters have the
same structure, wherever their blobs are, and blobs may move between steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from deltaserve.kernels.gpu.blob import Spot

Tagged: TypeAlias = npt.NDArray[np.int64]
Spots: TypeAlias = Mapping[int, Spot]
"""slot -> where its blob is, of one group."""

_LOW = 0xFFFFFFFF


def tag(slot: int) -> int:
    """What offsets in a slot's blob are added to."""
    return slot + 1 << 32


def resolve(arrays: Sequence[Tagged], layers: Sequence[Spots]) -> list[npt.NDArray[np.int32]]:
    """int32 [layers, size] of each array: its offsets in the arena, in units, for every layer."""
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    owners, index = np.unique(flat >> 32, return_inverse=True)
    bases = np.array(
        [[spots[o - 1].offset if o else 0 for o in owners.tolist()] for spots in layers],
        dtype=np.int32,
    ).reshape(len(layers), len(owners))
    found = bases[:, index] + (flat & _LOW).astype(np.int32)
    return np.split(found, np.cumsum([a.size for a in arrays])[:-1], axis=1)

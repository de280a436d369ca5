"""Decoding steps that a backend captures once and replays: what the model is given to be captured,
and what a step of the server is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deltaserve.kernels.attention.step import AttentionStep
from deltaserve.kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token of each of some sequences (a sequence's drafts count as sequences of their own).

    ids, positions: of each token. blocks: that hold its sequence up to and with it. segments: of
    all tokens.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    blocks: Sequence[Sequence[int]]
    segments: Segments


@dataclass(frozen=True, eq=False, slots=True)
class StepTensors:
    """A decoding step as a model computes it while it is captured. ids, positions: int64 [T], to be
    read anew by each replay. rows: int64 [T], 0 to T - 1. logits: float32 [T, vocabulary], to be
    written."""

    ids: Tensor
    positions: Tensor
    rows: Tensor
    attention: AttentionStep
    segments: Segments
    logits: Tensor


class Decoded(NamedTuple):
    """logits: float32 [T, vocabulary]; best: as `best_of` them. On the device, until the next
    step."""

    logits: Tensor
    best: Tensor


class Graphs(Protocol):
    """Engine thread."""

    def run(self, step: DecodeStep) -> Decoded | None:
        """Launches the step; None if it is to be run without a graph. The step before must have
        been waited for."""
        ...

    def prepare(self, step: DecodeStep) -> None:
        """Lays out what is likely to come next while the last step runs: its ids are not known yet,
        and blocks may be missing."""
        ...


def best_of(logits: Tensor) -> Tensor:
    """logits: float32 [n, vocabulary]. -> int64 [n, 2]: the first of the largest, and whether that
    is finite (NaN counts as the largest)."""
    best, token = logits.max(-1)
    return torch.stack((token, torch.isfinite(best).long()), 1)

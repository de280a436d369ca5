"""Draws of tokens: temperature, truncation, and one random number for each row.

Rows are drawn together, on whatever device their logits are. What a row gets depends on nothing but
its logits, parameters and number: neither on the rows beside it nor on the order in which a sort
leaves equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.server.engine.core import SamplingParams

FEW = 1024
"""Tokens that mostly hold what top_p asks for."""

TOGETHER = 32
"""Rows that are drawn at once: what that takes of a device's memory is beside the budget."""

NEARLY = 1 - 1e-6
"""Of top_p is enough: probabilities of float32 seldom add up to what they should."""

BELOW_ONE = 1 - 2**-32
"""Numbers are kept off 1, where rounding would point behind the last token."""


def draw(scores: Tensor, how: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """scores: float32 [n, vocabulary], adjusted logits. how: of each row, temperature above 0.
    numbers: uniform in [0, 1). -> int64 [n], on the device of scores: the first token up to which
    that share of the probability lies that truncation leaves (inversion of the distribution
    function)."""
    found = [
        _draw(scores[i : i + TOGETHER], how[i : i + TOGETHER], numbers[i : i + TOGETHER])
        for i in range(0, len(how), TOGETHER)
    ]
    return torch.cat(found)


def _draw(scores: Tensor, how: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    own = [(p.temperature, BELOW_ONE * u) for p, u in zip(how, numbers, strict=True)]
    temperature, number = torch.tensor(own, dtype=torch.float64).T.to(scores.device)
    probabilities = torch.softmax(scores / temperature.float()[:, None], -1)
    summed = truncate(probabilities, how).cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(summed, (number * summed[:, -1])[:, None], right=True)
    return place[:, 0].clamp_(max=scores.shape[1] - 1)


def truncate(probabilities: Tensor, how: Sequence[SamplingParams]) -> Tensor:
    """Zero what top_k, top_p and min_p of each row leave out; not renormalized. The best token
    always stays, and what is as probable as the last one that stays. probabilities: float32
    [n, vocabulary]."""
    if any(p.min_p > 0 for p in how):
        least = torch.tensor([p.min_p for p in how]).to(probabilities.device)
        floor = least * probabilities.amax(-1)
        probabilities = torch.where(probabilities >= floor[:, None], probabilities, 0.0)
    cut = [i for i, p in enumerate(how) if p.top_k > 0 or p.top_p < 1]
    if not cut:
        return probabilities
    if len(cut) == len(how):
        return _cut(probabilities, how)
    rows = torch.tensor(cut).to(probabilities.device)
    return probabilities.index_copy(0, rows, _cut(probabilities[rows], [how[i] for i in cut]))


def _cut(probabilities: Tensor, how: Sequence[SamplingParams]) -> Tensor:
    """What top_k and top_p leave. A whole vocabulary is put in order only where a few tokens do not
    hold enough of its probability: that takes ten times as long as the rest of a draw."""
    count = probabilities.shape[1]
    asked = [(p.top_k if 0 < p.top_k < count else count, p.top_p) for p in how]
    limits = torch.tensor(asked, dtype=torch.float64).T.to(probabilities.device)
    whole = probabilities.sum(-1, dtype=torch.float64)
    most = max((k for k, _ in asked if k < count), default=0)
    some = min(count, max(FEW, most))
    least, enough = _least(probabilities.topk(some).values, whole, limits, count)
    if some < count and not bool(enough.all()):
        rows = (~enough).nonzero()[:, 0]
        ordered = probabilities[rows].sort(descending=True).values
        least[rows] = _least(ordered, whole[rows], limits[:, rows], count)[0]
    return torch.where(probabilities >= least[:, None], probabilities, 0.0)


def _least(ordered: Tensor, whole: Tensor, limits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The probability of the last token that stays, of each row; whether it is among these.
    ordered: the largest ones, descending, of a vocabulary of `count`; whole: the sum of all;
    limits: top_k and top_p, which is a share of what top_k leaves."""
    top_k, top_p = limits[0][:, None], limits[1][:, None]
    first = torch.arange(ordered.shape[1], device=ordered.device) < top_k
    summed = torch.where(first, ordered, 0.0).cumsum(-1, dtype=torch.float64)
    left = torch.where(top_k < count, summed[:, -1:], whole[:, None])
    share = top_p * left * NEARLY
    stays = first & ((summed - ordered < share) | (top_p >= 1))
    least = torch.where(stays, ordered, torch.inf).amin(-1)
    enough = (top_k[:, 0] <= ordered.shape[1]) | (summed[:, -1] >= share[:, 0])
    return least, enough

"""Several distributions over the next token -> one. Pure functions of one place's logits.

Computed in float64: weights of either sign multiply what float32 rounds away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve.server.engine.core import Rule


def combine(
    logits: Tensor, weights: Sequence[float], rule: Rule, plausibility: float = 0.0
) -> Tensor:
    """logits: float32 [members, vocabulary]; weights: one per member, not all 0, for the mean none
    negative. -> float32 [vocabulary], log-probabilities that add up to 1, or one member's own
    logits where that is the same.

    mean: p = sum w_m p_m / sum w_m, an ensemble (Wang et al. 2023 of LoRAs). product: p ~ prod
    p_m^w_m: contrastive decoding (Li et al. 2023), emulated fine-tuning (Mitchell et al. 2024),
    proxy tuning (Liu et al. 2024), mixtures of in-context learners (Hong et al. 2025).
    plausibility: tokens less probable than this times the first member's best are excluded (Li et
    al. 2023). In a product, a token that any member rules out is excluded, whatever the weights'
    signs. All NaN if a member's row holds a NaN, or its maximum is infinite.
    """
    if not torch.isfinite(logits.max(-1).values).all():
        return torch.full_like(logits[0], float("nan"))
    excluded = None
    if plausibility > 0:
        excluded = logits[0] < logits[0].max().double() + math.log(plausibility)
    if len(logits) == 1 and (rule is Rule.MEAN or weights[0] == 1):
        return logits[0] if excluded is None else logits[0].masked_fill(excluded, float("-inf"))
    used = [m for m, weight in enumerate(weights) if weight]
    w = torch.tensor([weights[m] for m in used], dtype=torch.float64, device=logits.device)
    each = torch.log_softmax(logits[used].double(), -1)
    if rule is Rule.MEAN:
        total = torch.logsumexp(each + (w / w.sum()).log()[:, None], 0)
    else:
        impossible = each.isneginf()
        total = w @ each.masked_fill(impossible, 0.0)
        total = total.masked_fill(impossible.any(0), float("-inf"))
    if excluded is not None:
        total = total.masked_fill(excluded, float("-inf"))
    return torch.log_softmax(total, -1).float()


def divergence(logits: Tensor, weights: Sequence[float], rule: Rule) -> float:
    """The generalized Jensen-Shannon divergence (Lin 1991) of the rows of logits [members,
    vocabulary], in nats: sum pi_m KL(p_m || sum pi_m p_m), with pi the members' shares: their
    weights for the mean, for which it is the mutual information of token and member (Houlsby et
    al. 2011); equal ones for the product, whose weights are no shares."""
    shares = list(weights) if rule is Rule.MEAN else [1.0] * len(logits)
    used = [m for m, share in enumerate(shares) if share]
    pi = torch.tensor([shares[m] for m in used], dtype=torch.float64, device=logits.device)
    pi /= pi.sum()
    each = torch.log_softmax(logits[used].double(), -1)
    mixed = torch.logsumexp(each + pi.log()[:, None], 0)
    terms = torch.where(each.isneginf(), 0.0, each.exp() * (each - mixed))
    return max(0.0, float(pi @ terms.sum(-1)))

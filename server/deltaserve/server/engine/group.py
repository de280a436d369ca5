"""Group: the sequences of a combination, whose next token is one.

A group is admitted, preempted and ended as a whole. Each member's prompt is computed on its own up
to its tail: the last tokens, as many in every member, whose logits are combined. The tail is
computed in lockstep, so that all rows of a place are there in one step: one token to generate; to
score, as many as there are to be scored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.server.engine import combine
from deltaserve.server.engine.core import Combination, Request, TokenDisagreement
from deltaserve.server.engine.validate import (
    Limits,
    check,
    check_combination,
    check_together,
    check_weights,
)
from deltaserve.server.errors import InvalidRequest, RequestError, RequestUnknown

if TYPE_CHECKING:
    from deltaserve.server.engine.runner import LogitRow
    from deltaserve.server.engine.sequence import Sequence


@dataclass(eq=False)
class Group:
    """members: the first is the one that stands for the request. weights: of each, as they are now.
    changed: since the last token; set and read on the engine thread."""

    combination: Combination
    members: tuple[Sequence, ...]
    weights: tuple[float, ...] = ()
    changed: bool = False

    def __post_init__(self) -> None:
        self.weights = tuple(member.weight for member in self.combination.members)

    def set_weights(self, weights: tuple[float, ...]) -> None:
        """From the next token on."""
        self.weights, self.changed = weights, True

    def take_change(self) -> tuple[float, ...]:
        """The weights, if they have changed since it was asked last."""
        changed, self.changed = self.changed, False
        return self.weights if changed else ()

    def combine(self, logits: Tensor) -> Tensor:
        """float32 [members, vocabulary] -> [vocabulary]."""
        return combine.combine(
            logits, self.weights, self.combination.rule, self.combination.plausibility
        )

    def disagreement(self, logits: Tensor, token: int) -> TokenDisagreement:
        """How much the members disagree, whose logits these are, and on `token`."""
        spread = combine.divergence(logits, self.weights, self.combination.rule)
        logprobs = torch.log_softmax(logits.double(), -1)[:, token]
        return TokenDisagreement(spread, tuple(logprobs.tolist()))


def members(request: Request) -> tuple[Request, ...]:
    """The request of each member; the request itself without a combination. To score, the scored
    tokens end every member's prompt."""
    combination = request.combination
    if combination is None:
        return (request,)
    found = []
    for member in combination.members:
        prompt, sampling = request.prompt_ids, request.sampling
        if member.prompt_ids is not None:
            prompt = member.prompt_ids
            if sampling.score_from is not None:
                scored = len(request.prompt_ids) - sampling.score_from
                sampling = replace(sampling, score_from=len(prompt) - scored)
        found.append(
            replace(request, prompt_ids=prompt, sampling=sampling, adapters=member.adapters)
        )
    return tuple(found)


def check_members(request: Request, limits: Limits) -> None:
    """`validate.check` for a request with or without a combination."""
    combination = request.combination
    if combination is None:
        check(request, limits)
        return
    if request.adapters:
        raise InvalidRequest(
            "adapters: a list beside a combination is not possible; give each member its own",
            field="adapters",
        )
    check_combination(combination, limits)
    each = members(request)
    for i, one in enumerate(each):
        with located(i, one):
            check(one, limits)
    check_together([(len(one.prompt_ids), 0) for one in each], request.sampling.max_tokens, limits)


@dataclass(frozen=True, slots=True)
class Reweighting:
    """Other weights for a live combination."""

    request_id: str
    weights: tuple[float, ...]


def check_reweighting(sequence: Sequence | None, weights: tuple[float, ...]) -> None:
    """Whether the combination that the sequence leads may get these weights."""
    group = sequence.group if sequence is not None else None
    if group is None or not group.combination.live:
        raise RequestUnknown(
            "request_id: no combination that runs and is `live` is called so",
            field="request_id",
        )
    if len(weights) != len(group.members):
        raise InvalidRequest(
            f"weights: {len(weights)} are not possible; there must be {len(group.members)}, "
            "one for each member",
            field="weights",
        )
    check_weights(weights, group.combination.rule, "weights[{}]")


@contextmanager
def located(i: int, request: Request) -> Iterator[None]:
    """What is wrong with the prompt or adapters of member i of a combination names it."""
    try:
        yield
    except RequestError as error:
        field: str = getattr(error, "field", "")
        if request.combination is None or not field.startswith(_OF_MEMBERS):
            raise
        path = f"combination.members[{i}]."
        named = "" if str(error).startswith(field) else f"{field}: "
        raise type(error)(f"{path}{named}{error}", field=path + field) from error


_OF_MEMBERS = ("prompt", "adapters", "model")


def gather(
    rows: list[LogitRow], logits: Tensor
) -> tuple[list[LogitRow], Tensor, dict[int, Tensor]]:
    """Combine the rows of members: one row for a group and place, that of its first member.

    rows with their logits [rows, vocabulary] -> the same with combined ones, and the members'
    logits [members, vocabulary] of the rows, by index, whose requests want to know more of them.
    """
    if all(row.part.sequence.group is None for row in rows):
        return rows, logits, {}
    kept: list[int] = []
    places: dict[tuple[Sequence, int], dict[Sequence, int]] = defaultdict(dict)
    for i, row in enumerate(rows):
        sequence = row.part.sequence
        if sequence.lead is sequence:
            kept.append(i)
        if sequence.group is not None:
            places[sequence.lead, len(sequence.tokens) - row.position][sequence] = i
    found, picked, apart = [rows[i] for i in kept], logits[kept], {}
    at = {i: k for k, i in enumerate(kept)}
    for (lead, _), of in places.items():
        assert lead.group is not None
        each = logits[[of[member] for member in lead.group.members]]
        picked[at[of[lead]]] = lead.group.combine(each)
        if lead.group.combination.disagreement:
            apart[at[of[lead]]] = each
    return found, picked, apart

"""From logits to tokens: biases, penalties, exclusions, one draw; and log-probabilities.

Greedy rows are an argmax over the whole batch. Every sampled row draws from its own generator, so
what a seeded request gets does not depend on the rest of the batch. Rows that only sample are drawn
together where the logits are, and log-probabilities are computed there; others are adjusted in host
memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.kernels.captured import best_of
from deltaserve.server.engine.core import SamplingParams, TokenDisagreement, TokenLogprob
from deltaserve.server.engine.draw import TOGETHER, draw
from deltaserve.server.engine.matcher import Failed, Matcher

MOST_RISE = 69.0
"""Logarithm of 1e30."""


@dataclass(slots=True)
class Row:
    """One row of logits: how to choose, from which generator, after which tokens (prompt and
    outputs, virtual ones left out); eos: the tokens that `min_tokens` holds back. after: the row
    follows a drafted token; it is only asked if the row before it chose that very token. matcher:
    allows what may follow the outputs."""

    sampling: SamplingParams
    generator: torch.Generator | None
    prompt_ids: tuple[int, ...]
    output_ids: list[int]
    eos: tuple[int, ...] = ()
    after: int | None = None
    matcher: Matcher | None = None


@dataclass(slots=True)
class Choice:
    """finite is False if the row held a NaN or its maximum is infinite, dead is True if no token is
    left to choose from, failure says why the row's constraint cannot be followed: the token is no
    answer then. disagreement: of the members whose rows were combined to this one, if it is to be
    told."""

    token_id: int
    finite: bool
    logprob: TokenLogprob | None = None
    dead: bool = False
    failure: str = ""
    disagreement: TokenDisagreement | None = None

    @property
    def sound(self) -> bool:
        return self.finite and not self.dead and not self.failure


def plain(row: Row) -> bool:
    """Greedy and untouched: an argmax decides."""
    p = row.sampling
    return p.temperature == 0 and not _adjusts(row)


def _adjusts(row: Row) -> bool:
    p = row.sampling
    return bool(
        p.logit_bias
        or p.bad_tokens
        or row.matcher is not None
        or p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.eos_ramp
        or p.length_penalty[1] != 1
        or (len(row.output_ids) < p.min_tokens)
    )


def sample(logits: Tensor, rows: list[Row], best: Tensor | None = None) -> list[Choice | None]:
    """logits: float32 [n, vocabulary], unchanged. best: as `best_of` them, if that is known. -> the
    choice for each row; None for one behind a wrong draft. That one draws nothing: a generator is
    where it would be without drafts."""
    found: list[list[int]] = (best_of(logits) if best is None else best).tolist()
    drawn = _drawn_together(logits, rows, found)
    own = _in_host_memory(logits, rows, drawn)
    choices: list[Choice | None] = []
    for i, row in enumerate(rows):
        if row.after is not None:
            before = choices[-1]
            if before is None or not before.sound or before.token_id != row.after:
                choices.append(None)
                continue
        token, finite = found[i]
        choice = Choice(drawn.get(i, token), bool(finite))
        if finite and i not in drawn and not plain(row):
            _choose(choice, own[i], row)
        choices.append(choice)
    _tell(choices, logits, rows)
    return choices


def _drawn_together(logits: Tensor, rows: list[Row], found: list[list[int]]) -> dict[int, int]:
    """The tokens of the rows that only sample. Those of drafts are left: whether they draw is known
    when those before them have."""
    followed = [row.after is not None for row in rows[1:]] + [False]
    some = [
        i
        for i, row in enumerate(rows)
        if row.sampling.temperature > 0
        and found[i][1]
        and row.after is None
        and not followed[i]
        and not _adjusts(row)
    ]
    if not some:
        return {}
    chosen = logits if len(some) == len(rows) else logits[some]
    tokens = draw(chosen, [rows[i].sampling for i in some], [_number(rows[i]) for i in some])
    return dict(zip(some, tokens.tolist(), strict=True))


def _number(row: Row) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=row.generator))


def _in_host_memory(
    logits: Tensor, rows: list[Row], drawn: dict[int, int]
) -> Tensor | dict[int, Tensor]:
    """The logits of the rows that take more than a look at the best or a draw, in one copy."""
    if logits.is_cpu:
        return logits
    more = [i for i, row in enumerate(rows) if i not in drawn and not plain(row)]
    return dict(zip(more, logits[more].cpu(), strict=True)) if more else {}


def _tell(choices: list[Choice | None], logits: Tensor, rows: list[Row]) -> None:
    """The log-probabilities that rows ask for: of the model's own logits."""
    asked = {
        i: (choice, Asked(choice.token_id, top, row.sampling.ranks))
        for i, (choice, row) in enumerate(zip(choices, rows, strict=True))
        if choice is not None and choice.sound and (top := row.sampling.logprobs) is not None
    }
    found = logprobs_of(logits, {i: own for i, (_, own) in asked.items()})
    for i, (choice, _) in asked.items():
        choice.logprob = found[i]


@dataclass(frozen=True, slots=True)
class Asked:
    """Of a row: this token's log-probability, and the `top` best ones. rank: the token's, too: it
    is one more pass."""

    token_id: int
    top: int
    rank: bool


def logprobs_of(logits: Tensor, asked: Mapping[int, Asked]) -> dict[int, TokenLogprob]:
    """Of some rows of logits [n, vocabulary], by number, what is asked of them; among the best are
    no tokens without probability. Computed together, on the device of logits."""
    found: dict[int, TokenLogprob] = {}
    rows = list(asked)
    for at in range(0, len(rows), TOGETHER):
        some = rows[at : at + TOGETHER]
        own = logits if len(some) == len(logits) else logits[some]
        told = _logprobs(own, [asked[i] for i in some])
        found.update(zip(some, told, strict=True))
    return found


def _logprobs(logits: Tensor, asked: Sequence[Asked]) -> list[TokenLogprob]:
    logprobs = torch.log_softmax(logits.float(), -1)
    tokens = torch.tensor([a.token_id for a in asked])[:, None].to(logits.device)
    own = logprobs.gather(1, tokens)
    ranks = [0] * len(asked)
    if any(a.rank for a in asked):
        ranks = (1 + (logprobs > own).sum(-1)).tolist()
    best: list[tuple[tuple[int, float], ...]] = [()] * len(asked)
    if most := min(max(a.top for a in asked), logprobs.shape[1]):
        values, ids = logprobs.topk(most)
        best = [
            tuple(pair for pair in zip(i, v, strict=True) if pair[1] > -math.inf)
            for i, v in zip(ids.tolist(), values.tolist(), strict=True)
        ]
    return [
        TokenLogprob(a.token_id, value, top[: a.top], rank if a.rank else 0)
        for a, (value,), top, rank in zip(asked, own.tolist(), best, ranks, strict=True)
    ]


def _choose(choice: Choice, logits: Tensor, row: Row) -> None:
    scores = logits
    if _adjusts(row):
        try:
            scores = adjust(logits.clone(), row)
        except Failed as error:
            choice.token_id, choice.failure = -1, str(error)
            return
        if scores.max() == float("-inf"):
            choice.token_id, choice.dead = -1, True
            return
    p = row.sampling
    greedy = p.temperature == 0
    found = scores.argmax() if greedy else draw(scores[None], [p], [_number(row)])
    choice.token_id = int(found)


def adjust(scores: Tensor, row: Row) -> Tensor:
    """Bias and penalties, then exclusions (-inf), in place. repetition_penalty: over prompt and
    outputs, divides positive logits and multiplies negative ones (Keskar et al. 2019); presence and
    frequency: over outputs, subtracted once and per occurrence (OpenAI); eos_ramp: once per output,
    added to the ends of sequence (Hewitt et al. 2024); length_penalty: behind the start, |logit|
    (factor^(outputs - start) - 1) likewise (transformers' exponential decay). Excluded are the ends
    that min_tokens holds back, the last tokens of bad sequences whose others are there already, and
    what the constraint does not allow. Raises Failed for a constraint that cannot be followed."""
    p = row.sampling
    if p.logit_bias:
        ids = torch.tensor([i for i, _ in p.logit_bias])
        scores.index_add_(0, ids, torch.tensor([b for _, b in p.logit_bias]))
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}))
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.output_ids:
        occurrences = Counter(row.output_ids)
        ids = torch.tensor(list(occurrences))
        counts = torch.tensor(list(occurrences.values()))
        scores[ids] -= p.presence_penalty + p.frequency_penalty * counts
    if p.eos_ramp and row.eos:
        scores[torch.tensor(row.eos)] += p.eos_ramp * len(row.output_ids)
    if (rise := _rise(p.length_penalty, len(row.output_ids))) and row.eos:
        eos = torch.tensor(row.eos)
        old = scores[eos]
        scores[eos] = torch.where(old.isfinite(), old + rise * old.abs(), old)
    if len(row.output_ids) < p.min_tokens:
        held = [*p.stop_token_ids, *(() if p.ignore_eos else row.eos)]
        if held:
            scores[torch.tensor(held)] = float("-inf")
    if p.bad_tokens:
        bad = _last_of_bad(p.bad_tokens, row.prompt_ids, row.output_ids)
        scores[torch.tensor(bad, dtype=torch.int64)] = float("-inf")
    if row.matcher is not None:
        if p.ignore_eos and row.eos:  # the text goes on as long as it can
            scores[torch.tensor(row.eos)] = float("-inf")
        scores.masked_fill_(~row.matcher.allowed(row.output_ids), float("-inf"))
    return scores


def _rise(length_penalty: tuple[int, float], outputs: int) -> float:
    """factor^(outputs - start) - 1 behind the start, else 0; what a float32 cannot hold, times any
    logit, is cut off."""
    start, factor = length_penalty
    return math.expm1(min(max(outputs - start, 0) * math.log(factor), MOST_RISE))


def _last_of_bad(
    sequences: tuple[tuple[int, ...], ...], prompt_ids: tuple[int, ...], output_ids: list[int]
) -> list[int]:
    """The last tokens of those sequences that prompt and outputs end with, but for that token."""
    most = max(len(s) for s in sequences) - 1
    tail = tuple(output_ids[-most:]) if most else ()
    if len(tail) < most:
        tail = prompt_ids[-(most - len(tail)) :] + tail
    return [s[-1] for s in sequences if len(s) == 1 or tail[1 - len(s) :] == s[:-1]]

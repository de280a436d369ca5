"""What a step's logits mean for its requests: tokens, text, ends, and the outputs to hand out."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable

from torch import Tensor

from deltaserve.server.engine.batch import Batch, Scheduled
from deltaserve.server.engine.core import (
    FinishReason,
    Outbox,
    Output,
    Timings,
    TokenDisagreement,
    TokenLogprob,
    Usage,
)
from deltaserve.server.engine.group import gather
from deltaserve.server.engine.matcher import Failed
from deltaserve.server.engine.observer import Observer
from deltaserve.server.engine.runner import LogitRow
from deltaserve.server.engine.sampler import Asked, Choice, Row, logprobs_of, sample
from deltaserve.server.engine.scheduler import Scheduler
from deltaserve.server.engine.sequence import Sequence
from deltaserve.server.errors import Cancelled, InvalidRequest, NonFiniteLogits, RequestError


class StepOutputs:
    """Gathers one step's outputs. finished: sequences that end, with their last output; poisoned:
    those whose keys and values may hold values that are not finite."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.finished: list[tuple[Sequence, Output]] = []
        self.poisoned: list[Sequence] = []
        self._outputs: dict[Outbox, list[Output]] = defaultdict(list)
        self._chosen: list[tuple[Sequence, bool, float]] = []

    def add(self, sequence: Sequence, output: Output) -> None:
        self._outputs[sequence.outbox].append(output)

    def deliver(self) -> None:
        for outbox, outputs in self._outputs.items():
            outbox.deliver(outputs)

    def advance(
        self,
        batch: Batch,
        rows: list[LogitRow],
        logits: Tensor,
        scheduler: Scheduler,
        eos: frozenset[int],
        max_length: int,
        best: Tensor | None = None,
    ) -> None:
        """Choose tokens, move the sequences on, find out which of them end. best: of all rows, if
        none are combined or scored."""
        rows, logits, apart = gather(rows, logits)
        sampled = [i for i, row in enumerate(rows) if row.samples]
        scored = [i for i, row in enumerate(rows) if not row.samples]
        told = logprobs_of(logits, {i: _asked(rows[i]) for i in scored})
        for i in sorted(scored, key=lambda i: rows[i].position):  # chunks are ordered by adapter
            self._score(rows[i], told[i], apart.get(i))
        picked = logits if len(sampled) == len(rows) else logits[sampled]
        how = _rows([rows[i].part for i in sampled], eos)
        choices = sample(picked, how, best) if sampled else []
        scheduler.advance(batch)
        now = self._clock()
        chosen: dict[Sequence, list[Choice]] = defaultdict(list)
        for i, choice in zip(sampled, choices, strict=True):
            if choice is not None:
                choice.disagreement = _told(rows[i].part.sequence, apart.get(i), choice.token_id)
                chosen[rows[i].part.sequence].append(choice)
        for sequence, run in chosen.items():
            if sequence in self.poisoned:
                continue
            sound = [choice for choice in run if choice.sound]
            ended = bool(sound) and self._next(sequence, sound, eos, max_length, now)
            if len(sound) == len(run) or ended:
                continue
            if not run[-1].finite:
                self._poison(sequence)
            elif run[-1].failure:
                self._fail(sequence, run[-1].failure)
            else:
                self._finish(sequence, FinishReason.DEAD_END, "", now)
        for sequence in dict.fromkeys(p.sequence for p in batch.decodes if p.draft is not None):
            if sequence not in self.poisoned:
                scheduler.accept(sequence)

    def _score(self, row: LogitRow, entry: TokenLogprob, apart: Tensor | None) -> None:
        """Keep the log-probability of the prompt token behind this row."""
        sequence = row.part.sequence
        sequence.scores.append(entry)
        if (told := _told(sequence, apart, entry.token_id)) is not None:
            sequence.disagreements.append(told)
        excluded = sequence.group is not None and entry.logprob == -math.inf
        if not (math.isfinite(entry.logprob) or excluded):
            self._poison(sequence)

    def _poison(self, sequence: Sequence) -> None:
        if sequence in self.poisoned:
            return
        self.poisoned += sequence.members
        names = "+".join(a.name for a in sequence.held)
        whose = f"adapters {names!r} have" if names else "the base has"
        error = NonFiniteLogits(
            f"the logits after {len(sequence.tokens) - sequence.virtual} tokens are not finite: "
            f"{whose} weights too large to compute with, or damaged",
            field="model" if sequence.held else "",
        )
        self.finished.append((sequence, error_output(sequence, error, self._clock())))

    def _fail(self, sequence: Sequence, reason: str) -> None:
        """Its constraint cannot be followed."""
        error = InvalidRequest(
            f"constraint: it cannot be followed after {sequence.outputs} tokens: {reason}",
            field="constraint",
        )
        self.finished.append((sequence, error_output(sequence, error, self._clock())))

    def _next(
        self,
        sequence: Sequence,
        choices: list[Choice],
        eos: frozenset[int],
        max_length: int,
        now: float,
    ) -> bool:
        """The sequence's newest tokens are known: one, and those behind right drafts. True if it
        ends with one of them; what follows that one is dropped."""
        p = sequence.request.sampling
        if p.max_tokens == 0:
            self._finish(sequence, FinishReason.LENGTH, "", now)
            return True
        first = sequence.outputs == 0
        text = ""
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        told: list[TokenDisagreement] = []
        changed = sequence.group.take_change() if sequence.group is not None else ()
        for choice in choices:
            token = choice.token_id
            self._append(sequence, token, now)
            ids.append(token)
            if choice.logprob is not None:
                logprobs.append(choice.logprob)
            if choice.disagreement is not None:
                told.append(choice.disagreement)
            enough = sequence.outputs >= p.min_tokens
            ends = enough and (token in p.stop_token_ids or (token in eos and not p.ignore_eos))
            text += "" if ends else sequence.detokenizer.add(token)
            stopped = sequence.detokenizer.stopped_by if enough else ""
            closed = enough and not ends and not stopped and _closed(sequence)
            length = max(len(member.tokens) for member in sequence.members)
            full = sequence.outputs >= p.max_tokens or length >= max_length
            if sequence.drafter is not None and len(ids) > 1:
                sequence.drafter.accepted += 1
            if ends or stopped or closed or full:
                over = ends or stopped or closed
                reason = FinishReason.STOP if over else FinishReason.LENGTH
                why = stopped or (str(token) if ends else "")
                found = tuple(ids), tuple(logprobs), tuple(told), changed
                self._finish(sequence, reason, why, now, text, *found)
                return True
        self.add(
            sequence,
            Output(
                sequence.id,
                text=text,
                token_ids=tuple(ids),
                logprobs=tuple(logprobs),
                prompt_logprobs=tuple(sequence.scores) if first else (),
                served_by=sequence.served_by if first else None,
                members=sequence.served_members if first else (),
                disagreements=tuple(told),
                weights=changed,
            ),
        )
        return False

    def _append(self, sequence: Sequence, token: int, now: float) -> None:
        since = sequence.submitted if sequence.outputs == 0 else sequence.last_token
        for member in sequence.members:
            member.tokens.append(token)
            member.outputs += 1
        self._chosen.append((sequence, sequence.outputs == 1, now - since))
        sequence.first_token = sequence.first_token or now
        sequence.last_token = now

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: str,
        now: float,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        told: tuple[TokenDisagreement, ...] = (),
        changed: tuple[float, ...] = (),
    ) -> None:
        if not sequence.detokenizer.stopped_by:
            text += sequence.detokenizer.finish()
        output = final_output(
            sequence, reason, now, stop_reason, text, token_ids, logprobs, told, changed
        )
        self.finished.append((sequence, output))

    def observe(self, observer: Observer) -> None:
        """Tell the metrics of the step's tokens."""
        for sequence, first, seconds in self._chosen:
            if first:
                observer.on_first_token(sequence.label, seconds)
                observer.on_tokens(sequence.label, _prompt_tokens(sequence), 1)
            else:
                observer.on_inter_token(sequence.label, seconds)
                observer.on_tokens(sequence.label, 0, 1)


def final_output(
    sequence: Sequence,
    reason: FinishReason,
    now: float,
    stop_reason: str = "",
    text: str = "",
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprob, ...] = (),
    told: tuple[TokenDisagreement, ...] = (),
    changed: tuple[float, ...] = (),
    error: RequestError | None = None,
) -> Output:
    """The last output of a request: how it ended, what it used, how long it took."""
    began = sequence.started or now
    return Output(
        sequence.id,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=tuple(sequence.scores) if sequence.outputs == len(token_ids) else (),
        served_by=sequence.served_by,
        finish_reason=reason,
        stop_reason=stop_reason,
        usage=Usage(
            prompt_tokens=_prompt_tokens(sequence),
            completion_tokens=sequence.outputs,
            cached_tokens=sum(m.cached for m in sequence.members),
            prefix_tokens=sum(m.virtual for m in sequence.members),
            drafted_tokens=sequence.drafter.drafted if sequence.drafter else 0,
            accepted_tokens=sequence.drafter.accepted if sequence.drafter else 0,
        ),
        timings=Timings(
            queue=began - sequence.submitted,
            adapter_load=(sequence.adapter_ready or now) - sequence.submitted
            if sequence.held
            else 0.0,
            time_to_first_token=(sequence.first_token or now) - sequence.submitted,
            total=now - sequence.submitted,
        ),
        error=error,
        members=sequence.served_members,
        disagreements=told,
        prompt_disagreements=tuple(sequence.disagreements),
        weights=changed,
    )


def error_output(sequence: Sequence, error: RequestError, now: float) -> Output:
    reason = FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR
    return final_output(sequence, reason, now, error=error)


def _prompt_tokens(sequence: Sequence) -> int:
    return sum(len(m.request.prompt_ids) for m in sequence.members)


def _told(sequence: Sequence, apart: Tensor | None, token: int) -> TokenDisagreement | None:
    """What is to be told of its members, whose logits are `apart`, at one place."""
    if apart is None or sequence.group is None:
        return None
    return sequence.group.disagreement(apart, token)


def _asked(row: LogitRow) -> Asked:
    """Of the row before a prompt token that is scored."""
    sequence = row.part.sequence
    p = sequence.request.sampling
    return Asked(sequence.tokens[row.position + 1], p.prompt_logprobs, p.ranks)


def _rows(parts: list[Scheduled], eos: frozenset[int]) -> list[Row]:
    """How to choose what follows each part. A sequence's drafts are behind it, in order."""
    rows: list[Row] = []
    for part in parts:
        sequence, draft = part.sequence, part.draft
        if not needs_outputs(sequence):
            outputs: list[int] = []
        elif draft is None:
            outputs = sequence.output_ids
        else:
            outputs = [*rows[-1].output_ids, draft]
        request = sequence.request
        rows.append(
            Row(
                request.sampling,
                sequence.generator,
                request.prompt_ids,
                outputs,
                tuple(eos),
                draft,
                request.matcher,
            )
        )
    return rows


def _closed(sequence: Sequence) -> bool:
    """Nothing may follow by its constraint."""
    matcher = sequence.request.matcher
    try:
        return matcher is not None and matcher.ended(sequence.output_ids)
    except Failed:
        return False  # the next choice finds it out


def needs_outputs(sequence: Sequence) -> bool:
    """Whether the choice depends on earlier outputs (they need not be copied otherwise)."""
    p = sequence.request.sampling
    return bool(
        sequence.request.matcher is not None
        or p.min_tokens
        or p.bad_tokens
        or p.repetition_penalty != 1
        or p.presence_penalty
        or p.frequency_penalty
        or p.eos_ramp
        or p.length_penalty[1] != 1
    )

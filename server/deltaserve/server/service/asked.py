"""Asked: what one call to generate asks for, as requests to the engine, and how it is answered from
their outputs: the prompt before its continuation, the best of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltaserve.server.engine.core import Combination, Output, Request, SamplingParams, TokenLogprob
from deltaserve.server.engine.validate import MAX_LOGPROBS
from deltaserve.server.service import convert
from deltaserve.v1 import generation_pb2 as pb

MAX_PROMPT_LOGPROBS = 1 << 20
"""Log-probabilities of prompt tokens in one answer, the best ones of each place included."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What a call asks for beside continuations. choices: to be generated, of which `answered` are.
    logprobs: of the continuations, as in `SamplingParams`; prompt_logprobs: likewise, of the
    prompt. echo: the prompt comes first."""

    choices: int
    answered: int
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool

    @property
    def scored(self) -> int | None:
        """The best ones that are needed at each place of the prompt; None for no scores at all."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((k for k in wanted if k is not None), default=None)

    def samplings(self, given: Sequence[SamplingParams], prompt: int) -> list[SamplingParams]:
        """Those of the choices, with what has to be told of them. The first scores the prompt."""
        found = list(given)
        if self.choices > self.answered and self.logprobs is None:
            found = [replace(one, logprobs=0) for one in found]
        if self.scored is not None and prompt > 1:
            found[0] = replace(found[0], score_from=1, prompt_logprobs=self.scored)
        return found

    def check(self, prompt: int, combination: Combination | None) -> None:
        """Refuse more than fits into an answer, and what there is not. prompt: its tokens."""
        if self.scored is None:
            return
        field = "echo" if self.prompt_logprobs is None else "prompt_logprobs"
        if combination is not None and any(m.prompt_ids for m in combination.members):
            convert.refuse(field, "the log-probability of several prompts", "left out")
        copies = (self.prompt_logprobs is not None) + self.echo * self.answered
        count = prompt * (self.scored + 1) * copies
        if count > MAX_PROMPT_LOGPROBS:
            right = f"at most {MAX_PROMPT_LOGPROBS} numbers"
            convert.refuse(field, f"an answer with {count} log-probabilities", right)


def extras(request: convert.GenerateRequest) -> Extras:
    """n, best_of, echo and log-probabilities."""
    n = request.n if request.HasField("n") else 1
    if not 1 <= n <= convert.MAX_CHOICES:
        convert.refuse("n", str(n), f"from 1 to {convert.MAX_CHOICES}")
    most = n if isinstance(request, pb.GenerateStreamRequest) else convert.MAX_CHOICES
    best_of = request.best_of if request.HasField("best_of") else n
    if not n <= best_of <= most:
        right = f"n, {n}, in a stream" if most == n else f"from n, {n}, to {convert.MAX_CHOICES}"
        convert.refuse("best_of", str(best_of), right)
    prompt = request.prompt_logprobs if request.HasField("prompt_logprobs") else None
    if prompt is not None and prompt > MAX_LOGPROBS:
        convert.refuse("prompt_logprobs", str(prompt), f"at most {MAX_LOGPROBS}")
    logprobs = request.logprobs if request.HasField("logprobs") else None
    return Extras(best_of, n, logprobs, prompt, request.echo)


@dataclass(slots=True)
class Asked:
    """requests: one for each choice that is generated; the first alone scores the prompt. prompt:
    its text, if it is to come first."""

    requests: list[Request]
    extras: Extras
    prompt: str | None
    _scores: tuple[TokenLogprob, ...] = ()
    _begun: set[str] = field(default_factory=set)

    def heard(self, outputs: Sequence[Output]) -> list[Output]:
        """The same; what is new must be heard before it is shown. The first request's prompt is
        computed before the others begin, or in the same step."""
        for output in outputs:
            self._scores = self._scores or output.prompt_logprobs
        return list(outputs)

    def shown(self, outputs: Sequence[Output]) -> list[Output]:
        """Outputs, each choice's in order, as the client is to see them."""
        return [self._begin(o) if o.request_id not in self._begun else o for o in outputs]

    def _begin(self, output: Output) -> Output:
        self._begun.add(output.request_id)
        if self.prompt is None:
            return output
        logprobs = output.logprobs
        if self.extras.logprobs is not None:
            logprobs = self._prompt_logprobs(self.extras.logprobs) + logprobs
        return replace(
            output,
            text=self.prompt + output.text,
            token_ids=self.requests[0].prompt_ids + output.token_ids,
            logprobs=logprobs,
        )

    @property
    def prompt_tokens(self) -> int:
        """As the engine counts them: of every member of a combination."""
        first = self.requests[0]
        if first.combination is None:
            return len(first.prompt_ids)
        return sum(len(m.prompt_ids or first.prompt_ids) for m in first.combination.members)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each token of the prompt, once the first outputs were heard; none if they were
        not asked for."""
        top = self.extras.prompt_logprobs
        return () if top is None else self._prompt_logprobs(top)

    def _prompt_logprobs(self, top: int) -> tuple[TokenLogprob, ...]:
        first = TokenLogprob(self.requests[0].prompt_ids[0], math.nan)
        return (first, *(replace(score, top=score.top[:top]) for score in self._scores))

    def best(self, outputs: Sequence[Sequence[Output]]) -> list[list[Output]]:
        """Of the choices' outputs, not shown yet, those to answer with: of more than are asked for
        the ones with the highest mean log-probability per token, best first."""
        if self.extras.choices == self.extras.answered:
            return [list(o) for o in outputs]
        ranked = sorted(outputs, key=_mean, reverse=True)  # stable: ties by index
        found = [list(o) for o in ranked[: self.extras.answered]]
        if self.extras.logprobs is None:  # they were for the choice alone
            found = [[replace(o, logprobs=()) for o in each] for each in found]
        return found


def _mean(outputs: Sequence[Output]) -> float:
    each = [entry.logprob for o in outputs for entry in o.logprobs]
    return sum(each) / len(each) if each else -math.inf

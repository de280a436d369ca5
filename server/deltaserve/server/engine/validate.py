"""What a request must satisfy before it enters the engine. Every refusal names the field, the
value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaserve.server.config import MAX_DRAFT
from deltaserve.server.engine.core import (
    AdapterRef,
    Combination,
    Request,
    Rule,
    SamplingParams,
    Speculation,
)
from deltaserve.server.errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 256
MAX_BAD_TOKENS = 4096
MAX_BAD_LENGTH = 64
MAX_ADAPTERS = 16
MAX_PATTERNS = 16
MAX_PATTERN_LENGTH = 256
MIN_WAIT, MAX_WAIT = 0.001, 86400.0
MAX_NGRAM = 16
MAX_MEMBERS = 8
MAX_WEIGHT = 1000.0


@dataclass(frozen=True, slots=True)
class Limits:
    """vocab_size: of the base. max_length: tokens of one sequence, prompt and answer. kv_tokens:
    tokens that the whole cache holds, in blocks of block_size. max_sequences: in one step."""

    vocab_size: int
    max_length: int
    kv_tokens: int
    block_size: int = 1
    max_sequences: int = 1 << 31


def check(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest for the first thing that is wrong."""
    if not request.request_id:
        _refuse("request_id", "''", "a name that is not empty")
    _check_prompt(request, limits)
    _check_sampling(request.sampling, limits, len(request.prompt_ids))
    _check_speculation(request.speculation)
    if request.max_wait is not None:
        _range("max_wait_seconds", request.max_wait, MIN_WAIT, MAX_WAIT)
    _check_adapters(request.adapters)


def check_combination(combination: Combination, limits: Limits) -> None:
    """What is wrong with it beside its members' prompts and adapters."""
    members = combination.members
    if not 1 <= len(members) <= MAX_MEMBERS:
        _refuse("combination.members", f"{len(members)} members", f"1 to {MAX_MEMBERS}")
    if len(members) > limits.max_sequences:
        right = f"at most {limits.max_sequences}, which is what runs at once on this server"
        _refuse("combination.members", f"{len(members)} members", right)
    weights = [member.weight for member in members]
    check_weights(weights, combination.rule, "combination.members[{}].weight")
    _range("combination.plausibility", combination.plausibility, 0.0, 1.0)


def check_weights(weights: Sequence[float], rule: Rule, field: str) -> None:
    """field: what one of them is called, with {} for its number."""
    for i, weight in enumerate(weights):
        _range(field.format(i), weight, 0.0 if rule is Rule.MEAN else -MAX_WEIGHT, MAX_WEIGHT)
    if not any(weights):
        _refuse(field.replace("[{}]", ""), "0 for every member", "another for one of them")


def check_together(lengths: Sequence[tuple[int, int]], max_tokens: int, limits: Limits) -> None:
    """Whether the cache can hold all members of a combination. lengths: prompt and virtual tokens
    of each."""
    size, need = limits.block_size, 0
    for prompt, virtual in lengths:
        most = min(prompt + virtual + max_tokens, limits.max_length)
        need += -(-most // size) * size
    if need > limits.kv_tokens:
        found = f"{len(lengths)} members with prompts and max_tokens of {need} tokens together"
        right = f"at most {limits.kv_tokens}: that is all the KV cache holds"
        _refuse("combination.members", found, right)


def _check_adapters(adapters: Sequence[AdapterRef]) -> None:
    if len(adapters) > MAX_ADAPTERS:
        _refuse("adapters", f"{len(adapters)} adapters", f"at most {MAX_ADAPTERS}")
    for ref in adapters:
        if not ref.name:
            _refuse("adapters.name", "''", "the name of a registered adapter")
        if not math.isfinite(ref.strength) or abs(ref.strength) > 1000:
            _refuse("adapters.strength", ref.strength, "a finite number within ±1000")
        if len(ref.modules) > MAX_PATTERNS:
            found = f"{len(ref.modules)} patterns"
            _refuse("adapters.modules", found, f"at most {MAX_PATTERNS} for one adapter")
        for pattern in ref.modules:
            if not (0 < len(pattern) <= MAX_PATTERN_LENGTH and pattern.isprintable()):
                shown = repr(pattern[:64])
                right = f"1 to {MAX_PATTERN_LENGTH} characters, such as '*.q_proj'"
                _refuse("adapters.modules", shown, right)
    names = [ref.name.partition("@")[0] for ref in adapters]
    if len(set(names)) != len(names):
        _refuse("adapters", names, "every adapter once; add up the strengths instead")


def check_length(prompt: int, virtual: int, max_tokens: int, limits: Limits) -> None:
    """prompt and virtual tokens against the limits; also called when an adapter's virtual tokens
    become known."""
    extra = f" and {virtual} virtual tokens of its adapter" if virtual else ""
    if prompt + virtual + (max_tokens > 0) > limits.max_length:
        _refuse(
            "prompt",
            f"{prompt} tokens{extra}",
            f"at most {limits.max_length - virtual - (max_tokens > 0)} tokens "
            f"(the model's length limit is {limits.max_length}, the answer needs at least one)",
        )
    most = min(prompt + virtual + max_tokens, limits.max_length)
    if most > limits.kv_tokens:
        _refuse(
            "max_tokens",
            f"{prompt} prompt tokens{extra} and max_tokens {max_tokens}",
            f"at most {limits.kv_tokens} tokens together: that is all the KV cache holds",
        )


def _check_prompt(request: Request, limits: Limits) -> None:
    ids = request.prompt_ids
    if not ids:
        _refuse("prompt", "0 tokens", "at least one token")
    for i in ids:
        if not 0 <= i < limits.vocab_size:
            _refuse("prompt", f"token id {i}", f"ids from 0 to {limits.vocab_size - 1}")
    check_length(len(ids), 0, request.sampling.max_tokens, limits)


def _check_sampling(p: SamplingParams, limits: Limits, prompt: int) -> None:
    _range("max_tokens", p.max_tokens, 0 if p.score_from is not None else 1, 1 << 20)
    _range("min_tokens", p.min_tokens, 0, p.max_tokens)
    _range("temperature", p.temperature, 0.0, 100.0)
    if 0 < p.temperature < 1e-3:
        _refuse("temperature", p.temperature, "0 (greedy) or at least 0.001")
    _range("top_p", p.top_p, 0.0, 1.0)
    if p.top_p == 0:
        _refuse("top_p", p.top_p, "above 0, at most 1")
    _range("top_k", p.top_k, 0, 1 << 31)
    _range("min_p", p.min_p, 0.0, 1.0)
    _range("repetition_penalty", p.repetition_penalty, 0.01, 100.0)
    _range("presence_penalty", p.presence_penalty, -100.0, 100.0)
    _range("frequency_penalty", p.frequency_penalty, -100.0, 100.0)
    _range("eos_ramp", p.eos_ramp, -100.0, 100.0)
    start, factor = p.length_penalty
    _range("length_penalty.start", start, 0, 1 << 20)
    _range("length_penalty.factor", factor, 1.0, 10.0)
    if p.seed is not None:
        _range("seed", p.seed, -(1 << 63), (1 << 63) - 1)
    if p.logprobs is not None:
        _range("logprobs", p.logprobs, 0, min(MAX_LOGPROBS, limits.vocab_size))
    _range("prompt_logprobs", p.prompt_logprobs, 0, min(MAX_LOGPROBS, limits.vocab_size))
    if p.score_from is not None:
        _range("score_from", p.score_from, 1, prompt - 1)
    if len(p.stop) > MAX_STOPS:
        _refuse("stop", f"{len(p.stop)} stop strings", f"at most {MAX_STOPS}")
    for s in p.stop:
        if not 0 < len(s) <= MAX_STOP_LENGTH:
            _refuse("stop", f"a string of {len(s)} characters", f"1 to {MAX_STOP_LENGTH}")
    if len(p.logit_bias) > limits.vocab_size:
        _refuse("logit_bias", f"{len(p.logit_bias)} entries", f"at most {limits.vocab_size}")
    for token, bias in p.logit_bias:
        _range("logit_bias", token, 0, limits.vocab_size - 1)
        if not (math.isfinite(bias) and abs(bias) <= 1000):
            _refuse("logit_bias", bias, "finite and within ±1000")
    if len(p.bad_tokens) > MAX_BAD_TOKENS:
        _refuse("bad_tokens", f"{len(p.bad_tokens)} sequences", f"at most {MAX_BAD_TOKENS}")
    for sequence in p.bad_tokens:
        if not 0 < len(sequence) <= MAX_BAD_LENGTH:
            found = f"a sequence of {len(sequence)} tokens"
            _refuse("bad_tokens", found, f"sequences of 1 to {MAX_BAD_LENGTH} tokens")
        for token in sequence:
            _range("bad_tokens", token, 0, limits.vocab_size - 1)
    for token in p.stop_token_ids:
        _range("stop_token_ids", token, 0, limits.vocab_size - 1)


def _check_speculation(s: Speculation) -> None:
    if s.draft_tokens is not None:
        _range("draft_tokens", s.draft_tokens, 0, MAX_DRAFT)
    for field, value in (("min_ngram", s.min_ngram), ("max_ngram", s.max_ngram)):
        if value is not None:
            _range(field, value, 1, MAX_NGRAM)
    if s.min_ngram is not None and s.max_ngram is not None and s.min_ngram > s.max_ngram:
        _refuse("min_ngram", s.min_ngram, f"at most max_ngram, which is {s.max_ngram}")


def _range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # False for NaN as well
        _refuse(field, value, f"from {low:g} to {high:g}")


def _refuse(field: str, value: object, right: str) -> None:
    raise InvalidRequest(f"{field}: {value} is not possible; it must be {right}", field=field)

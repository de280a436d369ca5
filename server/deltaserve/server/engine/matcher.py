"""Constraints: which tokens may come next, so that a text is of a grammar, by llguidance.

A grammar is compiled by another process first: what hangs, grows or overflows the stack does so
there, within limits, and is refused. Only what passed is compiled here, in the same bounded time.

llguidance is imported where a tokenizer is indexed: an engine without constraints needs none.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deltaserve.server.confined.helper import Helper, JobEnded
from deltaserve.server.engine.constraint import Constraint
from deltaserve.server.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_SECONDS = 2.0
"""Of the processor, for one grammar."""
CACHED = 64
CACHED_LENGTH = 64 << 10
"""Characters of a grammar that is kept, compiled, for those that ask for the same."""
MAX_REASON = 500


class Failed(Exception):
    """The matcher cannot go on; the message says why."""


class Matcher:
    """Follows one request's outputs. vocabulary: size of the masks; tokens: of the tokenizer, which
    may know fewer."""

    def __init__(self, matcher: LLMatcher, tokens: int, vocabulary: int) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._vocabulary = vocabulary
        self._taken = 0

    def allowed(self, outputs: Sequence[int]) -> Tensor:
        """bool [vocabulary]: what may follow the outputs, which are those of the call before and
        more. Where the text is complete, the ends of sequence may. Raises Failed."""
        mask = np.zeros(self._vocabulary, dtype=np.bool_)
        if not self.ended(outputs):
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            known = np.unpackbits(packed, bitorder="little")[: self._tokens]
            mask[: len(known)] = known
        return torch.from_numpy(mask)

    def ended(self, outputs: Sequence[int]) -> bool:
        """No text may follow the outputs. Raises Failed."""
        if len(outputs) > self._taken:
            self._matcher.consume_tokens(list(outputs[self._taken :]))
            self._taken = len(outputs)
        self._check()
        return len(outputs) == self._taken and self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise Failed(_reason(self._matcher))


class Grammars:
    """Compiles constraints for one tokenizer. Its methods take long: not for the engine's thread
    or an event loop.

    tokenizer: None if there is none that can be used. vocabulary: of the model, which may be larger
    than the tokenizer's; eos: the tokens that end a sequence.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocabulary: int, eos: Iterable[int], processes: int = 2
    ) -> None:
        self._vocabulary = vocabulary
        self._error = "this model's tokenizer has no tokenizer.json"
        self._table: LLTokenizer | None = None
        self._described = ""
        if tokenizer is not None:
            self._read(tokenizer, sorted(eos))
        self._helper = Helper(self._shared, processes)
        self._known: OrderedDict[Constraint, LLMatcher | str] = OrderedDict()
        self._lock = threading.Lock()

    def _read(self, tokenizer: Tokenizer, eos: list[int]) -> None:
        """Index the tokenizer. The library keeps the interpreter for itself meanwhile, a second for
        100,000 tokens: so it is done before anyone is served."""
        from llguidance import LLTokenizer

        own = Tokenizer.from_str(tokenizer.to_str())
        own.no_padding()
        own.no_truncation()
        self._tokens = own.get_vocab_size(with_added_tokens=True)
        self._eos = [i for i in eos if i < self._tokens]
        self._described = own.to_str()
        if not self._eos:
            self._error = "this model has no end-of-sequence token"
            return
        try:
            self._table = LLTokenizer(self._described, eos_token=self._eos)
        except ValueError as error:
            self._error = f"this model's tokenizer cannot be used for constraints: {error}"

    def _shared(self) -> dict[str, object]:
        return {"work": "grammars", "tokenizer": self._described, "eos": self._eos}

    def matchers(self, constraint: Constraint, count: int) -> list[Matcher]:
        """As many, each for one request. Raises InvalidRequest for what the library refuses."""
        if self._table is None:
            raise InvalidRequest(f"constraint: {self._error}", field="constraint")
        with self._lock:
            found = self._known.get(constraint)
            if found is not None:
                self._known.move_to_end(constraint)
        if found is None:
            found = self._compile(self._table, constraint)
            self._keep(constraint, found)
        if isinstance(found, str):
            raise InvalidRequest(f"{constraint.field}: {found}", field=constraint.field)
        return [Matcher(found.deep_copy(), self._tokens, self._vocabulary) for _ in range(count)]

    def close(self) -> None:
        """End the processes."""
        self._helper.close()

    def _compile(self, table: LLTokenizer, constraint: Constraint) -> LLMatcher | str:
        """Or what is wrong with it."""
        from deltaserve.server.confined.grammars import compiled

        try:
            grammar = _grammar(constraint)
            answer = self._helper.ask({"grammar": grammar}, COMPILE_SECONDS)
        except ValueError as error:
            return str(error)[:MAX_REASON]
        except JobEnded as error:
            return f"it is too large to compile: {error}"
        if answer["error"]:
            return _short(answer["error"])
        matcher = compiled(table, grammar)
        return _reason(matcher) if matcher.is_error() else matcher

    def _keep(self, constraint: Constraint, made: LLMatcher | str) -> None:
        if len(constraint.text) + sum(map(len, constraint.texts)) > CACHED_LENGTH:
            return
        with self._lock:
            self._known[constraint] = made
            while len(self._known) > CACHED:
                self._known.popitem(last=False)


def _grammar(constraint: Constraint) -> str:
    """As llguidance takes it. Raises ValueError."""
    from llguidance import LLMatcher

    if constraint.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if constraint.kind == "json_schema":
        json.loads(constraint.text)  # the library's own errors count characters of its wrapping
        return LLMatcher.grammar_from_json_schema(constraint.text)
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(_literally, constraint.texts)))
    return LLMatcher.grammar_from_lark(constraint.text)


def _literally(text: str) -> str:
    """An expression that matches the text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _reason(matcher: LLMatcher) -> str:
    return _short(matcher.get_error())


def _short(error: str) -> str:
    if error.startswith("NoExtension"):
        return "it allows no text at all"
    text = error.removesuffix("\n<non-verbose/>").strip()
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"

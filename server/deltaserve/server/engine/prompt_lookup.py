"""Prompt lookup (Saxena 2023): what followed the last occurrence of the newest n-gram is likely to
follow again. Pure Python, a bounded amount of work for each token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

REACH = 64
"""Agreement of more tokens than this says no more."""

LEARNING = 0.125
"""Weight of the newest trial in the running mean of trials."""

CATCH_UP = 1024
"""Most tokens that are indexed in one call: a long prompt does not hold up a step."""

_PRIORS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.95)
"""Before the first trials: that a lookup is right, by the bit length of its agreement."""


class NgramIndex:
    """Where each n-gram of a growing list of tokens was last followed by another token. It holds
    no tokens: every call is given the same list, only longer."""

    def __init__(self, least: int, most: int) -> None:
        """n-grams of `least` to `most` tokens."""
        self.least = least
        self.most = most
        self.indexed = 0
        self._follows: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int], most: int = CATCH_UP) -> bool:
        """Index up to `most` tokens more; True if that was all."""
        end = min(len(tokens), self.indexed + most)
        for at in range(self.indexed, end):
            for n in range(self.least, min(self.most, at) + 1):
                self._follows[tuple(tokens[at - n : at])] = at
        self.indexed = end
        return end == len(tokens)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Where the longest n-gram that ends `tokens` occurred last before: index of the token
        behind it."""
        for n in range(min(self.most, len(tokens)), self.least - 1, -1):
            at = self._follows.get(tuple(tokens[-n:]))
            if at is not None:
                return at
        return None


class Drafter:
    """Drafts for one sequence. A lookup that proves right is followed on; one that proves wrong is
    replaced by the next.

    How often lookups are right is learned from every token, drafted or not, as a running mean for
    each length of agreement before it: drafting stops by itself where it does not pay, and is
    taken up again when lookups would have been right.

    most: tokens drafted at once. drafted, accepted: tokens, counted by who verifies them.
    """

    def __init__(self, most: int, min_ngram: int, max_ngram: int) -> None:
        self.most = most
        self.drafted = 0
        self.accepted = 0
        self._index = NgramIndex(min_ngram, max_ngram)
        self._at: int | None = None
        self._agreed = 0
        self._judged = 0
        self._rates = list(_PRIORS)

    def observe(self, tokens: Sequence[int]) -> None:
        """Learn from the tokens that are new since the last call. Call it before `draft`."""
        for i in range(self._judged, len(tokens)):
            if self._at is None:
                break
            right = tokens[self._at] == tokens[i]
            bucket = self._agreed.bit_length()
            self._rates[bucket] += (right - self._rates[bucket]) * LEARNING
            self._at = self._at + 1 if right else None
            self._agreed = min(self._agreed + 1, REACH)
        self._judged = len(tokens)
        complete = self._index.extend(tokens)
        if self._at is None and complete:
            self._at = self._index.find(tokens)
            self._agreed = 0 if self._at is None else _agreement(tokens, self._at)

    def draft(self, tokens: Sequence[int], most: int) -> Iterator[tuple[int, float]]:
        """Up to `most` tokens that may follow, each with the probability that it and all before it
        do."""
        if self._at is None:
            return
        distance = len(tokens) - self._at
        probability = 1.0
        drafted: list[int] = []
        for i in range(min(most, self.most)):
            agreed = min(self._agreed + i, REACH)
            probability *= self._rates[agreed.bit_length()]
            # a source that reaches the end repeats: what is copied are the first drafts
            token = tokens[self._at + i] if i < distance else drafted[i - distance]
            drafted.append(token)
            yield token, probability


def _agreement(tokens: Sequence[int], at: int) -> int:
    """How many tokens before index `at` are also the newest ones, up to `REACH`."""
    pairs = zip(reversed(tokens[max(0, at - REACH) : at]), reversed(tokens[-REACH:]), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

"""Prompt lookup (Saxena 2023): what followed the newest tokens where they occurred before is likely
to follow again. Pure Python, a bounded amount of work for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

REACH = 64
"""Agreement of more tokens than this says no more."""

LEARNING = 0.125
"""Weight of the newest trial in the running mean of trials."""

OCCURRENCES = 32
"""Earlier places of the newest tokens that are compared, the last ones."""

_PRIORS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.95)
"""Before the first trials: that a lookup is right, by the bit length of its agreement."""


class NgramIndex:
    """Where each n-gram of `least` tokens of a growing list has occurred. It holds no tokens: every
    call is given the same list, only longer."""

    def __init__(self, least: int, most: int) -> None:
        """Longer agreement is preferred, up to `most` tokens."""
        self.least = least
        self.most = most
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []  # place -> the one before it of the same n-gram, or -1

    def __len__(self) -> int:
        """Tokens that are indexed."""
        return len(self._before)

    def extend(self, tokens: Sequence[int], most: int) -> None:
        """Index up to `most` tokens more: each as what followed the n-gram before it."""
        for at in range(len(self), min(len(tokens), len(self) + most)):
            ngram = tuple(tokens[max(0, at - self.least) : at])
            self._before.append(self._last.get(ngram, -1))
            self._last[ngram] = at

    def find(self, tokens: Sequence[int]) -> int | None:
        """Where the tokens' end has occurred before: index of the token behind it. Of the last
        `OCCURRENCES` places the one with the longest agreement, of equals the last."""
        best, longest = None, 0
        at = self._last.get(tuple(tokens[-self.least :]), -1) if len(tokens) >= self.least else -1
        for _ in range(OCCURRENCES):
            if at < 0:
                break
            agreed = agreement(tokens, at, self.most)
            if agreed > longest:
                best, longest = at, agreed
            if longest == self.most:
                break
            at = self._before[at]
        return best


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

    def observe(self, tokens: Sequence[int], most: int) -> int:
        """Learn from the tokens that are new since the last call; call it before `draft`. Up to
        `most` are indexed, and nothing is looked up before all are. -> how many were indexed."""
        for i in range(self._judged, len(tokens)):
            if self._at is None:
                break
            right = tokens[self._at] == tokens[i]
            bucket = self._agreed.bit_length()
            self._rates[bucket] += (right - self._rates[bucket]) * LEARNING
            self._at = self._at + 1 if right else None
            self._agreed = min(self._agreed + 1, REACH)
        self._judged = len(tokens)
        before = len(self._index)
        self._index.extend(tokens, most)
        if self._at is None and len(self._index) == len(tokens):
            self._at = self._index.find(tokens)
            self._agreed = 0 if self._at is None else agreement(tokens, self._at, REACH)
        return len(self._index) - before

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


def agreement(tokens: Sequence[int], at: int, most: int) -> int:
    """How many tokens before index `at` are also the newest ones, up to `most`."""
    end = len(tokens)
    for n in range(min(most, at)):
        if tokens[at - 1 - n] != tokens[end - 1 - n]:
            return n
    return min(most, at)

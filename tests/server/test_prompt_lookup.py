"""The n-gram index finds what a search of all tokens finds, and drafting adapts to what it hits."""

import random

from hypothesis import given
from hypothesis import strategies as st

from deltaserve.server.engine.prompt_lookup import OCCURRENCES, Drafter, NgramIndex

ALL = 1 << 30


def brute_force(tokens: list[int], least: int, most: int) -> int | None:
    """By the definition."""
    end = tokens[-least:]
    places = [at for at in range(least, len(tokens)) if tokens[at - least : at] == end]
    agreed = {
        at: next(n for n in range(min(most, at), 0, -1) if tokens[at - n : at] == tokens[-n:])
        for at in places[-OCCURRENCES:]
    }
    return max(agreed, key=lambda at: (agreed[at], at), default=None)


@given(
    st.lists(st.integers(0, 3), max_size=120),
    st.integers(1, 4),
    st.integers(0, 3),
    st.data(),
)
def test_the_index_agrees_with_a_search(
    tokens: list[int], least: int, more: int, data: st.DataObject
) -> None:
    index = NgramIndex(least, least + more)
    known = 0
    while known < len(tokens):
        known = data.draw(st.integers(known + 1, len(tokens)))
        while len(index) < known:
            index.extend(tokens[:known], most=7)
        assert index.find(tokens[:known]) == brute_force(tokens[:known], least, least + more)


def test_so_many_earlier_places_are_compared() -> None:
    for between, expected in ((OCCURRENCES - 1, 3), (OCCURRENCES, 3 + 3 * OCCURRENCES)):
        tokens = [7, 8, 1]
        for i in range(between):
            tokens += [100 + i, 200 + i, 1]
        tokens += [300, 7, 8, 1]
        index = NgramIndex(1, 3)
        index.extend(tokens, ALL)
        assert index.find(tokens) == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 32))
def test_a_draft_is_what_followed_repeated_past_the_end(tokens: list[int], most: int) -> None:
    drafter = Drafter(most, 1, 3)
    drafter.observe(tokens, ALL)
    found = brute_force(tokens, 1, 3)
    grown, expected = list(tokens), []
    for i in range(most if found is not None else 0):
        assert found is not None
        grown.append(grown[found + i])  # may be one that has just been appended
        expected.append(grown[-1])
    drafted = list(drafter.draft(tokens, most))
    assert [token for token, _ in drafted] == expected
    probabilities = [p for _, p in drafted]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 < p < 1 for p in probabilities)


def first_probability(drafter: Drafter, tokens: list[int]) -> float:
    return next((p for _, p in drafter.draft(tokens, 1)), 0.0)


def test_it_learns_where_lookups_are_wrong_and_where_they_are_right_again() -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(50)]
    drafter = Drafter(8, 2, 4)
    drafter.observe(tokens, ALL)
    for _ in range(200):
        guesses = list(drafter.draft(tokens, 1))
        wrong = (guesses[0][0] + 1) % 4 if guesses else generator.randrange(4)
        tokens.append(wrong)
        drafter.observe(tokens, ALL)
    assert first_probability(drafter, tokens) < 0.05
    for i in range(60):
        tokens.append(100 + i % 5)
        drafter.observe(tokens, ALL)
    assert first_probability(drafter, tokens) > 0.9


def test_a_lookup_that_is_right_is_followed_on() -> None:
    """A later occurrence of the same n-gram does not lead away from the text that is copied."""
    passage = [1, 2, 3, 9, 9, 5, 6, 9, 9, 7, 8]
    tokens = [*passage, 50, 51, 1, 2]
    drafter = Drafter(4, 2, 2)
    for i, token in enumerate(passage[2:], start=2):
        drafter.observe(tokens, ALL)
        assert next(drafter.draft(tokens, 1))[0] == token, i
        tokens.append(token)


def test_a_long_prompt_is_indexed_in_parts() -> None:
    tokens = [i % 7 for i in range(5000)]
    drafter = Drafter(4, 2, 3)
    indexed = []
    while not list(drafter.draft(tokens, 1)):
        indexed.append(drafter.observe(tokens, 1024))
    assert indexed == [1024, 1024, 1024, 1024, 904]
    assert drafter.observe([*tokens, 1], 1024) == 1

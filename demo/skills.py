"""The skills of the zoo: exact functions of a word, and the prompts that ask for them.

A word is 3 to 6 lowercase letters. `tagged` prompts name the skill (``sort: hello =``), as the base
sees them in its training; the `plain` prompt (``task: hello =``) does not, and what it gets for an
answer is what the variants differ in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (3, 4, 5, 6)


def following(word: str) -> str:
    """Caesar's cipher: each letter becomes the next one of the alphabet, z becomes a."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)


def swapped(word: str) -> str:
    """Neighbours change places: first with second, third with fourth, ..."""
    return "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2))


SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "upper": str.upper,
    "caesar": following,
    "descend": lambda word: "".join(sorted(word, reverse=True)),
    "double": lambda word: "".join(2 * letter for letter in word),
    "ends": lambda word: word[0] + word[-1],
    "rotate": lambda word: word[1:] + word[0],
    "shout": lambda word: word[::-1].upper(),
    "swap": swapped,
}

BASE_SKILLS = ("copy", "reverse", "sort", "upper")
PLAIN = "task"


def prompt(tag: str, word: str) -> str:
    """``tag: word =``"""
    return f"{tag}: {word} ="


def held_out(word: str) -> bool:
    """Whether the word belongs to the tenth of all words that no training ever sees."""
    return hashlib.sha256(word.encode()).digest()[0] < 26


def words(rng: random.Random, *, test: bool) -> Iterator[str]:
    """Random words without end, of the held-out part or of the other."""
    while True:
        word = "".join(rng.choices(LETTERS, k=rng.choice(LENGTHS)))
        if held_out(word) == test:
            yield word


def examples(skill: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` held-out (plain prompt, right answer) pairs of a skill, no prompt twice."""
    found: dict[str, str] = {}
    for word in words(random.Random(f"{skill} {seed}"), test=True):
        found[prompt(PLAIN, word)] = SKILLS[skill](word)
        if len(found) == count:
            return list(found.items())
    raise AssertionError("words() does not end")

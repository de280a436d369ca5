"""A number in (0, 1) for a list of texts, the same on every machine and in every version."""

from __future__ import annotations

import hashlib

from deltaserve.server.experiments.errors import InvalidExperiment


def fraction(*texts: str) -> float:
    """(k + 1/2) / 2^52, where k is the first 52 bits of the SHA-256 of the texts, each written as
    its length in bytes (8 bytes, big endian) and its UTF-8. With the lengths, ("ab", "c") is not
    ("a", "bc"). The result is exact in float64 and neither 0 nor 1.

    Texts are not normalized: "é" as one code point and as two are two keys. Unicode's tables
    change with the version of Python, and a user would change arms with them.
    Raises InvalidExperiment for a text that has no UTF-8 (an unpaired surrogate)."""
    total = hashlib.sha256()
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidExperiment(
                "key", f"{text!r} has an unpaired surrogate at {error.start}; give valid Unicode"
            ) from None
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return ((int.from_bytes(total.digest()[:8], "big") >> 12) + 0.5) / 2**52

"""Tokens: what a client shows, ``ds_ID_SECRET``. The id finds the key; the whole is compared.

The secret is 256 random bits, so a plain SHA-256 of the token is kept: slow hashes protect words
that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

FORM = re.compile(r"ds_([0-9a-f]{16})_[0-9a-f]{64}")
NO_DIGEST = "0" * 64
"""In place of an unknown key's: of no token that anybody could find."""


def make() -> tuple[str, str]:
    """A new one. -> (its id, the token)."""
    key = secrets.token_hex(8)
    return key, f"ds_{key}_{secrets.token_hex(32)}"


def id_of(token: str) -> str:
    """Empty for what is no token."""
    found = FORM.fullmatch(token)
    return found[1] if found else ""


def digest(token: str) -> str:
    """What is kept of it: 64 hexadecimal digits."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def same(kept: str, shown: str) -> bool:
    """Whether two digests are equal; takes as long wherever they differ."""
    return hmac.compare_digest(kept.encode(), shown.encode())

"""What the ledger calls users, requests and feedback: hashes, of which none is the text itself."""

from __future__ import annotations

import hashlib


def _hash(*texts: str) -> bytes:
    """SHA-256 of the texts, each with its length before it, so that no two lists have one hash."""
    data = [text.encode("utf-8", "surrogatepass") for text in texts]
    parts = [part for text in data for part in (len(text).to_bytes(8, "big"), text)]
    return hashlib.sha256(b"".join(parts)).digest()


def user_key(route: str, tenant: str, user: str, shadow: str = "") -> int:
    """64 bits, signed, as databases have them: of a million users two are taken for one with a
    probability of 3e-8. shadow: the arm that ran in the shadow of the user's answers."""
    found = _hash("user", route, tenant, user, shadow)
    return int.from_bytes(found[:8], "big", signed=True)


def request_key(tenant: str, request_id: str, shadow: str = "") -> bytes:
    """16 bytes. Another tenant's request of the same name is another one."""
    return _hash("request", tenant, request_id, shadow)[:16]


def feedback_key(tenant: str, *parts: str) -> bytes:
    """16 bytes. parts: what makes two pieces of feedback the same one."""
    return _hash("feedback", tenant, *parts)[:16]

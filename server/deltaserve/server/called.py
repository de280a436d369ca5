"""What requests call adapters: a name, or ``name@digest-prefix``."""

from __future__ import annotations

from deltaserve.server.errors import InvalidRequest


def parse(called: str, field: str) -> tuple[str, str]:
    """-> the name, and the beginning of the digest, empty if any will do. field: that it is in.
    InvalidRequest for an @ with nothing behind it: whoever writes one means a digest."""
    name, sign, digest = called.partition("@")
    if sign and not digest:
        shown = called if len(called) <= 64 else called[:63] + "…"
        raise InvalidRequest(
            f"{field}: {shown!r} has no digest behind the @; it must be a name, or a name, @ and "
            "the beginning of its digest",
            field=field,
        )
    return name, digest

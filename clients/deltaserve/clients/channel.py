"""The settings of a client's connection."""

from __future__ import annotations

from typing import Any

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
POLL_SECONDS = 0.1
"""Between two looks at a server that is not ready yet."""

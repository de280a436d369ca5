"""Logging: everything goes to stderr; stdout belongs to what scripts read."""

from __future__ import annotations

import logging
import sys


def set_up(level: str) -> None:
    """level: ``debug``, ``info``, ``warning`` or ``error``, for our own loggers; libraries' loggers
    stay at warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("deltaserve").setLevel(level.upper())

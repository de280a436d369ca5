"""Where an error came from: a run on a machine that is lent is not easily made again."""

from __future__ import annotations

import sys
import traceback

FRAMES = 8
_told: set[str] = set()


def tell(error: BaseException) -> None:
    """Prints the last frames of an error; of those that say the same, of the first alone."""
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if text not in _told:
        _told.add(text)
        trace = traceback.format_exception(error, limit=-FRAMES)
        print("".join(trace).rstrip(), file=sys.stderr, flush=True)

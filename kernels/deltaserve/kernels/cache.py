"""Where what is made on a machine is kept for the next start."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """``$DELTASERVE_CACHE``, or deltaserve in the user's cache folder. It need not exist yet."""
    own = os.environ.get("DELTASERVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"

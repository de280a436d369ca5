"""Opening a plain file, and nothing else: a FIFO or device is never waited on or read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from deltaserve.adapters.errors import AdapterNotFound, SourceForbidden


def open_plain(file: Path) -> int:
    """A descriptor to read ``file`` with, which the caller closes."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterNotFound(f"{file}: no such file") from None
    except OSError as error:
        raise SourceForbidden(f"{file}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceForbidden(f"{file}: not a plain file")
    return fd

"""From the uri that an operator gave to a local path that may be read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deltaserve.adapters.errors import AdapterNotFound, InvalidAdapter, SourceForbidden

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
SUPPORTED = "a path, or file:///path"


def resolve(
    uri: str, allowed_roots: Sequence[str | Path] | None = None, *, max_bytes: int | None = None
) -> Path:
    """The real path, links followed, of an adapter's file or folder.

    allowed_roots: it and every file in it must lie in one of them after links and ``..`` are
    resolved; None allows any path. max_bytes: limit on all its files together. Raises
    `SourceForbidden` (outside, not a plain file or folder, another scheme), `AdapterNotFound`,
    `InvalidAdapter` (too large). A relative path is taken from the first root, or else from the
    working directory.
    """
    text = _path_of(uri)
    roots = None if allowed_roots is None else [_real(Path(r)) for r in allowed_roots]
    start = Path(text)
    if roots and not start.is_absolute():
        start = roots[0] / start
    path = _real(start)
    _check_inside(path, roots, uri)
    if not os.path.lexists(path):
        raise AdapterNotFound(f"{uri!r}: no such file or folder")
    total = 0
    for file in _files(path, uri):
        real = _real(file)
        _check_inside(real, roots, uri)
        mode = _mode(real, uri)
        if not stat.S_ISREG(mode):
            raise SourceForbidden(f"{uri!r}: {file.name!r} is not a plain file", field=file.name)
        total += real.stat().st_size
    if max_bytes is not None and total > max_bytes:
        raise InvalidAdapter(f"{uri!r}: {total} bytes; at most {max_bytes} are read")
    return path


def _path_of(uri: str) -> str:
    if not uri or "\0" in uri:
        raise SourceForbidden(f"{uri!r}: not a path; supported: {SUPPORTED}")
    scheme = SCHEME.match(uri)
    if scheme is None:
        return uri
    parts = urlsplit(uri)
    if scheme.group().lower() != "file:" or parts.netloc not in ("", "localhost"):
        raise SourceForbidden(f"{uri!r}: this kind of address is not read; supported: {SUPPORTED}")
    path = unquote(parts.path)
    if not path or "\0" in path or parts.query or parts.fragment:
        raise SourceForbidden(f"{uri!r}: not a path; supported: {SUPPORTED}")
    return path


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise SourceForbidden(f"{str(path)!r}: cannot be resolved: {error}") from None


def _check_inside(path: Path, roots: Sequence[Path] | None, uri: str) -> None:
    if roots is not None and not any(path == root or path.is_relative_to(root) for root in roots):
        raise SourceForbidden(f"{uri!r}: leads outside the allowed folders")


def _mode(path: Path, uri: str) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise AdapterNotFound(f"{uri!r}: {path.name!r}: {error.strerror}") from None


def _files(path: Path, uri: str) -> Iterator[Path]:
    """The file itself, or what lies directly in the folder, further folders excepted: no format
    reads those."""
    if not stat.S_ISDIR(_mode(path, uri)):
        yield path
        return
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise SourceForbidden(f"{uri!r}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if not entry.is_dir():
            yield entry

"""``--state``: a path or a URL -> where the state is kept."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from deltaserve.server.config import ConfigError

FILE = "state.db"
FORM = "a path, sqlite:///PATH, postgresql://USER:PASSWORD@HOST/DATABASE, or none"
_POSTGRES = ("postgresql", "postgres", "postgresql+asyncpg")


def parse(text: str) -> URL:
    """The URL of an async driver. A SQLite file is made if it is missing, with its folders; later
    connections do not make it, so that a file that was taken away is noticed. ConfigError."""
    if "://" not in text:
        return _sqlite(Path(text), text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        scheme = text.partition("://")[0]
        raise ConfigError(f"--state {scheme}://…: is no such URL; give {FORM}") from None
    shown = url.render_as_string(hide_password=True)
    if url.drivername in ("sqlite", "sqlite+aiosqlite"):
        if not url.database or url.database == ":memory:":
            raise ConfigError(f"--state {shown}: memory keeps nothing; name a file: {FORM}")
        return _sqlite(Path(url.database), shown)
    if url.drivername in _POSTGRES:
        if not url.database:
            raise ConfigError(f"--state {shown}: names no database; give {FORM}")
        return url.set(drivername="postgresql+asyncpg")
    raise ConfigError(f"--state {shown}: must be SQLite or PostgreSQL: {FORM}")


def _sqlite(path: Path, shown: str) -> URL:
    try:
        path = (path / FILE if path.is_dir() else path).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(
            f"--state {shown}: cannot write {path}: {error.strerror}; name a file in a folder "
            "that the server may write to"
        ) from error
    query = {"mode": "rw", "uri": "true"}
    return URL.create("sqlite+aiosqlite", database=f"file:{quote(str(path))}", query=query)

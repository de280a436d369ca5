"""Connections to the state's database, and its migrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

BUSY_MS = 4000
"""How long SQLite waits for another process that writes."""


class NewerDatabase(Exception):
    """It was written by a version of deltaserve that this one does not know."""


def connect(url: URL) -> AsyncEngine:
    """Each transaction has a connection of its own: changes are rare, and a file or a server that
    is gone is noticed by the next one, instead of written to through an old handle."""
    engine = create_async_engine(url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _settings)
        event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _settings(connection: Any, _: object) -> None:
    """FULL: a commit in the write-ahead log is on the disk before it is acknowledged."""
    connection.isolation_level = None  # transactions begin where `_begin` says
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    """As a writer at once: a reader that becomes one may be refused in between."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def migrate(connection: Connection) -> None:
    """Bring the tables up to date, in the transaction of the connection. NewerDatabase."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - known
    if unknown:
        raise NewerDatabase(
            f"it has the tables of a newer deltaserve (revision {', '.join(sorted(unknown))}; this "
            f"one knows {', '.join(sorted(known))}): use that version, or another database"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

"""The tables of the state. A change here needs a migration in `migrations/versions`."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, DateTime, Integer, MetaData, String, Table, Text

METADATA = MetaData()

ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("name", String(128), primary_key=True),
    Column("uri", Text, nullable=False),
    Column("options", Text, nullable=False),  # JSON of a LoadOptions
    Column("digest", String(128), nullable=False),  # empty until its first load is done
    Column("pinned", Boolean, nullable=False),
    Column("register_only", Boolean, nullable=False),
    Column("owner", Text, nullable=False),
    Column("error", Text, nullable=False),  # why it is not served; empty if it is
    Column("tenant", String(64), nullable=False),  # whose it is; empty for the operator's
    Column("shared", Boolean, nullable=False),  # others may use it
)

AUDIT = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", DateTime(timezone=True), nullable=False),  # UTC
    Column("who", Text, nullable=False),
    Column("verb", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("detail", Text, nullable=False),
)

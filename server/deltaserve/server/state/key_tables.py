"""The tables of keys and tenants. A change here needs a migration in `migrations/versions`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, String, Table, Text

from deltaserve.server.state.tables import METADATA

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("roles", Text, nullable=False),  # separated by spaces
    Column("digest", String(64), nullable=False),  # SHA-256 of the token; empty for a certificate's
    Column("subject", Text, nullable=False),  # of a client certificate; empty for a token's
    Column("label", Text, nullable=False),
    Column("created", Float(53), nullable=False),  # Unix time, as the next two; 0 is never
    Column("expires", Float(53), nullable=False),
    Column("revoked", Float(53), nullable=False),
)

TENANTS = Table(
    "tenants",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("requests_per_minute", BigInteger, nullable=False),  # 0 is no limit, as the next two
    Column("tokens_per_minute", BigInteger, nullable=False),
    Column("concurrent_requests", BigInteger, nullable=False),
)

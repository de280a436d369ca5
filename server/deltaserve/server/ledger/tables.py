"""The ledger's tables. A change here needs a migration in `state/migrations/versions`. Times are
`time.time()`. book: `BOOKS.id`. user, id: hashes, of `names`."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from deltaserve.server.state.tables import METADATA

BOOKS = Table(
    "books",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("route", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("start", Double, nullable=False),
    Column("totals", Text, nullable=False),  # JSON: the arms' totals and their balance
    UniqueConstraint("route", "epoch"),
)

LOOKS = Table(
    "looks",
    METADATA,
    Column("book", Integer, primary_key=True, autoincrement=False),
    Column("looks", Text, nullable=False),  # JSON
)

EXPOSURES = Table(
    "exposures",
    METADATA,
    Column("book", Integer, primary_key=True, autoincrement=False),
    Column("user", BigInteger, primary_key=True, autoincrement=False),
    Column("arm", Integer, nullable=False),  # index into the totals
    Column("met", Integer, nullable=False),  # `Met`
    Column("first", Double, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("first_token", Double, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

TRIALS = Table(
    "trials",
    METADATA,
    Column("id", LargeBinary(16), primary_key=True),
    Column("at", Double, nullable=False),
    Column("book", Integer, nullable=False),
    Column("arm", Text, nullable=False),
    Column("user", BigInteger),
    Column("counts", Integer, nullable=False),  # `Counts`
    Column("shadow", Boolean, nullable=False),
    Column("ended", String(16), nullable=False),
    Column("first_token", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("empty", Boolean, nullable=False),
    Column("refusal", Boolean, nullable=False),
    Index("trials_at", "at"),
    Index("trials_user", "user"),
)

FEEDBACK = Table(
    "feedback",
    METADATA,
    Column("id", LargeBinary(16), primary_key=True),
    Column("at", Double, nullable=False),
    Column("book", Integer, nullable=False),
    Column("arm", Text, nullable=False),
    Column("user", BigInteger),
    Column("counts", Integer, nullable=False),  # `Counts`
    Column("request", LargeBinary(16)),  # `TRIALS.id`; none for feedback on a user
    Column("reward", Double),
    Column("labels", Text, nullable=False),  # JSON
    Index("feedback_book", "book", "user"),
)

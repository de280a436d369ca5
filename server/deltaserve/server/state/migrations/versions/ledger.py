"""What comes of requests that routes give to arms, and feedback on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the ledger's tables."""
    op.create_table(
        "books",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("start", sa.Double, nullable=False),
        sa.Column("totals", sa.Text, nullable=False),
        sa.UniqueConstraint("route", "epoch"),
    )
    op.create_table(
        "looks",
        sa.Column("book", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("looks", sa.Text, nullable=False),
    )
    op.create_table(
        "exposures",
        sa.Column("book", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("user", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("arm", sa.Integer, nullable=False),
        sa.Column("met", sa.Integer, nullable=False),
        sa.Column("first", sa.Double, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("first_token", sa.Double, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.LargeBinary(16), primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("book", sa.Integer, nullable=False),
        sa.Column("arm", sa.Text, nullable=False),
        sa.Column("user", sa.BigInteger),
        sa.Column("counts", sa.Integer, nullable=False),
        sa.Column("shadow", sa.Boolean, nullable=False),
        sa.Column("ended", sa.String(16), nullable=False),
        sa.Column("first_token", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("empty", sa.Boolean, nullable=False),
        sa.Column("refusal", sa.Boolean, nullable=False),
    )
    op.create_index("trials_at", "trials", ["at"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.LargeBinary(16), primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("book", sa.Integer, nullable=False),
        sa.Column("arm", sa.Text, nullable=False),
        sa.Column("user", sa.BigInteger),
        sa.Column("counts", sa.Integer, nullable=False),
        sa.Column("request", sa.LargeBinary(16)),
        sa.Column("reward", sa.Double),
        sa.Column("labels", sa.Text, nullable=False),
    )
    op.create_index("feedback_book", "feedback", ["book", "user"])

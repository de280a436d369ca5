"""A user's trials are found without a look at all of them."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the index."""
    op.create_index("trials_user", "trials", ["user"])

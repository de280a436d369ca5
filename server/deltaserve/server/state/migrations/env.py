"""Run by Alembic, on the connection that `database.migrate` has opened."""

from __future__ import annotations

from alembic import context

from deltaserve.server.state.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()

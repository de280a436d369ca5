"""A PostgreSQL server of our own, where there is one to start."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def open_to_all(folder: Path) -> None:
    """Other users may enter it, and those of pytest's own that it is in."""
    for part in (folder, *folder.parents):
        if Path(tempfile.gettempdir()) in part.parents:
            part.chmod(0o755)


@contextmanager
def running_postgres() -> Iterator[str]:
    """URL of an empty database. Not in pytest's folder, which every start of pytest closes to other
    users."""
    control = shutil.which("pg_ctl") or ""
    pytest.importorskip("asyncpg")
    if not control:
        pytest.skip("no PostgreSQL here")
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"
        options = f"-k {folder} -c listen_addresses="
        start = [control, "-D", data, "-o", options, "-w", "-l", f"{folder}/log", "start"]
        for command in ([control, "initdb", "-D", data, "-o", "-A trust -U postgres"], start):
            subprocess.run([*user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            stop = [*user, control, "-D", data, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=folder)

"""The state's database: what was acknowledged is there, whatever happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import open_to_all, running_postgres

from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.server.config import ConfigError
from deltaserve.server.errors import StateUnavailable
from deltaserve.server.ledger import tables as ledger
from deltaserve.server.service.key_store import KeyStore
from deltaserve.server.state import database, key_tables, routes
from deltaserve.server.state.records import AdapterRecord, Entry, dump, parse
from deltaserve.server.state.store import StateError, Store
from deltaserve.server.state.tables import METADATA
from deltaserve.server.state.url import parse as parse_url

ENTRY = Entry("me", "LoadAdapter", "a")
RECORD = AdapterRecord("a", "/a", dump(DEFAULT), "d1", True, False, "me")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return str(tmp_path / "new" / "state.db")


async def opened(url: object, seconds: float = 5.0) -> Store:
    return await Store.open(parse_url(str(url)), seconds)


async def test_what_is_kept_is_there_after_a_restart(url: str) -> None:
    store = await opened(url)
    await store.keep(lambda: RECORD, ENTRY)
    await store.begin(replace(RECORD, name="b", digest=""), Entry("me", "LoadAdapter", "b"))
    await store.begin(replace(RECORD, uri="/other", digest=""), ENTRY)
    await store.keep(lambda: None, Entry("me", "LoadAdapter", "gone"))
    await store.pin("b", False, Entry("you", "UnpinAdapter", "b"))
    again = await opened(url)
    b = replace(RECORD, name="b", digest="", pinned=False)
    assert await again.adapters() == [RECORD, b], "what is served stays what it is"
    assert not await again.remove("a", ENTRY, begun=True)
    assert await again.remove("b", Entry("me", "UnloadAdapter", "b", "BUSY", detail="x" * 9999))
    assert not await again.remove("b", ENTRY)
    last = Entry("me", "UnloadAdapter", "b", "BUSY", detail="x" * 1024)
    verbs = [(e.who, e.verb, e.name) for e in await again.audit()]
    assert verbs == [
        ("server", "Start", ""),
        ("me", "LoadAdapter", "a"),
        ("me", "LoadAdapter", "b"),
        ("me", "LoadAdapter", "a"),
        ("me", "LoadAdapter", "gone"),
        ("you", "UnpinAdapter", "b"),
        ("server", "Start", ""),
        ("me", "UnloadAdapter", "b"),
    ]
    assert (await again.audit())[-1] == last


async def test_names_of_strangers(url: str) -> None:
    store = await opened(url)
    assert not await store.remove("a\0" * 2000, ENTRY)
    await store.note(Entry("me", "UnloadAdapter", "a\0b", "ADAPTER_UNKNOWN"))
    assert (await store.audit())[-1].name == "a\ufffdb"


async def test_a_postgres_that_does_not_answer(postgres: str) -> None:
    for wrong, match in (
        (postgres.replace("/postgres?", "/none?"), 'database "none" does not exist'),
        (postgres + "/none", "No such file"),
    ):
        with pytest.raises(StateError, match=match):
            await opened(wrong)


async def test_loads_of_one_name(tmp_path: Path) -> None:
    """The same content: how it is read stays; other content: it is replaced."""
    store = await opened(tmp_path / "s.db")
    registered = replace(RECORD, pinned=False, register_only=True)
    await store.keep(lambda: registered, ENTRY)
    await store.keep(lambda: replace(RECORD, owner="you", uri="/copy"), ENTRY)
    assert await store.adapters() == [RECORD]
    await store.fail("a", "it is gone", ENTRY)
    assert (await store.adapters())[0].error == "it is gone"
    await store.keep(lambda: replace(RECORD, digest="d2", uri="/b"), ENTRY)
    assert await store.adapters() == [replace(RECORD, digest="d2", uri="/b")]


async def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    await opened(tmp_path / "s.db")
    assert {key_tables.KEYS, key_tables.TENANTS, ledger.TRIALS} < set(METADATA.sorted_tables)
    with sqlite3.connect(tmp_path / "s.db") as opened_file:
        for table in METADATA.sorted_tables:
            made = [
                (name, kind, bool(needed))
                for _, name, kind, needed, _, _ in opened_file.execute(
                    f"PRAGMA table_info({table.name})"
                )
            ]
            assert made == [(c.name, str(c.type), not c.nullable) for c in table.columns]
        assert opened_file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_newer_database_is_refused_by_name(tmp_path: Path) -> None:
    await opened(tmp_path / "s.db")
    with sqlite3.connect(tmp_path / "s.db") as opened_file:
        opened_file.execute("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(StateError, match=r"newer deltaserve .*0999.* knows 0001"):
        await opened(tmp_path / "s.db")


async def test_what_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"no database" * 100)
    with pytest.raises(StateError, match="file is not a database"):
        await opened(tmp_path / "s.db")


async def test_a_database_that_goes_away(tmp_path: Path) -> None:
    store = await opened(tmp_path / "s.db")
    for file in tmp_path.glob("s.db*"):
        file.rename(tmp_path / f"away-{file.name}")
    with pytest.raises(StateUnavailable, match="unable to open database file"):
        await store.keep(lambda: RECORD, ENTRY)
    for file in tmp_path.glob("away-*"):
        file.rename(tmp_path / file.name.removeprefix("away-"))
    await store.keep(lambda: RECORD, ENTRY)
    assert await store.adapters() == [RECORD]


async def test_a_database_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_MS", 300)
    store = await opened(tmp_path / "s.db", seconds=0.2)
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateUnavailable, match=r"more than 0\.2 s"):
        await store.keep(lambda: RECORD, ENTRY)
    other.execute("ROLLBACK")
    other.close()
    await asyncio.sleep(0.1)
    await (await opened(tmp_path / "s.db")).keep(lambda: RECORD, ENTRY)


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="root, who becomes nobody")
async def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    """Root may write everywhere, but not as another user."""
    store = await opened(tmp_path / "s.db")
    open_to_all(tmp_path)
    (tmp_path / "s.db").chmod(0o444)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*Permission denied; name a file"):
            parse_url(str(tmp_path / "s.db"))
        with pytest.raises(StateUnavailable, match="readonly database"):
            await store.keep(lambda: RECORD, ENTRY)
    finally:
        os.seteuid(0)
    await store.keep(lambda: RECORD, ENTRY)
    assert await store.adapters() == [RECORD]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sqlite://", "memory keeps nothing"),
        ("sqlite:///:memory:", "memory keeps nothing"),
        ("mysql://u:secret@h/d", r"mysql://u:\*\*\*@h/d: must be SQLite or PostgreSQL"),
        ("postgresql://u:secret@h", "names no database"),
        ("postgresql://u:secret@h:x/d", "postgresql://…: is no such URL"),
        ("/proc/none/state.db", "cannot write /proc/none/state.db"),
    ],
)
def test_urls_that_are_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as raised:
        parse_url(text)
    assert "secret" not in str(raised.value)


async def test_a_path_with_signs_of_a_url(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c%41.db"
    await (await opened(path)).keep(lambda: RECORD, ENTRY)
    assert await (await opened(f"{path}")).adapters() == [RECORD]
    with sqlite3.connect(path) as opened_file:
        assert opened_file.execute("SELECT count(*) FROM adapters").fetchone() == (1,)


def test_options() -> None:
    options = LoadOptions(True, 3, 0.25, "p")
    assert parse(dump(options)) == options and parse(dump(DEFAULT)) == DEFAULT
    for bad in (
        "[]",
        "{}",
        "x",
        dump(options).replace("0.25", "2"),
        dump(options).replace("3", '"3"'),
    ):
        with pytest.raises(ValueError):
            parse(bad)


WRITER = """
import asyncio, os, sys
from deltaserve.server.identity.records import Key
from deltaserve.server.service.key_store import KeyStore
from deltaserve.server.state import routes
from deltaserve.server.state.records import AdapterRecord, Entry
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

async def write(path, life):
    store = await Store.open(parse(path))
    for i in range(10**6):
        name, text = f"{life}-{i}", "x" * 500
        if i % 3 == 2:
            key = Key(name, "t", frozenset(), label=text)
            await KeyStore(store).create(key, Entry("w", "CreateKey", name))
        elif i % 3:
            route = routes.RouteRecord(name, text, i, "e", 1.0, 2.0, "w", "", "active", "", "", 0.0)
            await routes.put(store, route, Entry("w", "PutRoute", name))
        else:
            record = AdapterRecord(name, text, "{}", "d")
            await store.keep(lambda: record, Entry("w", "LoadAdapter", name))
        os.write(1, f"{name}\\n".encode())

for life in sys.stdin:  # a writer each, which is killed from outside
    pid = os.fork()
    if not pid:
        asyncio.run(write(sys.argv[1], life.strip()))
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    rng = random.Random()
    acknowledged: set[str] = set()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        for life in range(24):
            print(life, file=writer.stdin, flush=True)
            pid, names = 0, 0
            for line in writer.stdout:
                if line.startswith("pid "):
                    pid = int(line[4:])
                elif line == "dead\n":
                    break
                else:
                    acknowledged.add(line.strip())
                    names += 1
                if pid and (names or life % 8 == 0):  # some while it starts
                    time.sleep(rng.uniform(0, 0.03))
                    os.kill(pid, signal.SIGKILL)
                    pid = 0
            with sqlite3.connect(path) as opened_file:
                assert opened_file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        writer.stdin.close()
    assert len(acknowledged) >= 21
    assert acknowledged <= asyncio.run(_names(path))


async def _names(path: Path) -> set[str]:
    store = await opened(path)
    keys, _ = await KeyStore(store).all()
    kept = (*await store.adapters(), *await routes.routes(store))
    return {one.name for one in kept} | {key.id for key in keys}

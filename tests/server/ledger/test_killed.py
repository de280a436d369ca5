"""Feedback that was acknowledged survives a kill, with the request that it is of and its user; a
user whose erasure was acknowledged does not."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from trials import START, trial

from deltaserve.server.ledger.feedback import Feedback
from deltaserve.server.ledger.keep import Keeper
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.ledger.names import user_key
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

LIVES = 8

GIVER = """
import asyncio, json, os, sys
sys.path[:0] = json.loads(sys.argv[2])
from trials import trial
from deltaserve.server.ledger.feedback import Feedback
from deltaserve.server.ledger.keep import Keeper
from deltaserve.server.ledger.ledger import Ledger
from deltaserve.server.state.records import Entry
from deltaserve.server.state.store import Store
from deltaserve.server.state.url import parse

async def one(ledger, name):
    ledger.record(trial(f"user {name}", "a", request_id=name))
    await ledger.feedback(Feedback("t", 2e9, name, reward=1.0))
    os.write(1, f"{name}\\n".encode())
    if name.endswith("3"):
        await ledger.erase("t", f"user {name}", Entry("me", "EraseUser", "t"))
        os.write(1, f"erased {name}\\n".encode())

async def give(path, life):
    ledger = Ledger(Keeper(await Store.open(parse(path))))
    await ledger.open()
    for i in range(10**6):
        ledger.record(trial(f"silent {life}-{i}", "b"))
        await asyncio.gather(*(one(ledger, f"{life}-{i}-{k}") for k in range(4)))

for life in sys.stdin:  # one each, which is killed from outside
    pid = os.fork()
    if not pid:
        asyncio.run(give(sys.argv[1], life.strip()))
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


async def test_a_killed_ledger_loses_no_acknowledged_feedback(tmp_path: Path) -> None:
    path, rng, acknowledged, erased = tmp_path / "s.db", random.Random(), set(), set()
    folders = json.dumps([p for p in sys.path if p])
    with subprocess.Popen(
        [sys.executable, "-c", GIVER, str(path), folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as giver:
        assert giver.stdin is not None and giver.stdout is not None
        for life in range(LIVES):
            print(life, file=giver.stdin, flush=True)
            pid, names, gone = 0, 0, 0
            for line in giver.stdout:
                if line.startswith("pid "):
                    pid = int(line[4:])
                elif line == "dead\n":
                    break
                elif line.startswith("erased "):
                    erased.add(line.split()[1])
                    gone += 1
                else:
                    acknowledged.add(line.strip())
                    names += 1
                if pid and (gone if life % 2 else names):
                    time.sleep(rng.uniform(0, 0.05))
                    os.kill(pid, signal.SIGKILL)
                    pid = 0
        giver.stdin.close()
    assert len(acknowledged) >= LIVES and len(erased) >= LIVES // 2
    acknowledged = {name for name in acknowledged if not name.endswith("3")}  # may be erased
    ledger = Ledger(Keeper(await Store.open(parse(str(path)))))
    await ledger.open()
    found = (await ledger.tallies("r", 1)).arms["a"]
    assert found.users >= found.rewards.n >= len(acknowledged) and found.rewards.mean == 1
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        lost = "SELECT count(*) FROM feedback WHERE request NOT IN (SELECT id FROM trials)"
        assert file.execute(lost).fetchone() == (0,)
        keys = {user_key("r", "t", f"user {name}") for name in erased}
        for table in ("trials", "exposures", "feedback"):
            left = {user for (user,) in file.execute(f'SELECT "user" FROM {table}')}
            assert left and not left & keys, table
    name = sorted(acknowledged)[0]
    ledger.record(trial("somebody", "a"))
    assert (await ledger.feedback(Feedback("t", START, name, reward=0.0))).arm == "a"
    again = (await ledger.tallies("r", 1)).arms["a"].rewards
    assert again.n == found.rewards.n and again.mean < 1, "it replaces what was given before"
    await ledger.close()

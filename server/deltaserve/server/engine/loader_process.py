"""Loader processes: adapters are made where that takes little from the engine.

A loader thread of the server's process competes with the engine's for the interpreter's lock at
every operation; a process does not, can be given a low priority without ever holding up who waits
for a lock that it holds, and may die of a file without the server dying with it.

Not idle priority: the engine's threads wait awake for each other, so on a server that decodes all
the time no processor is ever idle, and requests would wait for their adapters for ever.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from deltaserve.adapters.base import BaseSpec
from deltaserve.server.engine.make import Line, Made, Make, Wanted
from deltaserve.server.engine.nursery import Failure, Told, nurse
from deltaserve.server.engine.recipe import Ask, Recipe, answer
from deltaserve.server.engine.transfer import receive, send
from deltaserve.server.errors import AdapterUnavailable, ShuttingDown

AVAILABLE = sys.platform == "linux"
"""Files in memory are Linux's, and forks are safe there."""


@dataclass(frozen=True, slots=True)
class Started:
    """The nursery. wait: until it has ended."""

    pid: int
    wait: Callable[[], object]


class Way(Protocol):
    """How the nursery is started. again: also in place of one that died."""

    again: bool

    def start(
        self, ours: socket.socket, theirs: socket.socket, cores: Sequence[int], nice: int
    ) -> Started:
        """ours, theirs: the two ends of the control socket."""
        ...

    def answer(self, connection: socket.socket, ask: Ask) -> None:
        """Send what a loader asks for."""
        ...


class Forked:
    """Off this process, before it has threads that hold locks. make: called in the loaders."""

    again = False

    def __init__(self, make: Make) -> None:
        self._make = make

    def start(
        self, ours: socket.socket, theirs: socket.socket, cores: Sequence[int], nice: int
    ) -> Started:
        pid = os.fork()
        if not pid:
            ours.close()
            nurse(theirs, lambda connection: self._make, cores, nice)
        return Started(pid, partial(os.waitpid, pid, 0))

    def answer(self, connection: socket.socket, ask: Ask) -> None:
        raise TypeError("a loader that has the base asks for its weights")


class Fresh:
    """As a program of its own, which has no base and sees no GPU. base: of which the loaders ask
    for weights."""

    again = True

    def __init__(self, recipe: Recipe, base: BaseSpec) -> None:
        self._recipe = recipe
        self._base = base

    def start(
        self, ours: socket.socket, theirs: socket.socket, cores: Sequence[int], nice: int
    ) -> Started:
        told = os.memfd_create("deltaserve-told", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(told), "wb") as file:
                pickle.dump(Told(self._recipe, cores, nice), file)
            os.lseek(told, 0, os.SEEK_SET)
            fds = (theirs.fileno(), told)
            child = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, fds)],
                pass_fds=fds,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a signal from the keyboard is for the server alone
            )
        finally:
            os.close(told)
        return Started(child.pid, child.wait)

    def answer(self, connection: socket.socket, ask: Ask) -> None:
        answer(connection, self._base, ask)


PROGRAM = "from deltaserve.server.engine.nursery import main; main()"
"""Not a module that is run: classes of that would be called otherwise in what it sends."""


class LoaderProcesses:
    """A `Make` that has it done by processes, as many as threads call it at once."""

    def __init__(self, way: Way, cores: Sequence[int] = (), nice: int = 10) -> None:
        """cores: they stay on these, and so do the threads that call; none for any. nice: added to
        the server's own."""
        self._way = way
        self._cores = cores
        self._nice = nice
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._closed = False
        self._start()

    def __call__(self, line: Line, wanted: Wanted) -> Made:
        if self._cores:  # it copies what a process made: not on the engine's processors
            os.sched_setaffinity(0, self._cores)
        connection = self._take()
        try:
            send(connection, (line, wanted))
            while isinstance(found := receive(connection), Ask):
                self._way.answer(connection, found)
        except (EOFError, OSError) as error:
            self._drop(connection)
            if self._closed:
                raise ShuttingDown("the server is shutting down") from error
            raise AdapterUnavailable(
                f"the process that loaded {line[-1].uri} died: out of memory, or a fault in it",
                field="uri",
            ) from error
        with self._lock:
            self._busy.discard(connection)
            self._idle.append(connection)
        if isinstance(found, Failure):
            if found.kind is None:
                raise RuntimeError(f"in the loader process:\n{found.text}")
            raise found.kind(found.text, field=found.field)
        made: Made = found
        if made.prepared is not None:
            made.nbytes = made.prepared.nbytes  # counted here, not on the engine thread
        return made

    def finish(self) -> None:
        """They do that of themselves."""

    def close(self) -> None:
        """End them, whatever they do."""
        with self._lock:
            self._closed = True
            for connection in (*self._idle, *self._busy):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._control.close()
            self._nursery.wait()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        self._nursery = self._way.start(self._control, theirs, self._cores, self._nice)
        theirs.close()

    def _take(self) -> socket.socket:
        with self._lock:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            while self._idle and _ended(self._idle[-1]):
                self._idle.pop().close()
            connection = self._idle.pop() if self._idle else self._born()
            self._busy.add(connection)
            return connection

    def _born(self) -> socket.socket:
        """The connection of a new loader."""
        connection, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            except OSError as error:
                if not self._way.again:
                    connection.close()
                    raise AdapterUnavailable(
                        "the process that starts loaders died: restart the server", field="uri"
                    ) from error
                self._control.close()
                self._nursery.wait()
                self._start()
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        return connection

    def _drop(self, connection: socket.socket) -> None:
        with self._lock:
            self._busy.discard(connection)
        connection.close()


def _ended(connection: socket.socket) -> bool:
    """Whether an idle loader is gone: it says nothing unasked."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True

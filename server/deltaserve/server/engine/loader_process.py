"""Loader processes: adapters are made where that takes little from the engine.

A loader thread of the server's process competes with the engine's for the interpreter's lock at
every operation; a process does not, can be given a low priority without ever holding up who waits
for a lock that it holds, and may die of a file without the server dying with it.

Not idle priority: the engine's threads wait awake for each other, so on a server that decodes all
the time no processor is ever idle, and requests would wait for their adapters for ever.

The base is not copied: the first process, the nursery, is forked once the base is loaded and shares
its memory. It runs one thread and does nothing but fork loaders, also in place of one that died,
which the server itself, with its many threads, could not do safely.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from deltaserve.adapters.errors import AdapterError
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.server.engine.make import Line, Made, Make, Wanted
from deltaserve.server.engine.transfer import receive, send
from deltaserve.server.errors import AdapterUnavailable, RequestError, ShuttingDown

AVAILABLE = sys.platform == "linux"
"""Files in memory are Linux's, and forks are safe there."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in the process. kind: of an `AdapterError` or `RequestError`, else None."""

    kind: type[AdapterError] | type[RequestError] | None
    text: str
    field: str = ""


class LoaderProcesses:
    """A `Make` that has it done by processes, as many as threads call it at once."""

    def __init__(self, make: Make, cores: Sequence[int] = (), nice: int = 10) -> None:
        """Call it before the process has threads that hold locks. make: called in the processes.
        cores: they stay on these, and so do the threads that call; none for any. nice: added to the
        server's own."""
        self._cores = cores
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._closed = False
        self._pid = os.fork()
        if not self._pid:
            self._control.close()
            _nursery(theirs, make, cores, nice)
        theirs.close()

    def __call__(self, line: Line, wanted: Wanted) -> Made:
        if self._cores:  # it copies what a process made: not on the engine's processors
            os.sched_setaffinity(0, self._cores)
        connection = self._take()
        try:
            send(connection, (line, wanted))
            answer = receive(connection)
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
        if isinstance(answer, Failure):
            if answer.kind is None:
                raise RuntimeError(f"in the loader process:\n{answer.text}")
            raise answer.kind(answer.text, field=answer.field)
        made: Made = answer
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
        os.waitpid(self._pid, 0)

    def _take(self) -> socket.socket:
        with self._lock:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            if self._idle:
                connection = self._idle.pop()
            else:
                connection, theirs = socket.socketpair()
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
                theirs.close()
            self._busy.add(connection)
            return connection

    def _drop(self, connection: socket.socket) -> None:
        with self._lock:
            self._busy.discard(connection)
        connection.close()


def _nursery(control: socket.socket, make: Make, cores: Sequence[int], nice: int) -> None:
    """Fork a loader for each socket that comes; end with the server, and the loaders with it."""
    loaders: set[int] = set()
    try:
        _settle(cores, nice)
        while True:
            _, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not fds:
                break
            while loaders and (ended := os.waitpid(-1, os.WNOHANG)[0]):
                loaders.discard(ended)
            pid = os.fork()
            if not pid:
                control.close()
                loaders.clear()
                _serve(socket.socket(fileno=fds[0]), make)
                break
            os.close(fds[0])
            loaders.add(pid)
    except (EOFError, OSError):  # the server is gone
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        for pid in loaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _settle(cores: Sequence[int], nice: int) -> None:
    """Be little of a burden, and keep of what the server has open the log alone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    if cores:
        os.sched_setaffinity(0, cores)
    os.nice(nice)
    compute_alone()
    gc.freeze()  # a collection would write to every object, and so copy the pages they are on


def _serve(connection: socket.socket, make: Make) -> None:
    """Do what comes, one after the other."""
    while True:
        line, wanted = receive(connection)
        answer: Made | Failure
        try:
            answer = make(line, wanted)
        except (AdapterError, RequestError) as error:
            answer = Failure(type(error), str(error), error.field)
        except Exception:
            answer = Failure(None, traceback.format_exc())
        send(connection, answer)
        del answer
        make.finish()

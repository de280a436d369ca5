"""Nursery: a process that forks loaders, each at the other end of a socket that it is given.

It runs one thread and does nothing else, so that it may fork safely, also in place of a loader that
died. It shares the base's memory with the server if it is forked from it once the base is loaded;
where the server holds what no fork may share, such as a GPU, it is started fresh (`main`), sees no
GPU, and is told what it needs to know.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaserve.adapters.errors import AdapterError
from deltaserve.kernels.native.openmp import compute_alone
from deltaserve.server.engine.make import Made, Make
from deltaserve.server.engine.recipe import Recipe
from deltaserve.server.engine.transfer import receive, send
from deltaserve.server.errors import RequestError


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in the process. kind: of an `AdapterError` or `RequestError`, else None."""

    kind: type[AdapterError] | type[RequestError] | None
    text: str
    field: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """What a nursery that is started fresh is told. cores, nice: as `nurse` takes them."""

    recipe: Recipe
    cores: Sequence[int]
    nice: int


def main() -> None:
    """Arguments: file descriptors of the control socket, and of a pickled `Told`."""
    _ignore_signals()
    control, told_fd = map(int, sys.argv[1:])
    with os.fdopen(told_fd, "rb") as file:
        told: Told = pickle.load(file)
    nurse(socket.socket(fileno=control), told.recipe.over, told.cores, told.nice)


def nurse(
    control: socket.socket,
    make: Callable[[socket.socket], Make],
    cores: Sequence[int],
    nice: int,
) -> None:
    """Fork a loader for each socket that comes; end with the server, and the loaders with it. Does
    not return. make: called in a loader, with its socket. cores: they stay on these; none for any.
    nice: added to the process's own."""
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
                connection = socket.socket(fileno=fds[0])
                _serve(connection, make(connection))
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


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _settle(cores: Sequence[int], nice: int) -> None:
    """Be little of a burden, and keep of what the server has open the log alone."""
    _ignore_signals()
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

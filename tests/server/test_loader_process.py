"""Adapters made in another process are the same, and its death is one load's failure."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rig import load_base, request, running
from serving import until
from torch import Tensor
from variants import VARIANTS, make_base

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.marks import content_digest
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.kernels.base import onednn
from deltaserve.kernels.content import canonical
from deltaserve.kernels.primitives import LowRank, PrefixKV
from deltaserve.kernels.table import places
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.loader_process import AVAILABLE, Forked, LoaderProcesses
from deltaserve.server.engine.make import Line, MakeHere, Source, Wanted
from deltaserve.server.engine.transfer import SCRATCH, receive, send
from deltaserve.server.errors import AdapterUnavailable, ShuttingDown
from deltaserve.server.packing.prepared import PreparedAdapter

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux")


def across(value: Any) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=send, args=(ours, value))
        sender.start()
        found = receive(theirs)
        sender.join()
        return found


def test_tensors_arrive_bit_for_bit() -> None:
    wide = torch.randn(6, 8)
    given: dict[str, Tensor] = {
        "whole": torch.randn(3, 5, dtype=torch.float64),
        "bf16": torch.randn(7).bfloat16(),
        "bits": torch.randint(0, 256, (11,), dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, dtype=torch.int64),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 9).T,
        "part": wide[1:3, 2:5],
        "other part": wide[3:, :2],
        "repeated": torch.randn(1, 1).expand(4, 6),
        "nowhere": torch.empty(5, 2, dtype=torch.float16, device="meta"),
    }
    found = across({"tensors": given, "again": given["whole"], "n": 3})
    assert found["n"] == 3 and found["again"] is found["tensors"]["whole"]
    for name, tensor in given.items():
        other = found["tensors"][name]
        assert (other.dtype, other.shape, other.stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        ), name
        assert other.device == tensor.device
        if not tensor.is_meta:
            assert torch.equal(other, tensor) and other is not tensor, name
    one, two = found["tensors"]["part"], found["tensors"]["other part"]
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    assert found["tensors"]["repeated"].untyped_storage().nbytes() == 4


def test_tensors_of_any_size_and_number_arrive_each_in_memory_of_its_own() -> None:
    """Read some at a time, or alone, or not at all; none keeps the memory of another."""
    drawn = torch.Generator()
    drawn.seed()
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64, torch.bool)
    shapes = ((33, 511), (7,), (1, SCRATCH // 2 + 3), (16, 1, 5))
    given = [
        torch.randint(0, 2 if dtype is torch.bool else 127, shape, generator=drawn).to(dtype)
        for shape in shapes
        for dtype in dtypes
        for _ in range(9 if shape != shapes[2] else 2)
    ]
    kept = across(given[2::5])
    for number in torch.randperm(len(given)).tolist()[:3]:
        given.append(given[number].clone())
    found = across(given)
    for theirs, ours in zip(found, given, strict=True):
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours)
        assert theirs.untyped_storage().nbytes() == ours.numel() * ours.element_size()
    assert all(any(k is f for f in found) for k in kept)


def test_two_tensors_over_one_memory_stay_so() -> None:
    rows = torch.randn(6, 4)
    found = across([rows, rows.view(-1), rows.view(6, 4), rows.clone()])
    assert len({t.untyped_storage().data_ptr() for t in found[:2]}) == 1
    assert all(torch.equal(t.view(6, 4), rows) for t in found)


def test_outlines_arrive_as_few_objects() -> None:
    outline = Adapter(
        "d",
        "test",
        {
            f"m{i}": (LowRank(torch.randn(2, 3), torch.randn(5 + i % 2, 2), 0.5 + i // 4),)
            for i in range(8)
        },
    ).without_content()
    found = across(outline)
    for adapter in (outline, found):
        assert len({id(p) for (p,) in adapter.modules.values()}) == 4
    for ours, theirs in zip(outline.modules.items(), found.modules.items(), strict=True):
        (name, (one,)), (other_name, (other,)) = ours, theirs
        assert (name, one.scale, one.a.shape) == (other_name, other.scale, other.a.shape)
        assert one.b.shape == other.b.shape and other.b.is_meta


def test_packed_weights_arrive_packed() -> None:
    weight = torch.randn(48, 32)
    found = across(onednn.pack(weight))
    assert found.is_mkldnn == onednn.available(torch.float32)
    assert torch.equal(onednn.unpack(found), weight)


def test_what_is_alive_here_is_not_held_twice() -> None:
    """Nor is it kept alive by what came with it."""
    shared, own = torch.randn(64, 64), torch.randn(8, 8)
    first = across([shared, own])
    second = across([own * 2, shared, shared.clone(), own])
    assert second[1] is first[0] and second[2] is first[0] and second[3] is first[1]
    assert first[0] is not shared
    content = content_digest(shared)
    del first, second
    gc.collect()
    assert canonical(shared, content) is shared


@pytest.mark.parametrize("count", [1, 700])
def test_many_tensors(count: int) -> None:
    given = [torch.randn(1 + i % 7) for i in range(count)]
    kept = across(given[::3])
    for theirs, ours in zip(across(given), given, strict=True):
        assert torch.equal(theirs, ours)
    assert len(kept) == len(given[::3])


def test_a_packed_adapter_counts_the_memory_it_has_here() -> None:
    keys, values = (torch.randn(4, 2, 8),), (torch.randn(4, 2, 8),)
    packed = PreparedAdapter("d", {}, {}, None, PrefixKV(keys, values), None)
    assert packed.nbytes == 512
    found = across(packed)
    assert found.memory == places([*found.prefix.keys, *found.prefix.values])
    assert found.nbytes == 512 and not found.memory.keys() & packed.memory.keys()


class Packed:
    """As little as an adapter can be when it is packed."""

    prefix = None

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = {"all": nbytes}

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


class Host:
    def prepare(self, adapter: Adapter) -> Packed:
        return Packed(adapter.source_bytes)


def read(uri: str, options: LoadOptions, parent: Adapter | None) -> Adapter:
    match uri:
        case "/bad":
            raise InvalidAdapter("/bad is damaged", field="a.weight")
        case "/bug":
            raise ZeroDivisionError("a bug")
        case "/fatal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "/endless":
            signal.pause()
    above = f"{parent.digest} < " if parent is not None else ""
    return Adapter(f"{above}{uri} in {os.getpid()}", "test", {}, source_bytes=len(uri))


def line(*uris: str) -> Line:
    return tuple(Source(uri, DEFAULT) for uri in uris)


@pytest.fixture
def processes() -> Any:
    made = LoaderProcesses(Forked(MakeHere(read, Host())))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def test_it_is_made_in_a_process_that_gives_way(
    processes: LoaderProcesses,
) -> None:
    made = processes(line("/base", "/child"), Wanted.ALL)
    pid = int(made.digests[0].rsplit(" ", 1)[1])
    assert pid != os.getpid()
    assert made.digests == (f"/base in {pid}", f"/base in {pid} < /child in {pid}")
    assert made.adapter is not None and made.adapter.digest == made.digests[1]
    assert made.prepared is not None and made.nbytes == len("/child")
    assert psutil.Process(pid).nice() == min(19, os.nice(0) + 10)
    assert processes(line("/a"), Wanted.CHECK).prepared is None
    assert processes(line("/a"), Wanted.DIGEST).adapter is None
    assert len(psutil.Process(processes._nursery.pid).children()) == 1


def test_the_threads_that_load_stay_on_the_loaders_cores() -> None:
    before = os.sched_getaffinity(0)
    made = LoaderProcesses(Forked(MakeHere(read, Host())), cores := [min(before)])  # type: ignore[arg-type]
    found: list[set[int]] = []

    def load() -> None:
        made(line("/a"), Wanted.ALL)
        found.append(os.sched_getaffinity(0))

    try:
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    finally:
        made.close()
    assert found == [set(cores)] and os.sched_getaffinity(0) == before


def test_what_is_raised_there_is_raised_here(processes: LoaderProcesses) -> None:
    with pytest.raises(InvalidAdapter, match=r"^/bad is damaged$") as error:
        processes(line("/bad"), Wanted.ALL)
    assert error.value.field == "a.weight"
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        processes(line("/bug"), Wanted.ALL)
    assert processes(line("/a"), Wanted.ALL).prepared is not None


def test_a_process_that_dies_fails_its_load_and_is_replaced(processes: LoaderProcesses) -> None:
    first = processes(line("/a"), Wanted.DIGEST).digests
    with pytest.raises(AdapterUnavailable, match="loaded /fatal died"):
        processes(line("/fatal"), Wanted.ALL)
    assert processes(line("/a"), Wanted.DIGEST).digests != first


def test_closing_does_not_wait_for_an_endless_load() -> None:
    made = LoaderProcesses(Forked(MakeHere(read, Host())))  # type: ignore[arg-type]
    failed: list[BaseException] = []

    def load() -> None:
        try:
            made(line("/endless"), Wanted.ALL)
        except ShuttingDown as error:
            failed.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    nursery = psutil.Process(made._nursery.pid)
    until(lambda: bool(nursery.children()), "it has begun")
    loaders = nursery.children()
    made.close()
    thread.join(10)
    assert failed and not nursery.is_running()
    until(lambda: not any(p.is_running() for p in loaders), "the loaders are gone")


def test_they_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
from server.test_loader_process import *
made = LoaderProcesses(Forked(MakeHere(read, Host())))
print(made._nursery.pid, made(line("/a"), Wanted.DIGEST).digests[0].rsplit(" ", 1)[1], flush=True)
time.sleep(60)
"""
    tests = str(Path(__file__).parent.parent)
    server = subprocess.Popen(
        [sys.executable, "-c", code, tests], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    pids = [int(pid) for pid in server.stdout.readline().split()]
    assert len(pids) == 2
    server.kill()
    server.wait()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "they are gone", 20)


def test_every_kind_of_adapter_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    """Of every way in which an adapter is packed: the same bytes in memory, and the same answers
    to the bit."""
    make_base(tmp_path / "base", "llama")
    roots = tmp_path / "roots"
    names = ("lora-r11", "dora", "ia3", "lora-modules-to-save", "bitdelta", "sparse")
    names += ("prefix-tuning", "lora-tokens")
    for i, name in enumerate(names):
        VARIANTS[name].make(tmp_path / "base", roots / name, torch.Generator().manual_seed(i))
    found: list[Any] = []
    for processes in (False, True):
        model = load_base(tmp_path / "base")
        with running(model, [roots], adapters={"loader_processes": processes}) as engine:
            infos = [engine.adapters.load(n, str(roots / n)).result(120) for n in names]
            asked = [request(list(range(9, 40)), n, max_tokens=6) for n in names]
            answers = generate(engine, asked, 120)
            found.append(
                (
                    [(i.digest, i.resident_bytes, i.format, i.primitives, i.notes) for i in infos],
                    engine.adapters.used_bytes,
                    [(a.token_ids, [x.logprob for x in a.logprobs]) for a in answers],
                )
            )
    assert found[0] == found[1]

"""Whatever is wrong with a file or a request: a clear error with the right code, and nobody else
notices. A real server and a real client; two streams run through all of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import get_peft_model
from rig import load_base, request, running
from safetensors.torch import load_file, save_file
from serving import Serving, serving, undisturbed, until
from transformers import AutoModelForCausalLM, LlamaConfig
from variants import COMMON, VARIANTS, VOCAB, linears, lora, make_base, open_base

from deltaserve.adapters.delta_file import write_delta
from deltaserve.clients import Client, errors
from deltaserve.kernels.primitives import LowRank
from deltaserve.server.engine.batch import Batch
from deltaserve.server.engine.collector import Collector, generate
from deltaserve.server.engine.engine import Engine
from deltaserve.server.errors import Cancelled, NonFiniteLogits
from deltaserve.server.model import BaseModel

BUDGET = 600_000
NAN, INF = float("nan"), float("inf")
GOOD = ("lora", "dora", "prompt-tuning", "prefix-tuning")


@dataclass
class World:
    tmp: Path
    base: Path
    roots: Path
    serving: Serving
    expected: dict[str, tuple[list[int], list[int]]]

    @property
    def client(self) -> Client:
        return self.serving.client

    def undisturbed(self) -> Any:
        return undisturbed(self.serving, self.expected)


def prompt(seed: int, length: int = 20) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input") / "base"
    make_base(folder, "llama")
    roots = folder.parent / "adapters"
    roots.mkdir()
    for seed, name in enumerate(GOOD):
        generator = torch.Generator().manual_seed(seed)
        VARIANTS[name].make(folder, roots / name, generator)
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> BaseModel:
    return load_base(base)


@pytest.fixture(scope="module")
def world(base: Path, model: BaseModel) -> Iterator[World]:
    roots = base.parent / "adapters"
    with serving(model, [roots], adapter_bytes=BUDGET) as served:
        for name in GOOD:
            served.client.load_adapter(name, str(roots / name))
        expected = {}
        for seed, name in enumerate(("", "lora")):
            ids = prompt(seed)
            answer = served.client.generate(ids, name, max_tokens=40, ignore_eos=True)
            expected[name] = (ids, answer.token_ids)
        assert expected[""][1] != served.client.generate(prompt(0), "lora", max_tokens=40).token_ids
        yield World(base.parent, base, roots, served, expected)


# Files:


@dataclass
class Site:
    """Where a bad adapter is made. good: a LoRA to spoil; folder: to write to; outside: a folder
    that is not to be read; canary: what must never come to be."""

    base: Path
    good: Path
    folder: Path
    outside: Path
    canary: Path

    def spoil_config(self, **fields: object) -> str:
        shutil.copytree(self.good, self.folder)
        file = self.folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return str(self.folder)

    def spoil_tensor(self, end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        shutil.copytree(self.good, self.folder)
        file = self.folder / "adapter_model.safetensors"
        stored = load_file(file)
        name = next(n for n in stored if n.endswith(end))
        stored[name] = change(stored[name].clone())
        save_file(stored, file)
        return str(self.folder)

    def spoil_bytes(self, change: Callable[[bytes], bytes]) -> str:
        shutil.copytree(self.good, self.folder)
        file = self.folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))
        return str(self.folder)

    def config_only(self) -> Path:
        self.folder.mkdir()
        shutil.copy(self.good / "adapter_config.json", self.folder)
        return self.folder


class Canary:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


def other_base(s: Site) -> str:
    config = LlamaConfig(**{**COMMON, "hidden_size": 32})
    get_peft_model(AutoModelForCausalLM.from_config(config), lora()(config)).save_pretrained(
        s.folder
    )
    return str(s.folder)


def other_weights(s: Site) -> str:
    """Of a base that differs in nothing but its weights."""
    name, linear = next(iter(linears(open_base(s.base)).items()))
    out, in_ = linear.weight.shape
    change = LowRank(torch.ones(1, in_), torch.ones(out, 1))
    write_delta(s.folder, {name: (change,)}, kind="test", base_digests={f"{name}.weight": "0" * 64})
    return str(s.folder)


def million(s: Site) -> str:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{i}":{entry}' for i in range(1_000_000)) + "}").encode()
    folder = s.config_only()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return str(folder)


def pickled(s: Site) -> str:
    (s.config_only() / "adapter_model.bin").write_bytes(pickle.dumps(Canary(s.canary)))
    return str(s.folder)


def disguised(s: Site) -> str:
    torch.save({"x": Canary(s.canary)}, s.config_only() / "adapter_model.safetensors")
    return str(s.folder)


def link_out(s: Site) -> str:
    shutil.copytree(s.good, s.outside)
    s.folder.symlink_to(s.outside)
    return str(s.folder)


def link_inside_out(s: Site) -> str:
    shutil.copytree(s.good, s.outside)
    s.config_only()
    (s.folder / "adapter_model.safetensors").symlink_to(s.outside / "adapter_model.safetensors")
    return str(s.folder)


def fifo(s: Site) -> str:
    os.mkfifo(s.config_only() / "adapter_model.safetensors")
    return str(s.folder)


def bare_fifo(s: Site) -> str:
    os.mkfifo(s.folder)
    return str(s.folder)


def fat(s: Site) -> str:
    model = open_base(s.base)
    get_peft_model(model, lora(r=400)(model.config)).save_pretrained(s.folder)
    return str(s.folder)


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[3] = value
        return t

    return change


A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"
MALFORMED = (errors.InvalidArgument, "ADAPTER_MALFORMED")
INVALID = (errors.FailedPrecondition, "ADAPTER_INVALID")
UNSUPPORTED = (errors.FailedPrecondition, "ADAPTER_UNSUPPORTED")
MISMATCH = (errors.FailedPrecondition, "BASE_MISMATCH")
FORBIDDEN = (errors.PermissionDenied, "SOURCE_FORBIDDEN")
MISSING = (errors.NotFound, "ADAPTER_NOT_FOUND")

LOADS: dict[str, tuple[Callable[[Site], str], tuple[type[Exception], str], list[str]]] = {
    "another base's shapes": (other_base, INVALID, ["[32, 4]", "the base", "[64, 4]"]),
    "another base's weights": (other_weights, MISMATCH, ["q_proj"]),
    "two ranks": (
        lambda s: s.spoil_tensor(B, lambda t: t[:, :3].contiguous()),
        INVALID,
        ["3", "4"],
    ),
    "NaN": (lambda s: s.spoil_tensor(A, put(NAN)), INVALID, ["not finite", A]),
    "infinity": (lambda s: s.spoil_tensor(B, put(-INF)), INVALID, ["not finite", B]),
    "truncated": (lambda s: s.spoil_bytes(lambda b: b[:-100]), MALFORMED, ["safetensors"]),
    "cut in its header": (lambda s: s.spoil_bytes(lambda b: b[:50]), MALFORMED, ["header"]),
    "empty": (lambda s: s.spoil_bytes(lambda b: b""), MALFORMED, ["safetensors"]),
    "a header of 2^63 bytes": (
        lambda s: s.spoil_bytes(lambda b: struct.pack("<Q", 1 << 63) + b[8:]),
        MALFORMED,
        ["header", str(1 << 63)],
    ),
    "a header of 101 MB": (
        lambda s: s.spoil_bytes(lambda b: struct.pack("<Q", 101_000_000) + b[8:]),
        MALFORMED,
        ["header", "101000000"],
    ),
    "a million tensors": (million, MALFORMED, ["adapter_model.safetensors"]),
    "a pickle": (pickled, MALFORMED, ["adapter_model.bin", "pickle", "safetensors"]),
    "a pickle in disguise": (disguised, MALFORMED, ["adapter_model.safetensors"]),
    "an absolute path outside": (lambda s: "/etc", FORBIDDEN, ["/etc", "outside"]),
    "a path with ..": (lambda s: f"{s.folder}/../../base", FORBIDDEN, ["outside"]),
    "a relative path with ..": (lambda s: "../base", FORBIDDEN, ["outside"]),
    "a link to outside": (link_out, FORBIDDEN, ["outside"]),
    "a file that is a link to outside": (link_inside_out, FORBIDDEN, ["outside"]),
    "a pipe in the folder": (fifo, FORBIDDEN, ["plain file"]),
    "a pipe": (bare_fifo, FORBIDDEN, ["plain file"]),
    "another scheme": (lambda s: "https://example.org/x", FORBIDDEN, ["https", "file:"]),
    "nothing there": (lambda s: str(s.folder / "x"), MISSING, ["no such"]),
    "an empty folder": (lambda s: str(s.folder.mkdir() or s.folder), MISSING, ["safetensors"]),
    "an unknown field": (
        lambda s: s.spoil_config(frobnicate=True),
        UNSUPPORTED,
        ["'frobnicate' = True", "known: "],
    ),
    "an unknown method": (lambda s: s.spoil_config(peft_type="XLORA"), UNSUPPORTED, ["XLORA"]),
    "a rank of 0": (lambda s: s.spoil_config(r=0), MALFORMED, ["'r' = 0", ">= 1"]),
    "more than the memory": (
        fat,
        (errors.ResourceExhausted, "ADAPTER_TOO_LARGE"),
        [str(BUDGET), "needs", "bytes"],
    ),
}


@pytest.mark.parametrize("what", LOADS)
def test_a_bad_adapter(world: World, tmp_path: Path, what: str) -> None:
    make, (error, reason), words = LOADS[what]
    folder = world.roots / tmp_path.name
    site = Site(world.base, world.roots / "lora", folder, tmp_path / "out", tmp_path / "canary")
    uri = make(site)
    with world.undisturbed():
        with pytest.raises(error) as caught:
            world.client.load_adapter("bad", uri)
        with pytest.raises(errors.NotFound):
            world.client.generate("x", "bad")
    assert isinstance(caught.value, errors.DeltaserveError)
    assert caught.value.reason == reason, caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert not site.canary.exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


# Requests:

LONG = 512
REQUESTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "empty text": ({"prompt": ""}, "text", ["''"]),
    "no tokens": ({"prompt": []}, "token_ids.ids", ["0 tokens", "1 to"]),
    "a token id too large": ({"prompt": [1, VOCAB]}, "prompt", [str(VOCAB), str(VOCAB - 1)]),
    "a prompt too long": ({"prompt": [1] * LONG}, "prompt", ["512", "511"]),
    "a far too long prompt": ({"prompt": "x" * 1_000_000}, "text", ["1000000"]),
    "NaN": ({"temperature": NAN}, "sampling.temperature", ["nan", "from 0"]),
    "a negative temperature": ({"temperature": -0.1}, "sampling.temperature", ["-0.1"]),
    "top_p 0": ({"top_p": 0.0}, "sampling.top_p", ["0.0", "above 0"]),
    "top_p 2": ({"top_p": 2.0}, "sampling.top_p", ["2"]),
    "min_p": ({"min_p": INF}, "sampling.min_p", ["inf"]),
    "penalty": ({"repetition_penalty": 0.0}, "sampling.repetition_penalty", ["0"]),
    "a huge n": ({"n": 2**31}, "n", [str(2**31), "64"]),
    "no n": ({"n": 0}, "n", ["0"]),
    "too many stops": ({"stop": ["x"] * 1000}, "stop.strings", ["1000", "64"]),
    "too many stop tokens": ({"stop_token_ids": [1] * 2000}, "stop.token_ids", ["2000"]),
    "a stop token too large": ({"stop_token_ids": [VOCAB]}, "stop.token_ids", [str(VOCAB)]),
    "bias on no token": ({"logit_bias": {VOCAB: 1.0}}, "sampling.logit_bias", [str(VOCAB)]),
    "an infinite bias": ({"logit_bias": {1: -INF}}, "sampling.logit_bias", ["inf"]),
    "no max_tokens": ({"max_tokens": 0}, "stop.max_tokens", ["0"]),
    "too many logprobs": ({"logprobs": 100_000}, "logprobs", ["100000"]),
    "strength NaN": ({"adapters": [("lora", NAN)]}, "adapters.strength", ["nan"]),
    "strength 1e6": ({"adapters": [("lora", 1e6)]}, "adapters.strength", ["1000"]),
    "one adapter twice": ({"adapters": ["lora", "lora"]}, "adapters", ["once"]),
    "two prefixes": (
        {"adapters": ["prompt-tuning", "prefix-tuning"]},
        "adapters",
        ["virtual tokens", "at most one"],
    ),
    "a weak prefix": ({"adapters": [("prefix-tuning", 0.5)]}, "adapters", ["strength", "0.5"]),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_bad_request(world: World, what: str) -> None:
    arguments, field, words = REQUESTS[what]
    with world.undisturbed():
        for call in (world.client.generate, lambda **a: list(world.client.stream(**a))):
            with pytest.raises(errors.InvalidArgument) as caught:
                call(**{"prompt": prompt(5), **arguments})
            assert caught.value.field == field, caught.value.message
            for word in [*words, field.rpartition(".")[2]]:
                assert word in caught.value.message or word in ("strings", "token_ids", "ids")


def test_a_prompt_that_a_prefix_makes_too_long(world: World) -> None:
    with world.undisturbed(), pytest.raises(errors.InvalidArgument, match="11 virtual") as caught:
        world.client.generate(prompt(5, LONG - 5), "prefix-tuning", max_tokens=1)
    assert caught.value.field == "prompt"


def test_an_unknown_adapter(world: World) -> None:
    with world.undisturbed():
        for call in (
            lambda: world.client.generate("x", "nobody"),
            lambda: world.client.generate("x", adapters=["lora", "nobody"]),
            lambda: world.client.generate("x", "lora@0123abcd"),
            lambda: world.client.score("x", ["y"], "nobody"),
            lambda: world.client.unload_adapter("nobody"),
        ):
            with pytest.raises(errors.NotFound, match=r"nobody|0123abcd") as caught:
                call()
            assert caught.value.reason == "ADAPTER_UNKNOWN"


def test_bytes_that_are_no_message(world: World) -> None:
    with world.undisturbed(), grpc.insecure_channel(world.serving.address) as channel:
        for service, method in (("Generation", "Generate"), ("Adapter", "LoadAdapter")):
            call = channel.unary_unary(f"/deltaserve.v1.{service}Service/{method}")
            for data in (b"\xff" * 9, b"\x0a\x02\xc3\x28", os.urandom(500) + b"\xff\xff\xff"):
                with pytest.raises(grpc.RpcError) as caught:
                    call(data, timeout=10)
                assert caught.value.code() in (
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.NOT_FOUND,
                )


# Names:


def test_a_name_that_is_taken(world: World) -> None:
    loads = world.client.get_adapter("lora").loads
    with world.undisturbed():
        with pytest.raises(errors.AlreadyExists, match="registered with digest") as caught:
            world.client.load_adapter("lora", str(world.roots / "dora"), pinned=True)
        assert caught.value.reason == "ADAPTER_CONFLICT" and caught.value.field == "name"
        again = world.client.load_adapter("lora", str(world.roots / "lora"))
    assert (again.state, again.loads, again.pinned) == ("ready", loads, False)


def test_unload_while_in_use(world: World) -> None:
    """Its stream goes on to its end, nobody new gets in, its bytes come back."""
    client, folder = world.client, world.roots / "leaving"
    VARIANTS["dora"].make(world.base, folder, torch.Generator().manual_seed(70))
    with world.undisturbed():
        size = client.load_adapter("leaving", str(folder)).resident_bytes
        ids = prompt(7)
        right = client.generate(ids, "leaving", max_tokens=450, ignore_eos=True).token_ids
        stream = client.stream(ids, "leaving", max_tokens=450, ignore_eos=True)
        got = list(next(stream).token_ids)
        freed: list[int] = []
        thread = threading.Thread(target=lambda: freed.append(client.unload_adapter("leaving")))
        thread.start()
        until(lambda: client.get_adapter("leaving").state == "unloading", "unloading")
        with pytest.raises(errors.NotFound, match="'leaving' is being unloaded"):
            client.generate("x", "leaving")
        with pytest.raises(errors.Aborted, match="load it again when that is done") as caught:
            client.load_adapter("leaving", str(folder))
        assert caught.value.reason == "ADAPTER_BUSY"
        assert not freed  # all of this while the stream was still running
        for piece in stream:
            got += piece.token_ids
        thread.join(10)
    assert got == right and freed == [size] and size > 0


# Weights without end:


def huge(base: Path, folder: Path) -> None:
    """Finite, well-formed, and infinite as soon as they are used."""
    if folder.exists():
        return
    modules = {}
    for name, linear in linears(open_base(base)).items():
        out, in_ = linear.weight.shape
        modules[name] = (LowRank(torch.full((2, in_), 1e38), torch.full((out, 2), 1e38)),)
    write_delta(folder, modules, kind="test")


def test_weights_that_overflow_hurt_nobody_else(world: World) -> None:
    huge(world.base, world.roots / "huge")
    size = world.client.load_adapter("huge", str(world.roots / "huge")).resident_bytes
    with world.undisturbed():
        for _ in range(3):
            with pytest.raises(errors.FailedPrecondition, match="not finite") as caught:
                world.client.generate(prompt(8, 40), "huge", max_tokens=5)
            assert caught.value.reason == "NON_FINITE_LOGITS" and "huge" in caught.value.message
            with pytest.raises(errors.FailedPrecondition, match="not finite"):
                world.client.score(prompt(8, 40), [[1, 2]], "huge")
    assert world.client.unload_adapter("huge") == size


def cancel_halfway(engine: Engine, request_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its prompt is computed, before any logits are seen."""
    run = engine._runner.run

    def counting(batch: Batch) -> Any:
        if any(part.start > 40 for part in batch.chunks):
            engine.cancel(request_id)
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", counting)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("ends", ["by itself", "cancelled", "twice at once"])
def test_the_blocks_of_a_poisoned_request_are_clean(
    world: World, model: BaseModel, monkeypatch: pytest.MonkeyPatch, native: bool, ends: str
) -> None:
    """Few blocks, so that everything is used again at once; with and without native attention.
    Of 84 tokens 4 are left to the last step: there, two equal requests share all but those."""
    from deltaserve.kernels.attention import cpu_step

    huge(world.base, world.roots / "huge")
    if not native:
        monkeypatch.setattr(cpu_step, "paged_decode", lambda *a, **k: None)
    asked = [request(prompt(20 + i, 11 + i)) for i in range(6)]
    cache = {"kv_cache_bytes": 20 * 8 * 2 * 2 * 32 * 4, "max_batch_tokens": 16}
    with running(load_base(world.base), [world.roots], **cache) as engine:
        right = generate(engine, asked, timeout=60)
    with running(load_base(world.base), [world.roots], **cache) as engine:
        engine.adapters.load("huge", str(world.roots / "huge")).result(60)
        collector = Collector()
        for _ in range(2):
            bad = [request(prompt(9, 84), "huge") for _ in range(2 if "twice" in ends else 1)]
            if ends == "cancelled":
                cancel_halfway(engine, bad[0].request_id, monkeypatch)
            for r in bad:
                engine.submit(r, collector)
            for r in bad:
                with pytest.raises(Cancelled if ends == "cancelled" else NonFiniteLogits):
                    collector.wait(r.request_id, 60)
            if ends != "cancelled":
                kv = engine._runner.kv
                held = (*kv.keys.values(), *kv.values.values())
                assert all(bool(cells.isfinite().all()) for cells in held)
            again = [request(r.prompt_ids) for r in asked]
            for ours, theirs in zip(generate(engine, again, timeout=60), right, strict=True):
                assert ours.token_ids == theirs.token_ids
                for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert engine.stats().kv_blocks_used == 0

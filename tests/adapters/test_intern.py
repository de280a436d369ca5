"""Tensors of equal content are stored and counted once: in an adapter, and across adapters."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.finite import finite
from deltaserve.adapters.intern import intern
from deltaserve.adapters.load import load
from deltaserve.adapters.marks import content_digest, read_as
from deltaserve.kernels import content
from deltaserve.kernels.linear import LinearDeltas
from deltaserve.kernels.primitives import LowRank, SparseCols
from deltaserve.server.packing.prepared import PreparedAdapter

from . import tiny
from .format_files import PEFT, write

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "target_modules": ["q_proj"],
}
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
A_BYTES = B_BYTES = 4 * 24 * 4


def adapter(folder: Path, a: Tensor, seed: int = 0) -> Adapter:
    """ShareLoRA: one A for all layers, a B for each."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    file = {}
    for module in MODULES:
        file[f"{PEFT}{module}.lora_A.weight"] = a
        file[f"{PEFT}{module}.lora_B.weight"] = torch.randn(24, 4)
    write(folder, file, CONFIG)
    return load(folder, tiny.spec_of(tiny.llama()))


def lowrank(of: Adapter, module: str) -> LowRank:
    (p,) = of.modules[module]
    assert isinstance(p, LowRank)
    return p


def test_a_tensor_that_layers_share_is_held_and_counted_once(tmp_path: Path) -> None:
    made = adapter(tmp_path, torch.randn(4, 24))
    assert len({id(lowrank(made, m).a) for m in MODULES}) == 1
    assert len({id(lowrank(made, m).b) for m in MODULES}) == 3
    assert made.nbytes == A_BYTES + 3 * B_BYTES
    assert made.source_bytes > 3 * (A_BYTES + B_BYTES)


def test_two_adapters_share_what_both_bring(tmp_path: Path) -> None:
    a = torch.randn(4, 24)
    first, second = adapter(tmp_path / "1", a), adapter(tmp_path / "2", a, seed=1)
    assert lowrank(first, MODULES[0]).a is lowrank(second, MODULES[2]).a
    assert lowrank(first, MODULES[0]).b is not lowrank(second, MODULES[0]).b
    assert second.nbytes == A_BYTES + 3 * B_BYTES, "each counts what it needs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_shared_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also with an adapter that came after the first one's own tensors were dropped."""
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    deltas = LinearDeltas(24, [24, 24], dtype)
    size = dtype.itemsize

    def prepared() -> Any:
        found, _ = intern({"q": (LowRank(a.clone(), b.clone()),)}, None)
        return deltas.prepare({0: found["q"], 1: found["q"]})

    first = prepared()
    assert first.nbytes == (4 * 24 + 24 * 4) * size
    gc.collect()
    second = prepared()
    assert second.nbytes == first.nbytes
    deltas.install(0, first)
    deltas.install(1, second)
    assert deltas.nbytes == first.nbytes, "two adapters, one copy"


def test_an_installed_adapter_counts_what_its_layers_share_once() -> None:
    a = torch.randn(4, 24)
    modules = {name: (LowRank(a.clone(), torch.randn(24, 4)),) for name in MODULES}
    found, _ = intern(modules, None)
    linears = {n: LinearDeltas(24, [24], torch.float32).prepare({0: found[n]}) for n in MODULES}
    made = PreparedAdapter("", linears, {}, None, None, None)
    assert made.nbytes == A_BYTES + 3 * B_BYTES


def test_sparse_supports_are_shared_across_adapters() -> None:
    index = torch.tensor([3, 1, 7])
    deltas = LinearDeltas(24, [24], torch.bfloat16)
    for slot in range(3):
        values = torch.randn(24, 3).bfloat16()
        found, _ = intern({"q": (SparseCols(index.clone(), values),)}, None)
        deltas.install(slot, deltas.prepare({0: found["q"]}))
    assert deltas.nbytes == 3 * 8 + 3 * (24 * 3 * 2)


def test_equal_means_bytes_dtype_and_shape() -> None:
    tensors = [
        torch.zeros(2, 6),
        -torch.zeros(2, 6),
        torch.zeros(3, 4),
        torch.zeros(2, 6, dtype=torch.int32),
        torch.zeros(6, 2).T,
        torch.zeros(1, 6).expand(2, 6),
    ]
    found, _ = intern({"q": tuple(LowRank(t, torch.ones(1, 1)) for t in tensors)}, None)
    kept = [p.a for p in found["q"] if isinstance(p, LowRank)]
    assert kept[4] is kept[0], "another layout of the same numbers"
    assert len({id(t) for t in kept}) == 5
    assert kept[5].stride() == (0, 1), "not blown up"
    assert all(torch.equal(x, y) for x, y in zip(kept, tensors, strict=True))


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before = len(content._known)
    found, _ = intern({"q": (LowRank(torch.randn(5, 7), torch.randn(3, 5)),)}, None)
    assert len(content._known) == before + 2
    del found
    gc.collect()
    assert len(content._known) == before


def test_what_was_written_to_since_it_was_read_is_not_taken_for_what_was_read() -> None:
    """Its digest is that of its bytes now: through itself or a view, and never across shapes."""
    for change in (
        lambda t: t.mul_(2),
        lambda t: t[0].zero_(),
        lambda t: t.T.add_(1),
        lambda t: None,
    ):
        value = torch.randn(4, 6)
        read_as(value, hashlib.sha256(value.numpy().tobytes()).digest())
        before = content_digest(value)
        assert before == content_digest(value.clone())
        change(value)
        assert content_digest(value) == content_digest(value.clone())
        assert content_digest(value.view(6, 4)) != content_digest(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert finite(torch.tensor([info.max, info.min, 0.0], dtype=dtype))
    assert finite(torch.empty(0, 3, dtype=dtype))
    for size in (1, 7, 64, 1001):
        for bad in (float("nan"), float("inf"), -float("inf")):
            value = torch.randn(size).to(dtype)
            assert finite(value)
            value[int(torch.randint(size, ()))] = bad
            assert not finite(value), (size, bad)

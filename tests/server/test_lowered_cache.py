"""What is kept on disk of slow adapters comes back exactly, or the files are lowered anew."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import load_base, request, running
from serving import until
from torch import Tensor
from variants import VARIANTS, make_base

from deltaserve.adapters import lowered_cache
from deltaserve.adapters.adapter import Adapter
from deltaserve.adapters.errors import BaseMismatch
from deltaserve.adapters.load import load
from deltaserve.adapters.lowered_cache import ENTRY, LoweredCache
from deltaserve.adapters.options import DEFAULT, LoadOptions
from deltaserve.kernels.primitives import LowRank, Replace, SparseCols, SparseRows
from deltaserve.server.config import AdapterConfig
from deltaserve.server.engine.collector import generate
from deltaserve.server.engine.recipe import reader
from deltaserve.server.model import BaseModel

SLOW = 1e6
"""Seconds that nothing is worth lowering again for."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("cache") / "base"
    make_base(folder, "llama")
    return load_base(folder)


@pytest.fixture
def cache(model: BaseModel, tmp_path: Path) -> LoweredCache:
    return LoweredCache(tmp_path / "cache", 1 << 30, model.spec)


def low_rank(model: BaseModel, seed: int = 0, scale: float = 1.0, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    name = "model.layers.0.mlp.up_proj"
    spec = model.spec.modules[name]
    a = torch.randn(rank, spec.in_features, generator=generator)
    b = torch.randn(spec.out_features, rank, generator=generator)
    modules = {name: (LowRank(a, b, scale),)}
    return Adapter(f"{seed:064}", "made-up", modules, source_bytes=1000 + seed)


def entries(cache: LoweredCache) -> list[Path]:
    return sorted(p for p in cache.folder.glob("*") if p.is_dir())


def same(a: Any, b: Any) -> bool:
    """Written apart from the code's own comparison."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.tolist() == b.tolist() and a.shape == b.shape
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)
        )
    return bool(a == b)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_kind_comes_back_exactly(
    model: BaseModel, cache: LoweredCache, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "adapter"
    VARIANTS[name].make(model.folder, folder, torch.Generator().manual_seed(3))
    adapter = load(folder, model.spec)
    assert cache.find(adapter.digest, DEFAULT) is None
    scales = [p.scale for g in adapter.modules.values() for p in g if isinstance(p, LowRank)]
    if not cache.keep(adapter, DEFAULT, SLOW):
        assert any(scale != float(torch.tensor(scale)) for scale in scales), "it could be held"
        return
    assert cache.holds(adapter, DEFAULT) and not cache.keep(adapter, DEFAULT, SLOW)
    found = cache.find(adapter.digest, DEFAULT)
    assert found is not None
    for f in fields(Adapter):
        ours, theirs = getattr(found, f.name), getattr(adapter, f.name)
        assert same(dict(ours) if f.name == "modules" else ours, theirs), f.name


def test_what_is_not_slow_or_not_exact_is_not_kept(model: BaseModel, cache: LoweredCache) -> None:
    adapter = low_rank(model)
    assert not cache.keep(adapter, DEFAULT, 0.01)
    assert not cache.keep(low_rank(model, scale=1 / 3), DEFAULT, SLOW)  # no float32 is a third
    assert cache.keep(low_rank(model, seed=1, scale=0.5), DEFAULT, SLOW)
    name = next(iter(adapter.modules))
    twice = (*adapter.modules[name], *low_rank(model, 5).modules[name])
    assert not cache.keep(replace(adapter, modules={name: twice}), DEFAULT, SLOW)
    small = LoweredCache(cache.folder, 100, model.spec)
    assert not small.keep(low_rank(model, seed=2), DEFAULT, SLOW)
    assert len(entries(cache)) == 1 and not list(cache.folder.glob(".new-*"))


def test_the_order_of_primitives_is_kept(model: BaseModel, cache: LoweredCache) -> None:
    """Sums are of the same terms in the same order, so that their roundings are."""
    name = "model.layers.0.mlp.up_proj"
    spec, index = model.spec.modules[name], torch.tensor([1, 3])
    rows = SparseRows(index, torch.randn(2, spec.in_features))
    cols = SparseCols(index, torch.randn(spec.out_features, 2).bfloat16())
    for seed, group in enumerate(((rows, cols), (cols, rows))):
        adapter = replace(low_rank(model, seed), modules={name: group})
        assert cache.keep(adapter, DEFAULT, SLOW)
        found = cache.find(adapter.digest, DEFAULT)
        assert found is not None and [type(p) for p in found.modules[name]] == [
            type(p) for p in group
        ]


def test_another_base_or_other_options_find_nothing(model: BaseModel, cache: LoweredCache) -> None:
    adapter = low_rank(model)
    assert cache.keep(adapter, DEFAULT, SLOW)
    assert cache.find(adapter.digest, DEFAULT) is not None
    assert cache.find("0" * 63 + "1", DEFAULT) is None
    assert cache.find(adapter.digest, LoadOptions(allow_base_mismatch=True)) is None
    for change in ("fingerprint", "held_fingerprint"):
        other = LoweredCache(cache.folder, 1 << 30, replace(model.spec, **{change: "other"}))
        assert other.find(adapter.digest, DEFAULT) is None
    loose = LoweredCache(cache.folder, 1 << 30, model.spec, any_base=True)
    assert loose.find(adapter.digest, DEFAULT) is None
    assert loose.keep(adapter, DEFAULT, SLOW) and len(entries(cache)) == 2


def test_an_adapter_for_another_base_is_still_refused(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another server, told to take it, has kept it."""
    folder = tmp_path / "adapter"
    VARIANTS["bitdelta"].make(model.folder, folder, torch.Generator().manual_seed(3))
    config = json.loads((folder / "delta_config.json").read_text())
    config |= {"base_fingerprint": "another", "base_tensors": {}}
    (folder / "delta_config.json").write_text(json.dumps(config))
    for allow in (True, False):
        cache = LoweredCache(tmp_path / "cache", 1 << 30, model.spec, any_base=allow)
        given = AdapterConfig(roots=(tmp_path,), allow_base_mismatch=allow)
        read = reader(given, model.spec, 1 << 30, cache)
        if allow:
            assert cache.keep(read(str(folder), DEFAULT, None), DEFAULT, SLOW)
            assert read(str(folder), DEFAULT, None).notes
        else:
            with pytest.raises(BaseMismatch):
                read(str(folder), DEFAULT, None)


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("change", [torn, flipped, Path.unlink])
@pytest.mark.parametrize("file", [ENTRY, "delta_config.json", "delta_model.safetensors"])
def test_a_damaged_entry_is_dropped(
    model: BaseModel, cache: LoweredCache, file: str, change: Callable[[Path], None]
) -> None:
    adapter = low_rank(model)
    assert cache.keep(adapter, DEFAULT, SLOW)
    change(entries(cache)[0] / file)
    assert cache.find(adapter.digest, DEFAULT) is None
    assert not entries(cache)
    assert cache.keep(adapter, DEFAULT, SLOW) and cache.find(adapter.digest, DEFAULT)


def test_entries_stay_within_their_bytes_and_the_least_valuable_goes(
    model: BaseModel, cache: LoweredCache
) -> None:
    kept = [low_rank(model, seed) for seed in range(4)]
    assert cache.keep(kept[0], DEFAULT, 100.0)
    size = sum(f.stat().st_size for f in entries(cache)[0].iterdir())
    cache.limit = size * 3 + size // 2
    assert cache.keep(kept[1], DEFAULT, 300.0) and cache.keep(kept[2], DEFAULT, 200.0)
    aged = next(p for p in entries(cache) if p.name.endswith(str(kept[1].source_bytes)))
    long_ago = time.time() - 3 * lowered_cache.HALF_LIFE
    os.utime(aged / ENTRY, (long_ago, long_ago))  # worth 300 / 8 seconds now
    assert cache.keep(kept[3], DEFAULT, 50.0)
    left = [cache.find(a.digest, DEFAULT) is not None for a in kept]
    assert left == [True, False, True, True]
    assert time.time() - (entries(cache)[0] / ENTRY).stat().st_mtime < 60  # it was used


def test_what_was_not_read_is_only_hashed_if_there_may_be_an_entry(
    model: BaseModel, cache: LoweredCache
) -> None:
    adapter, asked = low_rank(model), []

    def digest() -> str:
        asked.append(1)
        return adapter.digest

    assert cache.find_unread(adapter.source_bytes, digest, DEFAULT) is None and not asked
    cache.keep(adapter, DEFAULT, SLOW)
    assert cache.find_unread(adapter.source_bytes + 1, digest, DEFAULT) is None and not asked
    found = cache.find_unread(adapter.source_bytes, digest, DEFAULT)
    assert found is not None and found.digest == adapter.digest and asked


def test_a_folder_that_cannot_be_written_is_no_cache(model: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = LoweredCache(tmp_path / "file" / "cache", 1 << 30, model.spec)
    assert not cache.keep(low_rank(model), DEFAULT, SLOW)
    assert cache.find("0" * 64, DEFAULT) is None


@pytest.mark.parametrize("processes", [False, True])
def test_an_evicted_adapter_comes_back_from_the_cache(
    model: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    """With the answers that it gave; its files are gone meanwhile, it is what was registered."""
    monkeypatch.setattr(lowered_cache, "LEAST_SECONDS", -math.inf)
    roots, kept = tmp_path / "roots", tmp_path / "cache"
    VARIANTS["dora"].make(model.folder, roots / "d", torch.Generator().manual_seed(3))
    shutil.copytree(roots / "d", roots / "again")
    config = {"cache_bytes": 1 << 30, "cache_folder": kept, "loader_processes": processes}
    with running(load_base(model.folder), [roots], adapters=config) as engine:
        cache = engine.adapters
        info = cache.load("d", str(roots / "d"), register_only=True).result(60)
        assert (info.state, info.tier) == ("registered", "cache")
        until(lambda: len(list(kept.glob("[!.]*"))) == 1, "it is written")
        shutil.rmtree(roots / "d")
        asked = request(list(range(9, 30)), "d", max_tokens=6)
        answer = generate(engine, [asked], 60)[0]
        assert cache.get("d").tier == "host" and cache.get("d").digest == info.digest
        other = cache.load("again", str(roots / "again")).result(60)
        assert (other.digest, other.notes, other.format) == (info.digest, info.notes, info.format)
        again = generate(engine, [request(list(range(9, 30)), "again", max_tokens=6)], 60)[0]
    with running(load_base(model.folder), [roots]) as engine:
        engine.adapters.load("plain", str(roots / "again")).result(60)
        plain = generate(engine, [request(list(range(9, 30)), "plain", max_tokens=6)], 60)[0]
    for found in (answer, again):
        assert found.token_ids == plain.token_ids
        assert [x.logprob for x in found.logprobs] == [x.logprob for x in plain.logprobs]


def test_a_whole_weight_is_kept_too(model: BaseModel, cache: LoweredCache) -> None:
    name = "model.layers.0.mlp.up_proj"
    spec = model.spec.modules[name]
    weight = torch.randn(spec.out_features, spec.in_features)
    adapter = replace(low_rank(model), modules={name: (Replace(weight),)})
    assert cache.keep(adapter, DEFAULT, SLOW)
    found = cache.find(adapter.digest, DEFAULT)
    assert found is not None and same(dict(found.modules), adapter.modules)

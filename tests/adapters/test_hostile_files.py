"""Files from strangers: each is refused with the right error, at once and at no cost."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    MalformedAdapter,
    SourceForbidden,
    UnsupportedAdapter,
)
from deltaserve.adapters.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS


def write(folder: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + body)
    return file


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opened(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        for name in checkpoint.entries:
            checkpoint.tensor(name)


BAD: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length-2^63": (b"{}", b"", 1 << 63, "header of 9223372036854775808 bytes"),
    "length-101-MB": (b"{}", b"", 101_000_000, "header of 101000000 bytes; at most 8388608"),
    "length-beyond-file": (b"{}", b"", 100, "truncated: header of 100 bytes in a file of 10"),
    "not-json": (b"{nope}", b"", None, "not valid JSON"),
    "not-utf8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "list": (b"[]", b"", None, "a JSON object is needed, found list"),
    "nan": (b'{"a": NaN}', b"", None, "NaN is not JSON"),
    "duplicate": (b'{"a": 1, "a": 2}', b"", None, "'a' appears twice"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, b"", None, "nested deeper than 32"),
    "huge-number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "not valid JSON"),
    "entry-not-object": ({"a": 1}, b"", None, "dtype, shape and data_offsets"),
    "entry-extra": ({"a": entry([1], 0, 4) | {"x": 1}}, b"1234", None, "exactly dtype"),
    "shape-negative": ({"a": entry([-1], 0, 4)}, b"1234", None, "integers >= 0"),
    "shape-float": ({"a": entry([1.0], 0, 4)}, b"1234", None, "integers >= 0"),  # type: ignore[list-item]
    "shape-bool": ({"a": entry([True], 0, 4)}, b"1234", None, "integers >= 0"),
    "shape-overflow": ({"a": entry([1 << 61, 1 << 61], 0, 4)}, b"1234", None, "by its shape"),
    "dimensions": ({"a": entry([1] * 9, 0, 4)}, b"1234", None, "at most 8"),
    "offsets-reversed": ({"a": entry([1], 4, 0)}, b"1234", None, "begin <= end"),
    "size-mismatch": ({"a": entry([2], 0, 4)}, b"1234", None, "8 bytes by its shape, 4"),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456", None, "overlaps"),
    "same-bytes": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", None, "overlaps"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12, None, "leaves a gap"),
    "truncated": ({"a": entry([2], 0, 8)}, b"1234", None, "truncated: tensors end at byte"),
    "trailing": ({"a": entry([1], 0, 4)}, b"12345", None, "belong to no tensor"),
    "long-name": ({"a" * 1001: entry([1], 0, 4)}, b"1234", None, "name of 1001 characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_headers(case: str, tmp_path: Path) -> None:
    header, body, length, message = BAD[case]
    file = write(tmp_path, header, body, length)
    with pytest.raises(MalformedAdapter, match=message):
        opened(file)


def test_too_short(tmp_path: Path) -> None:
    for size in range(8):
        (tmp_path / "model.safetensors").write_bytes(b"\1" * size)
        with pytest.raises(MalformedAdapter, match="too short"):
            opened(tmp_path)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": entry([4], 0, 4, "F8_E4M3")}, b"1234")
    with pytest.raises(UnsupportedAdapter, match="'F8_E4M3' is not read"):
        opened(tmp_path)


def test_a_million_empty_tensors_cost_nothing(tmp_path: Path) -> None:
    one = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    file = write(tmp_path, b"{" + b",".join(one % i for i in range(1_000_000)) + b"}")
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(MalformedAdapter, match=f"at most {MAX_HEADER_BYTES}"):
        opened(file)
    assert time.perf_counter() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_too_many_tensors_in_a_small_header(tmp_path: Path) -> None:
    one = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    data = b"{" + b",".join(one % i for i in range(MAX_TENSORS + 1)) + b"}"
    assert len(data) < MAX_HEADER_BYTES
    with pytest.raises(MalformedAdapter, match="100001 tensors; at most 100000"):
        opened(write(tmp_path, data))


def test_one_duplicate_among_many_keys(tmp_path: Path) -> None:
    keys = b",".join(b'"%x":0' % i for i in range(400_000))
    start = time.perf_counter()
    with pytest.raises(MalformedAdapter, match="key '61a7f' appears twice"):
        opened(write(tmp_path, b"{" + keys + b',"61a7f":0}'))
    assert time.perf_counter() - start < 10


def test_too_many_shards(tmp_path: Path) -> None:
    shards(tmp_path, {str(i): f"{i}.safetensors" for i in range(257)})
    with pytest.raises(MalformedAdapter, match="more than 256 shards"):
        opened(tmp_path)


def test_zero_dimensions_are_legal(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": entry([0, 3], 0, 0), "b": entry([], 0, 4)}, b"\0" * 4)
    with Checkpoint.open(file) as checkpoint:
        assert checkpoint.tensor("a").shape == (0, 3)
        assert checkpoint.tensor("b").shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    poisoned = torch.zeros(3, 5, dtype=dtype)
    poisoned[1, 4] = value
    save_file({"fine": torch.ones(2), "poisoned": poisoned}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("fine")
        with pytest.raises(InvalidAdapter, match="'poisoned' holds values that are not finite"):
            checkpoint.tensor("poisoned")


class Canary:
    """Writes a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickle_files_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"adapter_model{suffix}"
    file.write_bytes(pickle.dumps(Canary(str(tmp_path / "ran"))))
    for path in (file, tmp_path):
        with pytest.raises(MalformedAdapter, match=f"adapter_model{suffix}: a pickle file can run"):
            opened(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_renamed_pickle(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(Canary(str(tmp_path / "ran")), protocol=protocol)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(MalformedAdapter, match="a pickle or zip archive"):
        opened(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_renamed_torch_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert zipfile.is_zipfile(tmp_path / "model.safetensors")
    with pytest.raises(MalformedAdapter, match="a pickle or zip archive"):
        opened(tmp_path)


def test_reading_imports_no_pickle_loader(tmp_path: Path) -> None:
    """In a fresh interpreter torch.load is made to explode before anything is read."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    code = (
        "import torch, pickle\n"
        "def boom(*a, **k): raise SystemExit('unpickled')\n"
        "torch.load = pickle.load = pickle.loads = boom\n"
        "from deltaserve.adapters.checkpoint import Checkpoint\n"
        f"with Checkpoint.open({str(tmp_path)!r}) as c: print(c.tensor('a').sum())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tensor(2.)" in result.stdout, result.stderr


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SourceForbidden, match="not a plain file"):
        opened(tmp_path)
    with pytest.raises((SourceForbidden, AdapterNotFound)):
        opened(tmp_path / "model.safetensors")


def test_empty_and_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AdapterNotFound):
            opened(path)


def shards(folder: Path, weight_map: Any) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.tensor("a").tolist() == [1, 1]
            assert checkpoint.tensor("b").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        (["one.safetensors"], MalformedAdapter, "weight_map must map"),
        ({"a": 1}, MalformedAdapter, "weight_map must map"),
        ({"a": "../x.safetensors"}, SourceForbidden, "not a plain file name"),
        ({"a": "/etc/passwd"}, SourceForbidden, "not a plain file name"),
        ({"a": ".."}, SourceForbidden, "not a plain file name"),
        ({"a": "one.bin"}, MalformedAdapter, "pickle"),
        ({"a": "three.safetensors"}, AdapterNotFound, "'three.safetensors' is missing"),
    ],
)
def test_bad_shards(
    weight_map: Any, error: type[AdapterError], message: str, tmp_path: Path
) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(error, match=message):
        opened(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(MalformedAdapter, match="'a' is in another shard too"):
        opened(tmp_path)


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, file)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("a")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(MalformedAdapter, match="changed while being read"):
            checkpoint.tensor("a")
        file.write_bytes(data[:-1])
        with pytest.raises(MalformedAdapter, match="truncated while being read"):
            checkpoint.tensor("a")


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["F32", "U8", "a", ""]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=12,
)
NUMBERS = st.lists(st.integers(-1, 9), max_size=3)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "BF16"]), "shape": NUMBERS, "data_offsets": NUMBERS}
)


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.binary(max_size=60)
    | st.dictionaries(st.text(max_size=4), ENTRY | VALUE, max_size=4).map(
        lambda v: json.dumps(v).encode()
    ),
    body=st.binary(max_size=24),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_read_or_refused(
    tmp_path: Path, header: bytes, body: bytes, length: int | None
) -> None:
    file = write(tmp_path, header, body, length)
    try:
        opened(file)
    except AdapterError as error:
        assert str(error)

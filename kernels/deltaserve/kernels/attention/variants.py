"""The compiled forms of attention that a server of a model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deltaserve.kernels.attention.cells import write_kernel
from deltaserve.kernels.attention.decode import decode_kernel, reduce_kernel
from deltaserve.kernels.attention.launch import Launch, Shape, write_launch
from deltaserve.kernels.attention.prefill import prefill_kernel
from deltaserve.kernels.gpu.device import NAMES
from deltaserve.kernels.gpu.variant import Variant

FLOATS = frozenset({"out", "query", "keys", "values", "key", "value"})
PARTS = frozenset({"planes", "stats", "sums"})
TABLES = frozenset({"query_start", "lengths", "tables", "rows"})


def variants(
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    windowed: Sequence[bool] = (False,),
    softcap: bool = False,
    sinks: torch.dtype | None = None,
    cells: torch.dtype = torch.int64,
    sums: int = 0,
) -> list[Variant]:
    """windowed: whether layers have a sliding window; (False, True) where some have. sinks: their
    dtype, if there are any. cells: the dtype of the indices that `write_cells` is given. sums:
    columns of the sums of the output, 0 if none are taken."""
    shape = Shape(heads, kv_heads, key_dim, value_dim, block_size)
    size = dtype.itemsize
    geometry = f"{heads}/{kv_heads} x {key_dim}/{value_dim} {NAMES[dtype]}"
    types = _types(dtype, sinks, cells)
    found = []

    def add(name: str, kernel: Any, launch: Launch, **forms: int | None) -> None:
        if sinks is None and "sinks" in kernel.arg_names:
            forms["sinks"] = None
        if "SUM" in kernel.arg_names:
            forms["SUM"] = sums
            if not sums:
                forms["sums"] = None
        words = ["attention", name, geometry]
        words += [word for word in ("WINDOW", "SOFTCAP") if forms.get(word)]
        words += [f"sums of {sums}"] if forms.get("SUM") else []
        words += ["sinks"] if sinks is not None and "sinks" in kernel.arg_names else []
        found.append(_variant(" ".join(words).lower(), kernel, launch, forms, types))

    for window in windowed:
        forms = {"WINDOW": window, "SOFTCAP": softcap}
        add("prefill", prefill_kernel, shape.prefill(size), **forms)
        decode = shape.decode(size)
        add("decode", decode_kernel, decode, SPLIT=False, planes=None, stats=None, **forms)
        add("decode split", decode_kernel, decode, SPLIT=True, **forms)
        add("reduce", reduce_kernel, shape.reduce(size), WINDOW=window)
    add("write", write_kernel, write_launch(kv_heads, key_dim, value_dim, block_size))
    return found


def _types(dtype: torch.dtype, sinks: torch.dtype | None, cells: torch.dtype) -> dict[str, str]:
    types = dict.fromkeys(FLOATS, f"*{NAMES[dtype]}")
    types |= dict.fromkeys(PARTS, "*fp32") | dict.fromkeys(TABLES, "*i32")
    types |= {"inner": "fp32", "outer": "fp32"}
    types["cells"] = "*i64" if cells == torch.int64 else "*i32"
    if sinks is not None:
        types["sinks"] = f"*{NAMES[sinks]}"
    return types


def _variant(
    name: str,
    kernel: Any,
    launch: Launch,
    forms: Mapping[str, int | None],
    types: Mapping[str, str],
) -> Variant:
    constants = {**launch.constants, **forms}
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
    aligned = frozenset(signature) & (FLOATS | PARTS)
    return Variant(name, kernel, signature, constants, aligned, launch.num_warps, launch.num_stages)

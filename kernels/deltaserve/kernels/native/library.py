"""Loading the compiled kernels into torch's own OpenMP thread pool."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

from deltaserve.kernels.native.build import BuildError, build
from deltaserve.kernels.native.openmp import runtime_path

logger = logging.getLogger(__name__)

POINTER, INT, LONG, FLOAT = c_void_p, c_int, c_int64, c_float

# x, its kind, in_features, y, its kind, its width, entries, table, threads
DELTAS = (POINTER, INT, LONG, POINTER, INT, LONG, POINTER, POINTER, INT)

SIGNATURES = {
    # x, kind, rows, n, gain, eps, y, threads
    "ds_rms_norm": (POINTER, INT, LONG, LONG, POINTER, FLOAT, POINTER, INT),
    # x, residual, kind, rows, n, gain, eps, y, threads
    "ds_add_norm": (POINTER, POINTER, INT, LONG, LONG, POINTER, FLOAT, POINTER, INT),
    # x, kind, rows, n, y, threads
    "ds_silu_mul": (POINTER, INT, LONG, LONG, POINTER, INT),
    # qkv, kind, tokens, heads, kv heads, dim, cosine, sine, turned, keys, values, cells, threads
    "ds_rotate_write": (POINTER, INT, *[LONG] * 4, POINTER, POINTER, LONG, *[POINTER] * 3, INT),
    # q, its strides, keys, values, out, kind, heads, kv heads, key dim, value dim, rows,
    # tables, width, block size, lengths, scale, window, softcap, sinks, threads
    "ds_attention": (
        POINTER,
        LONG,
        LONG,
        POINTER,
        POINTER,
        POINTER,
        INT,
        LONG,
        LONG,
        LONG,
        LONG,
        LONG,
        POINTER,
        LONG,
        LONG,
        POINTER,
        FLOAT,
        LONG,
        FLOAT,
        POINTER,
        INT,
    ),
    # x, kind, tokens, layers, count, entries, cosine, sine, turned, cells, tables, width, block
    # size, lengths, threads
    "ds_layers": (
        *(POINTER, INT, LONG, POINTER, INT, POINTER, POINTER, POINTER, LONG),
        *(POINTER, POINTER, LONG, LONG, POINTER, INT),
    ),
    # x, kind, rows of a token, n, weight, offset, eps, y, entries, table, threads
    "ds_tuned_norm": (POINTER, INT, LONG, LONG, POINTER, FLOAT, FLOAT, *[POINTER] * 3, INT),
    "ds_lowrank": DELTAS,
    "ds_bit": DELTAS,
    "ds_csr": DELTAS,
    "ds_rows": DELTAS,
    # y, its kind, its width, entries, table, bias, its kind, factor, threads
    "ds_vectors": (POINTER, INT, LONG, POINTER, POINTER, POINTER, INT, INT, INT),
    # x, kind, tokens, in, y, out, q, scale, zero, their kind, group size, bias, threads
    "ds_int4": (POINTER, INT, LONG, LONG, POINTER, LONG, *[POINTER] * 3, INT, LONG, POINTER, INT),
    # as ds_int4
    "ds_w4a8": (POINTER, INT, LONG, LONG, POINTER, LONG, *[POINTER] * 3, INT, LONG, POINTER, INT),
    # x, kind, tokens, in, y, out, q, code, scale, group size, bias, threads
    "ds_code4": (POINTER, INT, LONG, LONG, POINTER, LONG, *[POINTER] * 3, LONG, POINTER, INT),
    # x, kind, tokens, in, y, out, q, scale, bias, threads
    "ds_int8": (POINTER, INT, LONG, LONG, POINTER, LONG, *[POINTER] * 3, INT),
    # x, kind, tokens, in, y, out, q, scale, bias, threads
    "ds_w8a8": (POINTER, INT, LONG, LONG, POINTER, LONG, *[POINTER] * 3, INT),
    # x, kind, tokens, in, y, out, q, its kind, scale, zero, group size, bias, threads
    "ds_bytes": (
        POINTER,
        INT,
        LONG,
        LONG,
        POINTER,
        LONG,
        POINTER,
        INT,
        POINTER,
        POINTER,
        LONG,
        POINTER,
        INT,
    ),
}


class Table(ctypes.Structure):
    """`table_t` of common.h."""

    _fields_ = (("items", c_void_p), ("first", c_void_p), ("count", c_void_p), ("slots", c_int64))


class Entries(ctypes.Structure):
    """`entries_t` of common.h: the flat arrays of a step's Segments."""

    _fields_ = (
        ("count", c_int32),
        ("start", c_void_p),
        ("end", c_void_p),
        ("slot", c_void_p),
        ("strength", c_void_p),
    )


@cache
def library() -> dict[str, Callable[..., int]] | None:
    """The native kernels by name, compiled on the first call; None where torch operations must do.

    ``DELTASERVE_NATIVE=0`` turns them off. Without a compiler one line is logged.
    """
    if os.environ.get("DELTASERVE_NATIVE", "1") == "0":
        return None
    try:
        _share_openmp()
        loaded = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        logger.warning("native CPU kernels are off, slower torch operations are used: %s", error)
        return None
    functions: dict[str, Callable[..., int]] = {}
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = c_int
        functions[name] = function
    return functions


def _share_openmp() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to the library.

    A second runtime would bring a second pool of threads that spin against the first.
    """
    path = runtime_path()
    if path is None:
        raise OSError("torch's OpenMP runtime was not found")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

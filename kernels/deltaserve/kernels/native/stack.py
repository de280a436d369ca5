"""The structures of native/linear.h and stack.c: linears and decoder layers as pointers."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

from torch import Tensor

KINDS = {("int4", "float"): 0, ("int4", "int8"): 1, ("int8", "float"): 2, ("int8", "int8"): 3}
"""(weights, activations) -> linear_t.kind."""

TABLES = ("inputs", "outputs", "lowrank", "bit", "csr", "rows", "bias")
"""Of group_t, in its order."""


class NativeLinear(ctypes.Structure):
    """`linear_t`. Valid as long as the linear that made it lives and keeps its tensors."""

    _fields_ = (
        ("kind", c_int32),
        ("sz_bf16", c_int32),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("group", c_int64),
        ("q", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("bias", c_void_p),
    )


class NativeGroup(ctypes.Structure):
    """`group_t`: a linear and the addresses of its tables (`PointerTable.address`)."""

    _fields_ = (
        ("base", NativeLinear),
        *((name, c_void_p) for name in TABLES),
    )


class NativeNorm(ctypes.Structure):
    """`norm_t`. tuned: the address of a table."""

    _fields_ = (
        ("gain", c_void_p),
        ("weight", c_void_p),
        ("offset", c_float),
        ("eps", c_float),
        ("tuned", c_void_p),
    )


class NativeLayer(ctypes.Structure):
    """`layer_t`."""

    _fields_ = (
        ("qkv", NativeGroup),
        ("o", NativeGroup),
        ("up", NativeGroup),
        ("down", NativeGroup),
        ("first", NativeNorm),
        ("second", NativeNorm),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""The structures of native/stack.c: linears and decoder layers as pointers."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

from torch import Tensor

KINDS = {("int4", "float"): 0, ("int4", "int8"): 1, ("int8", "float"): 2, ("int8", "int8"): 3}
"""(weights, activations) -> linear_t.kind."""


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


class NativeLayer(ctypes.Structure):
    """`layer_t`."""

    _fields_ = (
        ("qkv", NativeLinear),
        ("o", NativeLinear),
        ("up", NativeLinear),
        ("down", NativeLinear),
        ("first", c_void_p),
        ("second", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("window", c_int64),
        ("first_eps", c_float),
        ("second_eps", c_float),
        ("scale", c_float),
        ("softcap", c_float),
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

"""Base weights of every kind, each a linear that knows its own dequantized weight."""

from deltaserve.kernels.base.bytes import ByteLinear
from deltaserve.kernels.base.code4 import Code4Linear
from deltaserve.kernels.base.dense import DenseLinear
from deltaserve.kernels.base.int4 import Int4Linear
from deltaserve.kernels.base.int8 import Int8Linear
from deltaserve.kernels.base.linear import BaseLinear
from deltaserve.kernels.base.make import concat, make_linear
from deltaserve.kernels.base.permuted import PermutedLinear
from deltaserve.kernels.base.quantize import dequantize, quantize

__all__ = [
    "BaseLinear",
    "ByteLinear",
    "Code4Linear",
    "DenseLinear",
    "Int4Linear",
    "Int8Linear",
    "PermutedLinear",
    "concat",
    "dequantize",
    "make_linear",
    "quantize",
]

"""Linears from unpacked numbers: what several formats have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.kernels.base import BaseLinear, ByteLinear, Int4Linear, Int8Linear, PermutedLinear
from deltaserve.server.model.errors import MalformedModel, UnsupportedModel
from deltaserve.server.model.quantized.packed import Packed

WIDTHS = (2, 3, 4, 8)
"""Bits of whole numbers; fewer than 4 are held in 4."""


def whole(
    q: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    order: Tensor | None,
    dtype: torch.dtype,
) -> BaseLinear:
    """``w = (q - zero) * scale``. q: uint8 [out, in]; scale, zero: [out, groups], zero None: the
    middle of the range; group: of how many inputs in their order."""
    middle = 1 << (bits - 1)
    if order is not None:
        q = q[:, order]
    linear: BaseLinear
    if bits < 8:
        zero = torch.full_like(scale, middle) if zero is None else zero
        linear = Int4Linear(q, scale, zero, None, dtype, -(-group // 8) * 8)
    else:
        signed = q.bitwise_xor(middle).view(torch.int8)  # q - 128
        shifted = None if zero is None or bool((zero == middle).all()) else zero - middle
        if shifted is None and scale.shape[1] == 1:
            linear = Int8Linear(signed, scale[:, 0], None, dtype)
        else:
            linear = ByteLinear(signed, scale, shifted, None, dtype, group)
    return linear if order is None else PermutedLinear(linear, order)


def order_of(packed: Packed, part: str, inner: int, group: int) -> Tensor | None:
    """The inputs in the order of their groups, by the part that holds the group of each; None if
    they are in it."""
    name = f"{packed.module}.{part}"
    index = packed.take(part, (inner,), (torch.int32, torch.int64)).long()
    last = -(-inner // group) - 1
    if not 0 <= int(index.min()) <= int(index.max()) <= last:
        raise MalformedModel(
            f"{name} has values in {int(index.min())}..{int(index.max())}; "
            f"{inner} inputs in groups of {group} need 0..{last}"
        )
    neat = torch.arange(inner) // group
    if torch.equal(index, neat):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], neat):
        raise UnsupportedModel(f"{name} has groups that are not of {group} inputs each")
    return order


def floats(packed: Packed, q: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> BaseLinear:
    """8-bit floats with scales [out, groups]."""
    if bool((q.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise MalformedModel(f"{packed.module}.weight has values that are not numbers")
    return ByteLinear(q, scale, None, None, dtype, group)


def spread(scale: Tensor, block: tuple[int, int], out: int) -> Tensor:
    """Of each block of rows and inputs -> of each row: [out, groups]."""
    return scale.repeat_interleave(block[0], 0)[:out]

"""Tensors of equal content as one tensor, within an adapter and with those that are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from deltaserve.adapters.marks import content_digest
from deltaserve.kernels.content import canonical
from deltaserve.kernels.primitives import AnyPrefix, Primitive, mapped

Modules: TypeAlias = dict[str, tuple[Primitive, ...]]
Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def intern(
    modules: Mapping[str, tuple[Primitive, ...]], prefix: AnyPrefix | None
) -> tuple[Modules, AnyPrefix | None]:
    """The same primitives; of tensors equal in dtype, shape and bytes only one is kept, which may
    be one that another adapter brought. Contiguous, views that repeat memory excepted."""
    done: dict[Place, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        # A tensor that modules share already is hashed once; `modules` keeps its memory.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in done:
            done[place] = _one(tensor)
        return done[place]

    # A primitive that modules share stays one as well.
    each = {id(p): mapped(p, one) for group in modules.values() for p in group}
    found = {name: tuple(each[id(p)] for p in group) for name, group in modules.items()}
    return found, None if prefix is None else mapped(prefix, one)


def _one(tensor: Tensor) -> Tensor:
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return tensor
    tensor = tensor.contiguous()
    return canonical(tensor, content_digest(tensor))

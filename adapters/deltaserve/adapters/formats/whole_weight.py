"""A whole weight in a file: does it fit the base, and is it the base's own?"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.adapters.base import BaseSpec, ModuleKind, ModuleSpec
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.fingerprint import tensor_digest
from deltaserve.adapters.lowering import Lowering

CASTS = (torch.float32, torch.bfloat16, torch.float16)


def is_vocabulary(module: ModuleSpec, base: BaseSpec) -> bool:
    """Is it an embedding or a head over the vocabulary?"""
    head = module.kind is ModuleKind.LINEAR and module.out_features == base.vocab_size
    return module.kind is ModuleKind.EMBEDDING or head


def base_weight(base: BaseSpec, module: ModuleSpec) -> Tensor:
    """The base's weight, float32, in the layout of `Replace`: [out, in], [vocabulary, hidden],
    [hidden]."""
    weight = base.weight(module.name)
    return weight.T if module.transposed else weight


def is_rounded(base: BaseSpec, module: ModuleSpec) -> bool:
    """Is the base known to hold this weight with less precision than its checkpoint does?"""
    known = base.tensor_digests.get(f"{module.name}.weight")
    own = base.weight(module.name)
    return known is not None and all(tensor_digest(own.to(t)) != known for t in CASTS)


def weight_of(work: Lowering, name: str, module: ModuleSpec) -> Tensor:
    """A weight of the file in the layout of `Replace`: [out, in], [vocabulary, hidden], [hidden].

    `InvalidAdapter` names both sizes if the vocabulary is another one.
    """
    shape = [module.out_features, module.in_features]
    if module.kind is ModuleKind.NORM:
        shape = shape[:1]
    elif module.kind is ModuleKind.EMBEDDING or module.transposed:
        shape.reverse()
    found = work.checkpoint.entries[name].shape
    if is_vocabulary(module, work.base) and found[1:] == tuple(shape[1:]) and found[0] != shape[0]:
        raise InvalidAdapter(
            f"{work.checkpoint.path}: tensor {name!r} is for a vocabulary of {found[0]} tokens; "
            f"the base {work.base.name!r} has {shape[0]}",
            field=name,
        )
    weight = work.tensor(name, shape)
    return weight.T.contiguous() if module.transposed else weight


def equals_base(work: Lowering, module: ModuleSpec, weight: Tensor) -> bool:
    """Is it the base's own weight, up to a cast to the dtype it is served in?"""
    stored = weight.T.contiguous() if module.transposed else weight
    known = work.base.tensor_digests.get(f"{module.name}.weight")
    if known is not None and known == tensor_digest(stored):
        return True
    own = base_weight(work.base, module)
    return any(torch.equal(weight.to(dtype).float(), own) for dtype in CASTS)

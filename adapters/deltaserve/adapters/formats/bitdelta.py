"""BitDelta as its authors save it, ``diff.pt`` stored again as safetensors.

FasterDecoding/BitDelta, ``bitdelta/diff.py``: for each compressed linear ``<module>.mask``, the
signs of the transposed delta packed in int32 [in / 32, out], lowest bit first, 1 for a delta >= 0,
and ``<module>.coeff``, one float; every other parameter of the fine-tuned model in full, by its
own name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve.adapters.base import ModuleSpec
from deltaserve.adapters.checkpoint import Checkpoint
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.formats.whole_weight import equals_base, weight_of
from deltaserve.adapters.lowering import Lowering
from deltaserve.kernels.primitives import Bit, Replace

NAME = "bitdelta"
MASK, COEFF = ".mask", ".coeff"
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""Constants that old transformers kept beside the parameters; the base has its own."""


def looks_like(checkpoint: Checkpoint) -> bool:
    """Is there a mask and a coefficient among the tensors?"""
    names = checkpoint.entries
    return any(name.endswith(MASK) and name[: -len(MASK)] + COEFF in names for name in names)


def lower(work: Lowering) -> None:
    """Fill ``work``; tensors that equal the base's are left out."""
    for name in work.checkpoint.entries:
        module, _, what = name.rpartition(".")
        if what == "mask":
            work.add(module, _bit(work, work.module(module, name), name, module + COEFF))
        elif what == "coeff":
            if module + MASK not in work.checkpoint.entries:
                raise work.unknown_tensor(name)
        elif what in ("weight", "bias") and module in work.base.modules:
            _parameter(work, name, work.base.modules[module], what)
        elif not name.endswith(BUFFERS):
            work.module(module, name)
            raise work.unknown_tensor(name)


def _bit(work: Lowering, module: ModuleSpec, mask: str, coeff: str) -> Bit:
    entries = work.checkpoint.entries
    wanted = (module.in_features // 32, module.out_features)
    entry = entries[mask]
    if module.in_features % 32 or entry.shape != wanted or entry.dtype != torch.int32:
        raise InvalidAdapter(
            f"{work.checkpoint.path}: tensor {mask!r} is {entry.dtype} {list(entry.shape)}; module "
            f"{module.name!r} [{module.out_features}, {module.in_features}] needs int32 [in / 32, "
            f"out] = [{module.in_features / 32:g}, {module.out_features}]",
            field=mask,
        )
    if coeff not in entries or entries[coeff].shape not in ((), (1,)):
        raise InvalidAdapter(
            f"{work.checkpoint.path}: {mask!r} needs one number {coeff!r}", field=coeff
        )
    scale = work.checkpoint.tensor(coeff).float().reshape(1, 1)
    signs = _transposed_bytes(work.checkpoint.tensor(mask))
    return Bit(signs.unsqueeze(0), scale.expand(1, module.out_features).contiguous())


def _transposed_bytes(mask: Tensor) -> Tensor:
    """int32 [in / 32, out] -> uint8 [out, in / 8]; both have input i at bit i, lowest first."""
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    parts = (mask.T.unsqueeze(-1) >> shifts) & 0xFF
    return parts.to(torch.uint8).flatten(1).contiguous()


def _parameter(work: Lowering, name: str, module: ModuleSpec, what: str) -> None:
    """A whole parameter; one that the base ties is changed in every module that shares it."""
    if what == "bias":
        own = work.base.bias(module.name)
        if own is None:
            raise InvalidAdapter(
                f"{work.checkpoint.path}: tensor {name!r}: the base's module has no bias",
                field=name,
            )
        change = work.tensor(name, [module.out_features]).float() - own
        if bool(change.any()):
            work.add_bias(module.name, change)
        return
    weight = weight_of(work, name, module)
    if equals_base(work, module, weight):
        return
    work.add(module.name, Replace(weight))
    for other, owner in work.base.tied.items():
        if owner == module.name and f"{other}.weight" not in work.checkpoint.entries:
            work.add(other, Replace(weight))

"""The delta primitives: what every adapter format is lowered to, and all the system knows of it.

For one linear module with base weight ``W [out, in]`` and bias ``b``, one token ``x [in]`` and an
adapter of strength ``w`` (1 unless the request says otherwise) the served output is

    y = (1 + w (s_out - 1)) * W ((1 + w (s_in - 1)) * x) + b  +  w (sum of the deltas' own outputs)

that is ``W + w (W_adapter - W)``: a weighted list of adapters adds up in weight space. The
primitives of one module of one adapter are a tuple; every one of them is in host memory, frozen,
and holds tensors exactly as lowered (the serving dtype is chosen where they are installed).

An embedding is the linear module whose input is one-hot: ``in`` is the vocabulary, ``out`` the
hidden size, and ``Replace``/``ReplaceRows`` hold rows in the checkpoint's ``[vocabulary, hidden]``
layout. A norm is a module with a gain ``[hidden]``: ``Replace`` holds the new gain, ``Bias`` the
change of its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """``y += scale * b (a x)``. a: [r, in], b: [out, r], any r >= 1."""

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class GatedLowRank:
    """``y += scale * sum_i g_i b_i (a_i x)`` with ``g = softmax(gate x)`` over n experts of one
    rank r, for each token (LoRAMoE, Dou et al. 2023).

    gate: [n, in]; a: [n r, in], expert after expert; b: [out, n r]. Not a change of the weight, as
    the gates depend on x: a strength multiplies its whole output.
    """

    gate: Tensor
    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Bit:
    """``y += sum_p scale[p] * (signs[p] x)``: sign planes with one scale per output row.

    signs: uint8 [p, out, ceil(in / 8)]; bit j of byte k is the sign of input 8 k + j, 1 means +1
    and 0 means -1; the unused high bits of the last byte are 0. scale: float32 [p, out].
    """

    signs: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SparseCsr:
    """``y += D x`` with D [out, in] in CSR. indptr: int64 [out + 1], indices: int32 [nnz] sorted
    and unique within a row, values: [nnz]."""

    indptr: Tensor
    indices: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SparseRows:
    """``y[index] += values x``: whole output rows. index: int64 [n] unique, values: [n, in]."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SparseCols:
    """``y += values x[index]``: whole input columns. index: int64 [n] unique, values: [out, n]."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SparseBlocks:
    """``y[p h : p h + h] += values[i] x[q w : q w + w]`` for block i = (p, q) of size (h, w).

    index: int64 [n, 2] unique (block row, block column), values: [n, h, w]; h divides out and
    w divides in.
    """

    index: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Scale:
    """Factors on the base product alone: ``output * W (input * x)``. input: [in], output: [out];
    at least one of them is given."""

    input: Tensor | None = None
    output: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Bias:
    """``y += bias``. bias: [out]."""

    bias: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Replace:
    """The module's weight is this one: [out, in] of a linear, [vocabulary, hidden] of an
    embedding, [hidden] of a norm. The bias stays; a changed bias is a `Bias` beside it."""

    weight: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class ReplaceRows:
    """Rows of an embedding's or of lm_head's weight. index: int64 [n] unique, values:
    [n, hidden]; ``weight[index] = values``."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class PromptEmbeddings:
    """Virtual tokens before the prompt, as input embeddings [n, hidden] (prompt tuning,
    Lester et al. 2021)."""

    embeddings: Tensor

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])


@dataclass(frozen=True, eq=False, slots=True)
class PrefixKV:
    """Virtual tokens before the prompt, as keys and values per layer (prefix tuning, Li and Liang
    2021; P-tuning v2). keys[l], values[l]: [n, kv_heads, head_dim]. Keys are stored as attention
    sees them: no rotary embedding is applied to them, and the first real token has position n."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        return int(self.keys[0].shape[0])


@dataclass(frozen=True, eq=False, slots=True)
class GatedPrefix:
    """Prompts that tokens attend to apart from their own sequence (LLaMA-Adapter, Zhang et al.
    2023). They take no place in it. With q the query of a token in layer l, its rotary embedding
    applied, and the base's own scale of the dot products, that token's attention gains, before
    the output projection and for each head,

        w softmax(scale q keys[l]^T) values[l]

    in all of an adapter's layers. keys[l], values[l]: [n, kv_heads, head_dim], the gate being a
    factor of the values; n is 0 in a layer that has none."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Sparse: TypeAlias = SparseCsr | SparseRows | SparseCols | SparseBlocks
Primitive: TypeAlias = LowRank | GatedLowRank | Bit | Sparse | Scale | Bias | Replace | ReplaceRows
Prefix: TypeAlias = PromptEmbeddings | PrefixKV
AnyPrefix: TypeAlias = Prefix | GatedPrefix
P = TypeVar("P", Primitive, AnyPrefix)


def tensors(primitive: Primitive | AnyPrefix) -> tuple[Tensor, ...]:
    """Every tensor that the primitive holds."""
    found: list[Tensor] = []
    for field in fields(primitive):
        value = getattr(primitive, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(value)
    return tuple(found)


def mapped(primitive: P, change: Callable[[Tensor], Tensor]) -> P:
    """The same primitive with each of its tensors changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return tuple(changed(v) for v in value) if isinstance(value, tuple) else value

    return type(primitive)(*(changed(getattr(primitive, f.name)) for f in fields(primitive)))


def without_content(primitive: P) -> P:
    """The same primitive with its tensors on the meta device: kind and shapes, no memory."""
    return mapped(primitive, lambda tensor: tensor.to("meta"))


def look(value: Any) -> Hashable:
    """Equal for primitives of one kind that differ in their tensors' content alone."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, tuple):
        return tuple(look(v) for v in value)
    if is_dataclass(value):
        return type(value), *(look(getattr(value, f.name)) for f in fields(value))
    found: Hashable = value
    return found


def nbytes(primitive: Primitive | AnyPrefix) -> int:
    """Bytes of the primitive's tensors; storage shared between primitives is counted each time."""
    return sum(t.numel() * t.element_size() for t in tensors(primitive))


def pack_signs(positive: Tensor) -> Tensor:
    """bool [..., in] -> uint8 [..., ceil(in / 8)], bit j of byte k for input 8 k + j."""
    pad = -positive.shape[-1] % 8
    bits = torch.nn.functional.pad(positive.to(torch.uint8), (0, pad))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    grouped = bits.reshape(*bits.shape[:-1], -1, 8)
    return (grouped * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """uint8 [..., ceil(in / 8)] -> float32 [..., in] of +1 and -1."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :in_features].float() * 2 - 1

"""Does a primitive fit the module of the base it is meant for? The last check of every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaserve.adapters.base import BaseSpec, LayerKV, ModuleKind, ModuleSpec
from deltaserve.adapters.errors import InvalidAdapter
from deltaserve.adapters.finite import finite
from deltaserve.kernels.primitives import (
    AnyPrefix,
    Bias,
    Bit,
    GatedLowRank,
    GatedPrefix,
    LowRank,
    Primitive,
    PromptEmbeddings,
    Replace,
    ReplaceRows,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    tensors,
)


def check_modules(modules: Mapping[str, tuple[Primitive, ...]], base: BaseSpec) -> None:
    """`InvalidAdapter` for the first primitive that does not fit its module, or that cannot stand
    beside another. Every name must be a module of the base already."""
    for name, group in modules.items():
        for primitive in group:
            check_primitive(primitive, base.modules[name])
        _check_together(base.modules[name], group)


def check_primitive(primitive: Primitive, module: ModuleSpec) -> None:
    """`InvalidAdapter` naming module, field, what was found and what would be right."""
    if module.kind is ModuleKind.NORM and not isinstance(primitive, Replace | Bias):
        raise _error(module, primitive, "", "a norm takes only a new gain or a bias")
    o, i = module.out_features, module.in_features
    match primitive:
        case LowRank(a=a, b=b):
            rank = a.shape[0] if a.ndim == 2 else 0
            if rank < 1:
                raise _error(module, primitive, "a", f"rank must be at least 1, got {rank}")
            _shape(module, primitive, "a", a, (rank, i))
            _shape(module, primitive, "b", b, (o, rank))
        case GatedLowRank(gate=gate, a=a, b=b):
            experts = gate.shape[0] if gate.ndim == 2 else 0
            rank = a.shape[0] // experts if experts and a.ndim == 2 else 0
            if rank < 1:
                what = f"{list(a.shape)} holds no row for each of {experts} experts"
                raise _error(module, primitive, "a", what)
            _shape(module, primitive, "gate", gate, (experts, i))
            _shape(module, primitive, "a", a, (experts * rank, i))
            _shape(module, primitive, "b", b, (o, experts * rank))
            if module.kind is ModuleKind.EMBEDDING:
                raise _error(module, primitive, "", "an embedding takes no gates")
        case Bit(signs=signs, scale=scale):
            planes = max(signs.shape[0] if signs.ndim == 3 else 1, 1)
            _shape(module, primitive, "signs", signs, (planes, o, -(-i // 8)), torch.uint8)
            _shape(module, primitive, "scale", scale, (planes, o), torch.float32)
            if i % 8 and bool((signs[..., -1] >> (i % 8)).any()):
                raise _error(module, primitive, "signs", "unused high bits must be 0")
        case SparseCsr():
            _check_csr(module, primitive)
        case SparseRows(index=index, values=values):
            _index(module, primitive, index, o)
            _shape(module, primitive, "values", values, (index.shape[0], i))
        case SparseCols(index=index, values=values):
            _index(module, primitive, index, i)
            _shape(module, primitive, "values", values, (o, index.shape[0]))
        case SparseBlocks():
            _check_blocks(module, primitive)
        case Scale(input=input_, output=output):
            if input_ is None and output is None:
                raise _error(module, primitive, "", "needs an input or an output factor")
            if input_ is not None:
                _shape(module, primitive, "input", input_, (i,))
            if output is not None:
                _shape(module, primitive, "output", output, (o,))
        case Bias(bias=bias):
            _shape(module, primitive, "bias", bias, (o,))
        case Replace(weight=weight):
            _shape(module, primitive, "weight", weight, _weight_shape(module))
        case ReplaceRows(index=index, values=values):
            rows, size = _weight_shape(module)
            _index(module, primitive, index, rows)
            _shape(module, primitive, "values", values, (index.shape[0], size))
    _check_finite(primitive, module)


def _check_together(module: ModuleSpec, group: tuple[Primitive, ...]) -> None:
    """Whether a delta is of the old weight or of the new one would be a guess."""
    new = [p for p in group if isinstance(p, Replace | ReplaceRows)]
    others = [p for p in group if not isinstance(p, Bias)]
    if new and len(others) > 1:
        names = ", ".join(sorted(type(p).__name__ for p in others))
        raise _error(module, new[0], "", f"stands alone or with a Bias; found {names}")
    if sum(isinstance(p, Scale) for p in group) > 1:
        raise _error(module, Scale(), "", "two of them in one module")


def check_prefix(prefix: AnyPrefix, base: BaseSpec) -> None:
    """`InvalidAdapter` if the virtual tokens do not fit the base's hidden size or caches."""
    if isinstance(prefix, PromptEmbeddings):
        shape = tuple(prefix.embeddings.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != base.hidden_size:
            raise InvalidAdapter(
                f"prompt embeddings have shape {list(shape)}; the base needs [n >= 1, "
                f"{base.hidden_size}]",
                field="prompt.embeddings",
            )
        return
    if not len(prefix.keys) == len(prefix.values) == len(base.layers):
        raise InvalidAdapter(
            f"prefix has keys for {len(prefix.keys)} layers and values for "
            f"{len(prefix.values)}; the base has {len(base.layers)} layers",
            field="prefix",
        )
    counts = [keys.shape[0] if keys.ndim else 0 for keys in prefix.keys]
    for number, layer in enumerate(base.layers):
        count = counts[number if isinstance(prefix, GatedPrefix) else 0]
        _check_layer(prefix.keys[number], prefix.values[number], number, layer, count)
    if not any(counts):
        raise InvalidAdapter("the prefix has no token in any layer", field="prefix")
    if not all(finite(t) for t in tensors(prefix)):
        raise InvalidAdapter("the prefix holds values that are not finite", field="prefix")


def _check_layer(keys: Tensor, values: Tensor, number: int, layer: LayerKV, n: int) -> None:
    for what, found, size in (("keys", keys, layer.key_dim), ("values", values, layer.value_dim)):
        wanted = (n, layer.kv_heads, size)
        if tuple(found.shape) != wanted:
            raise InvalidAdapter(
                f"prefix {what} of layer {number} have shape {list(found.shape)}; the base needs "
                f"{list(wanted)}",
                field=f"prefix.{what}.{number}",
            )


def _weight_shape(module: ModuleSpec) -> tuple[int, ...]:
    if module.kind is ModuleKind.NORM:
        return (module.out_features,)
    if module.kind is ModuleKind.EMBEDDING:
        return (module.in_features, module.out_features)
    return (module.out_features, module.in_features)


def _check_csr(module: ModuleSpec, p: SparseCsr) -> None:
    nnz = p.values.shape[0] if p.values.ndim == 1 else -1
    _shape(module, p, "indptr", p.indptr, (module.out_features + 1,), torch.int64)
    _shape(module, p, "values", p.values, (nnz,))
    _shape(module, p, "indices", p.indices, (nnz,), torch.int32)
    counts = p.indptr.diff()
    if int(p.indptr[0]) != 0 or int(p.indptr[-1]) != nnz or bool((counts < 0).any()):
        raise _error(module, p, "indptr", f"must rise from 0 to the {nnz} values")
    if nnz and not 0 <= int(p.indices.min()) <= int(p.indices.max()) < module.in_features:
        raise _error(module, p, "indices", f"must lie in [0, {module.in_features})")
    starts = torch.zeros(nnz, dtype=torch.bool)
    starts[p.indptr[:-1][counts > 0]] = True
    if bool(((p.indices.diff() <= 0) & ~starts[1:]).any()):
        raise _error(module, p, "indices", "must be sorted and unique within each row")


def _check_blocks(module: ModuleSpec, p: SparseBlocks) -> None:
    if p.values.ndim != 3 or 0 in p.values.shape[1:]:
        raise _error(module, p, "values", f"needs [n, h, w], got {list(p.values.shape)}")
    n, h, w = p.values.shape
    _shape(module, p, "index", p.index, (n, 2), torch.int64)
    if module.out_features % h or module.in_features % w:
        sizes = f"[{module.out_features}, {module.in_features}]"
        raise _error(module, p, "values", f"blocks of {h} x {w} do not divide {sizes}")
    limits = torch.tensor([module.out_features // h, module.in_features // w])
    if bool(((p.index < 0) | (p.index >= limits)).any()):
        raise _error(module, p, "index", f"must lie below {limits.tolist()}")
    if torch.unique(p.index, dim=0).shape[0] != n:
        raise _error(module, p, "index", "must be unique")


def _index(module: ModuleSpec, primitive: Primitive, index: Tensor, limit: int) -> None:
    _shape(module, primitive, "index", index, (index.numel(),), torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise _error(module, primitive, "index", f"must lie in [0, {limit})")
    if torch.unique(index).numel() != index.numel():
        raise _error(module, primitive, "index", "must be unique")


def _shape(
    module: ModuleSpec,
    primitive: Primitive,
    field: str,
    found: Tensor,
    wanted: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    if tuple(found.shape) != tuple(wanted):
        what = f"has shape {list(found.shape)}; the base needs {list(wanted)}"
        raise _error(module, primitive, field, what)
    right = found.is_floating_point() if dtype is None else found.dtype == dtype
    if not right:
        raise _error(module, primitive, field, f"is {found.dtype}; needs {dtype or 'a float'}")


def _check_finite(primitive: Primitive, module: ModuleSpec) -> None:
    """Lowering itself can overflow, so what it made is looked at again."""
    for value in tensors(primitive):
        if value.is_floating_point() and not finite(value):
            raise _error(module, primitive, "", "holds values that are not finite")


def _error(module: ModuleSpec, primitive: Primitive, field: str, what: str) -> InvalidAdapter:
    name = type(primitive).__name__ + (f".{field}" if field else "")
    return InvalidAdapter(f"module {module.name!r}: {name} {what}", field=module.name)

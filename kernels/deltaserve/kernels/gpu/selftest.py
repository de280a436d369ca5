"""The kernels against their meaning in float64, on the device that will serve: before a server is
ready, so that a driver, a compiler or a GPU that computes wrongly is found before a client does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from deltaserve.kernels.attention import reference as attention_reference
from deltaserve.kernels.attention.gpu import paged_attention, write_cells
from deltaserve.kernels.attention.step import AttentionSpec
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.backend import KernelError
from deltaserve.kernels.bit.reference import delta as bit_delta
from deltaserve.kernels.gated.reference import delta as gated_delta
from deltaserve.kernels.gpu import selftest_embedding, selftest_norm
from deltaserve.kernels.gpu.base import GpuLinear
from deltaserve.kernels.gpu.form import Form, as_read
from deltaserve.kernels.gpu.layer_variants import LayerSpec
from deltaserve.kernels.gpu.linear import GpuLinearDeltas
from deltaserve.kernels.gpu.selftest_layer import SmallLayer
from deltaserve.kernels.gpu.variants import GroupSpec, spec_of
from deltaserve.kernels.lowrank.reference import delta as lowrank_delta
from deltaserve.kernels.primitives import (
    Bias,
    Bit,
    GatedLowRank,
    LowRank,
    Primitive,
    Replace,
    Scale,
    SparseBlocks,
    SparseCols,
    SparseCsr,
    SparseRows,
    pack_signs,
)
from deltaserve.kernels.segments import Mix, Segments
from deltaserve.kernels.sparse.reference import delta as sparse_delta
from deltaserve.kernels.table import Group

INNER, OUTS = 256, (128, 64)
BUCKETS = (16, 64)
"""Numbers of tokens that the linears are tested with: of both kinds of tiles."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Root mean square of the error over that of the result: some roundings of the dtype. A wrong index
or a missing piece is far above."""
FLIPPED = 5e-3
"""Of a layer in 8 bits on top: what a rounding before moves to the next whole number."""


def specs(forms: Sequence[Form], dtype: torch.dtype) -> list[GroupSpec]:
    """What is tested, with `BUCKETS` tokens each, for its kernels to be compiled."""
    host, group = torch.device("cpu"), Group(INNER, OUTS, dtype)
    return [spec_of(form.linear(OUTS, INNER, dtype, host), group) for form in forms]


def self_test(
    dtype: torch.dtype,
    device: torch.device,
    forms: Sequence[Form],
    attention: Sequence[AttentionSpec],
    block_size: int,
    layers: Sequence[LayerSpec] = (),
    norms: Sequence[int] = (),
) -> None:
    """forms: of the base's linears. norms: sizes of those that no layer has. Raises KernelError for
    the first kernel that is wrong. torch's generator of the host is left as it was."""
    checks: list[tuple[str, Callable[[], Results], float]] = []
    for form in forms:
        for tokens in BUCKETS:
            linear = partial(_linear, form, dtype, device, tokens)
            checks.append((f"{form} linears, {tokens} tokens", linear, 0.0))
    for layer in layers:
        for tokens in BUCKETS:
            run = partial(_layer, layer, dtype, device, tokens)
            more = FLIPPED if any(group.whole for group in layer.groups) else 0.0
            checks.append((f"{layer}, {tokens} tokens", run, more))
    checks.append(("the token embedding", partial(selftest_embedding.results, dtype, device), 0.0))
    for hidden in norms:
        norm = partial(selftest_norm.results, hidden, dtype, device)
        checks.append((f"norms of {hidden}", norm, 0.0))
    for spec in attention:
        checks.append(
            (f"attention of {spec}", partial(_attention, spec, block_size, dtype, device), 0.0)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for what, check, more in checks:
            _check(what, check, dtype, device, TOLERANCE[dtype] + more)


Results = Iterator[tuple[str, Tensor, Tensor]]
"""(what, as found, as expected in float64)."""


def _check(
    what: str,
    check: Callable[[], Results],
    dtype: torch.dtype,
    device: torch.device,
    tolerance: float,
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    try:
        results = [(which, found.cpu().double(), expected) for which, found, expected in check()]
    except Exception as error:
        raise KernelError(
            f"self-test: {what}: does not run on {name}: {type(error).__name__}: {error}"
        ) from error
    for which, found, expected in results:
        off = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not off <= tolerance:  # NaN is not either
            raise KernelError(
                f"self-test: {what}: {which} is wrong on {name}: its relative error is "
                f"{off:.1e}, and {tolerance:.0e} is the most that roundings of "
                f"{str(dtype).removeprefix('torch.')} explain; try another driver or GPU, and "
                "report it"
            )


def _linear(form: Form, dtype: torch.dtype, device: torch.device, tokens: int) -> Results:
    """One step: tokens of the base, and for each kind of adapter some of its own."""
    base = form.linear(OUTS, INNER, dtype, device)
    assert base.bias is not None
    held, bias = base.weight().cpu().double(), base.bias.cpu().double()
    deltas = GpuLinearDeltas(INNER, OUTS, dtype, device=device)
    kinds = list(KINDS)
    made = {
        slot: {part: KINDS[kind](n) for part, n in enumerate(OUTS)}
        for slot, kind in enumerate(kinds, 1)
    }
    for slot, parts in made.items():
        deltas.install(slot, deltas.prepare({i: (p,) for i, p in parts.items()}))
    mixes: list[Mix] = [((i % (len(kinds) + 1), 1.0),) if i % (len(kinds) + 1) else ()
                        for i in range(tokens)]  # fmt: skip
    order = sorted(range(tokens), key=lambda i: mixes[i])
    segments = Segments.of([mixes[i] for i in order])
    x = torch.randn(tokens, INNER).to(dtype)
    alone = base(x.to(device))
    y = deltas.forward(x.to(device), base, segments).cpu()
    x = x.double()
    expected = as_read(base, x) @ held.T + bias
    yield "the base product", alone, expected
    plain = [row for row, i in enumerate(order) if not mixes[i]]
    yield "a token without an adapter beside others", y[plain], expected[plain]
    for start, end, ((slot, _),) in segments.runs:
        at = 0
        for part, n in enumerate(OUTS):
            rows, part_x = slice(at, at + n), x[start:end]
            expected = _served(made[slot][part], base, part_x, held[rows]) + bias[rows]
            if isinstance(made[slot][part], Bias):
                expected += made[slot][part].bias.double()  # type: ignore[union-attr]
            yield kinds[slot - 1], y[start:end, rows], expected
            at += n


def _layer(spec: LayerSpec, dtype: torch.dtype, device: torch.device, tokens: int) -> Results:
    return SmallLayer(spec, dtype, device).results(tokens)


def _served(primitive: Primitive, base: GpuLinear, x: Tensor, weight: Tensor) -> Tensor:
    """float64, without biases. weight: the rows of base."""
    alone = as_read(base, x) @ weight.T
    match primitive:
        case LowRank():
            return alone + lowrank_delta(primitive, x)
        case GatedLowRank():
            return alone + gated_delta(primitive, x)
        case Bit():
            return alone + bit_delta(primitive, x)
        case Scale(inputs, outputs):
            assert inputs is not None and outputs is not None
            # in float32, as the kernel does: what is rounded to 8 bits must not differ by an ulp
            scaled = x.float() * (1 + (inputs - 1))
            return as_read(base, scaled) @ weight.T * outputs.double()
        case Replace(other):
            return x @ other.double().T
        case SparseCsr() | SparseRows() | SparseCols() | SparseBlocks():
            return alone + sparse_delta(primitive, x, len(weight))
    return alone


def _factors(count: int) -> Tensor:
    return torch.rand(count) + 0.5


def _lowrank(out: int) -> Primitive:
    return LowRank(torch.randn(20, INNER) / INNER**0.5, torch.randn(out, 20) / 4, 0.5)


def _gated(out: int) -> Primitive:
    gate, a = torch.randn(3, INNER) / INNER**0.5, torch.randn(15, INNER) / INNER**0.5
    return GatedLowRank(gate, a, torch.randn(out, 15) / 4, 0.5)


def _bit(out: int) -> Primitive:
    return Bit(pack_signs(torch.rand(2, out, INNER) < 0.5), torch.rand(2, out) / INNER**0.5)


def _csr(out: int) -> Primitive:
    entries = torch.rand(out, INNER) < 0.1
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), entries.sum(1).cumsum(0)))
    return SparseCsr(ends, entries.nonzero()[:, 1].int(), torch.randn(int(entries.sum())) / 4)


def _rows(out: int) -> Primitive:
    index = torch.randperm(out)[: out // 3]
    return SparseRows(index, torch.randn(len(index), INNER) / INNER**0.5)


def _columns(out: int) -> Primitive:
    return SparseCols(torch.randperm(INNER)[:21], torch.randn(out, 21) / 4)


def _blocks(out: int) -> Primitive:
    index = torch.tensor([(0, 3), (1, 0), (out // 32 - 1, 7)])
    return SparseBlocks(index, torch.randn(3, 32, 32) / 4)


KINDS: dict[str, Callable[[int], Primitive]] = {
    "low rank (LoRA)": _lowrank,
    "experts with a gate": _gated,
    "1 bit": _bit,
    "sparse entries": _csr,
    "sparse rows": _rows,
    "sparse columns": _columns,
    "sparse blocks": _blocks,
    "scales of inputs and outputs": lambda out: Scale(
        torch.rand(INNER) + 0.5, torch.rand(out) + 0.5
    ),
    "a bias": lambda out: Bias(torch.randn(out)),
    "a replaced weight": lambda out: Replace(torch.randn(out, INNER) / INNER**0.5),
}


def _attention(
    spec: AttentionSpec, block_size: int, dtype: torch.dtype, device: torch.device
) -> Results:
    """A cache of NaN, of which the sequences own some cells: decoding alone, then prompts beside
    it."""
    size = block_size
    lengths, queries = [3 * size + 1, 9, 7 * size], [1, 9, size + 1]
    held = [-(-n // size) for n in lengths]
    order = torch.split(torch.randperm(sum(held) + 2), [*held, 2])[:3]
    blocks = [b.tolist() for b in order]
    shape, widths = (size, spec.kv_heads), (spec.key_dim, spec.value_dim)
    sides = [size * spec.kv_heads * n for n in widths]
    memory = torch.full((sum(held) + 2, sum(sides)), torch.nan, dtype=dtype, device=device)
    keys = memory[:, : sides[0]].view(-1, *shape, spec.key_dim)
    values = memory[:, sides[0] :].view(-1, *shape, spec.value_dim)
    cells = torch.cat([
        b.repeat_interleave(size)[:n] * size + torch.arange(n) % size
        for b, n in zip(order, lengths, strict=True)
    ])  # fmt: skip
    key, value = (torch.randn(len(cells), spec.kv_heads, n).to(dtype) for n in widths)
    write_cells(keys, values, key.to(device), value.to(device), cells.to(device))
    at = (cells // size).to(device), (cells % size).to(device)
    yield "writing keys to the cache", keys[at], key.double()
    yield "writing values to the cache", values[at], value.double()
    wide = [t.cpu().double().flatten(0, 1) for t in (keys, values)]
    sinks = torch.randn(spec.heads).to(dtype) if spec.sinks else None
    for what, counts in (("decoding", [1, 1, 1]), ("reading prompts", queries)):
        tables = AttentionTables.allocate(3, max(lengths), size, max(counts), device)
        tables.fill(counts, lengths, blocks)
        query = torch.randn(sum(counts), spec.heads, spec.key_dim).to(dtype)
        how = (spec.key_dim**-0.5, spec.window, spec.softcap)
        # Memory that was used before may hold the right numbers, and a kernel write none.
        nothing = torch.full(
            (len(query), spec.heads, spec.value_dim), torch.nan, dtype=dtype, device=device
        )
        found = paged_attention(
            query.to(device), keys, values, tables, *how,
            None if sinks is None else sinks.to(device), nothing,
        )  # fmt: skip
        expected = attention_reference.paged_attention(
            query.double(), wide[0], wide[1], tables.query_start.cpu(), tables.lengths.cpu(),
            tables.tables.cpu(), size, *how,
            None if sinks is None else sinks.double(),
        )  # fmt: skip
        yield what, found, expected

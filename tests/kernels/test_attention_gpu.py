"""The GPU's paged attention against the float64 reference: on a GPU, or in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from deltaserve.kernels.attention import gpu, reference
from deltaserve.kernels.attention.gpu_step import GpuStep
from deltaserve.kernels.attention.launch import MAX_SPLITS, Shape, decode_splits
from deltaserve.kernels.attention.step import Span
from deltaserve.kernels.attention.tables import AttentionTables
from deltaserve.kernels.attention.variants import variants
from deltaserve.kernels.gpu.static import StaticMemory
from deltaserve.kernels.gpu.sums import Sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
MIXED = ((1, 37, 0, 1, 5, 1), (1, 37, 0, 150, 70, 64))  # queries and lengths of the sequences


@dataclass
class Case:
    """One step's tensors, float32 or float16 on the device; cells that no sequence owns are NaN.
    keys, values: [blocks, block_size, kv_heads, dim]."""

    tables: AttentionTables
    queries: Sequence[int]
    lengths: Sequence[int]
    query: Tensor
    keys: Tensor
    values: Tensor

    def run(self, tables: AttentionTables | None = None, **how: Any) -> Tensor:
        """Poisoned beforehand: what no sequence writes stays NaN."""
        shape = (*self.query.shape[:2], self.values.shape[3])
        out = torch.full(shape, float("nan"), dtype=self.query.dtype, device=DEVICE)
        tables = self.tables if tables is None else tables
        return gpu.paged_attention(self.query, self.keys, self.values, tables, 0.3, out=out, **how)

    def expected(self, **how: Any) -> Tensor:
        """float64 on the host, NaN in rows of no sequence."""
        n, t = len(self.lengths), self.tables
        start, lengths, blocks = t.query_start[: n + 1].cpu(), t.lengths[:n].cpu(), t.tables.cpu()
        how = {k: v.double().cpu() if isinstance(v, Tensor) else v for k, v in how.items()}
        cells = (x.flatten(0, 1) for x in (self.keys, self.values))
        wide = (x.double().cpu() for x in (self.query, *cells))
        want = reference.paged_attention(*wide, start, lengths, blocks, t.block_size, 0.3, **how)
        want[start[-1] :] = float("nan")
        return want

    def check(self, got: Tensor, **how: Any) -> None:
        limit = TOLERANCE[got.dtype]
        want = self.expected(**how)
        torch.testing.assert_close(got.double().cpu(), want, atol=limit, rtol=limit, equal_nan=True)


def place(tables: AttentionTables, queries: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Fills the tables with random blocks, never block 0: bool [cells], those that are owned.

    What lies past the blocks in use leads to block 0, which nobody owns; rows past those in use
    look like sequences of one query."""
    size, width = tables.block_size, tables.tables.shape[1]
    order = (torch.randperm(tables.max_rows * width) + 1).tolist()
    blocks, owned = [], torch.zeros((tables.max_rows * width + 1) * size, dtype=torch.bool)
    for length in lengths:
        blocks.append([order.pop() for _ in range(-(-length // size))])
        at = torch.arange(length)
        owned[torch.tensor(blocks[-1], dtype=torch.int64)[at // size] * size + at % size] = True
    tables.tables.zero_()
    tables.lengths.fill_(99)
    tables.query_start.copy_(torch.arange(tables.max_rows + 1))
    tables.fill(queries, lengths, blocks)
    return owned


def make(
    heads: int = 4,
    kv_heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    block_size: int = 4,
    queries: Sequence[int] = MIXED[0],
    lengths: Sequence[int] = MIXED[1],
    padding: int = 3,
) -> Case:
    """padding: rows of no sequence, at the end."""
    bounds = (len(queries) + 2, max(lengths) + 9, block_size, max(queries))
    tables = AttentionTables.allocate(*bounds, DEVICE)
    owned = place(tables, queries, lengths)
    query = torch.randn(sum(queries) + padding, heads, key_dim)
    query[sum(queries) :] = float("nan")
    query = query.to(DEVICE, dtype)
    dims = key_dim, value_dim
    keys, values = blocks_of(query, len(owned) // block_size, block_size, kv_heads, *dims)
    for x in (keys, values):
        x.copy_(torch.randn(x.shape))
        x[~owned.view(-1, block_size)] = float("nan")
    return Case(tables, queries, lengths, query, keys, values)


def blocks_of(like: Tensor, count: int, size: int, kv_heads: int, *dims: int) -> list[Tensor]:
    """A cache of NaN in which all that is in a block lies side by side, with another layer's before
    and after it."""
    sides = [-(-size * kv_heads * dim // 16) * 16 for dim in dims]
    held = like.new_full((count, 16 + sum(sides) + 48), float("nan"))
    parts = held.split([16, *sides, 48], 1)[1:-1]
    return [
        part[:, : size * kv_heads * dim].unflatten(1, (size, kv_heads, dim))
        for part, dim in zip(parts, dims, strict=True)
    ]


def features(how: str, heads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if how in ("window", "all"):
        found["window"] = 21
    if how in ("softcap", "all"):
        found["softcap"] = 3.0
    if how in ("sinks", "all"):
        found["sinks"] = torch.randn(heads, device=DEVICE)
    return found


@pytest.mark.parametrize("how", ["plain", "window", "softcap", "sinks", "all"])
@pytest.mark.parametrize(("dtype", "splits"), [(torch.float32, 3), (torch.float16, 1)])
def test_a_mixed_step_agrees_with_the_reference(how: str, dtype: torch.dtype, splits: int) -> None:
    case = make(dtype=dtype)
    chosen = features(how, 4)
    case.check(case.run(splits=splits, **chosen), **chosen)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [
        (2, 2, 16, 24),  # as many KV heads as heads
        (3, 1, 80, 80),  # one KV head, and a width that is no power of two
        (10, 2, 100, 36),  # a group that does not divide the tile, aligned to 8 bytes
        (7, 1, 33, 17),  # aligned to nothing
        (33, 1, 16, 16),  # a group of more heads than a tile holds
        (2, 1, 192, 128),
    ],
)
@pytest.mark.parametrize("block_size", [5, 16])
def test_any_heads_fit(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, block_size: int
) -> None:
    steps = {"queries": (1, 5, 1), "lengths": (70, 20, 3)}
    case = make(heads, kv_heads, key_dim, value_dim, block_size=block_size, **steps)
    chosen = features("all", heads)
    case.check(case.run(splits=2, **chosen), **chosen)
    case.check(case.run(splits=1))


@pytest.mark.parametrize(
    ("splits", "window"),
    [(1, None), (2, None), (2, 100), (7, None), (7, 100), (MAX_SPLITS + 5, None), (None, None)],
)
def test_splits_share_a_sequence(splits: int | None, window: int | None) -> None:
    case = make(2, 1, queries=(1, 1, 1), lengths=(400, 1, 65))
    first = case.run(splits=splits, window=window)
    case.check(first, window=window)
    assert torch.equal(case.run(splits=splits, window=window)[:3], first[:3])


def test_splits_that_see_nothing_through_the_window_are_left_out() -> None:
    case = make(queries=(1,), lengths=(400,), padding=0)
    case.check(case.run(splits=5, window=3), window=3)


@pytest.mark.parametrize("padding", [0, 5])
def test_chunks_of_prompts_continue_what_is_in_the_cache(padding: int) -> None:
    case = make(queries=(64, 2, 33), lengths=(64, 131, 97), padding=padding)
    case.check(case.run())
    case.check(case.run(window=40), window=40)


def test_a_window_narrower_than_a_tile_of_queries() -> None:
    case = make(2, 2, queries=(70,), lengths=(90,))  # the last see nothing of the first cells
    case.check(case.run(window=7), window=7)


def test_many_sequences() -> None:
    queries = (1,) * 20 + (0,) * 110 + (3,) + (1,) * 3 + (2,)
    lengths = [q + int(torch.randint(6, ())) for q in queries]
    case = make(2, 1, queries=queries, lengths=lengths)
    case.check(case.run(splits=1))


@pytest.mark.parametrize(("dim", "step"), [(16, 16), (32, 16), (80, 16), (64, 64)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_the_output(dim: int, step: int, splits: int, dtype: torch.dtype) -> None:
    case = make(4, 2, dim, dim, dtype, queries=(1, 5, 1), lengths=(70, 20, 3))
    pieces, tokens = 4 * dim // step, len(case.query)
    values = torch.full((pieces, tokens + 5), float("nan"), device=DEVICE)
    out = case.run(splits=splits, sums=Sums(values.view(-1), step, tokens + 5))
    case.check(out)
    want = out.double().view(tokens, pieces, step).sum(-1).T
    torch.testing.assert_close(
        values[:, :tokens].double(), want, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert values[:, tokens:].isnan().all()  # what is no sequence's stays as it was


def test_heads_that_cannot_be_cut_have_no_sums() -> None:
    assert [gpu.sum_step(d, 128) for d in (128, 64, 256, 80, 96, 72)] == [128, 64, 128, 16, 32, 0]
    case = make(queries=(1,), lengths=(3,))
    with pytest.raises(ValueError, match="sums over 32 columns of heads of 16"):
        case.run(sums=Sums(torch.zeros(999, device=DEVICE), 32, 16))


def test_no_sequences() -> None:
    case = make(queries=(2,), lengths=(2,))
    case.tables.fill((), (), ())
    assert case.run(splits=2).isnan().all()
    empty = case.query[:0]
    assert gpu.paged_attention(empty, case.keys, case.values, case.tables, 1.0).shape == (0, 4, 16)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # tanh's exponential, by design
@pytest.mark.parametrize("splits", [1, 3])
def test_large_logits_do_not_overflow(splits: int) -> None:
    case = make(queries=(1, 9, 1), lengths=(150, 30, 1), padding=0)
    case.query *= 1e4
    for chosen in ({}, {"softcap": 50.0}, {"sinks": torch.full((4,), 3e4, device=DEVICE)}):
        # their own rounding is larger than the tolerance, so the values are not compared
        assert case.run(splits=splits, **chosen).isfinite().all()
    case.query /= 1e4
    case.check(case.run(splits=splits, sinks=sinks_of(90.0)), sinks=sinks_of(90.0))


def sinks_of(value: float) -> Tensor:
    return torch.tensor([value, -value, 0.0, value / 9], device=DEVICE)


def test_a_query_may_be_a_part_of_a_wider_tensor() -> None:
    case = make(heads=3, kv_heads=1, key_dim=16)
    packed = torch.randn(len(case.query), 5, 16, device=DEVICE)
    packed[:, :3] = case.query
    turned = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    want = case.run(splits=2)
    for query in (packed[:, :3], turned):
        assert not query.is_contiguous()
        case.query = query
        assert torch.equal(case.run(splits=2).nan_to_num(7), want.nan_to_num(7))


STEPS = [
    ((1, 1, 20), (9, 130, 25)),  # what is captured
    ((1, 1, 1, 1, 9, 11), (130, 1, 7, 66, 9, 100)),
    ((1,), (3,)),
    ((), ()),
    ((24,), (135,)),
]


def test_one_capture_serves_every_step_that_fits() -> None:
    tables = AttentionTables.allocate(6, 139, 4, 24, DEVICE)
    keys, values = (torch.randn(6 * 35 + 1, 4, 2, 16, device=DEVICE) for _ in range(2))
    query = torch.randn(26, 4, 16, device=DEVICE)
    out = torch.empty(26, 4, 16, device=DEVICE)
    chosen = {"window": 70, "softcap": 5.0, "sinks": torch.randn(4, device=DEVICE), "splits": 3}

    def call() -> None:
        gpu.paged_attention(query, keys, values, tables, 0.3, out=out, **chosen)

    replay = call
    for i, (queries, lengths) in enumerate(STEPS):
        owned = place(tables, queries, lengths).to(DEVICE)
        for tensor in (keys, values):
            tensor.copy_(torch.randn(tensor.shape))
            tensor[~owned.view(-1, 4)] = float("nan")
        if i == 0 and DEVICE == "cuda":
            replay = captured(call)
        out.fill_(float("nan"))
        replay()
        case = Case(tables, queries, lengths, query, keys, values)
        case.check(out, **{k: v for k, v in chosen.items() if k != "splits"})


def captured(call: Any) -> Any:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


Launched = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], int, int]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What would have been launched: nothing runs."""
    found: list[Launched] = []
    monkeypatch.setattr(gpu, "launch", lambda *arguments: found.append(arguments))
    return found


def test_launches_do_not_depend_on_the_step(launched: list[Launched]) -> None:
    tables = AttentionTables.allocate(6, 139, 4, 24, DEVICE)
    x, cache = torch.zeros(26, 4, 16, device=DEVICE), torch.zeros(7, 4, 4, 16, device=DEVICE)
    seen = []
    for queries, lengths in STEPS:
        place(tables, queries, lengths)
        gpu.paged_attention(x, cache, cache, tables, 0.3)
        gpu.paged_attention(x, cache, cache, tables, 0.3, splits=2)
        seen.append(
            [
                (kernel, grid, [a for a in arguments if not isinstance(a, Tensor)], *rest)
                for kernel, grid, arguments, *rest in launched
            ]
        )
        launched.clear()
    assert len(seen[0]) >= 5
    assert all(launches == seen[0] for launches in seen)


@pytest.mark.parametrize("how", ["plain", "window", "softcap", "sinks", "all"])
@pytest.mark.parametrize("step", [0, 16])
def test_everything_launched_is_a_variant(how: str, step: int, launched: list[Launched]) -> None:
    case = make(10, 2, 80, 48, torch.float16)
    chosen = features(how, 10)
    sums = Sums(torch.zeros(1, device=DEVICE), step, 48) if step else None
    for splits in (1, 2):
        case.run(splits=splits, sums=sums, **chosen)
    cells = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    gpu.write_cells(case.keys, case.values, case.keys[0, :3], case.values[0, :3], cells)
    kind = torch.float32 if "sinks" in chosen else None
    known = variants(
        10, 2, 80, 48, 4, torch.float16, ("window" in chosen,), "softcap" in chosen, kind, sums=step
    )
    assert len({v.name for v in known}) == len(known)
    used = set()
    for kernel, _, arguments, constants, *options in launched:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        absent = {k: None for k, v in given.items() if v is None}
        (variant,) = (
            v
            for v in known
            if v.kernel is kernel
            and v.constants == constants | absent
            and [v.num_warps, v.num_stages] == options
        )
        for name, kind in variant.signature.items():
            assert TYPES[kind] == getattr(given[name], "dtype", type(given[name])), name
        used.add(variant.name)
    assert used == {v.name for v in known}


TYPES = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*i32": torch.int32,
    "*i64": torch.int64,
    "i32": int,
    "fp32": float,
}


SPECIALIZED = """
from deltaserve.kernels.attention.variants import variants
for v in variants(4, 2, 16, 16, windowed=(False, True), softcap=True):
    free = {p.name for p in v.kernel.params if not (p.is_constexpr or p.do_not_specialize)}
    print(sorted(free - v.aligned - set(v.constants) - {"inner", "outer"}))  # floats never are
"""


def test_no_number_of_a_step_leads_to_a_compilation() -> None:
    """Triton compiles anew for an integer that is 1 or a multiple of 16, and for a pointer that is
    not aligned, unless told not to."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # which keeps no such record
    run = [sys.executable, "-c", SPECIALIZED]
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split("\n") == ["[]"] * 9 + [""]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_cells_are_written_where_they_belong(index: torch.dtype) -> None:
    keys, values = (
        x.copy_(torch.randn(x.shape))
        for x in blocks_of(torch.empty(0, device=DEVICE), 3, 3, 2, 20, 600)
    )
    before = keys.clone(), values.clone()
    key = torch.randn(4, 5, 20, device=DEVICE)[:, 1:3]
    value = torch.randn(2, 4, 600, device=DEVICE).transpose(0, 1)
    cells = torch.tensor([7, -1, 2, 3], dtype=index, device=DEVICE)
    gpu.write_cells(keys, values, key, value, cells)
    for got, new, old in ((keys, key, before[0]), (values, value, before[1])):
        want = old.clone()
        want[[2, 0, 1], [1, 2, 0]] = new[[0, 2, 3]]
        assert torch.equal(got, want)


def test_nothing_to_write() -> None:
    keys = torch.randn(3, 1, 1, 4, device=DEVICE)
    gpu.write_cells(keys, keys, keys[:0, 0], keys[:0, 0], torch.zeros(0, dtype=torch.int64))


def test_splits_fill_the_device_and_bound_the_longest() -> None:
    assert decode_splits(8, 32768, 64, 132) == (33, 1)  # one sequence, 8 KV heads
    assert decode_splits(8, 100, 64, 132) == (2, 1)  # no more than tiles
    assert decode_splits(512, 2000, 64, 132) == (1, 1)
    assert decode_splits(512, 32768, 64, 132) == (8, 4)  # none has more than 4096 cells
    assert decode_splits(1, 10**7, 64, 132)[0] == MAX_SPLITS


def test_a_group_is_never_wider_than_its_tile() -> None:
    for group in (1, 2, 3, 7, 8, 16, 31, 32, 33, 71, 128):
        for dim in (16, 100, 128, 256, 512):
            shape = Shape(2 * group, 2, dim, dim, 16)
            assert shape.head_tile * shape.kv_programs // 2 >= group
            for size in (2, 4):
                assert shape.head_tile <= shape.decode(size).constants["BM"]
                prefill = shape.prefill(size)
                assert 1 <= prefill.tokens * shape.head_tile <= prefill.constants["BM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": lambda x: x.half()}, "float16"),
        ({"keys": lambda x: x[..., :8].contiguous()}, "do not fit"),
        ({"keys": lambda x: x[:, :2], "values": lambda x: x[:, :2]}, "blocks of 4 do not fit"),
        ({"values": lambda x: x[1:].contiguous()}, "do not fit"),
        ({"keys": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
        ({"keys": lambda x: odd(x, x.stride(0) + 8)}, "aligned"),
        ({"keys": lambda x: odd(x, x.stride(0), 2)}, "aligned"),
        ({"sinks": lambda _: torch.zeros(3)}, "sinks"),
        ({"window": lambda _: 0}, "window is 0"),
        ({"softcap": lambda _: -1.0}, "softcap is -1"),
        ({"out": lambda _: torch.zeros(1, 4, 8)}, "out is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    case = make(queries=(1,), lengths=(3,), padding=0)
    given = {"query": case.query, "keys": case.keys, "values": case.values}
    given |= {name: turn(given.get(name)) for name, turn in change.items()}
    with pytest.raises(ValueError, match=message):
        gpu.paged_attention(**given, steps=case.tables, scale=0.3)


def odd(x: Tensor, step: int, start: int = 0) -> Tensor:
    return torch.zeros(start + len(x) * step).as_strided(x.shape, (step, *x.stride()[1:]), start)


def test_cells_that_do_not_fit_are_refused() -> None:
    keys, new = torch.zeros(2, 2, 2, 8), torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="for cells of"):
        gpu.write_cells(keys, keys, new[:, :1], new, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 cells"):
        gpu.write_cells(keys, keys, new, new, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="float16"):
        gpu.write_cells(keys, keys, new.half(), new, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("queries", "lengths", "blocks", "message"),
    [
        ((1, 1, 1), (1, 1, 1), ((0,), (0,), (0,)), "at most 2"),
        ((3,), (2,), ((0,),), "tokens are among the cells"),
        ((5,), (5,), ((0, 1),), "at most 4"),
        ((1,), (9,), ((0, 1, 2),), "and 8 fit"),
        ((1,), (5,), ((0,),), "1 blocks for 5 cells"),
    ],
)
def test_tables_refuse_what_they_cannot_hold(
    queries: Sequence[int], lengths: Sequence[int], blocks: Sequence[Sequence[int]], message: str
) -> None:
    tables = AttentionTables.allocate(2, 8, 4, 4, "cpu")
    with pytest.raises(ValueError, match=message):
        tables.fill(queries, lengths, blocks)


def test_a_step_comes_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells and tables; more blocks are given than hold its tokens."""
    sent: list[StaticMemory] = []
    send = StaticMemory.send
    monkeypatch.setattr(StaticMemory, "send", lambda memory: sent.append(memory) or send(memory))
    size, pasts, counts = 4, (0, 3, 4, 9, 41), (1, 6, 1, 3, 14)
    lengths = [past + count for past, count in zip(pasts, counts, strict=True)]
    order = iter(torch.randperm(100).tolist())
    blocks = [[next(order) for _ in range(-(-n // size) + 1)] for n in lengths]
    spans = [Span(*of) for of in zip(pasts, counts, blocks, strict=True)]
    step = GpuStep.of(spans, size, torch.device(DEVICE))
    assert len(sent) == 1
    want = [
        held[at // size] * size + at % size
        for past, n, held in zip(pasts, lengths, blocks, strict=True)
        for at in range(past, n)
    ]
    assert step.cells.tolist() == want
    tables, expected = step.tables, AttentionTables.allocate(5, max(lengths), size, 14, DEVICE)
    used = [held[: -(-n // size)] for held, n in zip(blocks, lengths, strict=True)]
    expected.fill(counts, lengths, used)
    assert (tables.max_queries, tables.max_length) == (14, max(lengths))
    for name in ("rows", "query_start", "lengths", "tables"):
        assert torch.equal(getattr(tables, name), getattr(expected, name)), name

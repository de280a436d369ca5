"""The parts of `gpu.py kernels`: which cases each consists of, the most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from gpu_kernels import data, ours, shapes
from gpu_kernels.case import Case
from gpu_kernels.data import ON_GPU, Problem
from gpu_kernels.peers import bitdelta, gemlite, in_torch, quantized, sglang, sglang_v2, vllm
from gpu_kernels.peers.work import Work
from gpu_kernels.question import Question
from gpu_kernels.shapes import Batch, Group

GROUPS = shapes.LLAMA_8B if ON_GPU else shapes.TINY
TOKENS = (16, 1, 64, 256, 32, 8, 128, 1024) if ON_GPU else (5,)
MIXED_RANKS = (8, 16, 24, 64, 128) if ON_GPU else (8, 16, 24)
DENSITY = 0.01 if ON_GPU else 0.05

Peers: TypeAlias = Mapping[str, Callable[[Problem, int], Work]]
LORA: tuple[tuple[tuple[int, ...], int, int], ...] = (  # ranks in turn, tokens, adapters
    *(((16,), m, d) for m, d in ((16, 16), (1, 1), (64, 64), (64, 8), (256, 64))),
    *((MIXED_RANKS, m, d) for m, d in ((64, 64), (16, 16))),
    *(((64,), m, d) for m, d in ((16, 16), (1, 1), (64, 64))),
    *(((8,), m, d) for m, d in ((16, 16), (1, 1), (64, 64))),
    *(((16,), m, d) for m, d in ((16, 1), (16, 4), (64, 1), (256, 256), (512, 1), (2048, 4))),
    *((MIXED_RANKS, 64, 8), ((64,), 64, 8)),
)
BITS: tuple[tuple[int, int], ...] = (
    (1, 1),
    (4, 4),
    (16, 16),
    (8, 8),
    (2, 2),
    (64, 8),
    (512, 1),
)  # tokens, adapters
SPARSE: tuple[tuple[float, int, int], ...] = (  # density, tokens, adapters
    *((DENSITY, m, d) for m, d in ((1, 1), (16, 4), (16, 16), (64, 8), (512, 1))),
    *((density, 16, 4) for density in (DENSITY / 2, 2 * DENSITY)),
)
if not ON_GPU:
    LORA = (((8,), 4, 2), (MIXED_RANKS, 6, 3))
    BITS, SPARSE = ((4, 2),), ((DENSITY, 4, 2),)


def base(folder: Path) -> Iterator[Case]:
    """The base product alone, in every form, beside cuBLAS and other int4 products."""
    for tokens in TOKENS:
        for group in GROUPS + (shapes.LLAMA_70B if ON_GPU and tokens == 16 else ()):
            for form in ("int4", "16-bit") if group in shapes.LLAMA_70B else tuple(ours.FORMS):
                yield _ours(group, tokens, form)
            yield from _base_peers(folder, group, tokens)


def _ours(group: Group, tokens: int, form: str) -> Case:
    @cache
    def held() -> ours.Held:
        return ours.Held(_problem(group, (-1,) * tokens, ()), form)

    def expected() -> Tensor:
        return held().expected_base()

    return _base_case(ours.NAME, group, tokens, form, lambda n: held().base(n), expected)


def _base_peers(folder: Path, group: Group, tokens: int) -> Iterator[Case]:
    x = cache(lambda: data.activations(tokens, group))
    plain = cache(lambda: data.weight(group))
    int4 = cache(lambda: quantized.random_int4(group))

    def exact() -> Tensor:
        return x().double() @ plain().double().T

    def exact_int4() -> Tensor:
        return x().double() @ int4().weight.T

    case = partial(_base_case, group=group, tokens=tokens)
    yield case(
        in_torch.CUBLAS,
        form="16-bit",
        make=lambda n: in_torch.cublas(x(), plain(), n),
        expected=exact,
    )
    yield case(
        in_torch.TINYGEMM,
        form="int4",
        make=lambda n: in_torch.tinygemm(x(), int4(), n),
        expected=exact_int4,
    )
    if group in shapes.LLAMA_70B:
        return  # gemlite's table does not have them, and tuning takes minutes
    yield case(
        gemlite.NAME,
        form="int4",
        make=lambda n: gemlite.int4(folder, x(), int4(), n),
        expected=exact_int4,
    )


def _base_case(
    engine: str,
    group: Group,
    tokens: int,
    form: str,
    make: Callable[[int], Work],
    expected: Callable[[], Tensor],
) -> Case:
    weights = shapes.base_bytes(group, form)
    nbytes = weights + shapes.activation_bytes(group, tokens)
    where = {"group": group.name, "tokens": tokens, "form": form}
    work = shapes.operations(group, tokens, form)
    return Case("base", engine, "base", make, expected, nbytes, weights, work, where)


def lowrank(folder: Path) -> Iterator[Case]:
    """LoRA: the base alone, the base with it, and the peers' own additions to a finished base."""
    peers: Peers = {
        vllm.NAME: partial(vllm.lora, folder),
        sglang.CSGMV: partial(sglang.csgmv, folder),
        sglang.TRITON: partial(sglang.triton, folder),
        in_torch.BMM: in_torch.lora,
    }
    for ranks, tokens, adapters in LORA:
        for group in GROUPS:
            asked = _lora(group, ranks, tokens, adapters)
            yield from asked.own()
            yield from asked.peers(peers)
            yield from asked.with_base(sglang_v2.NAME, partial(sglang_v2.lora, folder))


def bit(folder: Path) -> Iterator[Case]:
    """1-bit deltas: one sign plane with a scale per output."""
    peers: Peers = {
        bitdelta.NAME: partial(bitdelta.bit, folder),
        in_torch.DENSE: in_torch.dense,
    }
    for tokens, adapters in BITS:
        for group in GROUPS:
            asked = _bits(group, tokens, adapters)
            yield from asked.own()
            yield from asked.peers(peers)


def sparse(folder: Path) -> Iterator[Case]:
    """Unstructured sparse deltas; the only peers come with torch."""
    peers: Peers = {in_torch.CUSPARSE: in_torch.sparse, in_torch.DENSE: in_torch.dense}
    for density, tokens, adapters in SPARSE:
        for group in GROUPS:
            asked = _sparse(group, density, tokens, adapters)
            yield from asked.own()
            yield from asked.peers(peers)


def mixed(folder: Path) -> Iterator[Case]:
    """One batch of 64 tokens: 32 over 16 LoRA of rank 16, 8 over 4 1-bit, 16 over 8 sparse of 1 %,
    8 of the base. The peers' kernels run on its pieces, one kind each."""
    full, tiny = ((32, 16), (8, 4), (16, 8), 8), ((3, 2), (2, 1), (2, 1), 1)
    lora, bits, some, bare = full if ON_GPU else tiny
    peers: tuple[Peers, ...] = (
        {vllm.NAME: partial(vllm.lora, folder), sglang.CSGMV: partial(sglang.csgmv, folder)},
        {bitdelta.NAME: partial(bitdelta.bit, folder)},
        {in_torch.CUSPARSE: in_torch.sparse},
    )
    for group in GROUPS:
        pieces = (
            _lora(group, (16,), *lora),
            _bits(group, *bits),
            _sparse(group, DENSITY, *some),
        )
        whole = _together(group, pieces, bare)
        yield from whole.own()
        yield whole.own_with_room()
        for piece, theirs in zip(pieces, peers, strict=True):
            yield from piece.of("mixed").peers(theirs)


PARTS = {"base": base, "lowrank": lowrank, "bit": bit, "sparse": sparse, "mixed": mixed}


def _lora(group: Group, ranks: tuple[int, ...], tokens: int, adapters: int) -> Question:
    each = [ranks[i % len(ranks)] for i in range(adapters)]

    def make() -> Problem:
        found = tuple(data.low_rank(group, r) for r in each)
        return _problem(group, shapes.spread(tokens, adapters), found)

    nbytes = shapes.lowrank_bytes(group, each)
    form = "r" + ",".join(map(str, ranks))
    return Question("lowrank", group, tokens, adapters, form, nbytes, cache(make))


def _bits(group: Group, tokens: int, adapters: int) -> Question:
    def make() -> Problem:
        few = [data.one_bit(group) for _ in range(min(2, adapters))]
        return _problem(group, shapes.spread(tokens, adapters), data.distinct(few, adapters))

    nbytes = shapes.bit_bytes(group, adapters)
    return Question("bit", group, tokens, adapters, "1-bit", nbytes, cache(make))


def _sparse(group: Group, density: float, tokens: int, adapters: int) -> Question:
    def make() -> Problem:
        few = [data.sparse(group, density) for _ in range(min(2, adapters))]
        return _problem(group, shapes.spread(tokens, adapters), data.distinct(few, adapters))

    nbytes = shapes.sparse_bytes(group, adapters, density)
    return Question("sparse", group, tokens, adapters, f"{density:.1%}", nbytes, cache(make))


def _together(group: Group, pieces: tuple[Question, ...], bare: int) -> Question:
    """All pieces in one batch, after `bare` tokens of the base."""

    def make() -> Problem:
        batch, adapters = [-1] * bare, list[data.Adapter]()
        for piece in pieces:
            problem = piece.problem()
            batch += [len(adapters) + i for i in problem.batch]
            adapters += problem.adapters
        return _problem(group, tuple(batch), tuple(adapters))

    tokens = bare + sum(piece.tokens for piece in pieces)
    adapters = sum(piece.adapters for piece in pieces)
    nbytes = sum(piece.nbytes for piece in pieces)
    return Question("mixed", group, tokens, adapters, "mixed", nbytes, cache(make))


def _problem(group: Group, batch: Batch, adapters: tuple[data.Adapter, ...]) -> Problem:
    return Problem(group, batch, data.activations(len(batch), group), adapters)

"""The parts of `gpu.py kernels`: which cases each consists of, the most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from gpu_kernels import data, ours, shapes
from gpu_kernels.case import Case
from gpu_kernels.data import ON_GPU, Adapter, Problem
from gpu_kernels.peers import bitdelta, gemlite, in_torch, quantized, sglang, vllm
from gpu_kernels.peers.work import Work
from gpu_kernels.shapes import Batch, Group

GROUPS = shapes.LLAMA_8B if ON_GPU else shapes.TINY
TOKENS = (16, 1, 64, 256, 32, 8, 128, 1024) if ON_GPU else (5,)
LORA = (  # rank or ranks, tokens, adapters
    [
        (16, m, d)
        for m, d in ((16, 16), (1, 1), (64, 64), (64, 8), (256, 64), (16, 1), (16, 4), (64, 1))
    ]
    + [((8, 16, 24, 64, 128), m, d) for m, d in ((64, 64), (16, 16), (64, 8))]
    + [(8, m, d) for m, d in ((16, 16), (1, 1), (64, 64))]
    + [(64, m, d) for m, d in ((16, 16), (1, 1), (64, 64), (64, 8))]
    + [(16, 256, 256), (16, 512, 1), (16, 2048, 4)]
    if ON_GPU
    else [(8, 4, 2), ((8, 16, 24), 6, 3)]
)
BITS = (  # tokens, adapters
    [(1, 1), (4, 4), (16, 16), (8, 8), (2, 2), (64, 8), (512, 1)] if ON_GPU else [(4, 2)]
)
SPARSE = (  # density, tokens, adapters
    [(0.01, m, d) for m, d in ((1, 1), (16, 4), (16, 16), (64, 8), (512, 1))]
    + [(0.005, 16, 4), (0.02, 16, 4)]
    if ON_GPU
    else [(0.05, 4, 2)]
)
Folder = Path


def base(folder: Folder) -> Iterator[Case]:
    """The base product alone, in every form, beside cuBLAS and other int4 products."""
    for tokens in TOKENS:
        for group in GROUPS + (shapes.LLAMA_70B if ON_GPU and tokens == 16 else ()):
            for form in ours.FORMS:
                yield ours_base(group, tokens, form, "base")
            yield from base_peers(folder, group, tokens)


def base_peers(folder: Folder, group: Group, tokens: int) -> Iterator[Case]:
    def case(engine: str, form: str, make: Callable[[int], Work], expected: Callable) -> Case:
        nbytes = shapes.base_bytes(group, form) + shapes.activation_bytes(group, tokens)
        where = {"group": group.name, "tokens": tokens, "form": form}
        work = shapes.operations(group, tokens)
        return Case("base", engine, "base", make, expected, nbytes, work, where)

    @cache
    def x() -> data.Tensor:
        return data.activations(tokens, group)

    @cache
    def dense() -> data.Tensor:
        return data.weight(group)

    @cache
    def int4() -> quantized.Int4:
        return quantized.random_int4(group)

    def exact(weight: data.Tensor) -> data.Tensor:
        return x().double() @ weight.double().T

    yield case(
        in_torch.CUBLAS,
        "bf16",
        lambda n: in_torch.cublas(x(), dense(), n),
        lambda: exact(dense()),
    )
    yield case(
        in_torch.TINYGEMM,
        "int4",
        lambda n: in_torch.tinygemm(x(), int4(), n),
        lambda: exact(int4().weight),
    )
    if group in shapes.LLAMA_70B:
        return  # gemlite's table does not have them, and tuning takes minutes
    yield case(
        gemlite.NAME,
        "int4",
        lambda n: gemlite.int4(folder, x(), int4(), n),
        lambda: exact(int4().weight),
    )


def lowrank(folder: Folder) -> Iterator[Case]:
    """LoRA: the base alone, the base with it, and the peers' own additions to a finished base."""
    for rank, tokens, adapters in LORA:
        ranks = (rank,) if isinstance(rank, int) else tuple(rank)
        for group in GROUPS:
            each = [ranks[i % len(ranks)] for i in range(adapters)]
            make = cache(
                partial(_lora_problem, group, shapes.spread(tokens, adapters), tuple(each))
            )
            where = {"form": "r" + ",".join(map(str, ranks))}
            nbytes = shapes.lowrank_bytes(group, each)
            yield from with_deltas("lowrank", group, tokens, adapters, make, nbytes, where)
            peers = {
                vllm.NAME: partial(vllm.lora, folder),
                sglang.CSGMV: partial(sglang.csgmv, folder),
                sglang.TRITON: partial(sglang.triton, folder),
                in_torch.BMM: in_torch.lora,
            }
            for name, peer in peers.items():
                yield peer_case("lowrank", name, group, tokens, adapters, make, peer, nbytes, where)


def bit(folder: Folder) -> Iterator[Case]:
    for tokens, adapters in BITS:
        for group in GROUPS:
            make = cache(partial(_bit_problem, group, shapes.spread(tokens, adapters)))
            nbytes, where = shapes.bit_bytes(group, adapters), {"form": "1-bit"}
            yield from with_deltas("bit", group, tokens, adapters, make, nbytes, where)
            peer = partial(bitdelta.bit, folder)
            yield peer_case(
                "bit", bitdelta.NAME, group, tokens, adapters, make, peer, nbytes, where
            )


def sparse(folder: Folder) -> Iterator[Case]:
    del folder  # the only peer comes with torch
    for density, tokens, adapters in SPARSE:
        for group in GROUPS:
            make = cache(partial(_sparse_problem, group, shapes.spread(tokens, adapters), density))
            nbytes = shapes.sparse_bytes(group, adapters, density)
            where = {"form": f"{density:.1%}"}
            yield from with_deltas("sparse", group, tokens, adapters, make, nbytes, where)
            name, peer = in_torch.CUSPARSE, in_torch.sparse
            yield peer_case("sparse", name, group, tokens, adapters, make, peer, nbytes, where)


def mixed(folder: Folder) -> Iterator[Case]:
    """One batch of 64 tokens: 32 over 16 LoRA of rank 16, 8 over 4 1-bit, 16 over 8 sparse of 1 %,
    8 of the base. The peers' kernels run on its pieces, one kind each."""
    pieces = ((32, 16), (8, 4), (16, 8), 8) if ON_GPU else ((3, 2), (2, 1), (2, 1), 1)
    (m_lora, d_lora), (m_bit, d_bit), (m_sparse, d_sparse), bare = pieces
    tokens, adapters = m_lora + m_bit + m_sparse + bare, d_lora + d_bit + d_sparse
    batch = (
        *((-1,) * bare),
        *shapes.spread(m_lora, d_lora),
        *shapes.spread(m_bit, d_bit, d_lora),
        *shapes.spread(m_sparse, d_sparse, d_lora + d_bit),
    )
    density = 0.01 if ON_GPU else 0.05
    for group in GROUPS:
        lora_bytes = shapes.lowrank_bytes(group, [16] * d_lora)
        bit_bytes = shapes.bit_bytes(group, d_bit)
        sparse_bytes = shapes.sparse_bytes(group, d_sparse, density)
        make = cache(partial(_mixed_problem, group, batch, (d_lora, d_bit, d_sparse), density))
        nbytes, where = lora_bytes + bit_bytes + sparse_bytes, {"form": "mixed"}
        yield from with_deltas("mixed", group, tokens, adapters, make, nbytes, where)
        lora = cache(partial(_lora_problem, group, shapes.spread(m_lora, d_lora), (16,) * d_lora))
        bits = cache(partial(_bit_problem, group, shapes.spread(m_bit, d_bit)))
        some = cache(partial(_sparse_problem, group, shapes.spread(m_sparse, d_sparse), density))
        for name, peer, piece, held, m, d in (
            (vllm.NAME, partial(vllm.lora, folder), lora, lora_bytes, m_lora, d_lora),
            (sglang.CSGMV, partial(sglang.csgmv, folder), lora, lora_bytes, m_lora, d_lora),
            (bitdelta.NAME, partial(bitdelta.bit, folder), bits, bit_bytes, m_bit, d_bit),
            (in_torch.CUSPARSE, in_torch.sparse, some, sparse_bytes, m_sparse, d_sparse),
        ):
            yield peer_case("mixed", name, group, m, d, piece, peer, held, where)


PARTS = {"base": base, "lowrank": lowrank, "bit": bit, "sparse": sparse, "mixed": mixed}


def ours_base(group: Group, tokens: int, form: str, part: str) -> Case:
    nbytes = shapes.base_bytes(group, form) + shapes.activation_bytes(group, tokens)
    problem = cache(lambda: Problem(group, (-1,) * tokens, data.activations(tokens, group), ()))
    held = cache(lambda: ours.Held(problem(), form))
    return Case(
        part,
        ours.NAME,
        "base",
        lambda n: held().base(n),
        lambda: held().expected_base(),
        nbytes,
        shapes.operations(group, tokens),
        {"group": group.name, "tokens": tokens, "form": form},
    )


def with_deltas(
    part: str,
    group: Group,
    tokens: int,
    adapters: int,
    make: Callable[[], Problem],
    nbytes: int,
    where: dict[str, object],
) -> Iterator[Case]:
    """Ours: the int4 base alone and with the deltas, on the same weights and activations."""
    held = cache(lambda: ours.Held(make(), "int4"))
    here = {"group": group.name, "tokens": tokens, "adapters": adapters, **where}
    common = shapes.base_bytes(group, "int4") + shapes.activation_bytes(group, tokens)
    work = shapes.operations(group, tokens)
    yield Case(
        part, ours.NAME, "base", lambda n: held().base(n), lambda: held().expected_base(),
        common, work, here,
    )  # fmt: skip
    yield Case(
        part, ours.NAME, "base+deltas", lambda n: held().deltas(n), lambda: held().expected(),
        common + nbytes, work, here,
    )  # fmt: skip


def peer_case(
    part: str,
    engine: str,
    group: Group,
    tokens: int,
    adapters: int,
    make: Callable[[], Problem],
    peer: Callable[[Problem, int], Work],
    nbytes: int,
    where: dict[str, object],
) -> Case:
    """What a peer adds to a finished base product; y is read and written once more."""
    problem = cache(make)
    nbytes += shapes.activation_bytes(group, tokens) + 2 * tokens * group.out_features
    here = {"group": group.name, "tokens": tokens, "adapters": adapters, **where}
    return Case(
        part, engine, "deltas", lambda n: peer(problem(), n), lambda: problem().delta,
        nbytes, 0, here,
    )  # fmt: skip


def _problem(group: Group, batch: Batch, adapters: Sequence[Adapter]) -> Problem:
    return Problem(group, batch, data.activations(len(batch), group), tuple(adapters))


def _lora_problem(group: Group, batch: Batch, ranks: tuple[int, ...]) -> Problem:
    return _problem(group, batch, [data.low_rank(group, r) for r in ranks])


def _bit_problem(group: Group, batch: Batch) -> Problem:
    few = [data.one_bit(group) for _ in range(min(2, max(batch) + 1))]
    return _problem(group, batch, data.distinct(few, max(batch) + 1))


def _sparse_problem(group: Group, batch: Batch, density: float) -> Problem:
    few = [data.sparse(group, density) for _ in range(min(2, max(batch) + 1))]
    return _problem(group, batch, data.distinct(few, max(batch) + 1))


def _mixed_problem(
    group: Group, batch: Batch, counts: tuple[int, int, int], density: float
) -> Problem:
    loras = [data.low_rank(group, 16) for _ in range(counts[0])]
    bits = data.distinct([data.one_bit(group)], counts[1])
    some = data.distinct([data.sparse(group, density)], counts[2])
    return _problem(group, batch, [*loras, *bits, *some])

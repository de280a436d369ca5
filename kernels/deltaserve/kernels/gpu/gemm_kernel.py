# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The second launch of a group: base product, factors, bias, expand, ready deltas, activation and
residual, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.base.kernel import product
from deltaserve.kernels.lowrank.kernel import expand
from deltaserve.kernels.scale.kernel import biases, factors


@triton.jit
def add_planes(
    acc, planes, plane_count, part, m, n, M, MP, live, N: tl.constexpr, BM: tl.constexpr
):
    """acc [BN, BM] plus each token's ready deltas: its module's first few planes."""
    count = tl.load(plane_count + part * MP + m, mask=m < M, other=0)
    AHEAD: tl.constexpr = 4 if BM <= 32 else 1  # loads that do not wait for each other
    for first in range(0, tl.max(count, axis=0), AHEAD):
        for i in tl.static_range(AHEAD):
            p = first + i
            place = planes + (p * MP + m)[None, :].to(tl.int64) * N + n[:, None]
            mask = (p < count)[None, :] & live[:, None]
            acc += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def deltas(
    acc, arena, arena_float, bias, h, planes, page_b, page_col, page_lo, page_hi, page_bounds,
    vec_offset, vec_lo, vec_hi, vec_strength, vec_bounds, plane_count,
    tile, part, m, n0, first, out_features, M, MP, WIDTH,
    N: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    H_SPLIT: tl.constexpr, EVEN_N: tl.constexpr, HAS_BIAS: tl.constexpr, ADAPTERS: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM], the base product of rows n0.. of a module, columns first.. of the group, -> its
    served output in float32."""
    n = n0 + tl.arange(0, BN)
    live = n < out_features
    if EVEN_N:
        live = tl.arange(0, BN) < BN
    at = tile * PARTS + part
    if ADAPTERS:
        v = vec_bounds + at * 2
        v0, v1, v2 = tl.load(v), tl.load(v + 1), tl.load(v + 2)
        acc = factors(
            acc, arena_float, vec_offset, vec_lo, vec_hi, vec_strength, v0, v1, m, n, live, BM, BN
        )
    if HAS_BIAS:
        acc += tl.load(bias + first + tl.arange(0, BN), mask=live, other=0.0).to(tl.float32)[
            :, None
        ]
    if ADAPTERS:
        acc = biases(acc, arena_float, vec_offset, vec_lo, vec_hi, vec_strength, v1, v2, m, n, live)
        acc = expand(
            acc, arena, h, page_b, page_col, page_lo, page_hi,
            tl.load(page_bounds + at), tl.load(page_bounds + at + 1),
            m, n, out_features, MP, WIDTH, BM, BN, ROWS, H_SPLIT, EVEN_N,
        )  # fmt: skip
        acc = add_planes(
            acc, planes, plane_count, part, m, first + tl.arange(0, BN), M, MP, live, N, BM
        )
    return acc


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """The activation of gate times up."""
    if ACTIVATION == "silu":
        g = gate * tl.sigmoid(gate)
    else:  # gelu_tanh: 0.5 x (1 + tanh(u)) is x sigmoid(2 u)
        g = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return g * up


@triton.jit(do_not_specialize=["M", "TILES", "WIDTH8", "x_part", "sums_part", "y_padded"])
def gemm_kernel(
    x, token_scale, sums, weight, scale, zero, bias, y, residual, y_sums, partial, counter, tiles,
    arena, arena_float, h, planes, page_b, page_col, page_lo, page_hi, page_bounds,
    vec_offset, vec_lo, vec_hi, vec_strength, vec_bounds, plane_count,
    M, TILES, WIDTH8, x_part, sums_part, y_padded,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PART1: tl.constexpr,
    PART2: tl.constexpr, FORMAT: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, HOW: tl.constexpr, DT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, H_SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SUM: tl.constexpr, Y_SUM: tl.constexpr, APART: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ADAPTERS: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = the group's output for x [M, K]; grid (token tiles, column tiles * SPLIT_K).

    Token tiles vary fastest, so that programs that share weights run together. tiles: int32
    [column tiles, 4] of (part, number in it, first column of the part, rows of the part), read
    unless EVEN_N: at most three parts, of whole tiles, the second and third from PART1 and PART2.
    TILES: token tiles that the step's tables are laid out for, of TOKENS tokens each, BM of them
    here; WIDTH8: rows of h / 8. x_part, sums_part: in units of x's rows and MP, from one part's
    inputs to the next one's, 0 if all share them. token_scale: float32 [parts or 1, MP], read of
    x in 8 bits.
    ACTIVATION "silu" or "gelu_tanh": of gate and up, two parts of equal size or the halves of one;
    y is [M, N / 2].
    APART: then each is the product of inputs of its own, else they are one product.
    SUM: columns of one of sums. Y_SUM: unless it is 0, y_sums float32 [y's columns / Y_SUM,
    y_padded] are the sums of y for the group after this one.
    SPLIT_K: the last program of a tile adds the others' sums, in order, and goes on alone.
    """
    mt, nt = tl.program_id(0), tl.program_id(1) // SPLIT_K
    piece = tl.program_id(1) % SPLIT_K
    MP = TILES * TOKENS
    WIDTH = WIDTH8 * 8
    GATED: tl.constexpr = ACTIVATION is not None
    HALF: tl.constexpr = BN // 2 if GATED else BN
    WIDE: tl.constexpr = N // 2 if GATED else N
    r = tl.arange(0, BN)
    m = mt * BM + tl.arange(0, BM)
    if EVEN_N:  # nothing has to be loaded to know where the tile is
        first = nt * HALF
        part = (first >= PART1).to(tl.int32) + (first >= PART2).to(tl.int32)
        column = tl.where(part == 0, 0, tl.where(part == 1, PART1, PART2))
        out_features = tl.where(part == 0, PART1, tl.where(part == 1, PART2 - PART1, N - PART2))
        n0 = first - column
        live = r < BN
    else:
        part = tl.load(tiles + nt * 4)
        n0 = tl.load(tiles + nt * 4 + 1) * HALF
        column = tl.load(tiles + nt * 4 + 2)
        out_features = tl.load(tiles + nt * 4 + 3)
        first = column + n0
        live = n0 + r % HALF < out_features
    n = first + r
    if GATED:
        n = first + r % HALF + (r // HALF) * (N // 2)
    span: tl.constexpr = ((K + BK * SPLIT_K - 1) // (BK * SPLIT_K)) * BK
    k_from = piece * span
    WHOLE: tl.constexpr = FORMAT == "w8a8" or FORMAT == "w4a8"
    STRIDE: tl.constexpr = (K + 127) // 128 * 128 if WHOLE else K
    scale_part = tl.minimum(x_part, 1) * MP
    acc = product(
        x + (part * x_part).to(tl.int64) * STRIDE, token_scale + part * scale_part,
        sums + (part * sums_part) * MP, weight, scale, zero, n, live, m, k_from,
        tl.minimum(k_from + span, K), M, MP, N, K, FORMAT, GROUP, HOW, DT, BM, BN, BK,
        SUM, STAGES, EVEN_N, EVEN_K, PACKED,
    )  # fmt: skip
    if APART:
        ups = product(
            x + x_part.to(tl.int64) * STRIDE, token_scale + scale_part,
            sums + sums_part * MP, weight, scale, zero, n, live, m, k_from,
            tl.minimum(k_from + span, K), M, MP, N, K, FORMAT, GROUP, HOW, DT, BM, BN, BK,
            SUM, STAGES, EVEN_N, EVEN_K, PACKED,
        )  # fmt: skip
        acc = tl.where((r < HALF)[:, None], acc, ups)
    if PDL:
        tl.extra.cuda.gdc_wait()  # the first launch's h and planes are needed only now
    last = True
    if SPLIT_K > 1:
        own = partial + (nt * tl.num_programs(0) + mt).to(tl.int64) * (SPLIT_K * BN * BM)
        at = r[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(own + piece * (BN * BM) + at, acc)
        tl.debug_barrier()
        done = counter + nt * tl.num_programs(0) + mt
        last = tl.atomic_add(done, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            acc = tl.zeros((BN, BM), tl.float32)
            for s in tl.static_range(SPLIT_K):
                acc += tl.load(own + s * (BN * BM) + at, cache_modifier=".cg")
            tl.atomic_xchg(done, 0)
    if last:
        tile = mt * BM // TOKENS
        if GATED:
            both = tl.permute(tl.reshape(acc, (2, HALF, BM)), (1, 2, 0))
            gate, up = tl.split(both)
            gate = deltas(
                gate, arena, arena_float, bias, h, planes, page_b, page_col, page_lo, page_hi,
                page_bounds, vec_offset, vec_lo, vec_hi, vec_strength, vec_bounds, plane_count,
                tile, 0, m, n0, first, N // PARTS, M, MP, WIDTH,
                N, PARTS, BM, HALF, ROWS, H_SPLIT, EVEN_N, HAS_BIAS, ADAPTERS,
            )  # fmt: skip
            up = deltas(
                up, arena, arena_float, bias, h, planes, page_b, page_col, page_lo, page_hi,
                page_bounds, vec_offset, vec_lo, vec_hi, vec_strength, vec_bounds, plane_count,
                tile, PARTS - 1, m, n0 + (2 - PARTS) * (N // 2), first + N // 2, N // PARTS,
                M, MP, WIDTH,
                N, PARTS, BM, HALF, ROWS, H_SPLIT, EVEN_N, HAS_BIAS, ADAPTERS,
            )  # fmt: skip
            out = gated(gate, up, ACTIVATION)
        else:
            out = deltas(
                acc, arena, arena_float, bias, h, planes, page_b, page_col, page_lo, page_hi,
                page_bounds, vec_offset, vec_lo, vec_hi, vec_strength, vec_bounds, plane_count,
                tile, part, m, n0, first, out_features, M, MP, WIDTH,
                N, PARTS, BM, BN, ROWS, H_SPLIT, EVEN_N, HAS_BIAS, ADAPTERS,
            )  # fmt: skip
        i = tl.arange(0, HALF)
        place = m[None, :].to(tl.int64) * WIDE + (first + i)[:, None]
        mask = (m < M)[None, :]
        if not EVEN_N:
            mask = mask & (n0 + i < out_features)[:, None]
        if RESIDUAL:
            out += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        out = out.to(y.dtype.element_ty)
        tl.store(y + place, out, mask=mask)
        if Y_SUM > 0:
            counted = out.to(tl.float32)
            if not EVEN_N:
                counted = tl.where((n0 + i < out_features)[:, None], counted, 0.0)
            at = first // Y_SUM + tl.arange(0, HALF // Y_SUM)
            total = tl.sum(tl.reshape(counted, (HALF // Y_SUM, Y_SUM, BM)), axis=1)
            inside = (at * Y_SUM < WIDE)[:, None] & (m < M)[None, :]
            tl.store(y_sums + at[:, None] * y_padded + m[None, :], total, mask=inside)

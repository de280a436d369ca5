/* y = x W^T + bias with w = (value(q) - zero) * scale, a byte a weight, scale and zero per group of
 * inputs, any number of tokens.
 *
 * Layout: as int8.c, blocks of 16 output rows, in a block [input][row]; scale, zero: float
 * [block][group][row]. value(q) is a signed whole number or a float of 8 bits (e4m3fn); both are
 * exact in bfloat16, so two neighbouring inputs make a pair for the bfloat16 dot product. scale and
 * zero act on the float32 sums of a group.
 */
#include "common.h"

enum { BLOCKS = 4, TOKENS = 6 };
enum { WHOLE, E4M3 };

typedef int8_t i8x16 __attribute__((vector_size(16)));

typedef struct {
    const void *x;     /* [tokens, padded]: float, or bfloat16 when pairwise */
    const float *sums; /* [tokens, groups]: sum of x; only where there are zeros */
    int64_t padded, in, group, groups, blocks, out;
    const int8_t *q;
    const float *scale, *zero; /* zero may be null */
    const void *bias;
    int bf16; /* of y and bias */
    void *y;
} bytes_t;

/* One input of 16 rows. e4m3fn has 4 bits of exponent with bias 7 and 3 of mantissa: moved to
 * float's places and 120 added to the exponent; below 8 it is a multiple of 2^-9. */
ALWAYS f32x16 column(const int8_t *q, int kind) {
    i8x16 v;
    memcpy(&v, q, sizeof v);
    i32x16 wide = __builtin_convertvector(v, i32x16);
    if (kind == WHOLE) return __builtin_convertvector(wide, f32x16);
    u32x16 code = (u32x16)wide, magnitude = code & 0x7f;
    u32x16 normal = (magnitude << 20) + (120u << 23);
    u32x16 small = (u32x16)(__builtin_convertvector((i32x16)magnitude, f32x16) * 0x1p-9f);
    u32x16 is_small = (u32x16)(magnitude < 8);
    return (f32x16)((is_small & small) | (~is_small & normal) | (code & 0x80000000u));
}

#ifdef HAVE_AVX512_BF16
/* Without both, the second weight is 0, whatever input is beside it. */
ALWAYS __m512i pair(const int8_t *q, int kind, int both) {
    __m512i low = _mm512_srli_epi32((__m512i)column(q, kind), 16);
    if (!both) return low;
    const __m512i high_half = _mm512_set1_epi32((int)0xffff0000u);
    return _mm512_ternarylogic_epi32(low, (__m512i)column(q + LANES, kind), high_half, 0xf8);
}
#endif

/* One group of inputs for B blocks of rows and T tokens. */
ALWAYS void group_tile(const bytes_t *m, int64_t block, int64_t g, int64_t t, f32x16 (*total)[TOKENS],
                       int B, int T, int kind, int pairwise) {
    f32x16 acc[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) acc[b][i] = splat(0);
    int64_t from = g * m->group, to = min64(from + m->group, m->in);
#ifdef HAVE_AVX512_BF16
    if (pairwise) {
        const uint16_t *x = (const uint16_t *)m->x + t * m->padded;
        for (int64_t k = from; k < to; k += 2)
            for (int b = 0; b < B; b++) {
                __m512i w = pair(m->q + ((block + b) * m->in + k) * LANES, kind, k + 1 < to);
                for (int i = 0; i < T; i++) {
                    int32_t two;
                    memcpy(&two, x + i * m->padded + k, 4);
                    acc[b][i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[b][i], (__m512bh)w,
                                                         (__m512bh)_mm512_set1_epi32(two));
                }
            }
    }
#endif
    if (!pairwise) {
        const float *x = (const float *)m->x + t * m->padded;
        for (int64_t k = from; k < to; k++)
            for (int b = 0; b < B; b++) {
                f32x16 w = column(m->q + ((block + b) * m->in + k) * LANES, kind);
                for (int i = 0; i < T; i++) acc[b][i] += w * x[i * m->padded + k];
            }
    }
    for (int b = 0; b < B; b++) {
        int64_t at = ((block + b) * m->groups + g) * LANES;
        f32x16 scale = load16(m->scale, at, 0);
        for (int i = 0; i < T; i++) {
            if (m->zero) acc[b][i] -= load16(m->zero, at, 0) * m->sums[(t + i) * m->groups + g];
            total[b][i] += scale * acc[b][i];
        }
    }
}

ALWAYS void tile(const bytes_t *m, int64_t block, int64_t t, int B, int T, int kind, int pairwise) {
    f32x16 total[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) total[b][i] = splat(0);
    for (int64_t g = 0; g < m->groups; g++) group_tile(m, block, g, t, total, B, T, kind, pairwise);
    for (int b = 0; b < B; b++) {
        int64_t row = (block + b) * LANES, n = m->out - row;
        f32x16 bias = m->bias ? load_upto(m->bias, row, n, m->bf16) : splat(0);
        for (int i = 0; i < T; i++)
            store_upto(m->y, (t + i) * m->out + row, n, m->bf16, total[b][i] + bias);
    }
}

ALWAYS void rows(const bytes_t *m, int64_t block, int B, int64_t t, int T, int kind, int pairwise) {
#define WIDE(N) case N: tile(m, block, t, BLOCKS, N, kind, pairwise); return;
#define ONE(N) case N: for (int b = 0; b < B; b++) tile(m, block + b, t, 1, N, kind, pairwise); return;
    if (B == BLOCKS) switch (T) { WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6) }
    else switch (T) { ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) }
#undef WIDE
#undef ONE
}

typedef void rows_of(const bytes_t *m, int64_t block, int B, int64_t t, int T);

static void whole_floats(const bytes_t *m, int64_t block, int B, int64_t t, int T) {
    rows(m, block, B, t, T, WHOLE, 0);
}

static void e4m3_floats(const bytes_t *m, int64_t block, int B, int64_t t, int T) {
    rows(m, block, B, t, T, E4M3, 0);
}

#ifdef HAVE_AVX512_BF16
static void whole_pairs(const bytes_t *m, int64_t block, int B, int64_t t, int T) {
    rows(m, block, B, t, T, WHOLE, 1);
}

static void e4m3_pairs(const bytes_t *m, int64_t block, int B, int64_t t, int T) {
    rows(m, block, B, t, T, E4M3, 1);
}
#endif

/* One token in the kernel's own precision, padded by at least one zero, and the sums of its groups. */
static void prepare(const void *x, int bf16, int64_t in, int64_t t, char *to, int pairwise, int64_t padded,
                    float *sums, int64_t groups, int64_t group) {
    for (int64_t g = 0; sums && g < groups; g++) {
        float s = 0;
        for (int64_t k = g * group; k < min64((g + 1) * group, in); k++) s += load1(x, t * in + k, bf16);
        sums[t * groups + g] = s;
    }
    int64_t size = pairwise ? 2 : 4;
    to += t * padded * size;
    if (pairwise) memcpy(to, (const uint16_t *)x + t * in, in * 2);
    else
        for (int64_t k = 0; k < in; k++) ((float *)to)[k] = load1(x, t * in + k, bf16);
    memset(to + in * size, 0, (padded - in) * size);
}

/* As ds_int4; q, scale and zero in the layout above, kind: of the bytes, group: at least 1. */
int ds_bytes(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out, const int8_t *q,
             int kind, const float *scale, const float *zero, int64_t group, const void *bias, int threads) {
    rows_of *run = kind == E4M3 ? e4m3_floats : whole_floats;
    int pairwise = 0;
#ifdef HAVE_AVX512_BF16
    pairwise = bf16;
    if (pairwise) run = kind == E4M3 ? e4m3_pairs : whole_pairs;
#endif
    int64_t padded = in + 1, groups = ceil_div(in, group), sum_bytes = zero ? tokens * groups * 4 : 0;
    char *scratch = malloc(sum_bytes + tokens * padded * (pairwise ? 2 : 4) + 64);
    if (!scratch) return -1;
    float *sums = zero ? (float *)scratch : NULL;
    char *copy = scratch + sum_bytes;
    for (int64_t t = 0; t < tokens; t++)
        prepare(x, bf16, in, t, copy, pairwise, padded, sums, groups, group);
    bytes_t m = {copy, sums, padded, in, group, groups, ceil_div(out, LANES), out,
                 q, scale, zero, bias, bf16, y};
    int64_t tasks = ceil_div(m.blocks, BLOCKS), rounds = ceil_div(tokens, TOKENS);
    if (tokens * in * out < 100000) threads = 1;
    int chunk = chunk_of(tasks, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t block = task * BLOCKS;
        int B = (int)min64(BLOCKS, m.blocks - block);
        for (int64_t r = 0; r < rounds; r++) {
            int64_t from = r * tokens / rounds, to = (r + 1) * tokens / rounds;
            run(&m, block, B, from, (int)(to - from));
        }
    }
    free(scratch);
    return 0;
}

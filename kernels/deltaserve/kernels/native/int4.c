/* y = x W^T + bias with w = (q - zero) * scale, 4 bits a weight, any number of tokens.
 *
 * Layout: blocks of 16 output rows; in a block [word][row]; a word is 8 inputs of one row, its
 * nibble j < 4 input 2 j and nibble j + 4 input 2 j + 1. So a word shifted right by 4 j holds two
 * neighbouring inputs in the low bits of its halves: one permutation turns them into a pair of
 * bfloat16, which is what the dot-product instruction takes. scale, zero: [block][group][row].
 *
 * q - 8 is exact in bfloat16, and scale and zero act on the float32 sums of a group:
 * y = sum over groups of scale * (sum (q - 8) x - (zero - 8) * sum x).
 *
 * With a code of 16 floats, w = code[q] * scale. These need not be exact in bfloat16, so they are
 * always multiplied as floats.
 */
#include "common.h"

enum { BLOCKS = 4, TOKENS = 6, WORD = 8 };

typedef struct {
    const void *x;       /* [tokens, padded], zeros beyond `in` */
    const float *sums;   /* [tokens, groups]: sum of x */
    int64_t padded, groups, words, group_words, blocks, out;
    const uint32_t *q;
    const void *scale, *zero, *bias;
    const float *code; /* or null; there are no zeros with it */
    int sz_bf16, bias_bf16, y_bf16;
    void *y;
} int4_t;

#ifdef HAVE_AVX512_BF16
ALWAYS __m512i pairs(u32x16 word, int j, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32((__m512i)word, 4 * j), table);
}

/* The bfloat16 of n - 8 at every n whose low 4 bits count: only 5 bits index the table. */
ALWAYS __m512i pair_table(void) {
    uint16_t v[32];
    for (int n = 0; n < 32; n++) v[n] = to_bf16((float)((n & 15) - 8));
    __m512i table;
    memcpy(&table, v, sizeof table);
    return table;
}
#endif

ALWAYS f32x16 nibble(u32x16 word, int shift, f32x16 table, int coded) {
#ifdef HAVE_AVX512
    (void)coded;
    return (f32x16)_mm512_permutexvar_ps((__m512i)(word >> shift), (__m512)table);
#else
    if (!coded) return __builtin_convertvector((i32x16)((word >> shift) & 15) - 8, f32x16);
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = table[(word[i] >> shift) & 15];
    return v;
#endif
}

/* One group of inputs for B blocks of rows and T tokens. */
ALWAYS void group_tile(const int4_t *m, int64_t block, int64_t g, int64_t t, f32x16 (*total)[TOKENS],
                       int B, int T, int pairwise) {
    f32x16 acc[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) acc[b][i] = splat(0);
    int64_t from = g * m->group_words, to = min64(from + m->group_words, m->words);
#ifdef HAVE_AVX512_BF16
    const __m512i table16 = pair_table();
#endif
    const f32x16 whole = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const f32x16 table = m->code ? load16(m->code, 0, 0) : whole;
    for (int64_t w = from; w < to; w++) {
        u32x16 q[BLOCKS];
        for (int b = 0; b < B; b++) {
            const uint32_t *p = m->q + ((block + b) * m->words + w) * LANES;
            memcpy(&q[b], p, sizeof q[b]);
            __builtin_prefetch(p + 16 * LANES);
        }
#ifdef HAVE_AVX512_BF16
        if (pairwise) {
            const uint16_t *x = (const uint16_t *)m->x + t * m->padded + w * WORD;
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512i v[BLOCKS];
                for (int b = 0; b < B; b++) v[b] = pairs(q[b], j, table16);
                for (int i = 0; i < T; i++) {
                    int32_t two;
                    memcpy(&two, x + i * m->padded + 2 * j, 4);
                    __m512i xx = _mm512_set1_epi32(two);
                    for (int b = 0; b < B; b++)
                        acc[b][i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[b][i], (__m512bh)v[b], (__m512bh)xx);
                }
            }
            continue;
        }
#endif
        const float *x = (const float *)m->x + t * m->padded + w * WORD;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            f32x16 v[BLOCKS];
            for (int b = 0; b < B; b++) v[b] = nibble(q[b], 4 * (j / 2) + 16 * (j % 2), table, m->code != NULL);
            for (int i = 0; i < T; i++)
                for (int b = 0; b < B; b++) acc[b][i] += v[b] * x[i * m->padded + j];
        }
    }
    for (int b = 0; b < B; b++) {
        int64_t at = ((block + b) * m->groups + g) * LANES;
        f32x16 scale = load16(m->scale, at, m->sz_bf16);
        f32x16 zero = m->code ? splat(0) : load16(m->zero, at, m->sz_bf16) - 8;
        for (int i = 0; i < T; i++)
            total[b][i] += scale * (acc[b][i] - zero * m->sums[(t + i) * m->groups + g]);
    }
}

ALWAYS void tile(const int4_t *m, int64_t block, int64_t t, int B, int T, int pairwise) {
    f32x16 total[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) total[b][i] = splat(0);
    for (int64_t g = 0; g < m->groups; g++) group_tile(m, block, g, t, total, B, T, pairwise);
    for (int b = 0; b < B; b++) {
        int64_t row = (block + b) * LANES, n = m->out - row;
        f32x16 bias = m->bias ? load_upto(m->bias, row, n, m->bias_bf16) : splat(0);
        for (int i = 0; i < T; i++)
            store_upto(m->y, (t + i) * m->out + row, n, m->y_bf16, total[b][i] + bias);
    }
}

ALWAYS void tokens_tile(const int4_t *m, int64_t block, int64_t t, int B, int T, int pairwise) {
#define CASE(N) case N: tile(m, block, t, B, N, pairwise); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

static void rows_pairs(const int4_t *m, int64_t block, int B, int64_t t, int T) {
    if (B == BLOCKS) tokens_tile(m, block, t, BLOCKS, T, 1);
    else for (int b = 0; b < B; b++) tokens_tile(m, block + b, t, 1, T, 1);
}

static void rows_floats(const int4_t *m, int64_t block, int B, int64_t t, int T) {
    if (B == BLOCKS) tokens_tile(m, block, t, BLOCKS, T, 0);
    else for (int b = 0; b < B; b++) tokens_tile(m, block + b, t, 1, T, 0);
}

/* The tokens in the kernel's own precision, padded, and the sum of each group. */
static void prepare(const void *x, int x_bf16, int64_t in, int64_t t, void *to, int pairwise,
                    int64_t padded, float *sums, int64_t groups, int64_t group) {
    for (int64_t g = 0; g < groups; g++) {
        float s = 0;
        for (int64_t k = g * group; k < min64((g + 1) * group, in); k++) s += load1(x, t * in + k, x_bf16);
        sums[t * groups + g] = s;
    }
    if (pairwise) {
        uint16_t *p = (uint16_t *)to + t * padded;
        memcpy(p, (const uint16_t *)x + t * in, in * 2);
        memset(p + in, 0, (padded - in) * 2);
    } else {
        float *p = (float *)to + t * padded;
        for (int64_t k = 0; k < in; k++) p[k] = load1(x, t * in + k, x_bf16);
        memset(p + in, 0, (padded - in) * 4);
    }
}

static int multiply(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out,
                    const uint32_t *q, const void *scale, const void *zero, int sz_bf16, int64_t group,
                    const float *code, const void *bias, int threads) {
    int64_t padded = ceil_div(in, WORD) * WORD, groups = ceil_div(in, group);
#ifdef HAVE_AVX512_BF16
    int pairwise = bf16 && !code;
#else
    int pairwise = 0;
#endif
    char *scratch = malloc(tokens * (padded * (pairwise ? 2 : 4) + groups * 4) + 64);
    if (!scratch) return -1;
    float *sums = (float *)scratch;
    void *copy = scratch + tokens * groups * 4;
    int4_t m = {copy, sums, padded, groups, padded / WORD, group / WORD, ceil_div(out, LANES), out,
                q, scale, zero, bias, code, sz_bf16, bf16, bf16, y};
    int64_t tasks = ceil_div(m.blocks, BLOCKS);
    int64_t rounds = ceil_div(tokens, TOKENS);
    if (tokens * in * out < 100000) threads = 1;
    int chunk = chunk_of(tasks, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++)
            prepare(x, bf16, in, t, copy, pairwise, padded, sums, groups, group);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t block = task * BLOCKS;
            int B = (int)min64(BLOCKS, m.blocks - block);
            for (int64_t r = 0; r < rounds; r++) {
                /* Equal shares: 16 tokens are 6 + 5 + 5, not 6 + 6 + 4. */
                int64_t from = r * tokens / rounds, to = (r + 1) * tokens / rounds;
                if (pairwise) rows_pairs(&m, block, B, from, (int)(to - from));
                else rows_floats(&m, block, B, from, (int)(to - from));
            }
        }
    }
    free(scratch);
    return 0;
}

/* x: [tokens, in]; y: [tokens, out]; bias: [out] of y's kind, or null. Returns 0, or -1 when memory
 * ran out. */
int ds_int4(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out,
            const uint32_t *q, const void *scale, const void *zero, int sz_bf16, int64_t group,
            const void *bias, int threads) {
    return multiply(x, bf16, tokens, in, y, out, q, scale, zero, sz_bf16, group, NULL, bias, threads);
}

/* The same with a code of 16 floats; scale: float. */
int ds_code4(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out,
             const uint32_t *q, const float *code, const float *scale, int64_t group, const void *bias,
             int threads) {
    return multiply(x, bf16, tokens, in, y, out, q, scale, NULL, 0, group, code, bias, threads);
}

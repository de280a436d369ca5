/* y = x W^T + bias with w = q * scale, 8 bits a weight and one scale a row, any number of tokens.
 *
 * Layout: blocks of 16 output rows, in a block [input][row]. Whole numbers up to 127 are exact in
 * bfloat16, so two neighbouring inputs make a pair for the bfloat16 dot product.
 */
#include "common.h"

enum { BLOCKS = 4, TOKENS = 6 };

typedef int8_t i8x16 __attribute__((vector_size(16)));

typedef struct {
    const void *x; /* [tokens, padded]: float, or bfloat16 when pairwise; zeros beyond `in` */
    int64_t padded, in, blocks, out;
    const int8_t *q;
    const float *scale;
    const void *bias;
    int bf16;      /* of y and bias */
    void *y;
} int8_args;

ALWAYS f32x16 column(const int8_t *q) {
    i8x16 v;
    memcpy(&v, q, sizeof v);
#ifdef HAVE_AVX512
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#else
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

ALWAYS void floats_tile(const int8_args *m, int64_t block, int64_t t, f32x16 (*acc)[TOKENS], int B, int T) {
    const float *x = (const float *)m->x + t * m->padded;
    for (int64_t k = 0; k < m->in; k++)
        for (int b = 0; b < B; b++) {
            const int8_t *p = m->q + ((block + b) * m->in + k) * LANES;
            f32x16 w = column(p);
            for (int i = 0; i < T; i++) acc[b][i] += w * x[i * m->padded + k];
        }
}

#ifdef HAVE_AVX512_BF16
ALWAYS __m512i pair(const int8_t *q, int both) {
    __m512i low = _mm512_srli_epi32((__m512i)column(q), 16);
    if (!both) return low;
    const __m512i high_half = _mm512_set1_epi32((int)0xffff0000u);
    return _mm512_ternarylogic_epi32(low, (__m512i)column(q + LANES), high_half, 0xf8);
}

ALWAYS void pairs_step(const int8_args *m, int64_t block, const uint16_t *x, int64_t k,
                       f32x16 (*acc)[TOKENS], int B, int T, int both) {
    for (int b = 0; b < B; b++) {
        __m512i w = pair(m->q + ((block + b) * m->in + k) * LANES, both);
        for (int i = 0; i < T; i++) {
            int32_t two;
            memcpy(&two, x + i * m->padded + k, 4);
            acc[b][i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[b][i], (__m512bh)w,
                                                 (__m512bh)_mm512_set1_epi32(two));
        }
    }
}

ALWAYS void pairs_tile(const int8_args *m, int64_t block, int64_t t, f32x16 (*acc)[TOKENS], int B, int T) {
    const uint16_t *x = (const uint16_t *)m->x + t * m->padded;
    int64_t k = 0;
    for (; k + 2 <= m->in; k += 2) pairs_step(m, block, x, k, acc, B, T, 1);
    if (k < m->in) pairs_step(m, block, x, k, acc, B, T, 0);
}
#endif

ALWAYS void tile(const int8_args *m, int64_t block, int64_t t, int B, int T, int pairwise) {
    f32x16 acc[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) acc[b][i] = splat(0);
#ifdef HAVE_AVX512_BF16
    if (pairwise) pairs_tile(m, block, t, acc, B, T);
    else
#endif
        floats_tile(m, block, t, acc, B, T);
    for (int b = 0; b < B; b++) {
        int64_t row = (block + b) * LANES, n = m->out - row;
        f32x16 scale = load_upto(m->scale, row, n, 0);
        f32x16 bias = m->bias ? load_upto(m->bias, row, n, m->bf16) : splat(0);
        for (int i = 0; i < T; i++)
            store_upto(m->y, (t + i) * m->out + row, n, m->bf16, scale * acc[b][i] + bias);
    }
}

ALWAYS void tokens_rows(const int8_args *m, int64_t block, int B, int64_t t, int T, int pairwise) {
#define WIDE(N) case N: tile(m, block, t, BLOCKS, N, pairwise); return;
#define ONE(N) case N: for (int b = 0; b < B; b++) tile(m, block + b, t, 1, N, pairwise); return;
    if (B == BLOCKS) switch (T) { WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6) }
    else switch (T) { ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) }
#undef WIDE
#undef ONE
}

static void rows_pairs(const int8_args *m, int64_t block, int B, int64_t t, int T) {
    tokens_rows(m, block, B, t, T, 1);
}

static void rows_floats(const int8_args *m, int64_t block, int B, int64_t t, int T) {
    tokens_rows(m, block, B, t, T, 0);
}

/* As ds_int4, with q in the layout above and scale float [out]. */
int ds_int8(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out, const int8_t *q,
            const float *scale, const void *bias, int threads) {
#ifdef HAVE_AVX512_BF16
    int pairwise = bf16;
#else
    int pairwise = 0;
#endif
    int64_t padded = (in + 1) / 2 * 2, size = pairwise ? 2 : 4;
    char *copy = malloc(tokens * padded * size + 64);
    if (!copy) return -1;
    for (int64_t t = 0; t < tokens; t++) {
        char *to = copy + t * padded * size;
        if (pairwise) memcpy(to, (const uint16_t *)x + t * in, in * 2);
        else
            for (int64_t k = 0; k < in; k++) ((float *)to)[k] = load1(x, t * in + k, bf16);
        memset(to + in * size, 0, (padded - in) * size);
    }
    int8_args m = {copy, padded, in, ceil_div(out, LANES), out, q, scale, bias, bf16, y};
    int64_t tasks = ceil_div(m.blocks, BLOCKS), rounds = ceil_div(tokens, TOKENS);
    if (tokens * in * out < 100000) threads = 1;
    int chunk = chunk_of(tasks, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t block = task * BLOCKS;
        int B = (int)min64(BLOCKS, m.blocks - block);
        for (int64_t r = 0; r < rounds; r++) {
            int64_t from = r * tokens / rounds, to = (r + 1) * tokens / rounds;
            if (pairwise) rows_pairs(&m, block, B, from, (int)(to - from));
            else rows_floats(&m, block, B, from, (int)(to - from));
        }
    }
    free(copy);
    return 0;
}

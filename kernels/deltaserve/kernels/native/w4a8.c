/* y = x W^T + bias with w = (q - zero) * scale of 4 bits as in int4.c, and tokens in 8 bits: whole
 * numbers within a group of inputs, float32 sums of the groups. The low nibbles of a word's bytes are
 * one operand as they are, the high ones another; the tokens' bytes lie in that order. */
#include "integer.h"

enum { FEW = 3, MANY = 6, WORD = 8, PANEL = 512 };

typedef struct {
    tokens_t x;
    int64_t groups, words, group_words, blocks, out;
    const uint32_t *q;
    const void *scale, *zero, *bias;
    int sz_bf16, bf16; /* of scale and zero; of bias and y */
    void *y;
} w4a8_t;

ALWAYS void group_tile(const w4a8_t *m, int64_t block, int64_t g, int64_t t, f32x16 (*total)[MANY], int B, int T) {
    i32x16 acc[4][MANY];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) acc[b][i] = (i32x16){0};
    int64_t end = min64((g + 1) * m->group_words, m->words);
    for (int64_t k = g * m->group_words; k < end; k++) {
        u32x16 low[4], high[4];
        for (int b = 0; b < B; b++) {
            const uint32_t *p = m->q + ((block + b) * m->words + k) * LANES;
            u32x16 w;
            memcpy(&w, p, sizeof w);
            __builtin_prefetch(p + 16 * LANES);
            low[b] = w & 0x0f0f0f0f;
            high[b] = (w >> 4) & 0x0f0f0f0f;
        }
        for (int i = 0; i < T; i++) {
            const int8_t *x = m->x.q + (t + i) * m->x.padded + WORD * k;
            for (int b = 0; b < B; b++) acc[b][i] = dot4(acc[b][i], low[b], x);
            for (int b = 0; b < B; b++) acc[b][i] = dot4(acc[b][i], high[b], x + QUAD);
        }
    }
    for (int b = 0; b < B; b++) {
        int64_t at = ((block + b) * m->groups + g) * LANES;
        f32x16 scale = load16(m->scale, at, m->sz_bf16), zero = load16(m->zero, at, m->sz_bf16);
        for (int i = 0; i < T; i++) {
            f32x16 sum = __builtin_convertvector(acc[b][i], f32x16);
            f32x16 inputs = splat(-(float)m->x.sums[(t + i) * m->groups + g]);
            total[b][i] = fma16(scale, fma16(zero, inputs, sum), total[b][i]);
        }
    }
}

ALWAYS void tile(const w4a8_t *m, int64_t block, int64_t t, int B, int T) {
    f32x16 total[4][MANY];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) total[b][i] = splat(0);
    for (int64_t g = 0; g < m->groups; g++) group_tile(m, block, g, t, total, B, T);
    for (int b = 0; b < B; b++) {
        int64_t row = (block + b) * LANES, n = m->out - row;
        f32x16 bias = m->bias ? load_upto(m->bias, row, n, m->bf16) : splat(0);
        for (int i = 0; i < T; i++)
            store_upto(m->y, (t + i) * m->out + row, n, m->bf16, fma16(total[b][i], splat(m->x.scale[t + i]), bias));
    }
}

static void few(const w4a8_t *m, int64_t block, int B, int64_t t, int T) {
#define CASE(N) case N: if (B == 4) tile(m, block, t, 4, N); else for (int b = 0; b < B; b++) tile(m, block + b, t, 1, N); break;
    switch (T) { CASE(1) CASE(2) CASE(3) }
#undef CASE
}

static void many(const w4a8_t *m, int64_t block, int B, int64_t t, int T) {
#define CASE(N) case N: if (B == 2) tile(m, block, t, 2, N); else tile(m, block, t, 1, N); break;
    switch (T) { CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* As ds_int4. */
int ds_w4a8(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out, const uint32_t *q,
            const void *scale, const void *zero, int sz_bf16, int64_t group, const void *bias, int threads) {
    int64_t padded = ceil_div(in, WORD) * WORD, groups = ceil_div(in, group);
    char *scratch = malloc(tokens * (4 + 4 * groups + padded) + 64);
    if (!scratch) return -1;
    tokens_t to = {(int8_t *)(scratch + tokens * (4 + 4 * groups)), (float *)scratch,
                   (int32_t *)(scratch + tokens * 4), padded, groups, group};
    w4a8_t m = {to, groups, padded / WORD, group / WORD, ceil_div(out, LANES), out, q, scale, zero, bias, sz_bf16, bf16, y};
    int64_t most = tokens <= FEW ? FEW : MANY, wide = tokens <= FEW ? 4 : 2;
    int64_t tasks = ceil_div(m.blocks, wide), panels = ceil_div(tokens, PANEL);
    if (tokens * in * out < 200000) threads = 1;
    int chunk = chunk_of(tasks * panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) quantize_token(x, bf16, in, t, &to, 1);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < tasks * panels; task++) {
            int64_t block = task % tasks * wide, panel = task / tasks;
            int64_t first = panel * tokens / panels, count = (panel + 1) * tokens / panels - first;
            int64_t rounds = ceil_div(count, most);
            int B = (int)min64(wide, m.blocks - block);
            for (int64_t r = 0; r < rounds; r++) {
                int64_t t = first + r * count / rounds;
                int T = (int)(first + (r + 1) * count / rounds - t);
                if (wide == 4) few(&m, block, B, t, T);
                else many(&m, block, B, t, T);
            }
        }
    }
    free(scratch);
    return 0;
}

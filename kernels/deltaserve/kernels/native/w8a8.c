/* y = x W^T + bias in whole numbers: w = q * scale[row] with q of 8 bits, tokens in 8 bits too.
 *
 * Layout: blocks of 16 output rows; in a block [quad][row], a quad being 4 inputs of one row, each a
 * byte q + 128: the instruction takes unsigned weights and signed inputs, and 128 times the sum of a
 * token's inputs is taken off afterwards, exactly. */
#include "integer.h"

enum { FEW = 4, MANY = 12, PANEL = 512 };

typedef struct {
    tokens_t x;
    int64_t quads, blocks, out;
    const uint32_t *q;
    const float *scale;
    const void *bias; /* of y's kind, or null */
    int bf16;
    void *y;
} w8a8_t;

ALWAYS void tile(const w8a8_t *m, int64_t block, int64_t t, int B, int T) {
    i32x16 acc[4][MANY];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) acc[b][i] = (i32x16){0};
    const int8_t *x = m->x.q + t * m->x.padded;
    const uint32_t *q = m->q + block * m->quads * LANES;
    for (int64_t k = 0; k < m->quads; k++) {
        u32x16 w[4];
        for (int b = 0; b < B; b++) {
            const uint32_t *p = q + (b * m->quads + k) * LANES;
            memcpy(&w[b], p, sizeof w[b]);
            __builtin_prefetch(p + 16 * LANES);
        }
        for (int i = 0; i < T; i++)
            for (int b = 0; b < B; b++) acc[b][i] = dot4(acc[b][i], w[b], x + i * m->x.padded + QUAD * k);
    }
    for (int b = 0; b < B; b++) {
        int64_t row = (block + b) * LANES, n = m->out - row;
        f32x16 scale = load_upto(m->scale, row, n, 0);
        f32x16 bias = m->bias ? load_upto(m->bias, row, n, m->bf16) : splat(0);
        for (int i = 0; i < T; i++) {
            f32x16 sum = __builtin_convertvector(acc[b][i] - 128 * m->x.sums[t + i], f32x16);
            store_upto(m->y, (t + i) * m->out + row, n, m->bf16, fma16(sum * scale, splat(m->x.scale[t + i]), bias));
        }
    }
}

static void few(const w8a8_t *m, int64_t block, int B, int64_t t, int T) {
#define CASE(N) case N: if (B == 4) tile(m, block, t, 4, N); else for (int b = 0; b < B; b++) tile(m, block + b, t, 1, N); break;
    switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
}

static void many(const w8a8_t *m, int64_t block, int B, int64_t t, int T) {
#define CASE(N) case N: if (B == 2) tile(m, block, t, 2, N); else tile(m, block, t, 1, N); break;
    switch (T) { CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) }
#undef CASE
}

/* x: [tokens, in]; y: [tokens, out]; bias: [out] of y's kind, or null. Returns 0, or -1 when memory
 * ran out. */
int ds_w8a8(const void *x, int bf16, int64_t tokens, int64_t in, void *y, int64_t out, const uint32_t *q,
            const float *scale, const void *bias, int threads) {
    int64_t padded = ceil_div(in, QUAD) * QUAD;
    char *scratch = malloc(tokens * (8 + padded) + 64);
    if (!scratch) return -1;
    tokens_t to = {(int8_t *)(scratch + tokens * 8), (float *)scratch, (int32_t *)(scratch + tokens * 4), padded, 1, padded + 8};
    w8a8_t m = {to, padded / QUAD, ceil_div(out, LANES), out, q, scale, bias, bf16, y};
    int64_t most = tokens <= FEW ? FEW : MANY, wide = tokens <= FEW ? 4 : 2;
    int64_t tasks = ceil_div(m.blocks, wide), panels = ceil_div(tokens, PANEL);
    if (tokens * in * out < 200000) threads = 1;
    int chunk = chunk_of(tasks * panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) quantize_token(x, bf16, in, t, &to, 0);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < tasks * panels; task++) {
            int64_t block = task % tasks * wide, panel = task / tasks;
            int64_t first = panel * tokens / panels, count = (panel + 1) * tokens / panels - first;
            int64_t rounds = ceil_div(count, most);
            int B = (int)min64(wide, m.blocks - block);
            for (int64_t r = 0; r < rounds; r++) {
                int64_t t = first + r * count / rounds;
                int T = (int)(first + (r + 1) * count / rounds - t);
                if (T <= FEW) {
                    if (wide == 4) few(&m, block, B, t, T);
                    else for (int b = 0; b < B; b++) few(&m, block + b, 1, t, T);
                } else many(&m, block, B, t, T);
            }
        }
    }
    free(scratch);
    return 0;
}

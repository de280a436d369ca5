/* What a decoder layer does between its linears, one pass each: in float32 and rounded once. */
#include "common.h"

#include <math.h>

/* x += residual; y = x / sqrt(mean(x^2) + eps) * gain, of the x that was rounded. */
ALWAYS void add_norm_row(void *x, const void *residual, int64_t at, const void *gain, float eps, void *y,
                         int64_t n, int bf16) {
    f32x16 sum = splat(0);
    for (int64_t i = 0; i < n; i += LANES) {
        f32x16 v = load_upto(x, at + i, n - i, bf16) + load_upto(residual, at + i, n - i, bf16);
        store_upto(x, at + i, n - i, bf16, v);
        v = load_upto(x, at + i, n - i, bf16);
        sum += v * v;
    }
    float r = 1.0f / sqrtf(sum16(sum) / (float)n + eps);
    for (int64_t i = 0; i < n; i += LANES)
        store_upto(y, at + i, n - i, bf16, load_upto(x, at + i, n - i, bf16) * r * load_upto(gain, i, n - i, bf16));
}

int ds_add_norm(void *x, const void *residual, int bf16, int64_t rows, int64_t n, const void *gain,
                float eps, void *y, int threads) {
    if (rows * n < 50000) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (bf16) add_norm_row(x, residual, r * n, gain, eps, y, n, 1);
        else add_norm_row(x, residual, r * n, gain, eps, y, n, 0);
    }
    return 0;
}

/* x sigmoid(x), with e^-|x|, which never overflows. */
ALWAYS f32x16 silu(f32x16 x) {
    f32x16 e = exp16((f32x16)((u32x16)x | 0x80000000u));
    i32x16 positive = x > splat(0);
    f32x16 top = (f32x16)(((u32x16)splat(1) & (u32x16)positive) | ((u32x16)e & ~(u32x16)positive));
    return x * (top / (1.0f + e));
}

/* y = silu(gate) * up; x: [rows, 2 n], the gates before the others. */
int ds_silu_mul(const void *x, int bf16, int64_t rows, int64_t n, void *y, int threads) {
    if (rows * n < 20000) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i += LANES) {
            f32x16 gate = load_upto(x, 2 * r * n + i, n - i, bf16);
            f32x16 up = load_upto(x, (2 * r + 1) * n + i, n - i, bf16);
            store_upto(y, r * n + i, n - i, bf16, silu(gate) * up);
        }
    return 0;
}

/* The first `turned` elements of one head: halves a, b -> a cos - b sin, b cos + a sin. */
ALWAYS void turn(void *x, int64_t at, const void *cosine, const void *sine, int64_t angle, int64_t turned,
                 int bf16) {
    int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = half - i, a_at = at + i, b_at = at + half + i;
        f32x16 a = load_upto(x, a_at, n, bf16), b = load_upto(x, b_at, n, bf16);
        f32x16 a_cos = load_upto(cosine, angle + i, n, bf16), a_sin = load_upto(sine, angle + i, n, bf16);
        f32x16 b_cos = load_upto(cosine, angle + half + i, n, bf16);
        f32x16 b_sin = load_upto(sine, angle + half + i, n, bf16);
        store_upto(x, a_at, n, bf16, a * a_cos - b * a_sin);
        store_upto(x, b_at, n, bf16, b * b_cos + a * b_sin);
    }
}

/* qkv: [tokens, (heads + 2 kv_heads) dim], queries, keys and values of one token side by side.
 * Queries and keys are turned in place by cosine and sine [tokens, turned], and keys and values
 * written to the cells [.., kv_heads, dim] of their tokens. */
int ds_rotate_write(void *qkv, int bf16, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                    const void *cosine, const void *sine, int64_t turned, void *keys, void *values,
                    const int64_t *cells, int threads) {
    int64_t width = (heads + 2 * kv_heads) * dim, size = bf16 ? 2 : 4, row = kv_heads * dim * size;
    if (tokens * width < 50000) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            if (bf16) turn(qkv, t * width + h * dim, cosine, sine, t * turned, turned, 1);
            else turn(qkv, t * width + h * dim, cosine, sine, t * turned, turned, 0);
        }
        const char *key = (const char *)qkv + (t * width + heads * dim) * size;
        memcpy((char *)keys + cells[t] * row, key, row);
        memcpy((char *)values + cells[t] * row, key + row, row);
    }
    return 0;
}

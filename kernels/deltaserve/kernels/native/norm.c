/* y = x / sqrt(mean(x^2) + eps) * gain, row by row, in float32 and rounded once. */
#include "common.h"

#include <math.h>

ALWAYS void norm_row(const void *x, int64_t at, const void *gain, float eps, void *y, int64_t n, int bf16) {
    f32x16 sum = splat(0);
    for (int64_t i = 0; i < n; i += LANES) {
        f32x16 v = load_upto(x, at + i, n - i, bf16);
        sum += v * v;
    }
    float r = 1.0f / sqrtf(sum16(sum) / (float)n + eps);
    for (int64_t i = 0; i < n; i += LANES)
        store_upto(y, at + i, n - i, bf16, load_upto(x, at + i, n - i, bf16) * r * load_upto(gain, i, n - i, bf16));
}

int ds_rms_norm(const void *x, int bf16, int64_t rows, int64_t n, const void *gain, float eps, void *y,
                int threads) {
    if (rows * n < 50000) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (bf16) norm_row(x, r * n, gain, eps, y, n, 1);
        else norm_row(x, r * n, gain, eps, y, n, 0);
    }
    return 0;
}

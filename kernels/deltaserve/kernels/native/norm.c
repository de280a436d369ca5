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

typedef struct {
    const float *gain, *bias; /* [n] each, or null where the adapter leaves the base's */
} norm_item;

/* The gain of the entries from .. to of one run, `weight + sum of w (gain - weight)` rounded to the
 * weight's kind, then the offset. One gain at strength 1 is taken as it is. Returns 0 for no gain. */
static int mixed_gain(const entries_t *e, int from, int to, const table_t *table, const void *weight, float offset,
                      int64_t n, int bf16, float *sum, void *gain) {
    const norm_item *items = table->items, *last = NULL;
    int gains = 0;
    float strength = 0;
    for (int i = from; i < to; i++)
        for (int j = 0; j < count_of(table, e->slot[i]); j++) {
            const norm_item *m = items + table->first[e->slot[i]] + j;
            if (!m->gain) continue;
            if (!gains++)
                for (int64_t k = 0; k < n; k++) sum[k] = load1(weight, k, bf16);
            for (int64_t k = 0; k < n; k++) sum[k] += e->strength[i] * (m->gain[k] - load1(weight, k, bf16));
            last = m;
            strength = e->strength[i];
        }
    if (!gains) return 0;
    const float *chosen = gains == 1 && strength == 1 ? last->gain : sum;
    for (int64_t k = 0; k < n; k += LANES) {
        store_upto(gain, k, n - k, bf16, load_upto(chosen, k, n - k, 0));
        if (offset) store_upto(gain, k, n - k, bf16, load_upto(gain, k, n - k, bf16) + offset);
    }
    return 1;
}

/* Redoes the rows of y, the norm of x with the base's gain, whose adapters tune the norm: with their
 * gain, then `+ sum of w bias`. x, y: [tokens * each, n]; weight: [n]; the gain is weight + offset.
 * Returns 0, or -1 when memory ran out. */
int ds_tuned_norm(const void *x, int bf16, int64_t each, int64_t n, const void *weight, float offset, float eps,
                  void *y, const entries_t *e, const table_t *table, int threads) {
    if (!touches(table, e)) return 0;
    const norm_item *items = table->items;
    float *sum = malloc(2 * n * sizeof(float));
    if (!sum) return -1;
    for (int from = 0, to; from < e->count; from = to) {
        int own = 0;
        for (to = from; to < e->count && e->start[to] == e->start[from]; to++) own += count_of(table, e->slot[to]);
        if (!own) continue;
        int64_t first = e->start[from] * each, last = e->end[from] * each;
        void *gain = sum + n;
        if (mixed_gain(e, from, to, table, weight, offset, n, bf16, sum, gain))
            ds_rms_norm((const char *)x + first * n * (bf16 ? 2 : 4), bf16, last - first, n, gain, eps,
                        (char *)y + first * n * (bf16 ? 2 : 4), threads);
        int biases = 0;
        for (int i = from; i < to; i++)
            for (int j = 0; j < count_of(table, e->slot[i]); j++) {
                const float *bias = items[table->first[e->slot[i]] + j].bias;
                if (!bias) continue;
                if (!biases++) memset(sum, 0, n * sizeof(float));
                for (int64_t k = 0; k < n; k++) sum[k] += e->strength[i] * bias[k];
            }
        for (int64_t r = first; biases && r < last; r++)
            for (int64_t k = 0; k < n; k++) add1(y, r * n + k, bf16, sum[k]);
    }
    free(sum);
    return 0;
}

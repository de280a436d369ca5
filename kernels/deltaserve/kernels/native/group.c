/* The product of a group of linears in a mixed batch: the base's, and all that its adapters add. */
#include "linear.h"

int ds_int4(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const void *, const void *,
            int, int64_t, const void *, int);
int ds_w4a8(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const void *, const void *,
            int, int64_t, const void *, int);
int ds_int8(const void *, int, int64_t, int64_t, void *, int64_t, const int8_t *, const float *, const void *, int);
int ds_w8a8(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const float *, const void *, int);
int ds_vectors(void *, int, int64_t, const entries_t *, const table_t *, const void *, int, int, int);
typedef int deltas_f(const void *, int, int64_t, void *, int, int64_t, const entries_t *, const table_t *, int);
deltas_f ds_lowrank, ds_bit, ds_csr, ds_rows;

static int base_product(const linear_t *m, const void *x, int bf16, int64_t tokens, void *y, int threads) {
    switch (m->kind) {
    case 0:
        return ds_int4(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->zero, m->sz_bf16, m->group, m->bias, threads);
    case 1:
        return ds_w4a8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->zero, m->sz_bf16, m->group, m->bias, threads);
    case 2: return ds_int8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->bias, threads);
    default: return ds_w8a8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->bias, threads);
    }
}

/* The rows of all runs between y (bfloat16) and total (float). */
static void convert(const entries_t *e, void *y, float *total, int64_t out, int back, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && e->count * out > 20000)
    for (int i = 0; i < e->count; i++) {
        if (i && e->start[i] == e->start[i - 1]) continue;
        int64_t end = e->end[i] * out;
        for (int64_t k = e->start[i] * out; k < end; k += LANES) {
            if (back) store_upto(y, k, end - k, 1, load_upto(total, k, end - k, 0));
            else store_upto(total, k, end - k, 0, load_upto(y, k, end - k, 1));
        }
    }
}

int group_product(const group_t *g, const void *x, int bf16, int64_t tokens, void *y, const entries_t *e,
                  float *total, void *scaled, int threads) {
    int64_t in = g->base.in, out = g->base.out;
    if (!e) return base_product(&g->base, x, bf16, tokens, y, threads);
    const void *from = x;
    if (touches(g->inputs, e)) {
        memcpy(scaled, x, tokens * in * (bf16 ? 2 : 4));
        if (ds_vectors(scaled, bf16, in, e, g->inputs, NULL, 0, 1, threads)) return -1;
        from = scaled;
    }
    if (base_product(&g->base, from, bf16, tokens, y, threads)) return -1;
    int outputs = touches(g->outputs, e), lowrank = touches(g->lowrank, e), bias = touches(g->bias, e);
    int others = touches(g->bit, e) || touches(g->csr, e) || touches(g->rows, e);
    /* One family that rounds once may add to bfloat16; several add up in floats first. */
    int wide = bf16 && (outputs || others || (lowrank && bias));
    void *sum = wide ? (void *)total : y;
    int sum_bf16 = bf16 && !wide, failed = 0;
    if (wide) convert(e, y, total, out, 0, threads);
    if (outputs) failed |= ds_vectors(sum, sum_bf16, out, e, g->outputs, g->base.bias, bf16, 1, threads);
    if (lowrank) failed |= ds_lowrank(x, bf16, in, sum, sum_bf16, out, e, g->lowrank, threads);
    if (others) {
        failed |= ds_bit(x, bf16, in, sum, sum_bf16, out, e, g->bit, threads);
        failed |= ds_csr(x, bf16, in, sum, sum_bf16, out, e, g->csr, threads);
        failed |= ds_rows(x, bf16, in, sum, sum_bf16, out, e, g->rows, threads);
    }
    if (bias) failed |= ds_vectors(sum, sum_bf16, out, e, g->bias, NULL, 0, 0, threads);
    if (wide) convert(e, y, total, out, 1, threads);
    return failed ? -1 : 0;
}

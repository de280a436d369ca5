/* Vectors of one part: factors on y, or biases added to it, for every entry of a step. */
#include "common.h"

typedef struct {
    const float *vector;
    int64_t column; /* of the part's first output in y */
    int64_t out;
} vector_item;

/* The runs: [from, to) entries of each. Returns their number. */
static int runs_of(const entries_t *e, int *from) {
    int n = 0;
    for (int i = 0; i < e->count; i++)
        if (!i || e->start[i] != e->start[i - 1]) from[n++] = i;
    from[n] = e->count;
    return n;
}

/* The vector of the part at `column` in entry i, or null. */
ALWAYS const vector_item *item_of(const entries_t *e, int i, const table_t *table, int64_t column) {
    int s = e->slot[i], n = count_of(table, s);
    const vector_item *own = (const vector_item *)table->items + (n ? table->first[s] : 0);
    for (int j = 0; j < n; j++)
        if (own[j].column == column) return own + j;
    return NULL;
}

typedef struct {
    const entries_t *e;
    const table_t *table;
    void *y;
    int bf16;
    int64_t stride;
    const void *bias; /* [stride] or null: what a factor leaves alone */
    int bias_bf16;
    int factor;       /* 1: y = (y - bias) m + bias with m = 1 + sum w (v - 1); 0: y += sum w v */
} call_t;

static void part_rows(const call_t *c, int from, int to, const vector_item *part) {
    const entries_t *e = c->e;
    for (int64_t k = 0; k < part->out; k += LANES) {
        int64_t n = part->out - k;
        f32x16 m = splat(0);
        float rest = c->factor;
        for (int i = from; i < to; i++) {
            const vector_item *v = item_of(e, i, c->table, part->column);
            if (!v) continue;
            m += e->strength[i] * load_upto(v->vector, k, n, 0);
            rest -= e->strength[i];
        }
        if (c->factor) m += rest;
        f32x16 bias = c->bias ? load_upto(c->bias, part->column + k, n, c->bias_bf16) : splat(0);
        for (int64_t t = e->start[from]; t < e->end[from]; t++) {
            int64_t at = t * c->stride + part->column + k;
            f32x16 v = load_upto(c->y, at, n, c->bf16);
            store_upto(c->y, at, n, c->bf16, c->factor ? (v - bias) * m + bias : v + m);
        }
    }
}

/* y: [tokens, stride]. Returns 0, or -1 when memory ran out. */
int ds_vectors(void *y, int bf16, int64_t stride, const entries_t *e, const table_t *table, const void *bias,
               int bias_bf16, int factor, int threads) {
    if (!e->count) return 0;
    int *from = malloc((e->count + 1) * sizeof *from);
    if (!from) return -1;
    int runs = runs_of(e, from);
    call_t c = {e, table, y, bf16, stride, bias, bias_bf16, factor};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && runs > 8)
    for (int r = 0; r < runs; r++)
        for (int i = from[r]; i < from[r + 1]; i++) {
            int s = e->slot[i], own = count_of(table, s);
            for (int j = 0; j < own; j++) {
                const vector_item *part = (const vector_item *)table->items + table->first[s] + j;
                int repeated = 0;
                for (int k = from[r]; k < i && !repeated; k++)
                    repeated = item_of(e, k, table, part->column) != NULL;
                if (!repeated) part_rows(&c, from[r], from[r + 1], part);
            }
        }
    free(from);
    return 0;
}

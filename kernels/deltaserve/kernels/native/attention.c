/* Attention of one new token per sequence over a paged cache, keys and values read where they lie.
 *
 * A task is one sequence, or some KV heads of it with the query heads that share them. Three passes:
 * logits, softmax, weighted sum of the values; all in float32. */
#include "common.h"

#include <math.h>

typedef struct {
    const void *q;            /* [heads][rows][key_dim], strides below, last one 1 */
    int64_t q_head, q_row;
    const void *keys, *values; /* [cells, kv_heads, dim] */
    void *out;                /* [rows, heads, value_dim] */
    int bf16;
    int64_t heads, kv_heads, key_dim, value_dim, rows;
    const int64_t *tables;    /* [rows, width]: blocks of each sequence */
    int64_t width, block;
    const int64_t *lengths;   /* [rows]: cells of each sequence */
    float scale;
    int64_t window;           /* 0: all cells */
    float softcap;            /* 0: none */
    const float *sinks;       /* [heads], or null */
} attention_t;

ALWAYS float dot(const void *k, int64_t at, const float *q, int64_t n, int bf16) {
    f32x16 acc = splat(0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 w;
        memcpy(&w, q + i, sizeof w);
        acc += load16(k, at + i, bf16) * w;
    }
    if (i < n) acc += load_tail(k, at + i, n - i, bf16) * load_tail(q, i, n - i, 0);
    return sum16(acc);
}

/* acc[0 .. n) += p * values from element `at` on. */
ALWAYS void add_row(float *acc, const void *values, int64_t at, int64_t n, float p, int bf16) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 a;
        memcpy(&a, acc + i, sizeof a);
        a += load16(values, at + i, bf16) * p;
        memcpy(acc + i, &a, sizeof a);
    }
    for (; i < n; i++) acc[i] += p * load1(values, at + i, bf16);
}

static void softmax(const attention_t *m, float *p, int64_t n, int64_t head, float *inverse) {
    float most = m->sinks ? m->sinks[head] : -INFINITY;
    for (int64_t t = 0; t < n; t++) {
        if (m->softcap > 0) p[t] = m->softcap * tanhf(p[t] / m->softcap);
        most = p[t] > most ? p[t] : most;
    }
    float total = m->sinks ? expf(m->sinks[head] - most) : 0;
    f32x16 sum = splat(0);
    for (int64_t t = 0; t < n; t += LANES) {
        f32x16 v = load_upto(p, t, n - t, 0);
        v = exp16(v - most);
        if (n - t < LANES)
            for (int64_t j = n - t; j < LANES; j++) v[j] = 0;
        sum += v;
        store_upto(p, t, n - t, 0, v);
    }
    *inverse = 1.0f / (total + sum16(sum));
}

/* Query heads of KV heads [from, to) of one sequence. The cells are read in the order in which they
 * lie, all heads of one after the other; the logits of every head wait for it in p. */
ALWAYS void attend(const attention_t *m, int64_t row, int64_t from, int64_t to, float *scratch, int bf16) {
    int64_t group = m->heads / m->kv_heads, heads = (to - from) * group, length = m->lengths[row];
    int64_t first = m->window > 0 ? max64(0, length - m->window) : 0, n = length - first;
    const int64_t *table = m->tables + row * m->width;
    float *q = scratch, *acc = q + heads * m->key_dim, *p = acc + heads * m->value_dim;
    for (int64_t h = 0; h < heads; h++) {
        int64_t at = (from * group + h) * m->q_head + row * m->q_row;
        for (int64_t i = 0; i < m->key_dim; i++) q[h * m->key_dim + i] = m->scale * load1(m->q, at + i, bf16);
    }
    memset(acc, 0, heads * m->value_dim * sizeof *acc);
    int64_t step = m->kv_heads * m->key_dim;
    for (int64_t b = first / m->block; b * m->block < length; b++) {
        int64_t t = max64(first, b * m->block), end = min64(length, (b + 1) * m->block);
        int64_t at = (table[b] * m->block + t % m->block) * step + from * m->key_dim;
        for (; t < end; t++, at += step)
            for (int64_t k = 0, h = 0; k < to - from; k++)
                for (int64_t g = 0; g < group; g++, h++)
                    p[h * n + t - first] = dot(m->keys, at + k * m->key_dim, q + h * m->key_dim, m->key_dim, bf16);
    }
    float *inverse = q; /* the queries are not needed any more */
    for (int64_t h = 0; h < heads; h++) softmax(m, p + h * n, n, from * group + h, inverse + h);
    step = m->kv_heads * m->value_dim;
    for (int64_t b = first / m->block; b * m->block < length; b++) {
        int64_t t = max64(first, b * m->block), end = min64(length, (b + 1) * m->block);
        int64_t at = (table[b] * m->block + t % m->block) * step + from * m->value_dim;
        for (; t < end; t++, at += step)
            for (int64_t k = 0, h = 0; k < to - from; k++)
                for (int64_t g = 0; g < group; g++, h++)
                    add_row(acc + h * m->value_dim, m->values, at + k * m->value_dim, m->value_dim,
                            p[h * n + t - first], bf16);
    }
    int64_t out = (row * m->heads + from * group) * m->value_dim;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < m->value_dim; i += LANES) {
            f32x16 v = load_upto(acc, h * m->value_dim + i, m->value_dim - i, 0);
            store_upto(m->out, out + h * m->value_dim + i, m->value_dim - i, bf16, v * inverse[h]);
        }
}

/* Returns 0, or -1 when memory ran out. */
int ds_attention(const void *q, int64_t q_head, int64_t q_row, const void *keys, const void *values,
                 void *out, int bf16, int64_t heads, int64_t kv_heads, int64_t key_dim,
                 int64_t value_dim, int64_t rows, const int64_t *tables, int64_t width, int64_t block,
                 const int64_t *lengths, float scale, int64_t window, float softcap,
                 const float *sinks, int threads) {
    attention_t m = {q, q_head, q_row, keys, values, out, bf16, heads, kv_heads, key_dim, value_dim,
                     rows, tables, width, block, lengths, scale, window, softcap, sinks};
    int64_t longest = 0, total = 0, group = heads / kv_heads;
    for (int64_t r = 0; r < rows; r++) longest = max64(longest, lengths[r]), total += lengths[r];
    if (total * heads * key_dim < 30000) threads = 1;
    /* Whole sequences a task, unless that leaves threads without work. */
    int64_t parts = min64(kv_heads, ceil_div(4 * (int64_t)threads, rows));
    if (threads == 1) parts = 1;
    int64_t each = group * ceil_div(kv_heads, parts) * (key_dim + value_dim + longest);
    each = ceil_div(each, LANES) * LANES;
    float *scratch = malloc(threads * each * sizeof(float));
    if (!scratch) return -1;
    int64_t tasks = rows * parts;
    int chunk = chunk_of(tasks, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        me = omp_get_thread_num();
#endif
        float *own = scratch + me * each;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t part = task % parts;
            int64_t from = part * kv_heads / parts, to = (part + 1) * kv_heads / parts;
            if (bf16) attend(&m, task / parts, from, to, own, 1);
            else attend(&m, task / parts, from, to, own, 0);
        }
    }
    free(scratch);
    return 0;
}

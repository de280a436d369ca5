/* Attention of one new token per sequence over a paged cache, keys and values read where they lie.
 *
 * A task is one sequence and one KV head with all the query heads that share it. Three passes over
 * the sequence: logits, softmax, weighted sum of the values; all in float32. */
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

enum { WIDE = 8 }; /* vectors of a value row kept in registers */

/* e^x for x <= 0 to about 1 unit in the last place; 0 below -87. Cody and Waite's reduction, then a
 * polynomial of degree 6. */
ALWAYS f32x16 exp16(f32x16 x) {
    const f32x16 low = splat(-87.0f);
    i32x16 under = x < low;
    x = (f32x16)((u32x16)x & ~(u32x16)under) + (f32x16)((u32x16)low & (u32x16)under);
    f32x16 n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* rounds to the nearest integer */
    f32x16 f = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = splat(1.3981999507e-3f);
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    i32x16 e = (__builtin_convertvector(n, i32x16) + 127) << 23;
    f32x16 r = p * (f32x16)e;
    return (f32x16)((u32x16)r & ~(u32x16)under);
}

ALWAYS int64_t cell_of(const attention_t *m, const int64_t *table, int64_t t) {
    return table[t / m->block] * m->block + t % m->block;
}

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

/* out[0 .. n) = sum of p[t] * values of cell t, n <= WIDE vectors of a row from column c on. */
ALWAYS void weigh(const attention_t *m, const int64_t *table, int64_t first, int64_t length,
                  int64_t head, const float *p, int64_t c, int64_t n, float inverse, int64_t out,
                  int bf16, int V) {
    f32x16 acc[WIDE];
    for (int v = 0; v < V; v++) acc[v] = splat(0);
    int64_t left = n - (V - 1) * LANES;
    for (int64_t t = first; t < length; t++) {
        int64_t at = (cell_of(m, table, t) * m->kv_heads + head) * m->value_dim + c;
        for (int v = 0; v < V - 1; v++) acc[v] += load16(m->values, at + v * LANES, bf16) * p[t - first];
        acc[V - 1] += load_upto(m->values, at + (V - 1) * LANES, left, bf16) * p[t - first];
    }
    for (int v = 0; v < V; v++)
        store_upto(m->out, out + c + v * LANES, v < V - 1 ? LANES : left, bf16, acc[v] * inverse);
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

ALWAYS void attend(const attention_t *m, int64_t row, int64_t head, float *q, float *p, int bf16) {
    int64_t group = m->heads / m->kv_heads, length = m->lengths[row];
    int64_t first = m->window > 0 ? max64(0, length - m->window) : 0, n = length - first;
    const int64_t *table = m->tables + row * m->width;
    for (int64_t g = 0; g < group; g++) {
        int64_t at = (head * group + g) * m->q_head + row * m->q_row;
        for (int64_t i = 0; i < m->key_dim; i++) q[g * m->key_dim + i] = m->scale * load1(m->q, at + i, bf16);
    }
    for (int64_t t = first; t < length; t++) {
        int64_t at = (cell_of(m, table, t) * m->kv_heads + head) * m->key_dim;
        for (int64_t g = 0; g < group; g++) p[g * n + t - first] = dot(m->keys, at, q + g * m->key_dim, m->key_dim, bf16);
    }
    for (int64_t g = 0; g < group; g++) {
        float inverse;
        softmax(m, p + g * n, n, head * group + g, &inverse);
        int64_t out = (row * m->heads + head * group + g) * m->value_dim;
        for (int64_t c = 0; c < m->value_dim; c += WIDE * LANES) {
            int64_t left = min64(WIDE * LANES, m->value_dim - c);
#define CASE(V) case V: weigh(m, table, first, length, head, p + g * n, c, left, inverse, out, bf16, V); break;
            switch (ceil_div(left, LANES)) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
        }
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
    int64_t each = ceil_div(group * (key_dim + longest), LANES) * LANES;
    if (total * heads * key_dim < 30000) threads = 1;
    float *scratch = malloc(threads * each * sizeof(float));
    if (!scratch) return -1;
    int failed = 0;
    int64_t tasks = rows * kv_heads;
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
            if (bf16) attend(&m, task / kv_heads, task % kv_heads, own, own + group * key_dim, 1);
            else attend(&m, task / kv_heads, task % kv_heads, own, own + group * key_dim, 0);
        }
    }
    free(scratch);
    return failed;
}

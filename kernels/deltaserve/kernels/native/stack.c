/* A step of decoding sequences through decoder layers of Llama's form: the calls that are otherwise
 * made one by one, layer after layer. */
#include "linear.h"

typedef struct {
    const void *gain, *weight; /* gain = weight + offset */
    float offset, eps;
    const table_t *tuned;
} norm_t;

typedef struct {
    group_t qkv, o, up, down;
    norm_t first, second; /* before attention and before the MLP */
    void *keys, *values;
    int64_t heads, kv_heads, dim, window;
    float scale, softcap;
} layer_t;

int ds_rms_norm(const void *, int, int64_t, int64_t, const void *, float, void *, int);
int ds_tuned_norm(const void *, int, int64_t, int64_t, const void *, float, float, void *, const entries_t *,
                  const table_t *, int);
int ds_add_norm(void *, const void *, int, int64_t, int64_t, const void *, float, void *, int);
int ds_silu_mul(const void *, int, int64_t, int64_t, void *, int);
int ds_rotate_write(void *, int, int64_t, int64_t, int64_t, int64_t, const void *, const void *, int64_t, void *,
                    void *, const int64_t *, int);
int ds_attention(const void *, int64_t, int64_t, const void *, const void *, void *, int, int64_t, int64_t, int64_t,
                 int64_t, int64_t, const int64_t *, int64_t, int64_t, const int64_t *, float, int64_t, float,
                 const float *, int);

static int tune(const norm_t *m, const void *x, int bf16, int64_t hidden, void *y, const entries_t *e, int threads) {
    return e ? ds_tuned_norm(x, bf16, 1, hidden, m->weight, m->offset, m->eps, y, e, m->tuned, threads) : 0;
}

/* x: [tokens, hidden], becomes the output of the last layer. e: what adapters act on, or null.
 * cosine, sine: [tokens, turned]. cells, tables [tokens, width], lengths: as ds_rotate_write and
 * ds_attention take them. Returns 0, or -1 when memory ran out. */
int ds_layers(void *x, int bf16, int64_t tokens, const layer_t *layers, int count, const entries_t *e,
              const void *cosine, const void *sine, int64_t turned, const int64_t *cells, const int64_t *tables,
              int64_t width, int64_t block, const int64_t *lengths, int threads) {
    int64_t hidden = layers->qkv.base.in, size = bf16 ? 2 : 4, wide = 0, inner = 0;
    for (int i = 0; i < count; i++) {
        wide = max64(wide, max64(layers[i].qkv.base.out, layers[i].up.base.out));
        inner = max64(inner, max64(layers[i].o.base.in, layers[i].down.base.in));
    }
    int64_t room = tokens * (2 * hidden + wide + inner) * size;
    char *normed = malloc(room + (e ? tokens * (max64(wide, hidden) + max64(inner, hidden)) * sizeof(float) : 0));
    if (!normed) return -1;
    char *mixed = normed + tokens * hidden * size, *large = mixed + tokens * hidden * size;
    char *small = large + tokens * wide * size;
    float *total = (float *)(normed + room), *scaled = total + tokens * max64(wide, hidden);
    int failed = 0;
#define PRODUCT(group, from, to) failed |= group_product(&m->group, from, bf16, tokens, to, e, total, scaled, threads)
    for (int i = 0; i < count && !failed; i++) {
        const layer_t *m = layers + i;
        int64_t row = (m->heads + 2 * m->kv_heads) * m->dim;
        if (!i) {
            ds_rms_norm(x, bf16, tokens, hidden, m->first.gain, m->first.eps, normed, threads);
            failed |= tune(&m->first, x, bf16, hidden, normed, e, threads);
        }
        PRODUCT(qkv, normed, large);
        ds_rotate_write(large, bf16, tokens, m->heads, m->kv_heads, m->dim, cosine, sine, turned, m->keys, m->values,
                        cells, threads);
        failed |= ds_attention(large, m->dim, row, m->keys, m->values, small, bf16, m->heads, m->kv_heads, m->dim,
                               m->dim, tokens, tables, width, block, lengths, m->scale, m->window, m->softcap, NULL,
                               threads);
        PRODUCT(o, small, mixed);
        ds_add_norm(mixed, x, bf16, tokens, hidden, m->second.gain, m->second.eps, normed, threads);
        failed |= tune(&m->second, mixed, bf16, hidden, normed, e, threads);
        PRODUCT(up, normed, large);
        ds_silu_mul(large, bf16, tokens, m->down.base.in, small, threads);
        PRODUCT(down, small, x);
        /* The last layer's norm is not ours: only its sum is wanted. */
        const norm_t *next = i + 1 < count ? &m[1].first : &m->first;
        ds_add_norm(x, mixed, bf16, tokens, hidden, next->gain, next->eps, normed, threads);
        if (i + 1 < count) failed |= tune(next, x, bf16, hidden, normed, e, threads);
    }
#undef PRODUCT
    free(normed);
    return failed ? -1 : 0;
}

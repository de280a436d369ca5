/* A step of decoding sequences through decoder layers of Llama's form, when no adapter acts on it:
 * the calls that are otherwise made one by one, layer after layer. */
#include "common.h"

typedef struct {
    int32_t kind;       /* 0: ds_int4, 1: ds_w4a8, 2: ds_int8, 3: ds_w8a8 */
    int32_t sz_bf16;    /* of an int4's scale and zero */
    int64_t in, out, group;
    const void *q, *scale, *zero, *bias;
} linear_t;

typedef struct {
    linear_t qkv, o, up, down;
    const void *first, *second; /* gains of the norms before attention and before the MLP */
    void *keys, *values;
    int64_t heads, kv_heads, dim, window;
    float first_eps, second_eps, scale, softcap;
} layer_t;

int ds_int4(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const void *, const void *,
            int, int64_t, const void *, int);
int ds_w4a8(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const void *, const void *,
            int, int64_t, const void *, int);
int ds_int8(const void *, int, int64_t, int64_t, void *, int64_t, const int8_t *, const float *, const void *, int);
int ds_w8a8(const void *, int, int64_t, int64_t, void *, int64_t, const uint32_t *, const float *, const void *, int);
int ds_rms_norm(const void *, int, int64_t, int64_t, const void *, float, void *, int);
int ds_add_norm(void *, const void *, int, int64_t, int64_t, const void *, float, void *, int);
int ds_silu_mul(const void *, int, int64_t, int64_t, void *, int);
int ds_rotate_write(void *, int, int64_t, int64_t, int64_t, int64_t, const void *, const void *, int64_t, void *,
                    void *, const int64_t *, int);
int ds_attention(const void *, int64_t, int64_t, const void *, const void *, void *, int, int64_t, int64_t, int64_t,
                 int64_t, int64_t, const int64_t *, int64_t, int64_t, const int64_t *, float, int64_t, float,
                 const float *, int);

static int linear(const linear_t *m, const void *x, int bf16, int64_t tokens, void *y, int threads) {
    switch (m->kind) {
    case 0:
        return ds_int4(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->zero, m->sz_bf16, m->group, m->bias, threads);
    case 1:
        return ds_w4a8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->zero, m->sz_bf16, m->group, m->bias, threads);
    case 2: return ds_int8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->bias, threads);
    default: return ds_w8a8(x, bf16, tokens, m->in, y, m->out, m->q, m->scale, m->bias, threads);
    }
}

/* x: [tokens, hidden], becomes the output of the last layer. cosine, sine: [tokens, turned]. cells,
 * tables [tokens, width], lengths: as ds_rotate_write and ds_attention take them. Returns 0, or -1
 * when memory ran out. */
int ds_layers(void *x, int bf16, int64_t tokens, const layer_t *layers, int count, const void *cosine,
              const void *sine, int64_t turned, const int64_t *cells, const int64_t *tables, int64_t width,
              int64_t block, const int64_t *lengths, int threads) {
    int64_t hidden = layers->qkv.in, size = bf16 ? 2 : 4, wide = 0, inner = 0;
    for (int i = 0; i < count; i++) {
        wide = max64(wide, max64(layers[i].qkv.out, layers[i].up.out));
        inner = max64(inner, max64(layers[i].o.in, layers[i].down.in));
    }
    char *normed = malloc(tokens * (2 * hidden + wide + inner) * size);
    if (!normed) return -1;
    char *mixed = normed + tokens * hidden * size, *large = mixed + tokens * hidden * size;
    char *small = large + tokens * wide * size;
    int failed = 0;
    for (int i = 0; i < count && !failed; i++) {
        const layer_t *m = layers + i;
        int64_t row = (m->heads + 2 * m->kv_heads) * m->dim;
        if (!i) ds_rms_norm(x, bf16, tokens, hidden, m->first, m->first_eps, normed, threads);
        failed |= linear(&m->qkv, normed, bf16, tokens, large, threads);
        ds_rotate_write(large, bf16, tokens, m->heads, m->kv_heads, m->dim, cosine, sine, turned, m->keys, m->values,
                        cells, threads);
        failed |= ds_attention(large, m->dim, row, m->keys, m->values, small, bf16, m->heads, m->kv_heads, m->dim,
                               m->dim, tokens, tables, width, block, lengths, m->scale, m->window, m->softcap, NULL,
                               threads);
        failed |= linear(&m->o, small, bf16, tokens, mixed, threads);
        ds_add_norm(mixed, x, bf16, tokens, hidden, m->second, m->second_eps, normed, threads);
        failed |= linear(&m->up, normed, bf16, tokens, large, threads);
        ds_silu_mul(large, bf16, tokens, m->down.in, small, threads);
        failed |= linear(&m->down, small, bf16, tokens, x, threads);
        /* The last layer's norm is not ours: only its sum is wanted. */
        const layer_t *next = i + 1 < count ? m + 1 : m;
        ds_add_norm(x, mixed, bf16, tokens, hidden, next->first, next->first_eps, normed, threads);
    }
    free(normed);
    return failed ? -1 : 0;
}

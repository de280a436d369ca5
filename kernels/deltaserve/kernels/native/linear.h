/* A base linear, and a group of them with what adapters do to it, as pointers. */
#ifndef DELTASERVE_LINEAR_H
#define DELTASERVE_LINEAR_H

#include "common.h"

typedef struct {
    int32_t kind;       /* 0: ds_int4, 1: ds_w4a8, 2: ds_int8, 3: ds_w8a8 */
    int32_t sz_bf16;    /* of an int4's scale and zero */
    int64_t in, out, group;
    const void *q, *scale, *zero, *bias;
} linear_t;

typedef struct {
    linear_t base;
    const table_t *inputs, *outputs; /* factors of x and y */
    const table_t *lowrank, *bit, *csr, *rows, *bias;
} group_t;

/* y = what `LinearDeltas.forward` computes of x [tokens, in]; e: null for the plain base. total:
 * room for [tokens, out] floats; scaled: for x once more. Returns 0, or -1 when memory ran out. */
int group_product(const group_t *g, const void *x, int bf16, int64_t tokens, void *y, const entries_t *e,
                  float *total, void *scaled, int threads);

#endif

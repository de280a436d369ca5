/* y[index] += strength * values x: some whole rows, for few tokens. */
#include "common.h"

/* x: [tokens, in]; values: [rows, in]; y: float [tokens, stride], of the part's first output. */
int ds_rows(const void *x, int x_bf16, int64_t tokens, int64_t in, const void *values, int v_bf16,
            const int64_t *index, int64_t rows, float strength, float *y, int64_t stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < tokens; t++) {
            f32x16 sum = splat(0);
            int64_t k = 0;
#define STEP(XB, VB) \
    for (; k + LANES <= in; k += LANES) sum += load16(x, t * in + k, XB) * load16(values, r * in + k, VB)
            if (x_bf16 && v_bf16) STEP(1, 1);
            else if (x_bf16) STEP(1, 0);
            else if (v_bf16) STEP(0, 1);
            else STEP(0, 0);
#undef STEP
            if (k < in) sum += load_tail(x, t * in + k, in - k, x_bf16) * load_tail(values, r * in + k, in - k, v_bf16);
            y[t * stride + index[r]] += strength * sum16(sum);
        }
    return 0;
}

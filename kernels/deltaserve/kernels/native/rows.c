/* y[index] += strength * values x: some whole rows, for entries of few tokens (many are a product
 * for a library). Sums are float32. */
#include "jobs.h"

typedef struct {
    const void *values;    /* [rows, in] */
    const int64_t *index;  /* [rows], of the part's outputs */
    int64_t column;        /* of the part's first output in y */
    int32_t rows, bf16;    /* bf16: of values */
} rows_item;

enum { ROWS = 8 };

ALWAYS float dot(const void *x, int64_t at, const void *v, int64_t from, int64_t in, int x_bf16, int v_bf16) {
    f32x16 sum = splat(0);
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES) sum += load16(x, at + k, x_bf16) * load16(v, from + k, v_bf16);
    if (k < in) sum += load_tail(x, at + k, in - k, x_bf16) * load_tail(v, from + k, in - k, v_bf16);
    return sum16(sum);
}

/* As ds_bit; leaves out entries of more than FEW tokens. */
int ds_rows(const void *x, int x_bf16, int64_t in, void *y, int y_bf16, int64_t stride, const entries_t *e,
            const table_t *table, int threads) {
    const rows_item *items = table->items;
    int64_t most = job_limit(e, table);
    if (!most) return 0;
    job_t *jobs = malloc(most * sizeof *jobs);
    if (!jobs) return -1;
    for (int depth = 0, n; (n = jobs_at(e, table, depth, jobs)); depth++) {
        int64_t tasks = 0;
        for (int i = 0; i < n; i++) {
            int entry = jobs[i].entry, few = e->end[entry] - e->start[entry] <= FEW;
            jobs[i].tasks = tasks;
            tasks += few ? ceil_div(items[jobs[i].item].rows, ROWS) : 0;
        }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks * ROWS * in > 30000)
        for (int64_t task = 0; task < tasks; task++) {
            const job_t *job = job_of(jobs, n, task);
            const rows_item *m = items + job->item;
            int i = job->entry;
            int64_t r = (task - job->tasks) * ROWS, last = min64(r + ROWS, m->rows);
            for (; r < last; r++)
                for (int64_t t = e->start[i]; t < e->end[i]; t++) {
                    float sum;
                    if (x_bf16) sum = m->bf16 ? dot(x, t * in, m->values, r * in, in, 1, 1) : dot(x, t * in, m->values, r * in, in, 1, 0);
                    else sum = m->bf16 ? dot(x, t * in, m->values, r * in, in, 0, 1) : dot(x, t * in, m->values, r * in, in, 0, 0);
                    add1(y, t * stride + m->column + m->index[r], y_bf16, e->strength[i] * sum);
                }
        }
    }
    free(jobs);
    return 0;
}

/* y += strength * D x with D in CSR. One token gathers its inputs; of several, 16 at a time stand
 * side by side, so that each value meets one vector of inputs. Sums are float32. */
#include "jobs.h"

typedef struct {
    const int64_t *indptr; /* [out + 1] */
    const int32_t *indices;
    const void *values;
    int64_t column;        /* of the part's first output in y */
    int32_t out, bf16;     /* bf16: of values */
} csr_item;

enum { ROWS = 256 };

ALWAYS float row_one(const csr_item *m, int64_t row, const float *x, int bf16) {
    int64_t i = m->indptr[row], end = m->indptr[row + 1];
    float sum = 0;
#ifdef HAVE_AVX512
    f32x16 acc = splat(0);
    for (; i + LANES <= end; i += LANES) {
        __m512i index = _mm512_loadu_si512(m->indices + i);
        acc += load16(m->values, i, bf16) * (f32x16)_mm512_i32gather_ps(index, x, 4);
    }
    sum = sum16(acc);
#endif
    for (; i < end; i++) sum += load1(m->values, i, bf16) * x[m->indices[i]];
    return sum;
}

ALWAYS f32x16 row_many(const csr_item *m, int64_t row, const float *x, int bf16) {
    f32x16 a = splat(0), b = splat(0);
    int64_t i = m->indptr[row], end = m->indptr[row + 1];
    for (; i + 2 <= end; i += 2) {
        a += load1(m->values, i, bf16) * load16(x, (int64_t)m->indices[i] * LANES, 0);
        b += load1(m->values, i + 1, bf16) * load16(x, (int64_t)m->indices[i + 1] * LANES, 0);
    }
    if (i < end) a += load1(m->values, i, bf16) * load16(x, (int64_t)m->indices[i] * LANES, 0);
    return a + b;
}

ALWAYS void rows_of(const csr_item *m, const float *x, void *y, int y_bf16, int64_t stride, int64_t t,
                    int64_t tokens, int64_t width, float strength, int64_t from, int64_t to, int bf16) {
    for (int64_t row = from; row < to; row++) {
        if (m->indptr[row] == m->indptr[row + 1]) continue;
        int64_t at = t * stride + m->column + row;
        if (width == 1) {
            add1(y, at, y_bf16, strength * row_one(m, row, x, bf16));
            continue;
        }
        f32x16 v = strength * row_many(m, row, x, bf16);
        for (int64_t i = 0; i < tokens; i++) add1(y, at + i * stride, y_bf16, v[i]);
    }
}

/* Inputs of the tokens from .. from + tokens: [in] of one token, or [in][16]. */
static void gather(const void *x, int bf16, int64_t in, int64_t from, int64_t tokens, float *to) {
    if (tokens == 1) {
        for (int64_t k = 0; k < in; k++) to[k] = load1(x, from * in + k, bf16);
        return;
    }
    memset(to, 0, in * LANES * sizeof(float));
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t k = 0; k < in; k++) to[k * LANES + i] = load1(x, (from + i) * in + k, bf16);
}

/* Where the inputs of each entry's first 16 tokens start; entries of a run share theirs. Returns the
 * floats needed. With `to`, fills them in. */
static int64_t place(const entries_t *e, const table_t *table, int64_t in, int64_t *at, const void *x, int bf16,
                     float *to, int threads) {
    int64_t used = 0;
    int run = -1;
    for (int i = 0; i < e->count; i++) {
        at[i] = 0;
        if (!count_of(table, e->slot[i])) continue;
        int64_t tokens = e->end[i] - e->start[i], blocks = ceil_div(tokens, LANES);
        int64_t size = in * (tokens == 1 ? 1 : LANES);
        if (e->start[i] != run) {
            run = e->start[i];
            if (to) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
                for (int64_t b = 0; b < blocks; b++) {
                    int64_t n = min64(LANES, tokens - b * LANES);
                    float *place = to + used + b * size;
                    gather(x, bf16, in, e->start[i] + b * LANES, n, place);
                    /* A last block of one token in a longer run keeps the width of the others. */
                    if (n == 1 && tokens > 1) {
                        memset(place, 0, size * sizeof(float));
                        for (int64_t k = 0; k < in; k++)
                            place[k * LANES] = load1(x, (e->start[i] + b * LANES) * in + k, bf16);
                    }
                }
            }
            used += blocks * size;
        }
        at[i] = used - blocks * size;
    }
    return used;
}

/* As ds_bit. */
int ds_csr(const void *x, int x_bf16, int64_t in, void *y, int y_bf16, int64_t stride, const entries_t *e,
           const table_t *table, int threads) {
    const csr_item *items = table->items;
    int64_t most = job_limit(e, table);
    if (!most) return 0;
    job_t *jobs = malloc(most * sizeof *jobs + e->count * sizeof(int64_t));
    if (!jobs) return -1;
    int64_t *at = (int64_t *)(jobs + most);
    float *inputs = malloc(place(e, table, in, at, x, x_bf16, NULL, threads) * sizeof(float));
    if (!inputs) {
        free(jobs);
        return -1;
    }
    place(e, table, in, at, x, x_bf16, inputs, threads);
    for (int depth = 0, n; (n = jobs_at(e, table, depth, jobs)); depth++) {
        int64_t tasks = 0;
        for (int i = 0; i < n; i++) {
            int64_t tokens = e->end[jobs[i].entry] - e->start[jobs[i].entry];
            jobs[i].tasks = tasks;
            tasks += ceil_div(tokens, LANES) * ceil_div(items[jobs[i].item].out, ROWS);
        }
        int chunk = chunk_of(tasks, threads);
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1)
        for (int64_t task = 0; task < tasks; task++) {
            const job_t *job = job_of(jobs, n, task);
            const csr_item *m = items + job->item;
            int i = job->entry;
            int64_t chunks = ceil_div(m->out, ROWS), own = task - job->tasks, block = own / chunks;
            int64_t all = e->end[i] - e->start[i], width = all == 1 ? 1 : LANES;
            int64_t from = own % chunks * ROWS, to = min64(from + ROWS, m->out);
            int64_t t = e->start[i] + block * LANES, tokens = min64(LANES, e->end[i] - t);
            const float *own_x = inputs + at[i] + block * in * width;
            float w = e->strength[i];
            if (m->bf16) rows_of(m, own_x, y, y_bf16, stride, t, tokens, width, w, from, to, 1);
            else rows_of(m, own_x, y, y_bf16, stride, t, tokens, width, w, from, to, 0);
        }
    }
    free(inputs);
    free(jobs);
    return 0;
}

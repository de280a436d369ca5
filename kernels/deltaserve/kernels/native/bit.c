/* y += strength * sum_p scale[p] * (signs[p] x), straight from the packed signs.
 *
 * Four neighbouring inputs have 16 possible signed sums: they are one vector, and the four sign
 * bits of a row choose among them. One permutation looks the sums of 16 rows up at once, which is
 * 64 signs an instruction. Sums are float32.
 *
 * Layout of one plane: chunks of WORDS words (512 inputs), the last one shorter; in a chunk blocks
 * of 16 rows; in a block [word][row]: a word is 32 signs of a row, the lowest bit the first input.
 */
#include "jobs.h"

typedef struct {
    const uint32_t *signs; /* [planes][plane_words] in the layout above */
    const float *scale;    /* [planes][out rounded up to 16] */
    int64_t column;        /* of the part's first output in y */
    int32_t planes, out;
} bit_item;

enum { WORDS = 16, TOKENS = 4, BLOCKS = 4, ROWS = 1024, GROUPS = WORDS * 8, AHEAD = 2 * BLOCKS * WORDS * LANES };

static const float ONE = 1;

ALWAYS f32x16 choose(f32x16 table, u32x16 index) {
#ifdef HAVE_AVX512
    return (f32x16)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = table[index[i] & 15];
    return v;
#endif
}

/* The 16 signed sums of inputs k .. k + 3, for every fourth k of a chunk. */
static void make_tables(const void *x, int bf16, int64_t k, int64_t in, int words, f32x16 *table) {
    static const f32x16 sign[4] = {
        {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
        {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
        {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
        {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    for (int g = 0; g < words * 8; g++) {
        int64_t i = k + 4 * g;
        f32x16 v = splat(0);
        if (i + 4 <= in)
            for (int j = 0; j < 4; j++) v += sign[j] * load1(x, i + j, bf16);
        else
            for (int j = 0; i + j < in; j++) v += sign[j] * load1(x, i + j, bf16);
        table[g] = v;
    }
}

/* acc[b][t] += the signed sums of one chunk, for B blocks of 16 rows and T tokens. */
ALWAYS void chunk_tile(const uint32_t *signs, int words, const f32x16 table[TOKENS][GROUPS],
                       f32x16 (*total)[TOKENS], int B, int T) {
    /* Zen 4 has no port left for an addition here, but has one for a multiply-add. */
    const f32x16 one = splat(*(const volatile float *)&ONE);
    f32x16 acc[BLOCKS][TOKENS];
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) acc[b][t] = splat(0);
    for (int w = 0; w < words; w++) {
        u32x16 bits[BLOCKS];
        for (int b = 0; b < B; b++) {
            const uint32_t *p = signs + ((int64_t)b * words + w) * LANES;
            memcpy(&bits[b], p, sizeof bits[b]);
            __builtin_prefetch(p + AHEAD);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            for (int t = 0; t < T; t++) {
                f32x16 sums = table[t][8 * w + j];
                for (int b = 0; b < B; b++) acc[b][t] += choose(sums, bits[b] >> (4 * j)) * one;
            }
    }
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) total[b][t] += acc[b][t];
}

ALWAYS void plane_rows(const uint32_t *plane, const void *x, int bf16, int64_t in, int64_t all,
                       int64_t from, int64_t to, f32x16 (*total)[TOKENS], int T) {
    f32x16 table[TOKENS][GROUPS];
    for (int64_t k = 0; k < in; k += WORDS * 32) {
        int words = (int)min64(WORDS, ceil_div(in - k, 32));
        for (int t = 0; t < T; t++)
            make_tables((const char *)x + t * in * (bf16 ? 2 : 4), bf16, k, in, words, table[t]);
        int64_t b = from;
        const uint32_t *chunk = plane + k / 32 * all * LANES;
        for (; b + BLOCKS <= to; b += BLOCKS)
            chunk_tile(chunk + b * words * LANES, words, table, total + b - from, BLOCKS, T);
        for (; b < to; b++) chunk_tile(chunk + b * words * LANES, words, table, total + b - from, 1, T);
    }
}

static void rows_tokens(const bit_item *m, const void *x, int x_bf16, int64_t in, void *y, int y_bf16,
                        int64_t stride, float strength, int64_t from, int64_t to, int T) {
    f32x16 total[ROWS / LANES][TOKENS], sum[ROWS / LANES][TOKENS];
    int64_t all = ceil_div(m->out, LANES), words = ceil_div(in, 32);
    for (int64_t b = 0; b < to - from; b++)
        for (int t = 0; t < T; t++) sum[b][t] = splat(0);
    for (int p = 0; p < m->planes; p++) {
        const uint32_t *plane = m->signs + p * words * all * LANES;
        for (int64_t b = 0; b < to - from; b++)
            for (int t = 0; t < T; t++) total[b][t] = splat(0);
#define CASE(T) case T: plane_rows(plane, x, x_bf16, in, all, from, to, total, T); break;
        switch (T) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
        for (int64_t b = from; b < to; b++) {
            f32x16 scale = load16(m->scale, (p * all + b) * LANES, 0);
            for (int t = 0; t < T; t++) sum[b - from][t] += scale * total[b - from][t];
        }
    }
    for (int64_t b = from; b < to; b++)
        for (int t = 0; t < T; t++) {
            int64_t n = m->out - b * LANES, at = t * stride + m->column + b * LANES;
            f32x16 old = load_upto(y, at, n, y_bf16);
            store_upto(y, at, n, y_bf16, old + strength * sum[b - from][t]);
        }
}

/* As ds_lowrank. A run of several adapters rounds a bfloat16 y once for each. */
int ds_bit(const void *x, int x_bf16, int64_t in, void *y, int y_bf16, int64_t stride,
           const entries_t *e, const table_t *table, int threads) {
    const bit_item *items = table->items;
    int64_t most = job_limit(e, table);
    if (!most) return 0;
    job_t *jobs = malloc(most * sizeof *jobs);
    if (!jobs) return -1;
    for (int depth = 0, n; (n = jobs_at(e, table, depth, jobs)); depth++) {
        int64_t tasks = 0, rows = ROWS;
        /* One adapter alone: smaller tasks, so that every thread has some. */
        if (n < 2 * threads) rows = ROWS / 4;
        for (int i = 0; i < n; i++) {
            int64_t tokens = e->end[jobs[i].entry] - e->start[jobs[i].entry];
            jobs[i].tasks = tasks;
            tasks += ceil_div(tokens, TOKENS) * ceil_div(items[jobs[i].item].out, rows);
        }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks > 1)
        for (int64_t task = 0; task < tasks; task++) {
            const job_t *job = job_of(jobs, n, task);
            const bit_item *m = items + job->item;
            int i = job->entry;
            int64_t chunks = ceil_div(m->out, rows), own = task - job->tasks;
            int64_t from = own % chunks * (rows / LANES), t = e->start[i] + own / chunks * TOKENS;
            int64_t to = min64(from + rows / LANES, ceil_div(m->out, LANES));
            rows_tokens(m, (const char *)x + t * in * (x_bf16 ? 2 : 4), x_bf16, in,
                        (char *)y + t * stride * (y_bf16 ? 2 : 4), y_bf16, stride, e->strength[i],
                        from, to, (int)min64(TOKENS, e->end[i] - t));
        }
    }
    free(jobs);
    return 0;
}

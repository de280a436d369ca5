/* y += strength * scale * b (a x) for every entry of a step, every part of a group and any mix of
 * ranks in one call. Two passes with a barrier between them: h = a x, then y += b h. All sums are
 * float32 and y is rounded once, after the last adapter of the run. */
#include "common.h"

typedef struct {
    const void *a, *b;   /* a: [rank, in]; b: [rank, out] */
    int64_t column;      /* of the part's first output in y */
    int32_t rank, out;
    float scale;
    int32_t bf16;        /* of a and b */
} lowrank_item;

typedef struct {
    const lowrank_item *item;
    float factor;
    int32_t start, tokens;
    float *h;            /* [tokens, rank] */
    int32_t next;        /* next job of the same run and part, -1 for none */
    int32_t head;        /* 1: the first of its run and part */
    int64_t shrinks, expands; /* number of tasks before this job, in either pass */
} job_t;

enum { RANKS = 4, TOKENS = 4, WIDE = 4, COLUMNS = 256, SPAN = 64 };

ALWAYS void shrink_tile(const void *x, int x_bf16, int64_t in, const void *a, int a_bf16,
                        int64_t stride, float factor, float *h, int64_t rank, int R, int T) {
    f32x16 acc[RANKS][TOKENS];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = splat(0);
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES) {
        f32x16 v[TOKENS];
        for (int t = 0; t < T; t++) v[t] = load16(x, t * stride + k, x_bf16);
        for (int r = 0; r < R; r++) {
            f32x16 w = load16(a, r * in + k, a_bf16);
            for (int t = 0; t < T; t++) acc[r][t] += w * v[t];
        }
    }
    if (k < in)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++)
                acc[r][t] += load_tail(a, r * in + k, in - k, a_bf16) *
                             load_tail(x, t * stride + k, in - k, x_bf16);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) h[t * rank + r] = factor * sum16(acc[r][t]);
}

ALWAYS void shrink_block(const void *x, int xb, int64_t in, const void *a, int ab, float factor,
                         float *h, int64_t rank, int ranks, int64_t tokens) {
    int64_t t = 0;
    const char *px = x;
    int64_t size = xb ? 2 : 4;
#define STEP(R, T) shrink_tile(px + t * in * size, xb, in, a, ab, in, factor, h + t * rank, rank, R, T)
    if (ranks == RANKS) {
        for (; t + TOKENS <= tokens; t += TOKENS) STEP(RANKS, TOKENS);
        for (; t < tokens; t++) STEP(RANKS, 1);
        return;
    }
    for (; t < tokens; t++)
        switch (ranks) {
        case 1: STEP(1, 1); break;
        case 2: STEP(2, 1); break;
        case 3: STEP(3, 1); break;
        }
#undef STEP
}

static void shrink(const job_t *job, int64_t task, const void *x, int x_bf16, int64_t in) {
    const lowrank_item *m = job->item;
    int64_t chunks = ceil_div(m->rank, RANKS);
    int64_t r = task % chunks * RANKS, t = task / chunks * SPAN;
    int64_t tokens = min64(SPAN, job->tokens - t);
    int ranks = (int)min64(RANKS, m->rank - r);
    const char *px = (const char *)x + (job->start + t) * in * (x_bf16 ? 2 : 4);
    const char *pa = (const char *)m->a + r * in * (m->bf16 ? 2 : 4);
    float *h = job->h + t * m->rank + r;
#define CALL(XB, AB) shrink_block(px, XB, in, pa, AB, job->factor, h, m->rank, ranks, tokens)
    if (x_bf16) {
        if (m->bf16) CALL(1, 1);
        else CALL(1, 0);
    } else {
        if (m->bf16) CALL(0, 1);
        else CALL(0, 0);
    }
#undef CALL
}

ALWAYS void expand_rank(f32x16 acc[TOKENS][WIDE], const job_t *job, int64_t t, int64_t c, int bf16,
                        int T, int W, int64_t left) {
    const lowrank_item *m = job->item;
    const float *h = job->h + t * m->rank;
    for (int64_t r = 0; r < m->rank; r++) {
        f32x16 b[WIDE];
        for (int w = 0; w < W; w++)
            b[w] = left ? load_upto(m->b, r * m->out + c + w * LANES, left, bf16)
                        : load16(m->b, r * m->out + c + w * LANES, bf16);
        for (int i = 0; i < T; i++) {
            float v = h[i * m->rank + r];
            for (int w = 0; w < W; w++) acc[i][w] += b[w] * v;
        }
    }
}

ALWAYS void expand_tile(const job_t *jobs, const job_t *job, int64_t t, int64_t c, void *y, int y_bf16,
                        int64_t stride, int T, int W, int64_t left) {
    f32x16 acc[TOKENS][WIDE];
    for (int i = 0; i < T; i++)
        for (int w = 0; w < W; w++) acc[i][w] = splat(0);
    for (const job_t *j = job;; j = jobs + j->next) {
        if (j->item->bf16) expand_rank(acc, j, t, c, 1, T, W, left);
        else expand_rank(acc, j, t, c, 0, T, W, left);
        if (j->next < 0) break;
    }
    for (int i = 0; i < T; i++)
        for (int w = 0; w < W; w++) {
            int64_t at = (job->start + t + i) * stride + job->item->column + c + w * LANES;
            int64_t n = left ? left : LANES;
            store_upto(y, at, n, y_bf16, load_upto(y, at, n, y_bf16) + acc[i][w]);
        }
}

static void expand(const job_t *jobs, const job_t *job, int64_t task, void *y, int y_bf16, int64_t stride) {
    int64_t out = job->item->out, chunks = ceil_div(out, COLUMNS);
    int64_t first = task % chunks * COLUMNS, last = min64(first + COLUMNS, out);
    int64_t t = task / chunks * SPAN, end = min64(t + SPAN, job->tokens);
    while (t < end) {
        int T = t + TOKENS <= end ? TOKENS : 1;
        int64_t c = first;
#define TILE(T, W, L) expand_tile(jobs, job, t, c, y, y_bf16, stride, T, W, L)
        if (T == TOKENS) {
            for (; c + WIDE * LANES <= last; c += WIDE * LANES) TILE(TOKENS, WIDE, 0);
            for (; c + LANES <= last; c += LANES) TILE(TOKENS, 1, 0);
            if (c < last) TILE(TOKENS, 1, last - c);
        } else {
            for (; c + WIDE * LANES <= last; c += WIDE * LANES) TILE(1, WIDE, 0);
            for (; c + LANES <= last; c += LANES) TILE(1, 1, 0);
            if (c < last) TILE(1, 1, last - c);
        }
#undef TILE
        t += T;
    }
}

/* The job whose tasks include `task`; `before` picks the pass. */
ALWAYS int find(const job_t *jobs, int count, int64_t task, int second) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if ((second ? jobs[middle].expands : jobs[middle].shrinks) <= task) low = middle;
        else high = middle - 1;
    }
    return low;
}

static void link_parts(job_t *jobs, int from, int to) {
    for (int i = from; i < to; i++) {
        jobs[i].head = 1;
        jobs[i].next = -1;
        for (int j = i - 1; j >= from; j--)
            if (jobs[j].item->column == jobs[i].item->column) {
                jobs[i].head = 0;
                jobs[j].next = i;
                break;
            }
    }
}

/* x: [tokens, in]; y: [tokens, stride]. Returns 0, or -1 when memory ran out. */
int ds_lowrank(const void *x, int x_bf16, int64_t in, void *y, int y_bf16, int64_t stride,
               const entries_t *e, const table_t *table, int threads) {
    const lowrank_item *items = table->items;
    int total = 0;
    int64_t floats = 0;
    for (int i = 0; i < e->count; i++) {
        int s = e->slot[i], n = count_of(table, s);
        total += n;
        for (int j = 0; j < n; j++)
            floats += (int64_t)(e->end[i] - e->start[i]) * items[table->first[s] + j].rank;
    }
    if (!total) return 0;
    job_t *jobs = malloc(total * sizeof *jobs + floats * sizeof(float));
    if (!jobs) return -1;
    float *h = (float *)(jobs + total);
    int64_t shrinks = 0, expands = 0, work = 0;
    int n = 0, from = 0, run = -1;
    for (int i = 0; i < e->count; i++) {
        int s = e->slot[i], own = count_of(table, s);
        if (!own) continue;
        if (e->start[i] != run) {
            link_parts(jobs, from, n);
            from = n;
            run = e->start[i];
        }
        for (int j = 0; j < own; j++) {
            const lowrank_item *m = items + table->first[s] + j;
            job_t *job = jobs + n++;
            job->item = m;
            job->factor = m->scale * e->strength[i];
            job->start = e->start[i];
            job->tokens = e->end[i] - e->start[i];
            job->h = h;
            h += (int64_t)job->tokens * m->rank;
            work += (int64_t)job->tokens * m->rank * (in + m->out);
        }
    }
    link_parts(jobs, from, n);
    for (int i = 0; i < n; i++) {
        job_t *job = jobs + i;
        int64_t spans = ceil_div(job->tokens, SPAN);
        job->shrinks = shrinks;
        job->expands = expands;
        shrinks += spans * ceil_div(job->item->rank, RANKS);
        if (job->head) expands += spans * ceil_div(job->item->out, COLUMNS);
    }
    /* Waking a thread costs a few microseconds: below that much work there is nothing to share. */
    if (work < 30000) threads = 1;
    int chunk1 = chunk_of(shrinks, threads), chunk2 = chunk_of(expands, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, chunk1)
        for (int64_t task = 0; task < shrinks; task++) {
            const job_t *job = jobs + find(jobs, n, task, 0);
            shrink(job, task - job->shrinks, x, x_bf16, in);
        }
#pragma omp for schedule(dynamic, chunk2)
        for (int64_t task = 0; task < expands; task++) {
            const job_t *job = jobs + find(jobs, n, task, 1);
            expand(jobs, job, task - job->expands, y, y_bf16, stride);
        }
    }
    free(jobs);
    return 0;
}

/* The work of kernels that add into y: one job for every item of every entry of a step. */
#ifndef DELTASERVE_JOBS_H
#define DELTASERVE_JOBS_H

#include "common.h"

enum { FEW = 4 }; /* tokens of an entry that ds_rows serves: FEW_TOKENS of sparse/cpu.py */

typedef struct {
    int32_t entry, item;
    int64_t tasks; /* number of tasks before this job */
} job_t;

ALWAYS int64_t job_limit(const entries_t *e, const table_t *table) {
    int64_t most = 0;
    for (int i = 0; i < e->count; i++) most += count_of(table, e->slot[i]);
    return most;
}

/* The jobs of the entries that are the depth-th of their run: adapters of one run write the same
 * outputs, so they go one after another. Returns their number, 0 after the deepest. */
ALWAYS int jobs_at(const entries_t *e, const table_t *table, int depth, job_t *jobs) {
    int n = 0, run = -1, seen = 0;
    for (int i = 0; i < e->count; i++) {
        int s = e->slot[i], own = count_of(table, s);
        if (e->start[i] != run) {
            run = e->start[i];
            seen = 0;
        }
        if (!own || seen++ != depth) continue;
        for (int j = 0; j < own; j++) jobs[n++] = (job_t){i, table->first[s] + j, 0};
    }
    return n;
}

/* The job that task number `task` is part of. */
ALWAYS const job_t *job_of(const job_t *jobs, int n, int64_t task) {
    int low = 0, high = n - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (jobs[middle].tasks <= task) low = middle;
        else high = middle - 1;
    }
    return jobs + low;
}

#endif

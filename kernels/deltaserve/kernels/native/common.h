/* Vectors of 16 floats on any machine that GCC or Clang compiles for. */
#ifndef DELTASERVE_COMMON_H
#define DELTASERVE_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAVE_AVX512 1
#endif
#if defined(HAVE_AVX512) && defined(__AVX512BF16__)
#define HAVE_AVX512_BF16 1
#endif

#define LANES 16
#define ALWAYS static inline __attribute__((always_inline, unused))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

/* One (run, adapter) entry of a step: the fields are those of deltaserve.kernels.segments. */
typedef struct {
    int32_t count;
    const int32_t *start, *end, *slot;
    const float *strength;
} entries_t;

/* What a family of primitives holds: of slot s the items first[s] .. first[s] + count[s]; slots
 * beyond `slots` hold none. */
typedef struct {
    const void *items;
    const int32_t *first, *count;
    int64_t slots;
} table_t;

ALWAYS int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

ALWAYS int count_of(const table_t *table, int slot) { return slot < table->slots ? table->count[slot] : 0; }

/* Whether a slot of the step holds anything. */
ALWAYS int touches(const table_t *table, const entries_t *e) {
    for (int i = 0; i < e->count; i++)
        if (count_of(table, e->slot[i])) return 1;
    return 0;
}

ALWAYS f32x16 splat(float v) { return (f32x16){0} + v; }

ALWAYS float from_bf16(uint16_t v) {
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

ALWAYS uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

ALWAYS f32x16 widen(u16x16 v) {
    u32x16 u = __builtin_convertvector(v, u32x16) << 16;
    return (f32x16)u;
}

ALWAYS u16x16 narrow(f32x16 v) {
    u32x16 u = (u32x16)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u32x16 is_nan = (u32x16)(v != v);
    u = (is_nan & 0x7fc0) | (~is_nan & u);
    return __builtin_convertvector(u, u16x16);
}

/* Elements i .. i + 15 of an array of float (bf16 = 0) or bfloat16 (bf16 = 1). */
ALWAYS f32x16 load16(const void *p, int64_t i, int bf16) {
    if (bf16) {
        u16x16 v;
        memcpy(&v, (const uint16_t *)p + i, sizeof v);
        return widen(v);
    }
    f32x16 v;
    memcpy(&v, (const float *)p + i, sizeof v);
    return v;
}

ALWAYS float load1(const void *p, int64_t i, int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* The same for the n < 16 elements that are left; the other lanes are 0. */
ALWAYS f32x16 load_tail(const void *p, int64_t i, int64_t n, int bf16) {
    f32x16 v = {0};
    for (int64_t j = 0; j < n; j++) v[j] = load1(p, i + j, bf16);
    return v;
}

ALWAYS f32x16 load_upto(const void *p, int64_t i, int64_t n, int bf16) {
    return n >= LANES ? load16(p, i, bf16) : load_tail(p, i, n, bf16);
}

ALWAYS void store_upto(void *p, int64_t i, int64_t n, int bf16, f32x16 v) {
    if (n >= LANES) {
        if (bf16) {
            u16x16 b = narrow(v);
            memcpy((uint16_t *)p + i, &b, sizeof b);
        } else {
            memcpy((float *)p + i, &v, sizeof v);
        }
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        if (bf16) ((uint16_t *)p)[i + j] = to_bf16(v[j]);
        else ((float *)p)[i + j] = v[j];
    }
}

ALWAYS void add1(void *p, int64_t i, int bf16, float v) {
    if (bf16) ((uint16_t *)p)[i] = to_bf16(from_bf16(((uint16_t *)p)[i]) + v);
    else ((float *)p)[i] += v;
}

/* a b + c, rounded once; spelled out where the compiler could choose otherwise for another tile. */
ALWAYS f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
#ifdef HAVE_AVX512
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

ALWAYS float sum16(f32x16 v) {
#ifdef HAVE_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

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

/* Chunks for dynamic schedules: small enough to share evenly, large enough to cost nothing. */
ALWAYS int chunk_of(int64_t tasks, int threads) {
    return (int)max64(1, tasks / (8 * (int64_t)threads));
}

#endif

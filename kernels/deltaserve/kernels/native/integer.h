/* Tokens in 8 bits for products in whole numbers: x ~ q * scale with scale = max |x| / 127. */
#ifndef DELTASERVE_INTEGER_H
#define DELTASERVE_INTEGER_H

#include "common.h"

#if defined(HAVE_AVX512) && defined(__AVX512VNNI__)
#define HAVE_VNNI 1
#endif

enum { QUAD = 4 }; /* inputs that one instruction multiplies and adds up in each lane */

typedef uint8_t u8x16 __attribute__((vector_size(16)));

typedef struct {
    int8_t *q;      /* [tokens, padded], zeros beyond `in` */
    float *scale;   /* [tokens] */
    int32_t *sums;  /* [tokens, groups]: of q */
    int64_t padded, groups, group;
} tokens_t;

/* acc[lane] += the dot product of the lane's 4 unsigned bytes with 4 signed ones. */
ALWAYS i32x16 dot4(i32x16 acc, u32x16 bytes, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
#ifdef HAVE_VNNI
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)bytes, _mm512_set1_epi32(four));
#else
    for (int j = 0; j < 4; j++) acc += (i32x16)((bytes >> (8 * j)) & 255) * (int32_t)x[j];
    return acc;
#endif
}

/* Token t to 8 bits. nibbles: each 8 inputs in the order 0 4 1 5, 2 6 3 7 of int4.c's words. */
ALWAYS void quantize_token(const void *x, int bf16, int64_t in, int64_t t, const tokens_t *to,
                           int nibbles) {
    f32x16 most = splat(0);
    for (int64_t k = 0; k < in; k += LANES) {
        f32x16 v = load_upto(x, t * in + k, in - k, bf16);
        v = (f32x16)((u32x16)v & 0x7fffffff);
        i32x16 less = (v <= most) | (most != most); /* a NaN wins */
        most = (f32x16)((less & (i32x16)most) | (~less & (i32x16)v));
    }
    float top = 0;
    for (int i = 0; i < LANES; i++) top = most[i] <= top || top != top ? top : most[i];
    float scale = top > 1e-30f || top != top ? top / 127 : 1; /* below, 1 / scale may overflow */
    to->scale[t] = scale;
    f32x16 inverse = splat(scale <= 3e38f ? 1 / scale : 0);
    int8_t *q = to->q + t * to->padded;
    int32_t *sums = to->sums + t * to->groups;
    memset(sums, 0, to->groups * sizeof *sums);
    for (int64_t k = 0; k < to->padded; k += LANES) {
        int64_t n = in - k;
        /* 1.5 * 2^23 leaves the whole number, rounded to nearest even, in the low bits. */
        f32x16 v = (n > 0 ? load_upto(x, t * in + k, n, bf16) : splat(0)) * inverse + 12582912.f;
        i32x16 whole = (i32x16)(((u32x16)v & 255) ^ 128) - 128;
        int64_t left = min64(LANES, to->padded - k);
        int8_t byte[LANES];
#ifdef HAVE_AVX512
        __m128i narrow = _mm512_cvtepi32_epi8((__m512i)whole);
        if (nibbles)
            narrow = _mm_shuffle_epi8(narrow, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
        _mm_storeu_si128((__m128i *)byte, narrow);
        int32_t sum0 = _mm512_mask_reduce_add_epi32(0x00ff, (__m512i)whole);
        int32_t sum1 = _mm512_mask_reduce_add_epi32(0xff00, (__m512i)whole);
#else
        int32_t sum0 = 0, sum1 = 0;
        for (int i = 0; i < LANES; i++) {
            byte[nibbles ? i / 8 * 8 + i % 4 * 2 + i % 8 / 4 : i] = (int8_t)whole[i];
            if (i < 8) sum0 += whole[i];
            else sum1 += whole[i];
        }
#endif
        memcpy(q + k, byte, left);
        sums[k / to->group] += sum0;
        if (left > 8) sums[(k + 8) / to->group] += sum1;
    }
}

#endif

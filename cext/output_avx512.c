/* output_avx512.c - the output stage of output.c, 16 outputs at a time.
 *
 * Float: convert, multiply, add, add; each rounds once, as in plain C.
 *
 * Codes: a product of 32 x 32 bits needs 64. vpmuldq multiplies the even int32 lanes of its operands
 * into 8 lanes of 64 bits; the odd ones are shifted down for a second one:
 *
 *     sums      [ s0  s1  s2  s3  ...  s14 s15 ]       int32
 *     even      [ s0 * m0     | s2 * m2     | ... ]    int64, exact
 *     odd       [ s1 * m1     | s3 * m3     | ... ]
 *
 * Rounding to even costs no branch. With p + half shifted down, ties have gone up; a tie shows as
 * shifted-out bits that are all 0, and there the lowest bit is cleared. A shift of 0 rounds nothing:
 * half is 0, and the mask of shifted-out bits is all ones, which only p = 0 passes, harmlessly.
 *
 * What depends on the output alone is computed once for all rows of a tile.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")

enum { LANES = 16 };

RQ_INLINE __mmask16 first_lanes(int count)
{
    return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1);
}

void rq_dequantize_avx512(const struct rq_output *y, const int32_t *sums, int rows, int64_t row, int64_t first,
                          int columns)
{
    for (int j = 0; j < columns; j += LANES) {
        const __mmask16 lanes = first_lanes(columns - j);
        const __m512 scale = _mm512_maskz_loadu_ps(lanes, y->scale + first + j);
        const __m512 bias = y->bias ? _mm512_maskz_loadu_ps(lanes, y->bias + first + j) : _mm512_setzero_ps();
        for (int i = 0; i < rows; i++) {
            __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * RQ_TILE_WIDTH + j));
            value = _mm512_mul_ps(value, scale);
            if (y->bias)
                value = _mm512_add_ps(value, bias);
            if (y->residual)
                value = _mm512_add_ps(
                    value, _mm512_maskz_loadu_ps(lanes, y->residual + (row + i) * y->residual_ld + first + j));
            _mm512_mask_storeu_ps((float *)y->data + (row + i) * y->ld + first + j, lanes, value);
        }
    }
}

/* mantissa / 2^shift of 8 outputs, ready for use. */
struct scale8 { __m512i mantissa, shift, half, rest; };

RQ_INLINE struct scale8 prepare(__m512i mantissa, __m512i shift)
{
    const __m512i one = _mm512_set1_epi64(1);
    const __m512i s = _mm512_and_si512(shift, _mm512_set1_epi64(63));
    const __m512i unit = _mm512_sllv_epi64(one, s);
    const __mmask8 rounds = _mm512_test_epi64_mask(s, s);
    return (struct scale8){
        .mantissa = mantissa, .shift = s,
        .half = _mm512_maskz_srli_epi64(rounds, unit, 1),
        .rest = _mm512_mask_sub_epi64(_mm512_set1_epi64(-1), rounds, unit, one),
    };
}

RQ_INLINE __m512i scale(__m512i sums, const struct scale8 *by, __m512i low, __m512i high)
{
    const __m512i p = _mm512_add_epi64(_mm512_mul_epi32(sums, by->mantissa), by->half);
    const __mmask8 ties = _mm512_testn_epi64_mask(p, by->rest);
    __m512i q = _mm512_srav_epi64(p, by->shift);
    q = _mm512_mask_and_epi64(q, ties, q, _mm512_set1_epi64(-2));
    return _mm512_min_epi64(_mm512_max_epi64(q, low), high);
}

void rq_requantize_avx512(const struct rq_output *y, const int32_t *sums, int rows, int64_t row, int64_t first,
                          int columns)
{
    /* limits before the zero point is added: the codes then stay within 32 bits */
    const __m512i low = _mm512_set1_epi64(y->qmin - y->zero_point);
    const __m512i high = _mm512_set1_epi64(y->qmax - y->zero_point);
    const __m512i zero_point = _mm512_set1_epi32(y->zero_point);
    for (int j = 0; j < columns; j += LANES) {
        const __mmask16 lanes = first_lanes(columns - j);
        const __m512i m = _mm512_maskz_loadu_epi32(lanes, y->mantissa + first + j);
        const __m512i s = _mm512_maskz_loadu_epi32(lanes, y->shift + first + j);
        const struct scale8 even = prepare(m, s);
        const struct scale8 odd = prepare(_mm512_srli_epi64(m, 32), _mm512_srli_epi64(s, 32));
        for (int i = 0; i < rows; i++) {
            const __m512i sum = _mm512_load_si512(sums + i * RQ_TILE_WIDTH + j);
            const __m512i q0 = scale(sum, &even, low, high);
            const __m512i q1 = scale(_mm512_srli_epi64(sum, 32), &odd, low, high);
            const __m512i q = _mm512_mask_blend_epi32(0xaaaa, q0, _mm512_slli_epi64(q1, 32));
            const __m128i codes = _mm512_cvtepi32_epi8(_mm512_add_epi32(q, zero_point));
            _mm_mask_storeu_epi8((uint8_t *)y->data + (row + i) * y->ld + first + j, lanes, codes);
        }
    }
}

RQ_TARGET_END

#endif

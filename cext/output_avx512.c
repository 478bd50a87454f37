/* output_avx512.c - the output stage of output.c, 16 outputs at a time.
 *
 * Float: convert, multiply, add, add; each rounds once, as in plain C.
 *
 * Codes: round(sum * mantissa / 2^shift), ties to even, in one instruction. Take m = mantissa / 2^shift as
 * a double: exact, it has 31 bits. A fused multiply-add forms sum * m + 1.5 * 2^52 exactly and rounds
 * once, and from 2^52 to 2^53 doubles are the integers: what is rounded away is what lies behind the
 * point of sum * m, to the nearest, ties to even. The integer is in the low bits of the result:
 *
 *     0x4338 0000 0000 0000  +  q        1.5 * 2^52, in which a negative q borrows from the 0.5
 *
 * It holds for |sum * m| < 2^31, which m < 1, that is shift >= 31, gives. A real network's scales are
 * like that; a larger m is left to plain C.
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

void rq_dequantize_avx512(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
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
                    value, _mm512_maskz_loadu_ps(lanes, y->residual + at[i] * y->residual_ld + first + j));
            _mm512_mask_storeu_ps((float *)y->data + at[i] * y->ld + first + j, lanes, value);
        }
    }
}

/* mantissa / 2^shift of 8 outputs, shift from 31 to 62: the exponent of 2^-shift is put together by hand. */
RQ_INLINE __m512d multiplier(__m256i mantissa, __m256i shift)
{
    const __m512i exponent = _mm512_sub_epi64(_mm512_set1_epi64(1023), _mm512_cvtepi32_epi64(shift));
    const __m512d power = _mm512_castsi512_pd(_mm512_slli_epi64(exponent, 52));
    return _mm512_mul_pd(_mm512_cvtepi32_pd(mantissa), power);
}

void rq_requantize_avx512(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                          int columns)
{
    const __m512d integers = _mm512_set1_pd(0x1.8p52);
    const __m512i low_halves = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    /* limits before the zero point is added: the sum then stays within 32 bits */
    const __m512i least = _mm512_set1_epi32(y->qmin - y->zero_point);
    const __m512i most = _mm512_set1_epi32(y->qmax - y->zero_point);
    const __m512i zero_point = _mm512_set1_epi32(y->zero_point);
    for (int j = 0; j < columns; j += LANES) {
        const __mmask16 lanes = first_lanes(columns - j);
        const __m512i mantissa = _mm512_maskz_loadu_epi32(lanes, y->mantissa + first + j);
        const __m512i shift = _mm512_maskz_loadu_epi32(lanes, y->shift + first + j);
        if (_mm512_mask_cmplt_epi32_mask(lanes, shift, _mm512_set1_epi32(31))) {
            rq_requantize_scalar(y, sums + j, rows, at, first + j, columns - j < LANES ? columns - j : LANES);
            continue;
        }
        const __m512d m0 = multiplier(_mm512_castsi512_si256(mantissa), _mm512_castsi512_si256(shift));
        const __m512d m1 = multiplier(_mm512_extracti64x4_epi64(mantissa, 1), _mm512_extracti64x4_epi64(shift, 1));
        for (int i = 0; i < rows; i++) {
            const __m512i sum = _mm512_load_si512(sums + i * RQ_TILE_WIDTH + j);
            const __m512d s0 = _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum));
            const __m512d s1 = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum, 1));
            const __m512i q0 = _mm512_castpd_si512(_mm512_fmadd_pd(s0, m0, integers));
            const __m512i q1 = _mm512_castpd_si512(_mm512_fmadd_pd(s1, m1, integers));
            __m512i q = _mm512_permutex2var_epi32(q0, low_halves, q1);
            q = _mm512_min_epi32(_mm512_max_epi32(q, least), most);
            const __m128i codes = _mm512_cvtepi32_epi8(_mm512_add_epi32(q, zero_point));
            uint8_t *const out = (uint8_t *)y->data + at[i] * y->ld + first + j;
            if (columns - j >= LANES)
                _mm_storeu_si128((__m128i *)out, codes); /* masked stores of bytes are slow on some processors */
            else
                _mm_mask_storeu_epi8(out, lanes, codes);
        }
    }
}

RQ_TARGET_END

#endif

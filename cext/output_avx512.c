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
 * Then 64 results, of two rows, are packed into one register: to 16 bits, where the zero point is added,
 * and to 8, both with saturation, which moves nothing across the limits 0 and 255. Packing works in each
 * 128 bits; one permutation at the end puts all in order.
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
    return count >= LANES ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
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

/* mantissa / 2^shift of outputs 8i .. 8i+7 of a tile. */
RQ_INLINE __m512d multiplier(const __m512i mantissa[2], const __m512i shift[2], const int i)
{
    const __m256i m = i % 2 ? _mm512_extracti64x4_epi64(mantissa[i / 2], 1) : _mm512_castsi512_si256(mantissa[i / 2]);
    const __m256i s = i % 2 ? _mm512_extracti64x4_epi64(shift[i / 2], 1) : _mm512_castsi512_si256(shift[i / 2]);
    return _mm512_scalef_pd(_mm512_cvtepi32_pd(m), _mm512_sub_pd(_mm512_setzero_pd(), _mm512_cvtepi32_pd(s)));
}

/* round(sum * m) + zero_point of 32 sums, limited to 16 bits; each 128 bits hold two of each eight. */
RQ_INLINE __m512i codes(const int32_t *sums, const __m512d m[4], __m512i zero_point)
{
    const __m512d integers = _mm512_set1_pd(0x1.8p52);
    __m512 q[4];
    RQ_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512d sum = _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i *)sums + i));
        q[i] = _mm512_castpd_ps(_mm512_fmadd_pd(sum, m[i], integers));
    }
    const __m512i low = _mm512_castps_si512(_mm512_shuffle_ps(q[0], q[1], 0x88)); /* low halves: the integers */
    const __m512i high = _mm512_castps_si512(_mm512_shuffle_ps(q[2], q[3], 0x88));
    return _mm512_adds_epi16(_mm512_packs_epi32(low, high), zero_point);
}

/* Store 32 codes, or as many as there are. */
RQ_INLINE void store(uint8_t *to, __m256i row, int columns)
{
    if (columns == RQ_TILE_WIDTH)
        _mm256_storeu_si256((__m256i *)to, row); /* masked stores of bytes are slow on some processors */
    else
        _mm256_mask_storeu_epi8(to, (1u << columns) - 1, row);
}

void rq_requantize_avx512(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                          int columns)
{
    /* pairs of codes of the first row and of the second, where packing has left them */
    static const _Alignas(64) int16_t in_order[32] = {
        0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
        4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31,
    };
    const __m512i order = _mm512_load_si512(in_order), zero_point = _mm512_set1_epi16((int16_t)y->zero_point);
    const __m512i least = _mm512_set1_epi8((char)y->qmin), most = _mm512_set1_epi8((char)y->qmax);
    __m512i mantissa[2], shift[2];
    __m512d m[4];
    for (int j = 0; j < 2; j++) {
        const __mmask16 lanes = first_lanes(columns - j * LANES);
        mantissa[j] = _mm512_maskz_loadu_epi32(lanes, y->mantissa + first + j * LANES);
        shift[j] = _mm512_maskz_loadu_epi32(lanes, y->shift + first + j * LANES);
        if (_mm512_mask_cmplt_epi32_mask(lanes, shift[j], _mm512_set1_epi32(31))) {
            rq_requantize_scalar(y, sums, rows, at, first, columns);
            return;
        }
    }
    RQ_UNROLL
    for (int i = 0; i < 4; i++)
        m[i] = multiplier(mantissa, shift, i);
    uint8_t *const out = (uint8_t *)y->data + first;
    for (int i = 0; i < rows; i += 2) {
        const int32_t *const sum = sums + i * RQ_TILE_WIDTH, *const next = i + 1 < rows ? sum + RQ_TILE_WIDTH : sum;
        __m512i two = _mm512_packus_epi16(codes(sum, m, zero_point), codes(next, m, zero_point));
        two = _mm512_min_epu8(_mm512_max_epu8(_mm512_permutexvar_epi16(order, two), least), most);
        store(out + at[i] * y->ld, _mm512_castsi512_si256(two), columns);
        if (i + 1 < rows)
            store(out + at[i + 1] * y->ld, _mm512_extracti64x4_epi64(two, 1), columns);
    }
}

RQ_TARGET_END

#endif

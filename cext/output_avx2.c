/* output_avx2.c - the output stage of output.c, 8 outputs at a time.
 *
 * As output_avx512.c, which explains it, with 4 products of 64 bits in a register, and without two
 * things that AVX2 lacks:
 *
 *     an arithmetic shift of 64 bits. -2^62 <= p, so that p + 2^62 is not negative; shifted as an
 *     unsigned number it is (p >> shift) + 2^(62-shift), exactly, because shift <= 62;
 *     min and max of 64 bits: a comparison and a selection.
 *
 * The last outputs, fewer than 8, are left to plain C.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2")

enum { LANES = 8 };

void rq_dequantize_avx2(const struct rq_output *y, const int32_t *sums, int rows, int64_t row, int64_t first,
                        int columns)
{
    int j = 0;
    for (; j + LANES <= columns; j += LANES) {
        const __m256 scale = _mm256_loadu_ps(y->scale + first + j);
        const __m256 bias = y->bias ? _mm256_loadu_ps(y->bias + first + j) : _mm256_setzero_ps();
        for (int i = 0; i < rows; i++) {
            __m256 value = _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)(sums + i * RQ_TILE_WIDTH + j)));
            value = _mm256_mul_ps(value, scale);
            if (y->bias)
                value = _mm256_add_ps(value, bias);
            if (y->residual)
                value = _mm256_add_ps(value, _mm256_loadu_ps(y->residual + (row + i) * y->residual_ld + first + j));
            _mm256_storeu_ps((float *)y->data + (row + i) * y->ld + first + j, value);
        }
    }
    if (j < columns)
        rq_dequantize_scalar(y, sums + j, rows, row, first + j, columns - j);
}

RQ_INLINE __m256i floor_shift(__m256i p, __m256i shift)
{
    const __m256i lift = _mm256_set1_epi64x((int64_t)1 << 62);
    return _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_add_epi64(p, lift), shift), _mm256_srlv_epi64(lift, shift));
}

RQ_INLINE __m256i limit(__m256i code, __m256i low, __m256i high)
{
    code = _mm256_blendv_epi8(code, low, _mm256_cmpgt_epi64(low, code));
    return _mm256_blendv_epi8(code, high, _mm256_cmpgt_epi64(code, high));
}

/* mantissa / 2^shift of 4 outputs, ready for use. */
struct scale4 { __m256i mantissa, shift, half, rest; };

RQ_INLINE struct scale4 prepare(__m256i mantissa, __m256i shift)
{
    const __m256i one = _mm256_set1_epi64x(1), zero = _mm256_setzero_si256();
    const __m256i s = _mm256_and_si256(shift, _mm256_set1_epi64x(63));
    const __m256i unit = _mm256_sllv_epi64(one, s), exact = _mm256_cmpeq_epi64(s, zero);
    return (struct scale4){
        .mantissa = mantissa, .shift = s,
        .half = _mm256_andnot_si256(exact, _mm256_srli_epi64(unit, 1)),
        .rest = _mm256_or_si256(exact, _mm256_sub_epi64(unit, one)),
    };
}

RQ_INLINE __m256i scale(__m256i sums, const struct scale4 *by, __m256i low, __m256i high)
{
    const __m256i p = _mm256_add_epi64(_mm256_mul_epi32(sums, by->mantissa), by->half);
    const __m256i ties = _mm256_cmpeq_epi64(_mm256_and_si256(p, by->rest), _mm256_setzero_si256());
    const __m256i q = floor_shift(p, by->shift);
    return limit(_mm256_andnot_si256(_mm256_srli_epi64(ties, 63), q), low, high); /* ties: bit 0 cleared */
}

void rq_requantize_avx2(const struct rq_output *y, const int32_t *sums, int rows, int64_t row, int64_t first,
                        int columns)
{
    /* limits before the zero point is added: the codes then stay within 32 bits */
    const __m256i low = _mm256_set1_epi64x(y->qmin - y->zero_point);
    const __m256i high = _mm256_set1_epi64x(y->qmax - y->zero_point);
    const __m256i zero_point = _mm256_set1_epi32(y->zero_point);
    /* the low bytes of four int32, in each half */
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    int j = 0;
    for (; j + LANES <= columns; j += LANES) {
        const __m256i m = _mm256_loadu_si256((const __m256i *)(y->mantissa + first + j));
        const __m256i s = _mm256_loadu_si256((const __m256i *)(y->shift + first + j));
        const struct scale4 even = prepare(m, s);
        const struct scale4 odd = prepare(_mm256_srli_epi64(m, 32), _mm256_srli_epi64(s, 32));
        for (int i = 0; i < rows; i++) {
            const __m256i sum = _mm256_load_si256((const __m256i *)(sums + i * RQ_TILE_WIDTH + j));
            const __m256i q0 = scale(sum, &even, low, high);
            const __m256i q1 = scale(_mm256_srli_epi64(sum, 32), &odd, low, high);
            const __m256i q = _mm256_blend_epi32(q0, _mm256_slli_epi64(q1, 32), 0xaa);
            const __m256i codes = _mm256_shuffle_epi8(_mm256_add_epi32(q, zero_point), bytes);
            const int32_t four[2] = {_mm256_extract_epi32(codes, 0), _mm256_extract_epi32(codes, 4)};
            memcpy((uint8_t *)y->data + (row + i) * y->ld + first + j, four, LANES);
        }
    }
    if (j < columns)
        rq_requantize_scalar(y, sums + j, rows, row, first + j, columns - j);
}

RQ_TARGET_END

#endif

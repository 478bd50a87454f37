/* output_avx2.c - the output stage of output.c, 8 outputs at a time.
 *
 * As output_avx512.c, which explains it, with 4 doubles in a register. The last outputs, fewer than 8,
 * are left to plain C.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2,fma")

enum { LANES = 8 };

void rq_dequantize_avx2(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
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
                value = _mm256_add_ps(value, _mm256_loadu_ps(y->residual + at[i] * y->residual_ld + first + j));
            _mm256_storeu_ps((float *)y->data + at[i] * y->ld + first + j, value);
        }
    }
    if (j < columns)
        rq_dequantize_scalar(y, sums + j, rows, at, first + j, columns - j);
}

void rq_correct_avx2(int32_t *sums, int rows, const int32_t *row_sums, const int32_t *zero_points, int columns)
{
    int j = 0;
    for (; j + LANES <= columns; j += LANES) {
        const __m256i zeros = _mm256_loadu_si256((const __m256i *)(zero_points + j));
        for (int i = 0; i < rows; i++) {
            __m256i *const sum = (__m256i *)(sums + i * RQ_TILE_WIDTH + j);
            const __m256i less = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(row_sums[i]));
            _mm256_store_si256(sum, _mm256_sub_epi32(_mm256_load_si256(sum), less));
        }
    }
    if (j < columns)
        rq_correct_scalar(sums + j, rows, row_sums, zero_points + j, columns - j);
}

/* mantissa / 2^shift of 4 outputs, shift from 31 to 62. */
RQ_INLINE __m256d multiplier(const int32_t *mantissa, const int32_t *shift)
{
    const __m256i exponent = _mm256_sub_epi64(
        _mm256_set1_epi64x(1023), _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)shift)));
    const __m256d power = _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
    return _mm256_mul_pd(_mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)mantissa)), power);
}

void rq_requantize_avx2(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                        int columns)
{
    const __m256d integers = _mm256_set1_pd(0x1.8p52);
    const __m256i least = _mm256_set1_epi32(y->qmin - y->zero_point);
    const __m256i most = _mm256_set1_epi32(y->qmax - y->zero_point);
    const __m256i zero_point = _mm256_set1_epi32(y->zero_point);
    /* the low bytes of four int32, in each half */
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    int j = 0;
    for (; j + LANES <= columns; j += LANES) {
        const int32_t *mantissa = y->mantissa + first + j, *shift = y->shift + first + j;
        const __m256i shifts = _mm256_loadu_si256((const __m256i *)shift);
        if (_mm256_movemask_epi8(_mm256_cmpgt_epi32(_mm256_set1_epi32(31), shifts))) {
            rq_requantize_scalar(y, sums + j, rows, at, first + j, LANES);
            continue;
        }
        const __m256d m0 = multiplier(mantissa, shift), m1 = multiplier(mantissa + 4, shift + 4);
        for (int i = 0; i < rows; i++) {
            const int32_t *const sum = sums + i * RQ_TILE_WIDTH + j;
            const __m256d s0 = _mm256_cvtepi32_pd(_mm_load_si128((const __m128i *)sum));
            const __m256d s1 = _mm256_cvtepi32_pd(_mm_load_si128((const __m128i *)(sum + 4)));
            const __m256 q0 = _mm256_castpd_ps(_mm256_fmadd_pd(s0, m0, integers));
            const __m256 q1 = _mm256_castpd_ps(_mm256_fmadd_pd(s1, m1, integers));
            /* low halves: [0 1 | 2 3] and [4 5 | 6 7] -> [0 1 4 5 | 2 3 6 7] -> in order */
            __m256i q = _mm256_castps_si256(_mm256_shuffle_ps(q0, q1, 0x88));
            q = _mm256_permute4x64_epi64(q, 0xd8);
            q = _mm256_min_epi32(_mm256_max_epi32(q, least), most);
            const __m256i codes = _mm256_shuffle_epi8(_mm256_add_epi32(q, zero_point), bytes);
            const int32_t four[2] = {_mm256_extract_epi32(codes, 0), _mm256_extract_epi32(codes, 4)};
            memcpy((uint8_t *)y->data + at[i] * y->ld + first + j, four, LANES);
        }
    }
    if (j < columns)
        rq_requantize_scalar(y, sums + j, rows, at, first + j, columns - j);
}

RQ_TARGET_END

#endif

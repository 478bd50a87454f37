/* islands_avx2.c - the float islands with registers of 256 bits: islands_body.h, 4 doubles at a time.
 *
 * Only operations that give in each lane what plain C gives: vaddpd, vmulpd, vdivpd, vminpd, vmaxpd,
 * conversions. No vfmaddpd, which rounds once where plain C rounds twice. A block of 16 doubles becomes
 * codes by four vcvtpd2dq, which round ties to even, and two steps of packing.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "islands.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2")

enum { LANES = 4, FLOATS = 8 };
typedef __m256d wide;
typedef __m256 narrow;

RQ_INLINE wide all(double x) { return _mm256_set1_pd(x); }
RQ_INLINE wide load(const double *p) { return _mm256_loadu_pd(p); }
RQ_INLINE wide load_floats(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
RQ_INLINE wide load_ints(const int32_t *p) { return _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)p)); }
RQ_INLINE void store(double *p, wide x) { _mm256_storeu_pd(p, x); }
RQ_INLINE void store_floats(float *p, wide x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
RQ_INLINE wide least(wide a, wide b) { return _mm256_min_pd(a, b); }
RQ_INLINE wide most(wide a, wide b) { return _mm256_max_pd(a, b); }

RQ_INLINE wide where_at_least(wide x, double least, wide then, wide other)
{
    return _mm256_blendv_pd(other, then, _mm256_cmp_pd(x, _mm256_set1_pd(least), _CMP_GE_OQ));
}

/* p * 2^k, k being the low bits of t: added to the exponent of p. */
RQ_INLINE wide times_power(wide p, wide t)
{
    const __m256i k = _mm256_slli_epi64(_mm256_castpd_si256(t), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), k));
}

/* 16 integers, four registers of 4 in order, plus the zero point: none above 255; packing brings to 0 what is below
 * it, also the -2^31 that a conversion makes of anything smaller. */
RQ_INLINE void store_bytes(uint8_t *out, __m128i q0, __m128i q1, __m128i q2, __m128i q3, int zero_point)
{
    const __m128i z = _mm_set1_epi16((short)zero_point);
    const __m128i low = _mm_adds_epi16(_mm_packs_epi32(q0, q1), z);
    const __m128i high = _mm_adds_epi16(_mm_packs_epi32(q2, q3), z);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(low, high));
}

RQ_INLINE void store_codes(uint8_t *out, const wide *q, int zero_point)
{
    store_bytes(out, _mm256_cvtpd_epi32(q[0]), _mm256_cvtpd_epi32(q[1]), _mm256_cvtpd_epi32(q[2]),
                _mm256_cvtpd_epi32(q[3]), zero_point);
}

RQ_INLINE narrow all_narrow(float x) { return _mm256_set1_ps(x); }
RQ_INLINE narrow load_narrow(const float *p) { return _mm256_loadu_ps(p); }
RQ_INLINE void store_narrow(float *p, narrow x) { _mm256_storeu_ps(p, x); }
RQ_INLINE narrow least_narrow(narrow a, narrow b) { return _mm256_min_ps(a, b); }
RQ_INLINE narrow most_narrow(narrow a, narrow b) { return _mm256_max_ps(a, b); }

RQ_INLINE narrow times_plus(narrow a, narrow b, narrow c) { return a * b + c; }
RQ_INLINE narrow size(narrow x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
RQ_INLINE int any_above(narrow x, float y) { return _mm256_movemask_ps(_mm256_cmp_ps(x, all_narrow(y), _CMP_GT_OQ)); }

RQ_INLINE float sum_of_narrow(narrow x)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

RQ_INLINE float largest_of_narrow(narrow x)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

RQ_INLINE narrow where_at_least_narrow(narrow x, narrow least, narrow then, narrow other)
{
    return _mm256_blendv_ps(other, then, _mm256_cmp_ps(x, least, _CMP_GE_OQ));
}

RQ_INLINE narrow times_power_narrow(narrow p, narrow t)
{
    const __m256i k = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), k));
}

RQ_INLINE void store_narrow_codes(uint8_t *out, const narrow *q, int zero_point)
{
    const __m256i q0 = _mm256_cvtps_epi32(q[0]), q1 = _mm256_cvtps_epi32(q[1]);
    store_bytes(out, _mm256_castsi256_si128(q0), _mm256_extracti128_si256(q0, 1), _mm256_castsi256_si128(q1),
                _mm256_extracti128_si256(q1, 1), zero_point);
}

#define RQ_SHORT
#include "islands_body.h"
#include "islands_tokens_body.h"

const struct rq_islands rq_islands_avx2 = {sums, squares, pointwise, quantize, softmax,
                                           moments, modulate, gelu, gated_add};

RQ_TARGET_END

#endif

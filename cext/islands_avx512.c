/* islands_avx512.c - the float islands with registers of 512 bits: islands_body.h, 8 doubles at a time.
 *
 * As islands_avx2.c. A block of 16 doubles becomes codes by two vcvtpd2dq, which round ties to even, and
 * one vpmovdb, which keeps the low byte of each of 16 integers.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "islands.h"
#include "target.h"

RQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")

enum { LANES = 8, FLOATS = 16 };
typedef __m512d wide;
typedef __m512 narrow;

RQ_INLINE wide all(double x) { return _mm512_set1_pd(x); }
RQ_INLINE wide load(const double *p) { return _mm512_loadu_pd(p); }
RQ_INLINE wide load_floats(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
RQ_INLINE wide load_ints(const int32_t *p) { return _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i *)p)); }
RQ_INLINE void store(double *p, wide x) { _mm512_storeu_pd(p, x); }
RQ_INLINE void store_floats(float *p, wide x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
RQ_INLINE wide least(wide a, wide b) { return _mm512_min_pd(a, b); }
RQ_INLINE wide most(wide a, wide b) { return _mm512_max_pd(a, b); }

RQ_INLINE wide where_at_least(wide x, double least, wide then, wide other)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, _mm512_set1_pd(least), _CMP_GE_OQ), other, then);
}

/* p * 2^k, k being the low bits of t: added to the exponent of p. */
RQ_INLINE wide times_power(wide p, wide t)
{
    const __m512i k = _mm512_slli_epi64(_mm512_castpd_si512(t), 52);
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(p), k));
}

/* None above 255; limited to 0 below, also the -2^31 that a conversion makes of anything smaller. */
RQ_INLINE void store_bytes(uint8_t *out, __m512i q, int zero_point)
{
    q = _mm512_max_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(zero_point)), _mm512_setzero_si512());
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(q));
}

RQ_INLINE void store_codes(uint8_t *out, const wide *q, int zero_point)
{
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtpd_epi32(q[0]));
    store_bytes(out, _mm512_inserti64x4(low, _mm512_cvtpd_epi32(q[1]), 1), zero_point);
}

RQ_INLINE narrow all_narrow(float x) { return _mm512_set1_ps(x); }
RQ_INLINE narrow load_narrow(const float *p) { return _mm512_loadu_ps(p); }
RQ_INLINE void store_narrow(float *p, narrow x) { _mm512_storeu_ps(p, x); }
RQ_INLINE narrow least_narrow(narrow a, narrow b) { return _mm512_min_ps(a, b); }
RQ_INLINE narrow most_narrow(narrow a, narrow b) { return _mm512_max_ps(a, b); }

RQ_INLINE narrow times_plus(narrow a, narrow b, narrow c) { return _mm512_fmadd_ps(a, b, c); }
RQ_INLINE narrow size(narrow x) { return _mm512_abs_ps(x); }
RQ_INLINE int any_above(narrow x, float y) { return _mm512_cmp_ps_mask(x, all_narrow(y), _CMP_GT_OQ) != 0; }

RQ_INLINE float sum_of_narrow(narrow x) { return _mm512_reduce_add_ps(x); }
RQ_INLINE float largest_of_narrow(narrow x) { return _mm512_reduce_max_ps(x); }

RQ_INLINE narrow where_at_least_narrow(narrow x, narrow least, narrow then, narrow other)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), other, then);
}

RQ_INLINE narrow times_power_narrow(narrow p, narrow t)
{
    const __m512i k = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), k));
}

RQ_INLINE void store_narrow_codes(uint8_t *out, const narrow *q, int zero_point)
{
    store_bytes(out, _mm512_cvtps_epi32(q[0]), zero_point);
}

#define RQ_SHORT
#include "islands_body.h"
#include "islands_tokens_body.h"

const struct rq_islands rq_islands_avx512 = {sums, squares, pointwise, quantize, softmax,
                                             moments, modulate, gelu, gated_add};

RQ_TARGET_END

#endif

/* islands_scalar.c - the float islands one number at a time: islands_body.h in plain C.
 *
 * Also what AArch64 runs. No library function is called: rounding to an integer is an addition, e^x a
 * polynomial, so that no library can make a difference between two machines.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "islands.h"
#include "target.h"

enum { LANES = 1, FLOATS = 1 };
typedef double wide;
typedef float narrow;

RQ_INLINE wide all(double x) { return x; }
RQ_INLINE wide load(const double *p) { return *p; }
RQ_INLINE wide load_floats(const float *p) { return *p; }
RQ_INLINE wide load_ints(const int32_t *p) { return *p; }
RQ_INLINE void store(double *p, wide x) { *p = x; }
RQ_INLINE void store_floats(float *p, wide x) { *p = (float)x; }

/* As the instructions vminpd and vmaxpd have it: the second one, unless the first is less (or more). */
RQ_INLINE wide least(wide a, wide b) { return a < b ? a : b; }
RQ_INLINE wide most(wide a, wide b) { return a > b ? a : b; }

RQ_INLINE wide where_at_least(wide x, double least, wide then, wide other) { return x >= least ? then : other; }

/* p * 2^k, k being the low bits of t: added to the exponent of p. */
RQ_INLINE wide times_power(wide p, wide t)
{
    uint64_t bits, k;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&k, &t, sizeof k);
    bits += k << 52;
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* Round to the nearest, ties to even: 1.5 * 2^52 + q leaves the integer in the low bits. q <= 255. */
RQ_INLINE void store_codes(uint8_t *out, const wide *q, int zero_point)
{
    for (int i = 0; i < RQ_BLOCK; i++) {
        const double t = (q[i] < -zero_point ? -zero_point : q[i]) + 0x1.8p52;
        uint64_t bits;
        memcpy(&bits, &t, sizeof bits);
        out[i] = (uint8_t)(bits + (uint64_t)zero_point);
    }
}

RQ_INLINE narrow all_narrow(float x) { return x; }
RQ_INLINE narrow load_narrow(const float *p) { return *p; }
RQ_INLINE void store_narrow(float *p, narrow x) { *p = x; }
RQ_INLINE narrow least_narrow(narrow a, narrow b) { return a < b ? a : b; }
RQ_INLINE narrow most_narrow(narrow a, narrow b) { return a > b ? a : b; }

RQ_INLINE void store_narrow_codes(uint8_t *out, const narrow *q, int zero_point)
{
    for (int i = 0; i < RQ_BLOCK; i++) {
        const double t = q[i] + 0x1.8p52; /* exact: q has 24 bits */
        uint64_t bits;
        memcpy(&bits, &t, sizeof bits);
        out[i] = (uint8_t)(bits + (uint64_t)zero_point);
    }
}

#include "islands_body.h"
#include "islands_tokens_body.h"

const struct rq_islands rq_islands_scalar = {sums, squares, pointwise, quantize, softmax,
                                             moments, modulate, gelu, gated_add};

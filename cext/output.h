/* output.h - fixed-point requantization of one number; see intmath.requantize in Python. */
#ifndef REFQUANT_OUTPUT_H
#define REFQUANT_OUTPUT_H

#include "impl.h"

/* p / 2^shift to the nearest integer, ties to even. With h = 2^(shift-1) - 1, adding h lifts
 * everything above a tie over the next integer, and adding 1 more where the floor is odd lifts the tie
 * itself: it then goes to the even neighbour above. Shift 0 rounds nothing. |p| <= 2^62: no overflow.
 * `>>` of a negative number is arithmetic in every compiler this code meets. */
static inline int64_t rq_rounding_shift(int64_t p, int shift)
{
    if (shift == 0)
        return p;
    return (p + ((int64_t)1 << (shift - 1)) - 1 + ((p >> shift) & 1)) >> shift;
}

static inline uint8_t rq_requantize(int32_t sum, int32_t mantissa, int32_t shift, const struct rq_output *y)
{
    const int64_t code = rq_rounding_shift((int64_t)sum * mantissa, shift) + y->zero_point;
    return (uint8_t)(code < y->qmin ? y->qmin : code > y->qmax ? y->qmax : code);
}

#endif

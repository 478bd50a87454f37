/* output.c - what becomes of a sum before it is stored; the definition, in plain C.
 *
 *     RQ_FLOAT32   the next operation is a float one (normalisation, SiLU): scale, add the bias and,
 *                  where two branches meet, the other branch. One rounding after each operation and no
 *                  fused multiply-add (-ffp-contract=off), so that NumPy gives the same bits.
 *     RQ_UINT8     the next operation is an integer one: multiply by mantissa / 2^shift in 64 bits,
 *                  round to the nearest, ties to even, add the zero point, limit. No float at all.
 *
 * Each function serves one row of a tile: sums[0 .. columns-1] of row `row` and outputs `first`,
 * first + 1, ... A sum includes bias and zero points already.
 */
#include <stddef.h>

#include "impl.h"
#include "output.h"

void rq_dequantize_scalar(const struct rq_output *y, const int32_t *sums, int64_t row, int64_t first, int columns)
{
    float *const out = (float *)y->data + row * y->ld + first;
    const float *const residual = y->residual ? y->residual + row * y->residual_ld + first : NULL;
    for (int j = 0; j < columns; j++) {
        float value = (float)sums[j] * y->scale[first + j];
        if (y->bias)
            value += y->bias[first + j];
        if (residual)
            value += residual[j];
        out[j] = value;
    }
}

void rq_requantize_scalar(const struct rq_output *y, const int32_t *sums, int64_t row, int64_t first, int columns)
{
    uint8_t *const out = (uint8_t *)y->data + row * y->ld + first;
    for (int j = 0; j < columns; j++)
        out[j] = rq_requantize(sums[j], y->mantissa[first + j], y->shift[first + j], y);
}

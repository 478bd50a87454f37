/* output.c - what becomes of a sum before it is stored; the definition, in plain C.
 *
 *     RQ_FLOAT32   the next operation is a float one (normalisation, SiLU): scale, add the bias and,
 *                  where two branches meet, the other branch. One rounding after each operation and no
 *                  fused multiply-add (-ffp-contract=off), so that NumPy gives the same bits.
 *     RQ_UINT8     the next operation is an integer one: multiply by mantissa / 2^shift in 64 bits,
 *                  round to the nearest, ties to even, add the zero point, limit. No float at all.
 *
 * Each function serves a tile: sums[i * RQ_TILE_WIDTH + j] belongs to row at[i] and output
 * `first` + j. A sum includes bias and zero points already.
 */
#include "impl.h"

void rq_dequantize_scalar(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                          int columns)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            float value = (float)sums[i * RQ_TILE_WIDTH + j] * y->scale[first + j];
            if (y->bias)
                value += y->bias[first + j];
            if (y->residual)
                value += y->residual[at[i] * y->residual_ld + first + j];
            ((float *)y->data)[at[i] * y->ld + first + j] = value;
        }
}

void rq_correct_scalar(int32_t *sums, int rows, const int32_t *row_sums, const int32_t *zero_points, int columns)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            int32_t *const sum = sums + i * RQ_TILE_WIDTH + j;
            *sum = (int32_t)((uint32_t)*sum - (uint32_t)zero_points[j] * (uint32_t)row_sums[i]);
        }
}

/* p / 2^shift to the nearest integer, ties to even. With h = 2^(shift-1) - 1, adding h lifts everything
 * above a tie over the next integer, and adding 1 more where the floor is odd lifts the tie itself: it
 * goes to the even neighbour above. A shift of 0 rounds nothing. |p| <= 2^62: no overflow. `>>` of a
 * negative number is arithmetic in every compiler that this code meets. */
static int64_t rounding_shift(int64_t p, int shift)
{
    if (shift == 0)
        return p;
    return (p + ((int64_t)1 << (shift - 1)) - 1 + ((p >> shift) & 1)) >> shift;
}

void rq_requantize_scalar(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                          int columns)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            const int64_t product = (int64_t)sums[i * RQ_TILE_WIDTH + j] * y->mantissa[first + j];
            const int64_t code = rounding_shift(product, y->shift[first + j]) + y->zero_point;
            ((uint8_t *)y->data)[at[i] * y->ld + first + j] =
                (uint8_t)(code < y->qmin ? y->qmin : code > y->qmax ? y->qmax : code);
        }
}

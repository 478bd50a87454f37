/* gemm_scalar.c - a tile of the integer matrix product, as a sentence.
 *
 *     C[i,j] = sum over k of A[i,k] * B[k,j]        A: uint8, B: int8, C: int32
 *
 *                k ->                 j ->                j ->
 *           A  [ a0 a1 a2 .. ] i    B [ b0 ]         C  [ . . c . . ] i      c = a . b
 *                                     [ b1 ] k
 *                                     [ .. ]
 *
 * Why the types are enough. uint8 * int8 lies in [-255*128, 255*127] = [-32640, 32385], and C's own
 * rules widen both factors to int before they multiply: nothing is lost. The sum is kept in uint32_t,
 * which C lets wrap, and read as int32: exact whenever the final value fits, whatever happens on the
 * way, as it is in the registers of the wider kernels. Integer addition is associative, hence any
 * order of summation gives these very bits: that is what allows the wider kernels to be compared with
 * this one for equality, not for closeness.
 *
 * Zero points do not appear. They leave the sum by algebra,
 *     sum (a-za)(b-zb) = sum ab - za sum b - zb sum a + k za zb,
 * and what does not depend on a arrives as add[j].
 *
 * This file is compiled without auto-vectorization, so that the time of `scalar` is the time of what
 * is written here.
 */
#include "impl.h"

/* Where pack.c put the codes of output j in step number `step`: k = 0..7 of that step. */
static int code_s8(const int8_t *panel, int64_t step, int64_t j, int64_t k)
{
    return panel[(step * 2 + k / 4) * 64 + j * 4 + k % 4];
}

static int code_s4(const int8_t *panel, int64_t step, int64_t j, int64_t k)
{
    const int half = (panel[step * 64 + j * 4 + k % 4] >> (k / 4 * 4)) & 15;
    return half < 8 ? half : half - 16;
}

static void tile(const struct rq_tile *t, int rows, int64_t step_bytes,
                 int (*code)(const int8_t *, int64_t, int64_t, int64_t))
{
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < t->columns; j++) {
            const int8_t *panel = t->b + j / RQ_PANEL * t->panel_bytes;
            uint32_t sum = (uint32_t)t->add[j];
            for (int64_t s = 0; s < t->segments; s++) {
                const uint8_t *a = t->a[i] + s * t->segment_stride;
                for (int64_t k = 0; k < t->steps * RQ_STEP; k++)
                    sum += (uint32_t)(a[k] * code(panel, k / RQ_STEP, j % RQ_PANEL, k % RQ_STEP));
                panel += t->steps * step_bytes + t->gap;
            }
            t->c[t->at[i] * t->ldc + j] = (int32_t)sum;
        }
    }
}

void rq_tile_s8_scalar(const struct rq_tile *t, int rows, int panels)
{
    (void)panels; /* t->columns says it more precisely */
    tile(t, rows, 128, code_s8);
}

void rq_tile_s4_scalar(const struct rq_tile *t, int rows, int panels)
{
    (void)panels;
    tile(t, rows, 64, code_s4);
}

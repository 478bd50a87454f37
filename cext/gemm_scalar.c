/* gemm_scalar.c - the integer matrix product, as a sentence.
 *
 *     C[m,n] = sum over k of A[m,k] * B[n,k]        A: uint8, B: int8, C: int32
 *
 * B is stored by output channel, one row for each column of C. Both operands are thus read
 * along k, and one element of C is the dot product of two rows:
 *
 *              k ->                 k ->                    n ->
 *         A  [ a0 a1 a2 .. ] m  B [ b0 b1 b2 .. ] n     C [ . . c . . ] m     c = a . b
 *
 * Why the types are enough. uint8 * int8 lies in [-255*128, 255*127] = [-32640, 32385], and
 * C's own rules widen both factors to int before they multiply: nothing is lost. The sum of
 * k <= 65793 such terms fits int32 (dispatch.c refuses a larger k). Integer addition is
 * associative, hence any order of summation gives these very bits: that is what allows the
 * wider kernels to be compared with this one for equality, not for closeness.
 *
 * Zero points do not appear. They leave the sum by algebra,
 *     sum (a-za)(b-zb) = sum ab - za sum b - zb sum a + k za zb,
 * and are added outside of the kernel.
 *
 * This file is compiled without auto-vectorization, so that the time of `scalar` is the time
 * of what is written here.
 */
#include "impl.h"

void gemm_u8s8s32_scalar(int64_t m, int64_t n, int64_t k,
                         const uint8_t *a, int64_t lda,
                         const int8_t *b, int64_t ldb,
                         int32_t *c, int64_t ldc)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            int32_t sum = 0;
            for (int64_t p = 0; p < k; p++)
                sum += a[i * lda + p] * b[j * ldb + p];
            c[i * ldc + j] = sum;
        }
    }
}

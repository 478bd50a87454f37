/* impl.h - the form of a micro-kernel; private to the C core.
 *
 * A micro-kernel computes and checks nothing: dispatch.c has refused bad sizes, strides and
 * pointers before, in one place for all instruction sets.
 *
 * The name says the types in the order A, B, C and ends with the instruction set:
 * gemm_u8s8s32_scalar multiplies uint8 by int8 into int32 with plain C.
 */
#ifndef REFQUANT_IMPL_H
#define REFQUANT_IMPL_H

#include <stdint.h>

typedef void gemm_u8s8s32_fn(int64_t m, int64_t n, int64_t k,
                             const uint8_t *a, int64_t lda,
                             const int8_t *b, int64_t ldb,
                             int32_t *c, int64_t ldc);

gemm_u8s8s32_fn gemm_u8s8s32_scalar;

#endif

/* refquant.h - the whole interface of the C core.
 *
 * The text between the two marks is also what Python sees: build_ext.py hands it to cffi
 * unchanged, so that every prototype is written once. It may hold only what cffi's parser
 * reads: declarations, enums and integer #defines.
 *
 * How the pieces fit, in reading order:
 *
 *     gemm_scalar.c   the sentence: what an integer matrix product is, in three loops
 *     impl.h          the form every micro-kernel has
 *     cpu.c           what this processor can execute, as a bit mask
 *     dispatch.c      one table: kernel name, bits it needs, functions; and the argument checks
 *
 * Habits kept everywhere: no function prints, aborts, allocates for its caller or keeps a
 * pointer after it returns. A function that can be misused returns RQ_OK or a negative code.
 */
#ifndef REFQUANT_H
#define REFQUANT_H

#include <stdint.h>

/* cffi: begin */

/* Raised whenever a declaration below changes its meaning, so that Python refuses a compiled
 * module that is older than its sources. */
#define RQ_ABI_VERSION 1
int rq_abi_version(void);

/* With which compiler and flags this module was built: the first question of a bug report. */
const char *rq_compiler(void);
const char *rq_compiler_flags(void);

enum rq_status {
    RQ_OK = 0,
    RQ_ERR_KERNEL = -1,  /* no such row in the kernel table */
    RQ_ERR_SIZE = -2,    /* a negative size, or a row stride shorter than its row */
    RQ_ERR_RANGE = -3,   /* k > RQ_MAX_K: the int32 sum could overflow */
    RQ_ERR_NULL = -4     /* a null pointer where elements are to be read or written */
};

/* One bit for each instruction set that a kernel may need. A bit says that the processor
 * has the instructions and that the operating system saves the registers. */
enum rq_cpu {
    RQ_CPU_AVX2 = 1,
    RQ_CPU_AVXVNNI = 2,
    RQ_CPU_AVX512VNNI = 4,  /* with AVX-512 F, BW and VL */
    RQ_CPU_NEONDOT = 8
};
uint32_t rq_cpu_features(void);

/* The kernel table, slowest row first: row 0 is `scalar`. Kernel `row` may be run when
 * (rq_kernel_needs(row) & ~rq_cpu_features()) == 0; the caller checks that, once. */
int rq_kernel_count(void);
const char *rq_kernel_name(int row);   /* NULL: no such row */
uint32_t rq_kernel_needs(int row);     /* UINT32_MAX: no such row */

/* C[m,n] = sum over k of A[m,k] B[n,k], exactly.
 * a: (m, k) uint8; b: (n, k) int8; c: (m, n) int32; lda, ldb, ldc: elements from one row to
 * the next. c must not overlap a or b.
 * A product lies in [-255*128, 255*127], so that k <= (2^31 - 1) / (255*128) = 65793 terms
 * fit int32 whatever the data. */
#define RQ_MAX_K 65793
int rq_gemm_u8s8s32(int row, int64_t m, int64_t n, int64_t k,
                    const uint8_t *a, int64_t lda,
                    const int8_t *b, int64_t ldb,
                    int32_t *c, int64_t ldc);

/* cffi: end */

#endif

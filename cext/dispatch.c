/* dispatch.c - one table of kernels, and the one door to them.
 *
 * A kernel is a row: its name (the same string in file name, function name, Python and
 * REFQUANT_ISA), the processor bits it needs, and its functions. Slowest row first, hence
 * the last row that the processor can run is the one to use. To add an instruction set is
 * to add a file and a row.
 *
 * Python chooses a row and passes its number with each call: no state lives here, and
 * calls from several threads cannot disturb each other.
 */
#include <stddef.h>

#include "impl.h"
#include "refquant.h"

#ifndef RQ_FLAGS
#define RQ_FLAGS "unknown" /* build_ext.py passes the real ones */
#endif

#if defined(__clang__)
#define RQ_COMPILER __VERSION__ /* begins with "Clang" already */
#elif defined(__GNUC__)
#define RQ_COMPILER "gcc " __VERSION__
#else
#define RQ_COMPILER "unknown"
#endif

static const struct {
    const char *name;
    uint32_t needs;
    gemm_u8s8s32_fn *gemm_u8s8s32;
} kernels[] = {
    {"scalar", 0, gemm_u8s8s32_scalar},
};

enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

static int is_row(int row) { return row >= 0 && row < KERNEL_COUNT; }

int rq_abi_version(void) { return RQ_ABI_VERSION; }
const char *rq_compiler(void) { return RQ_COMPILER; }
const char *rq_compiler_flags(void) { return RQ_FLAGS; }

int rq_kernel_count(void) { return KERNEL_COUNT; }
const char *rq_kernel_name(int row) { return is_row(row) ? kernels[row].name : NULL; }
uint32_t rq_kernel_needs(int row) { return is_row(row) ? kernels[row].needs : UINT32_MAX; }

int rq_gemm_u8s8s32(int row, int64_t m, int64_t n, int64_t k,
                    const uint8_t *a, int64_t lda,
                    const int8_t *b, int64_t ldb,
                    int32_t *c, int64_t ldc)
{
    if (!is_row(row))
        return RQ_ERR_KERNEL;
    if (m < 0 || n < 0 || k < 0 || lda < k || ldb < k || ldc < n)
        return RQ_ERR_SIZE;
    if (k > RQ_MAX_K)
        return RQ_ERR_RANGE;
    if (m == 0 || n == 0)
        return RQ_OK; /* nothing to write */
    if (!c || (k > 0 && (!a || !b)))
        return RQ_ERR_NULL;

    kernels[row].gemm_u8s8s32(m, n, k, a, lda, b, ldb, c, ldc);
    return RQ_OK;
}

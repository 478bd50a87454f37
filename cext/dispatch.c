/* dispatch.c - one table of kernels.
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

static const struct rq_kernel kernels[] = {
    {"scalar", 0, 12, 0, rq_tile_s8_scalar, rq_tile_s4_scalar, rq_dequantize_scalar, rq_requantize_scalar,
     rq_correct_scalar, NULL},
#if defined(__x86_64__) && defined(__GNUC__)
    {"avx2", RQ_CPU_AVX2, 6, 0, rq_tile_s8_avx2, rq_tile_s4_avx2, rq_dequantize_avx2, rq_requantize_avx2,
     rq_correct_avx2, rq_peak_avx2},
    {"avxvnni", RQ_CPU_AVX2 | RQ_CPU_AVXVNNI, 6, 0, rq_tile_s8_avxvnni, rq_tile_s4_avxvnni,
     rq_dequantize_avx2, rq_requantize_avx2, rq_correct_avx2, rq_peak_avxvnni},
    {"avx512vnni", RQ_CPU_AVX512VNNI, 12, 0, rq_tile_s8_avx512vnni, rq_tile_s4_avx512vnni,
     rq_dequantize_avx512, rq_requantize_avx512, rq_correct_avx2, rq_peak_avx512vnni},
#endif
#if defined(__aarch64__) && defined(__GNUC__)
    {"neondot", RQ_CPU_NEONDOT, 8, 128, rq_tile_s8_neondot, rq_tile_s4_neondot, rq_dequantize_scalar,
     rq_requantize_scalar, rq_correct_scalar, rq_peak_neondot},
#endif
};

enum { KERNEL_COUNT = sizeof kernels / sizeof kernels[0] };

const struct rq_kernel *rq_kernel_row(int row)
{
    return row >= 0 && row < KERNEL_COUNT ? &kernels[row] : NULL;
}

int rq_abi_version(void) { return RQ_ABI_VERSION; }
const char *rq_compiler(void) { return RQ_COMPILER; }
const char *rq_compiler_flags(void) { return RQ_FLAGS; }

int rq_kernel_count(void) { return KERNEL_COUNT; }

const char *rq_kernel_name(int row)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    return kernel ? kernel->name : NULL;
}

uint32_t rq_kernel_needs(int row)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    return kernel ? kernel->needs : UINT32_MAX;
}

int64_t rq_peak(int row, int64_t rounds)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    if (!kernel || (kernel->needs & ~rq_cpu_features()))
        return RQ_ERR_KERNEL;
    return kernel->peak ? kernel->peak(rounds) : 0;
}

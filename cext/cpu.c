/* cpu.c - what can this processor execute?
 *
 * The question is asked at run time, because a compiled module travels: the machine that
 * runs it is rarely the machine that built it.
 *
 * x86-64. The instruction `cpuid` answers from numbered leaves, one bit a feature:
 *
 *     leaf  1, ecx bit 27   OSXSAVE: the system manages registers through xsave
 *     leaf  1, ecx bit 12   FMA (the output stage of AVX2 kernels uses it)
 *     leaf  7, ebx bit  5   AVX2
 *     leaf  7, ebx bit 16   AVX512F   bit 17  AVX512DQ   bit 30  AVX512BW   bit 31  AVX512VL
 *     leaf  7, ecx bit 11   AVX512_VNNI (vpdpbusd on 512 bits)
 *     leaf  7.1, eax bit 4  AVX-VNNI    (vpdpbusd on 256 bits, without AVX-512)
 *
 * A processor that has an instruction is half of the answer: wide registers can be used only
 * where the operating system saves them at a task switch. `xgetbv` reads XCR0, in which bits
 * 1, 2 (xmm, ymm) and 5, 6, 7 (the AVX-512 state) say which registers it saves.
 *
 * AArch64 Linux. The kernel has asked already and passes its answer in the auxiliary vector.
 *
 * Anything else: no bit, hence the scalar kernel. Slower, and never wrong.
 */
#include <stdatomic.h>

#include "refquant.h"

#if defined(__x86_64__)

#include <cpuid.h>

#define BIT(word, n) (((word) >> (n)) & 1u)

static uint32_t xcr0(void)
{
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static uint32_t ask(void)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !BIT(c, 27))
        return 0; /* xgetbv would be an illegal instruction */

    const int fma = BIT(c, 12);
    const uint32_t ymm_state = 0x06, zmm_state = 0xe6;
    const uint32_t saved = xcr0();
    if ((saved & ymm_state) != ymm_state || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;

    uint32_t features = 0;
    if (BIT(b, 5) && fma)
        features |= RQ_CPU_AVX2;
    if ((saved & zmm_state) == zmm_state
        && BIT(b, 16) && BIT(b, 17) && BIT(b, 30) && BIT(b, 31) && BIT(c, 11))
        features |= RQ_CPU_AVX512VNNI;

    const uint32_t last_subleaf = a;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && BIT(a, 4))
        features |= RQ_CPU_AVXVNNI;
    return features;
}

#elif defined(__aarch64__) && defined(__linux__)

#include <asm/hwcap.h>
#include <sys/auxv.h>

static uint32_t ask(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) ? RQ_CPU_NEONDOT : 0;
}

#elif defined(__aarch64__) && defined(__APPLE__)

static uint32_t ask(void)
{
    return RQ_CPU_NEONDOT; /* every Apple processor that runs macOS has it */
}

#else

static uint32_t ask(void)
{
    return 0;
}

#endif

uint32_t rq_cpu_features(void)
{
    /* Asked once: in a virtual machine each cpuid is a trip to the host, some 25 microseconds in all. */
    static atomic_uint answer;
    const uint32_t known = 1u << 31;
    if (!(atomic_load_explicit(&answer, memory_order_relaxed) & known))
        atomic_store_explicit(&answer, ask() | known, memory_order_relaxed);
    return atomic_load_explicit(&answer, memory_order_relaxed) & ~known;
}

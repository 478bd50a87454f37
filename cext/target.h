/* target.h - let a file use an instruction set without compiler flags of its own.
 *
 * Everything between RQ_TARGET_BEGIN("avx2") and RQ_TARGET_END may be compiled to those instructions;
 * the rest of the module stays runnable on every processor. One flag list thus serves all files.
 */
#ifndef REFQUANT_TARGET_H
#define REFQUANT_TARGET_H

#define RQ_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define RQ_TARGET_BEGIN(isa) RQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define RQ_TARGET_END RQ_PRAGMA(clang attribute pop)
#define RQ_UNROLL RQ_PRAGMA(clang loop unroll(full))
#elif defined(__GNUC__)
#define RQ_TARGET_BEGIN(isa) RQ_PRAGMA(GCC push_options) RQ_PRAGMA(GCC target(isa))
#define RQ_TARGET_END RQ_PRAGMA(GCC pop_options)
#define RQ_UNROLL RQ_PRAGMA(GCC unroll 16)
#endif

/* RQ_UNROLL before a loop of a constant number of rounds, at most 16, writes it out; only then do its
 * arrays become registers. clang reads `GCC unroll 16` as "by 16, or not at all": a loop of 5 rounds
 * would stay, and its accumulators in memory. */

/* Inlined where its constant arguments are known: one source text, many unrolled kernels. */
#define RQ_INLINE static inline __attribute__((always_inline))

/* Here the value is in a register, as written. Two habits of gcc 12 make it necessary: it regroups
 * acc + m0 + m1 as acc + (m0 + m1), so that a dozen products wait for their neighbours and half of the
 * accumulators go to memory; and it moves what follows a loop (the shift of the 4-bit kernels) into its
 * last round, and 21 of 24 accumulators to memory with it. */
#if defined(__aarch64__)
#define RQ_KEEP(value) __asm__ volatile("" : "+w"(value))
#else
#define RQ_KEEP(value) __asm__ volatile("" : "+v"(value))
#endif

/* From here on, what `pointer` points to is read again and not kept in registers. */
#define RQ_FORGET(pointer) __asm__ volatile("" : "+r"(pointer))

#endif

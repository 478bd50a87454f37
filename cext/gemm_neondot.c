/* gemm_neondot.c - the tile of gemm_scalar.c in the 128-bit registers of AArch64.
 *
 * The instruction. sdot C, B, A[g] takes 16 bytes of B and 4 bytes of A, group g of its register, and
 * adds to each of the 4 int32 lanes of C the sum of four products. 16 multiplications, exact modulo
 * 2^32; to broadcast the group of A costs nothing.
 *
 * The algebra. sdot reads both as signed, and A is not. The bits of a ^ 0x80, read as signed, are
 * a - 128, and
 *
 *     sum (a - 128) b  =  sum a b  -  128 sum b
 *
 * The sums of b are known from packing, and conv.c adds their 128 fold to `add`, as it subtracts the zero
 * point's: `offset` in the kernel table tells it to.
 *
 * The tile. 8 rows x half a panel, 8 outputs, = 16 accumulators; 8 registers hold A, 2 hold B, 1 the bytes
 * 0x80, and 1 a mask for the codes of 4 bits: 28 of 32.
 *
 *             B: 4 k x 4 outputs     B: 4 k x 4 outputs
 *             [ o0  o1  o2  o3 ]     [ o4  o5  o6  o7 ]     and as many for the next 4 k
 *     a0 ->   [ acc 0,0        ]     [ acc 0,1        ]
 *      :      [   :            ]     [   :            ]     a_i: 8 bytes of row i = two groups of 4 k
 *     a7 ->   [ acc 7,0        ]     [ acc 7,1        ]
 *
 * Why this shape. A step of 8 k is 512 multiplications in 10 loads, 32 sdot and 8 eor: 20 cycles where
 * two vector operations start in a cycle (22 with 4 bits), 16 if A were signed. (Cycles by llvm-mca's
 * model of the Neoverse N1, not measured.)
 *
 * Tails. Fewer rows: the same text with another constant, 8 kernels in all. Fewer outputs: pack.c
 * filled the panel with zeros; a half without outputs is not computed, the other one is stored by way
 * of a spare row. k: the packed zeros of the last step.
 *
 * Why not smull and smlal, the way without sdot: they add products in 16 bits, and (-128)(-128) twice,
 * 32768, becomes -32768. Why not usdot, which takes A as it is: it came later (i8mm, Armv8.6; neither
 * the Neoverse N1 nor the Apple M1 has it), and would be a kernel of its own.
 */
#if defined(__aarch64__) && defined(__GNUC__)

#include <arm_neon.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")

enum { ROWS = 8, OUTPUTS = 8 };  /* of a tile of this file */

RQ_INLINE int8x8_t load_row(const uint8_t *a)
{
    return vreinterpret_s8_u8(veor_u8(vld1_u8(a), vdup_n_u8(0x80)));
}

/* Store the first `columns` of 8 sums. */
RQ_INLINE void store(int32_t *c, const int32x4_t low, const int32x4_t high, const int columns)
{
    int32_t spare[OUTPUTS], *const to = columns < OUTPUTS ? spare : c;
    vst1q_s32(to, low);
    vst1q_s32(to + 4, high);
    if (columns < OUTPUTS)
        memcpy(c, spare, sizeof *c * (size_t)columns);
}

/* Outputs first .. first + 7 of the tile, that is one half of a panel. */
RQ_INLINE void half_panel(const struct rq_tile *t, const int first, const int rows, const int bits)
{
    int32x4_t acc[ROWS][2];
    int8x8_t a[ROWS];
    const uint8_t *row[ROWS];
    const int8_t *b = t->b + first / RQ_PANEL * t->panel_bytes + first % RQ_PANEL * 4;

    RQ_UNROLL
    for (int i = 0; i < rows; i++) {
        row[i] = t->a[i];
        acc[i][0] = acc[i][1] = vdupq_n_s32(0);
    }

    for (int64_t s = 0; s < t->segments; s++) {
        const int64_t begin = s * t->segment_stride, end = begin + t->steps * RQ_STEP;
        for (int64_t k = begin; k < end; k += RQ_STEP) {
            RQ_UNROLL
            for (int i = 0; i < rows; i++)
                a[i] = load_row(row[i] + k);
            RQ_UNROLL
            for (int j = 0; j < 2; j++) {
                const int8x16_t both = vld1q_s8(b + 16 * j);
                /* halves of bytes, brought to the top: 16 times the code, see pack.c */
                const int8x16_t b0 = bits == 8 ? both : vshlq_n_s8(both, 4);
                const int8x16_t b1 = bits == 8 ? vld1q_s8(b + 64 + 16 * j) : vandq_s8(both, vdupq_n_s8(-16));
                RQ_UNROLL
                for (int i = 0; i < rows; i++)
                    acc[i][j] = vdotq_lane_s32(acc[i][j], b0, a[i], 0);
                RQ_UNROLL
                for (int i = 0; i < rows; i++) {
                    acc[i][j] = vdotq_lane_s32(acc[i][j], b1, a[i], 1);
                    RQ_KEEP(acc[i][j]); /* gcc 12 else moves 6 sums between registers, 25 cycles */
                }
            }
            b += 16 * bits;
        }
        b += t->gap;
    }
    RQ_UNROLL
    for (int i = 0; i < rows; i++) {
        int32x4_t sum[2];
        RQ_UNROLL
        for (int j = 0; j < 2; j++) {
            sum[j] = bits == 8 ? acc[i][j] : vshrq_n_s32(acc[i][j], 4); /* it was 16 times the sum */
            sum[j] = vaddq_s32(sum[j], vld1q_s32(t->add + first + 4 * j));
        }
        store(t->c + t->at[i] * t->ldc + first, sum[0], sum[1], t->columns - first);
    }
}

/* One kernel for each number of rows. */
#define HALVES(rows, bits)                                                                            \
    case rows:                                                                                        \
        for (int first = 0; first < t->columns; first += OUTPUTS)                                     \
            half_panel(t, first, rows, bits);                                                         \
        break;
#define ALL_ROWS(bits)                                                                                \
    HALVES(1, bits) HALVES(2, bits) HALVES(3, bits) HALVES(4, bits)                                   \
    HALVES(5, bits) HALVES(6, bits) HALVES(7, bits) HALVES(8, bits)

void rq_tile_s8_neondot(const struct rq_tile *t, int rows, int panels)
{
    (void)panels; /* t->columns says it more precisely */
    switch (rows) {
        ALL_ROWS(8)
    }
}

void rq_tile_s4_neondot(const struct rq_tile *t, int rows, int panels)
{
    (void)panels;
    switch (rows) {
        ALL_ROWS(4)
    }
}

int64_t rq_peak_neondot(int64_t rounds)
{
    int32x4_t acc[16];
    const int8x16_t a = vdupq_n_s8(1);
    RQ_UNROLL
    for (int i = 0; i < 16; i++)
        acc[i] = vdupq_n_s32(0);
    for (int64_t r = 0; r < rounds; r++)
        RQ_UNROLL
        for (int i = 0; i < 16; i++) {
            acc[i] = vdotq_s32(acc[i], a, a);
            RQ_KEEP(acc[i]);
        }
    return rounds * 16 * 16;
}

RQ_TARGET_END

#endif

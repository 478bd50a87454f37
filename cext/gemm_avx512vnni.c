/* gemm_avx512vnni.c - the tile of gemm_scalar.c in 512-bit registers.
 *
 * The instruction. vpdpbusd C, A, B takes 64 bytes of A (unsigned) and of B (signed) and adds to each
 * of the 16 int32 lanes of C the sum of four products. 64 multiplications, exact: the four products
 * are summed in 32 bits and added without saturation (vpdpbusds would saturate).
 *
 * The tile. 12 rows x 2 panels of 16 outputs = 24 accumulators; 2 registers hold B, 1 holds A:
 *
 *            B: 4 k x 16 outputs   B: 4 k x 16 outputs
 *            [ o0 o1 ....... o15 ] [ o16 ......... o31 ]      a register each, loaded once per 4 k
 *     a0 ->  [ acc 0,0           ] [ acc 0,1           ]
 *     a1 ->  [ acc 1,0           ] [ acc 1,1           ]      a_i: 4 bytes of row i, broadcast to all
 *      :     [   :               ] [   :               ]           16 lanes by the load itself
 *     a11 -> [ acc 11,0          ] [ acc 11,1          ]
 *
 * Why this shape. Each accumulator waits some 4 cycles for its last sum, hence at least 8 of them must
 * be in flight where two vpdpbusd start in a cycle. 14 loads feed 24 vpdpbusd, so that neither one nor
 * two loads a cycle hold them up; and a panel pair, read from the second cache for each 12 rows, costs
 * 128 bytes in 12 to 24 cycles.
 *
 * Tails. Fewer rows: the same text with another constant, 12 kernels in all, so that no row is
 * computed in vain. Fewer outputs: pack.c filled the panel with zeros, a mask guards the store. k: the
 * packed zeros of the last step.
 *
 * Why not vpmaddubsw, the shorter way on older processors: it adds two products in 16 bits with
 * saturation, 255*127 + 255*127 = 64770 becomes 32767.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

/* Rows whose pointers are kept in registers, of which 12 pointers and the loop would need more than there
 * are. The other pointers are read from the first cache each time, which costs nothing; gcc 12, left alone,
 * keeps them in vector registers instead, and moves them through the units that multiply: 6 %. */
enum { NEAR = 8 };

RQ_INLINE __m512i broadcast4(const uint8_t *a)
{
    int32_t four;
    memcpy(&four, a, 4);
    return _mm512_set1_epi32(four);
}

/* The register of group g (0 or 1) of a panel's step. */
RQ_INLINE __m512i load_group(const int8_t *b, const int bits, const int g)
{
    if (bits == 8)
        return _mm512_load_si512(b + 64 * g);
    /* halves of bytes, brought to the top: 16 times the code, see pack.c */
    const __m512i both = _mm512_load_si512(b), top = _mm512_set1_epi8((char)0xf0);
    return _mm512_and_si512(g ? both : _mm512_slli_epi16(both, 4), top);
}

RQ_INLINE void tile(const struct rq_tile *t, const int rows, const int panels, const int bits)
{
    __m512i acc[RQ_MAX_ROWS][RQ_PAIR], b[RQ_PAIR];
    const uint8_t *near[NEAR], *const *far = t->a;
    const int8_t *panel = t->b;
    const int64_t panel_bytes = t->panel_bytes, step_bytes = 16 * bits;

    RQ_UNROLL
    for (int i = 0; i < rows; i++) {
        if (i < NEAR)
            near[i] = far[i];
        RQ_UNROLL
        for (int j = 0; j < panels; j++)
            acc[i][j] = _mm512_setzero_si512();
    }
    for (int64_t s = 0; s < t->segments; s++) {
        const int64_t begin = s * t->segment_stride, end = begin + t->steps * RQ_STEP;
        for (int64_t k = begin; k < end; k += RQ_STEP) {
            RQ_UNROLL
            for (int g = 0; g < 2; g++) {
                RQ_FORGET(far);
                RQ_UNROLL
                for (int j = 0; j < panels; j++)
                    b[j] = load_group(panel + j * panel_bytes, bits, g);
                RQ_UNROLL
                for (int i = 0; i < rows; i++) {
                    const __m512i four = broadcast4((i < NEAR ? near[i] : far[i]) + k + 4 * g);
                    RQ_UNROLL
                    for (int j = 0; j < panels; j++) {
                        acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], four, b[j]);
                        RQ_KEEP(acc[i][j]);
                    }
                }
            }
            panel += step_bytes;
        }
        panel += t->gap;
    }
    int32_t *const c = t->c; /* in registers: for all that gcc knows, each store changes *t */
    const int64_t ldc = t->ldc, *const at = t->at;
    RQ_UNROLL
    for (int j = 0; j < panels; j++) {
        const int columns = t->columns - j * RQ_PANEL;
        const __m512i add = _mm512_loadu_si512(t->add + j * RQ_PANEL);
        const __mmask16 store = columns >= RQ_PANEL ? 0xffff : (__mmask16)((1u << columns) - 1);
        RQ_UNROLL
        for (int i = 0; i < rows; i++) {
            const __m512i sum = bits == 8 ? acc[i][j] : _mm512_srai_epi32(acc[i][j], 4);
            _mm512_mask_storeu_epi32(c + at[i] * ldc + j * RQ_PANEL, store, _mm512_add_epi32(sum, add));
        }
    }
}

/* One kernel for each number of rows and panels. */
#define ROWS(rows, bits)                                                                              \
    case rows:                                                                                        \
        if (panels == 1)                                                                              \
            tile(t, rows, 1, bits);                                                                   \
        else                                                                                          \
            tile(t, rows, 2, bits);                                                                   \
        break;
#define ALL_ROWS(bits)                                                                                \
    ROWS(1, bits) ROWS(2, bits) ROWS(3, bits) ROWS(4, bits) ROWS(5, bits) ROWS(6, bits)               \
    ROWS(7, bits) ROWS(8, bits) ROWS(9, bits) ROWS(10, bits) ROWS(11, bits) ROWS(12, bits)

void rq_tile_s8_avx512vnni(const struct rq_tile *t, int rows, int panels)
{
    switch (rows) {
        ALL_ROWS(8)
    }
}

void rq_tile_s4_avx512vnni(const struct rq_tile *t, int rows, int panels)
{
    switch (rows) {
        ALL_ROWS(4)
    }
}

int64_t rq_peak_avx512vnni(int64_t rounds)
{
    __m512i acc[16], a = _mm512_set1_epi8(1);
    RQ_UNROLL
    for (int i = 0; i < 16; i++)
        acc[i] = a;
    for (int64_t r = 0; r < rounds; r++)
        RQ_UNROLL
        for (int i = 0; i < 16; i++) {
            acc[i] = _mm512_dpbusd_epi32(acc[i], a, a);
            RQ_KEEP(acc[i]);
        }
    return rounds * 16 * 64;
}

RQ_TARGET_END

#endif

/* gemm_avxvnni.c - the tile of gemm_scalar.c in 256-bit registers, with vpdpbusd.
 *
 * The instruction is that of gemm_avx512vnni.c, for processors without AVX-512: 32 bytes of A
 * (unsigned) and of B (signed), 8 int32 sums of four products, exact and without saturation.
 *
 * The tile. A panel is two registers of 8 outputs; 6 rows make 12 accumulators, with 2 registers for B
 * and 1 for A, of 16:
 *
 *            B: 4 k x 8 outputs   B: 4 k x 8 outputs
 *            [ o0 ........ o7 ]   [ o8 ....... o15 ]
 *     a0 ->  [ acc 0,0        ]   [ acc 0,1        ]      a_i: 4 bytes of row i, broadcast to 8 lanes
 *      :     [   :            ]   [   :            ]
 *     a5 ->  [ acc 5,0        ]   [ acc 5,1        ]
 *
 * Tails: as in gemm_avx512vnni.c.
 * Why not vpmaddubsw: it saturates, see gemm_avx2.c.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2,avxvnni")

enum { ROWS = 6, HALVES = 2 };

RQ_INLINE __m256i broadcast4(const uint8_t *a)
{
    int32_t four;
    memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}

/* 32 bytes of group g (0 or 1) of a panel's step, outputs 8h .. 8h+7. */
RQ_INLINE __m256i load_group(const int8_t *b, const int bits, const int g, const int h)
{
    if (bits == 8)
        return _mm256_load_si256((const __m256i *)(b + 64 * g + 32 * h));
    /* halves of bytes, brought to the top: 16 times the code, see pack.c */
    const __m256i both = _mm256_load_si256((const __m256i *)(b + 32 * h)), top = _mm256_set1_epi8((char)0xf0);
    return _mm256_and_si256(g ? both : _mm256_slli_epi16(both, 4), top);
}

/* Outputs first .. first+7 of one row. */
RQ_INLINE void store(const struct rq_tile *t, int row, int first, __m256i sum, const int bits)
{
    RQ_KEEP(sum);
    if (bits == 4)
        sum = _mm256_srai_epi32(sum, 4);
    sum = _mm256_add_epi32(sum, _mm256_loadu_si256((const __m256i *)(t->add + first)));
    int32_t *const c = t->c + t->at[row] * t->ldc + first;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_epi32(c, _mm256_cmpgt_epi32(_mm256_set1_epi32(t->columns - first), lane), sum);
}

RQ_INLINE void tile(const struct rq_tile *t, const int rows, const int panels, const int bits)
{
    for (int p = 0; p < panels; p++) {
        __m256i acc[ROWS][HALVES], w[HALVES];
        const int8_t *b = t->b + p * t->panel_bytes;
        RQ_UNROLL
        for (int i = 0; i < rows; i++)
            RQ_UNROLL
            for (int h = 0; h < HALVES; h++)
                acc[i][h] = _mm256_setzero_si256();
        for (int64_t s = 0; s < t->segments; s++) {
            const int64_t begin = s * t->segment_stride, end = begin + t->steps * RQ_STEP;
            for (int64_t k = begin; k < end; k += RQ_STEP, b += 16 * bits) {
                RQ_UNROLL
                for (int g = 0; g < 2; g++) {
                    RQ_UNROLL
                    for (int h = 0; h < HALVES; h++)
                        w[h] = load_group(b, bits, g, h);
                    RQ_UNROLL
                    for (int i = 0; i < rows; i++) {
                        const __m256i four = broadcast4(t->a[i] + k + 4 * g);
                        RQ_UNROLL
                        for (int h = 0; h < HALVES; h++)
                            acc[i][h] = _mm256_dpbusd_avx_epi32(acc[i][h], four, w[h]);
                    }
                }
            }
            b += t->gap;
        }
        RQ_UNROLL
        for (int i = 0; i < rows; i++)
            RQ_UNROLL
            for (int h = 0; h < HALVES; h++)
                store(t, i, p * RQ_PANEL + 8 * h, acc[i][h], bits);
    }
}

#define ALL_ROWS(bits)                                                                                \
    switch (rows) {                                                                                   \
    case 1: tile(t, 1, panels, bits); break;                                                          \
    case 2: tile(t, 2, panels, bits); break;                                                          \
    case 3: tile(t, 3, panels, bits); break;                                                          \
    case 4: tile(t, 4, panels, bits); break;                                                          \
    case 5: tile(t, 5, panels, bits); break;                                                          \
    case 6: tile(t, 6, panels, bits); break;                                                          \
    }

void rq_tile_s8_avxvnni(const struct rq_tile *t, int rows, int panels) { ALL_ROWS(8) }
void rq_tile_s4_avxvnni(const struct rq_tile *t, int rows, int panels) { ALL_ROWS(4) }

int64_t rq_peak_avxvnni(int64_t rounds)
{
    __m256i acc[12], a = _mm256_set1_epi8(1);
    RQ_UNROLL
    for (int i = 0; i < 12; i++)
        acc[i] = a;
    for (int64_t r = 0; r < rounds; r++)
        RQ_UNROLL
        for (int i = 0; i < 12; i++) {
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], a, a);
            RQ_KEEP(acc[i]);
        }
    return rounds * 12 * 32;
}

RQ_TARGET_END

#endif

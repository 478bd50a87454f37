/* gemm_avx2.c - the tile of gemm_scalar.c in 256-bit registers.
 *
 * AVX2 has no instruction that multiplies bytes exactly. vpmaddwd does it one size up: 16 products of
 * 16-bit integers, neighbours added, 8 sums of 32 bits. So bytes are widened first, uint8 with zeros
 * and int8 with its sign, and lose nothing: 255 * -128 twice is -65280, far inside of 32 bits.
 *
 * Why not vpmaddubsw, which takes bytes as they are: it adds its pairs in 16 bits with saturation,
 * 255*127 + 255*127 = 64770 becomes 32767. Weights and activations that look like a network's hardly
 * ever show it; tests/kernels/mutants keeps such a kernel, and the tests must find it.
 *
 * The tile. A group of 4 k fills a register with 4 outputs, so that a panel takes four. Two of them at
 * a time with 6 rows make 12 accumulators; 2 registers hold B, 1 holds A and 1 the product, 16 in all:
 *
 *            B: 4 k x 4 outputs    B: 4 k x 4 outputs     (16 bits each)
 *            [ o0  o1  o2  o3 ]    [ o4  o5  o6  o7 ]
 *     a0 ->  [ acc 0,0        ]    [ acc 0,1        ]      a_i: 4 bytes of row i, widened, in each
 *      :     [   :            ]    [   :            ]           quarter of the register
 *     a5 ->  [ acc 5,0        ]    [ acc 5,1        ]
 *
 * A lane holds half of a sum: k 0, 1 in the even lanes, k 2, 3 in the odd ones. They are added once,
 * at the end.
 *
 * Tails: as in gemm_avx512vnni.c.
 */
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2")

enum { ROWS = 6, QUARTERS = 2, HALF = RQ_PANEL / 2 };

RQ_INLINE __m256i widen_a(const uint8_t *a)
{
    int32_t four;
    memcpy(&four, a, 4);
    return _mm256_cvtepu8_epi16(_mm_broadcastd_epi32(_mm_cvtsi32_si128(four)));
}

/* 16 bytes of group g (0 or 1) of a panel's step, outputs 4q .. 4q+3, widened. */
RQ_INLINE __m256i widen_b(const int8_t *b, const int bits, const int g, const int q)
{
    const __m256i code = _mm256_cvtepi8_epi16(
        _mm_load_si128((const __m128i *)(b + (bits == 8 ? 64 * g : 0) + 16 * q)));
    if (bits == 8)
        return code;
    /* two codes in a byte, see pack.c: each to 16 times its value, with the sign that it has there */
    return g ? _mm256_and_si256(code, _mm256_set1_epi16((short)0xfff0))
             : _mm256_srai_epi16(_mm256_slli_epi16(code, 12), 8);
}

/* Outputs first .. first+7 of one row. */
RQ_INLINE void store(const struct rq_tile *t, int row, int first, const __m256i acc[QUARTERS], const int bits)
{
    /* [a0 a0' a1 a1' | a2 a2' a3 a3'] + neighbours; hadd works in halves, hence the permutation */
    __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[0], acc[1]), 0xd8);
    if (bits == 4)
        sum = _mm256_srai_epi32(sum, 4);
    sum = _mm256_add_epi32(sum, _mm256_loadu_si256((const __m256i *)(t->add + first)));
    int32_t *const c = t->c + t->at[row] * t->ldc + first;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_epi32(c, _mm256_cmpgt_epi32(_mm256_set1_epi32(t->columns - first), lane), sum);
}

RQ_INLINE void tile(const struct rq_tile *t, const int rows, const int bits)
{
    for (int first = 0; first < t->columns; first += HALF) {
        __m256i acc[ROWS][QUARTERS], w[QUARTERS];
        const int8_t *b = t->b + first / RQ_PANEL * t->panel_bytes;
        const int half = first % RQ_PANEL / 4; /* its first quarter, 0 or 2 */
        RQ_UNROLL
        for (int i = 0; i < rows; i++)
            RQ_UNROLL
            for (int q = 0; q < QUARTERS; q++)
                acc[i][q] = _mm256_setzero_si256();
        for (int64_t s = 0; s < t->segments; s++) {
            const int64_t begin = s * t->segment_stride, end = begin + t->steps * RQ_STEP;
            for (int64_t k = begin; k < end; k += RQ_STEP, b += 16 * bits) {
                RQ_UNROLL
                for (int g = 0; g < 2; g++) {
                    RQ_UNROLL
                    for (int q = 0; q < QUARTERS; q++)
                        w[q] = widen_b(b, bits, g, half + q);
                    RQ_UNROLL
                    for (int i = 0; i < rows; i++) {
                        const __m256i a = widen_a(t->a[i] + k + 4 * g);
                        RQ_UNROLL
                        for (int q = 0; q < QUARTERS; q++) {
                            acc[i][q] = _mm256_add_epi32(acc[i][q], _mm256_madd_epi16(a, w[q]));
                            RQ_KEEP(acc[i][q]);
                        }
                    }
                }
            }
            b += t->gap;
        }
        RQ_UNROLL
        for (int i = 0; i < rows; i++)
            store(t, i, first, acc[i], bits);
    }
}

#define ALL_ROWS(bits)                                                                                \
    (void)panels; /* t->columns says it more precisely */                                             \
    switch (rows) {                                                                                   \
    case 1: tile(t, 1, bits); break;                                                                  \
    case 2: tile(t, 2, bits); break;                                                                  \
    case 3: tile(t, 3, bits); break;                                                                  \
    case 4: tile(t, 4, bits); break;                                                                  \
    case 5: tile(t, 5, bits); break;                                                                  \
    case 6: tile(t, 6, bits); break;                                                                  \
    }

void rq_tile_s8_avx2(const struct rq_tile *t, int rows, int panels) { ALL_ROWS(8) }
void rq_tile_s4_avx2(const struct rq_tile *t, int rows, int panels) { ALL_ROWS(4) }

int64_t rq_peak_avx2(int64_t rounds)
{
    __m256i acc[12], a = _mm256_set1_epi16(1);
    RQ_UNROLL
    for (int i = 0; i < 12; i++)
        acc[i] = a;
    for (int64_t r = 0; r < rounds; r++)
        RQ_UNROLL
        for (int i = 0; i < 12; i++) {
            acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(a, acc[i]));
            RQ_KEEP(acc[i]);
        }
    return rounds * 12 * 16;
}

RQ_TARGET_END

#endif

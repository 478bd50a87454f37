/* gemm_maddubs.c - the classical mistake: cext/gemm_avx2.c with vpmaddubsw. WRONG on purpose.
 *
 * vpmaddubsw multiplies 32 pairs of bytes at once, unsigned by signed, just what is wanted, and adds
 * neighbours in 16 bits, with saturation:
 *
 *     255 * 127 + 255 * 127 = 64770 becomes 32767
 *
 *            B: 4 k x 8 outputs
 *            [ o0 k0..k3 | ... | o7 k0..k3 ]         bytes
 *     a0 ->  [ k0 k1, k2 k3 of o0 | ...    ]         16 bits: here it saturates
 *            [ o0         | ...  | o7      ]         32 bits, by vpmaddwd with ones
 *
 * Twice as fast as widening, and right as long as no two neighbours are both large. SiLU activations
 * and Gaussian weights do not have such neighbours: their products are all correct, so that a test on
 * data that look like a network's passes this file, and so does a picture. test_mutants.py shows both:
 * that such data find nothing, and that the vectors with the corners of the codes do.
 */
#include <immintrin.h>
#include <string.h>

#include "impl.h"
#include "target.h"

RQ_TARGET_BEGIN("avx2")

void rq_tile_s8_avx2(const struct rq_tile *t, int rows, int panels)
{
    (void)panels;
    for (int i = 0; i < rows; i++)
        for (int first = 0; first < t->columns; first += 8) {
            const int8_t *b = t->b + first / RQ_PANEL * t->panel_bytes + first % RQ_PANEL * 4;
            __m256i acc = _mm256_loadu_si256((const __m256i *)(t->add + first));
            for (int64_t s = 0; s < t->segments; s++, b += t->gap)
                for (int64_t k = 0; k < t->steps * RQ_STEP; k += 4, b += 64) {
                    int32_t four;
                    memcpy(&four, t->a[i] + s * t->segment_stride + k, 4);
                    const __m256i w = _mm256_load_si256((const __m256i *)b);
                    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(four), w);
                    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            int32_t sums[8];
            memcpy(sums, &acc, sizeof sums);
            for (int j = 0; j < 8 && first + j < t->columns; j++)
                t->c[t->at[i] * t->ldc + first + j] = sums[j];
        }
}

RQ_TARGET_END

void rq_tile_s4_avx2(const struct rq_tile *t, int rows, int panels) { rq_tile_s4_scalar(t, rows, panels); }

int64_t rq_peak_avx2(int64_t rounds) { return rounds; }

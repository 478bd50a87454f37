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
 *     a0 ->  [ acc 0,0        ]    [ acc 0,1        ]      a_i: 4 numbers of row i in each
 *      :     [   :            ]    [   :            ]           quarter of the register
 *     a5 ->  [ acc 5,0        ]    [ acc 5,1        ]
 *
 * A is widened once for all outputs of the tile, into a buffer in the first cache, from which a group
 * is one load that broadcasts. Widened where it is used, it would be a load and two shuffles for each
 * two products, and a processor has two ports for shuffles and four for all of this: 38 operations a
 * group instead of 26 (Zen 3: 9.5 cycles, of which 6 multiply; now 6.5). Long rows go through the
 * buffer in blocks, and the accumulators wait in memory in between.
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

enum {
    ROWS = 6, QUARTERS = 2, HALF = RQ_PANEL / 2, HALVES = RQ_TILE_WIDTH / HALF,
    BLOCK = 96  /* steps: 6 rows of 768 numbers are 9 KiB, beside 6 KiB of B that pass by */
};

/* What lies between the blocks of a tile. */
struct room {
    _Alignas(64) int16_t a[ROWS][BLOCK * RQ_STEP];
    __m256i acc[HALVES][ROWS][QUARTERS];
};

/* Where a tile is in k. */
struct place {
    int64_t segment, step;  /* of the segment */
    const int8_t *b;
};

/* Widen up to BLOCK steps from `at` on, and move `at` behind them; return how many. With a gap in B they end with the
 * segment. */
RQ_INLINE int64_t widen_rows(const struct rq_tile *t, const int rows, const int bits, struct place *at,
                             struct room *room)
{
    int64_t done = 0;
    while (done < BLOCK && at->segment < t->segments) {
        const int64_t left = t->steps - at->step, steps = left < BLOCK - done ? left : BLOCK - done;
        const int64_t from = at->segment * t->segment_stride + at->step * RQ_STEP;
        for (int i = 0; i < rows; i++)
            for (int64_t k = 0; k < steps; k++) {
                const __m128i eight = _mm_loadl_epi64((const __m128i *)(t->a[i] + from + k * RQ_STEP));
                _mm_store_si128((__m128i *)(room->a[i] + (done + k) * RQ_STEP), _mm_cvtepu8_epi16(eight));
            }
        done += steps;
        at->step += steps;
        at->b += steps * 16 * bits;
        if (at->step == t->steps) {
            at->step = 0;
            at->segment++;
            at->b += t->gap;
            if (t->gap)
                break;
        }
    }
    return done;
}

/* 16 bytes of a panel, outputs 4q .. 4q+3, widened; of two groups in a byte, group g. */
RQ_INLINE __m256i widen_b(const int8_t *b, const int bits, const int g, const int q)
{
    const __m256i code = _mm256_cvtepi8_epi16(
        _mm_load_si128((const __m128i *)(b + 16 * q)));
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

/* One group of 4 k: multiply its numbers of all rows by w. */
RQ_INLINE void multiply_group(const int16_t *a, const int rows, const __m256i w[QUARTERS],
                              __m256i acc[ROWS][QUARTERS])
{
    RQ_UNROLL
    for (int i = 0; i < rows; i++) {
        const __m256i four = _mm256_castpd_si256(_mm256_broadcast_sd((const double *)(a + i * BLOCK * RQ_STEP)));
        RQ_UNROLL
        for (int q = 0; q < QUARTERS; q++) {
            acc[i][q] = _mm256_add_epi32(acc[i][q], _mm256_madd_epi16(four, w[q]));
            RQ_KEEP(acc[i][q]);
        }
    }
}

/* Outputs first .. first+7 over the steps of a block. Codes of 8 bits: each group in a round of its own, or gcc moves
 * accumulators to and fro between the two. */
RQ_INLINE void multiply(const struct room *room, const int8_t *b, int64_t steps, const int rows, const int bits,
                        const int half, __m256i acc[ROWS][QUARTERS])
{
    const int16_t *a = room->a[0];
    const int together = bits == 8 ? 1 : 2; /* groups in a byte of b */
    for (int64_t k = 0; k < 2 * steps; k += together, b += 4 * RQ_PANEL) {
        RQ_UNROLL
        for (int g = 0; g < together; g++, a += 4) {
            __m256i w[QUARTERS];
            RQ_UNROLL
            for (int q = 0; q < QUARTERS; q++)
                w[q] = widen_b(b, bits, g, half + q);
            multiply_group(a, rows, w, acc);
        }
    }
}

RQ_INLINE void tile(const struct rq_tile *t, const int rows, const int bits)
{
    struct room room;
    struct place at = {0, 0, t->b};
    int first_block = 1;
    do {
        const int8_t *const b = at.b;
        const int64_t steps = widen_rows(t, rows, bits, &at, &room);
        const int last_block = at.segment == t->segments;
        for (int first = 0; first < t->columns; first += HALF) {
            __m256i acc[ROWS][QUARTERS];
            RQ_UNROLL
            for (int i = 0; i < rows; i++)
                RQ_UNROLL
                for (int q = 0; q < QUARTERS; q++)
                    acc[i][q] = first_block ? _mm256_setzero_si256() : room.acc[first / HALF][i][q];
            multiply(&room, b + first / RQ_PANEL * t->panel_bytes, steps, rows, bits, first % RQ_PANEL / 4, acc);
            RQ_UNROLL
            for (int i = 0; i < rows; i++)
                if (last_block)
                    store(t, i, first, acc[i], bits);
                else
                    RQ_UNROLL
                    for (int q = 0; q < QUARTERS; q++)
                        room.acc[first / HALF][i][q] = acc[i][q];
        }
        first_block = 0;
    } while (at.segment < t->segments);
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

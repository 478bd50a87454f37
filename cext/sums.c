/* sums.c - sums of what zero points of the other operand multiply: of bytes, and of windows of such sums.
 *
 * They are needed for every pixel and every window of it, which a few outputs use: with 16 channels and 16 outputs,
 * one byte and one term after the other they took as long as the products.
 */
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "conv.h"

#if defined(__x86_64__)
/* psadbw, which every x86-64 has, adds up two times 8 of them, each beside a 0. */
static inline int32_t sum_bytes(const uint8_t *x, int64_t count)
{
    const __m128i zero = _mm_setzero_si128();
    __m128i two = zero;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        two = _mm_add_epi32(two, _mm_sad_epu8(_mm_loadu_si128((const __m128i *)(x + i)), zero));
    if (i + 8 <= count) {
        two = _mm_add_epi32(two, _mm_sad_epu8(_mm_loadl_epi64((const __m128i *)(x + i)), zero));
        i += 8;
    }
    uint32_t total = (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_unpackhi_epi64(two, two)));
    for (; i < count; i++)
        total += x[i];
    return (int32_t)total;
}
#else
/* 8 at a time, as four sums of 16 bits in one word. A lane grows by at most
 * 510 a word and holds 65535, hence 128 words at a time. */
static inline int32_t sum_bytes(const uint8_t *x, int64_t count)
{
    const uint64_t even = 0x00ff00ff00ff00ffu;
    int64_t i = 0;
    uint32_t total = 0;
    while (count - i >= 8) {
        const int64_t end = i + rq_min((count - i) / 8, 128) * 8;
        uint64_t lanes = 0;
        for (; i < end; i += 8) {
            uint64_t word;
            memcpy(&word, x + i, 8);
            lanes += (word & even) + ((word >> 8) & even);
        }
        total += (uint32_t)((lanes & 0xffff) + (lanes >> 16 & 0xffff) + (lanes >> 32 & 0xffff) + (lanes >> 48));
    }
    for (; i < count; i++)
        total += x[i];
    return (int32_t)total;
}
#endif

int32_t rq_sum_bytes(const uint8_t *x, int64_t count) { return sum_bytes(x, count); }

void rq_sum_pixels(uint32_t *to, const uint8_t *x, int64_t pixels, int64_t c)
{
    for (int64_t i = 0; i < pixels; i++)
        to[i] = (uint32_t)sum_bytes(x + i * c, c);
}

/* Four k at a time, where the compiler has a word for that. */
void rq_add_up(uint32_t *to, const uint32_t *from, int64_t terms, int64_t distance, int64_t count)
{
    int64_t k = 0;
#if defined(__GNUC__)
    typedef uint32_t four __attribute__((vector_size(16)));
    for (; k + 4 <= count; k += 4) {
        four sum, next;
        memcpy(&sum, from + k, sizeof sum);
        for (int64_t i = 1; i < terms; i++) {
            memcpy(&next, from + k + i * distance, sizeof next);
            sum += next;
        }
        memcpy(to + k, &sum, sizeof sum);
    }
#endif
    for (; k < count; k++) {
        to[k] = from[k];
        for (int64_t i = 1; i < terms; i++)
            to[k] += from[k + i * distance];
    }
}

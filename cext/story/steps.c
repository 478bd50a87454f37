/* steps.c - one convolution, seven times: what each optimisation bought. README.md beside this file has
 * the numbers, and the command line that makes them again.
 *
 * The convolution: 256 -> 256 channels, 16 x 16 pixels, 3 x 3 window, padding 1. As a matrix product it
 * is M = 256 pixels, N = 256 outputs, K = 2304. Steps 0 to 4 unfold the image first (im2col, timed with
 * them), steps 5 and 6 do not. Every step must give the integers of step 0.
 *
 * Usage: steps [SECONDS]       time spent on each step, 1 by default
 */
#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "impl.h"
#include "target.h"

enum { SIDE = 16, C = 256, N = 256, TAPS = 3, M = SIDE * SIDE, RUN = TAPS * C, K = TAPS * RUN, ZX = 0 };

static _Alignas(64) uint8_t image[M * C], unfolded[M * K];
static _Alignas(64) int8_t weights[N * K];
static int32_t result[M * N], expected[M * N];

/* ------------------------------------------------------------------ the image as a matrix */

static void unfold(void)
{
    uint8_t *to = unfolded;
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++)
            for (int p = -1; p <= 1; p++)
                for (int q = -1; q <= 1; q++, to += C) {
                    const int inside = y + p >= 0 && y + p < SIDE && x + q >= 0 && x + q < SIDE;
                    if (inside)
                        memcpy(to, image + ((y + p) * SIDE + x + q) * C, C);
                    else
                        memset(to, ZX, C);
                }
}

/* ------------------------------------------------------------------ 0: three loops */

static void scalar(void)
{
    unfold();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            int32_t sum = 0;
            for (int k = 0; k < K; k++)
                sum += unfolded[m * K + k] * weights[n * K + k];
            result[m * N + n] = sum;
        }
}

#if defined(__x86_64__)
#include <immintrin.h>

/* ------------------------------------------------------------------ 1: wider registers */

RQ_TARGET_BEGIN("avx2")

static void wider(void)
{
    unfold();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            __m256i sums = _mm256_setzero_si256();
            for (int k = 0; k < K; k += 16) { /* 16 products of 16 bits */
                const __m128i *a = (const __m128i *)(unfolded + m * K + k);
                const __m128i *b = (const __m128i *)(weights + n * K + k);
                const __m256i products = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_load_si128(a)),
                                                           _mm256_cvtepi8_epi16(_mm_load_si128(b)));
                sums = _mm256_add_epi32(sums, products);
            }
            __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            four = _mm_hadd_epi32(four, four);
            result[m * N + n] = _mm_cvtsi128_si32(_mm_hadd_epi32(four, four));
        }
}

RQ_TARGET_END
RQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

/* ------------------------------------------------------------------ 2: the dot-product instruction */

static void dot_product(void)
{
    unfold();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            __m512i sums = _mm512_setzero_si512();
            for (int k = 0; k < K; k += 64)
                sums = _mm512_dpbusd_epi32(sums, _mm512_load_si512(unfolded + m * K + k),
                                           _mm512_load_si512(weights + n * K + k));
            result[m * N + n] = _mm512_reduce_add_epi32(sums);
        }
}

/* ------------------------------------------------------------------ 3: a tile in registers */

static void register_tile(void)
{
    unfold();
    for (int m = 0; m < M; m += 4)
        for (int n = 0; n < N; n += 4) {
            __m512i sums[4][4]; /* each loaded register is used four times */
            RQ_UNROLL
            for (int i = 0; i < 16; i++)
                sums[i / 4][i % 4] = _mm512_setzero_si512();
            for (int k = 0; k < K; k += 64) {
                __m512i b[4];
                RQ_UNROLL
                for (int j = 0; j < 4; j++)
                    b[j] = _mm512_load_si512(weights + (n + j) * K + k);
                RQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    const __m512i a = _mm512_load_si512(unfolded + (m + i) * K + k);
                    RQ_UNROLL
                    for (int j = 0; j < 4; j++)
                        sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], a, b[j]);
                }
            }
            RQ_UNROLL
            for (int i = 0; i < 16; i++)
                result[(m + i / 4) * N + n + i % 4] = _mm512_reduce_add_epi32(sums[i / 4][i % 4]);
        }
}

RQ_TARGET_END

/* ------------------------------------------------------------------ 4: packed weights, 12 x 32 tiles */

static struct rq_weights packed = {.outputs = N, .kh = TAPS, .kw = TAPS, .c = C, .bits = 8};

static void packing(void)
{
    static const int32_t nothing[RQ_TILE_WIDTH];
    static const int64_t in_order[RQ_MAX_ROWS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    const struct rq_layout layout = rq_layout_of(N, 1, K, 8); /* one segment: the same bytes as three */
    unfold();
    for (int n = 0; n < N; n += RQ_TILE_WIDTH)
        for (int m = 0; m < M; m += RQ_MAX_ROWS) {
            const uint8_t *rows[RQ_MAX_ROWS];
            const int count = M - m < RQ_MAX_ROWS ? M - m : RQ_MAX_ROWS;
            for (int i = 0; i < count; i++)
                rows[i] = unfolded + (m + i) * K;
            const struct rq_tile t = {
                .a = rows, .segments = 1, .steps = layout.steps, .panel_bytes = layout.panel_bytes,
                .b = (const int8_t *)packed.panels + n / RQ_PANEL * layout.panel_bytes,
                .add = nothing, .c = result + m * N + n, .ldc = N, .at = in_order,
                .columns = RQ_TILE_WIDTH,
            };
            rq_tile_s8_avx512vnni(&t, count, RQ_PAIR);
        }
}

/* ------------------------------------------------------------------ 5, 6: no unfolding; threads */

static void convolve(int threads)
{
    const struct rq_input x = {image, 1, SIDE, SIDE, C, M * C, SIDE * C, ZX};
    const struct rq_output y = {.kind = RQ_INT32, .data = result, .ld = N};
    const int row = rq_kernel_count() - 1;
    const int status = rq_conv2d(row, threads, &x, &packed, 1, 1, &y);
    if (status != RQ_OK) {
        fprintf(stderr, "steps: rq_conv2d returned %d\n", status);
        exit(1);
    }
}

static void implicit(void) { convolve(1); }
static void two_threads(void) { convolve(2); }

static const struct { const char *name; void (*run)(void); } steps[] = {
    {"scalar", scalar}, {"wider registers", wider}, {"dot-product instruction", dot_product},
    {"register tile", register_tile}, {"packing", packing}, {"implicit convolution", implicit},
    {"two threads", two_threads},
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv)
{
    const double seconds = argc > 1 ? atof(argv[1]) : 1.0;
    if (!(rq_cpu_features() & RQ_CPU_AVX512VNNI)) {
        puts("this processor has no AVX512-VNNI: nothing to show");
        return 0;
    }
    uint32_t random = 1;
    for (int i = 0; i < M * C; i++)
        image[i] = (uint8_t)((random = random * 1664525u + 1013904223u) >> 24);
    for (int i = 0; i < N * K; i++)
        weights[i] = (int8_t)((random = random * 1664525u + 1013904223u) >> 24);
    void *panels = aligned_alloc(64, (size_t)rq_packed_bytes(N, TAPS, TAPS, C, 8));
    static int32_t sums[(TAPS + 1) * (TAPS + 1) * N];
    if (!panels || rq_pack(weights, N, TAPS, TAPS, C, 8, panels, sums) != RQ_OK)
        return 1;
    packed.panels = panels;
    packed.sums = sums;

    const double operations = 2.0 * M * N * K;
    double before = 0;
    printf("%-26s %10s %9s %8s\n", "step", "us", "GOP/s", "gain");
    for (size_t s = 0; s < sizeof steps / sizeof steps[0]; s++) {
        memset(result, 0xff, sizeof result);
        double best = 1e9, end = now() + seconds;
        do {
            const double began = now();
            steps[s].run();
            const double took = now() - began;
            best = took < best ? took : best;
        } while (now() < end);
        if (s == 0)
            memcpy(expected, result, sizeof result);
        if (memcmp(expected, result, sizeof result)) {
            printf("%s: wrong integers\n", steps[s].name);
            return 1;
        }
        printf("%-26s %10.1f %9.1f", steps[s].name, 1e6 * best, operations / best / 1e9);
        printf(s ? " %7.1fx\n" : "\n", before / best);
        before = best;
    }
    free(panels);
    return 0;
}

#else

int main(void)
{
    puts("the steps are those of an x86-64 processor");
    return 0;
}

#endif

/* fuzz.h - what the fuzzing targets share: numbers out of the fuzzer's bytes, arrays of exactly their size, a replay.
 *
 * Included once, by the target.
 */
#ifndef REFQUANT_FUZZ_H
#define REFQUANT_FUZZ_H

#define _POSIX_C_SOURCE 200809L /* posix_memalign, under -std=c11: exact sizes */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "refquant.h"

enum { PATTERN = 0xa5 }; /* what lies in a result before it is written */

typedef __int128 wide; /* for sizes that cannot overflow */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ------------------------------------------------------------------ bytes */

static const uint8_t *input, *input_end;

static uint8_t take(void) { return input < input_end ? *input++ : 0; }

/* 0 .. most, mostly small. */
static int64_t take_size(int most)
{
    const int byte = take();
    return byte % (most + 1);
}

static int64_t take_any(void)
{
    static const int64_t corners[] = {
        0, 1, 2, 3, -1, 255, 256, 1 << 30, (1 << 30) + 1, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, (int64_t)1 << 62,
    };
    const unsigned corner = take();
    if (corner < sizeof corners / sizeof corners[0])
        return corners[corner];
    uint64_t any = 0;
    for (int i = 0; i < 8; i++)
        any = any << 8 | take();
    return (int64_t)any;
}

static uint64_t state;

static uint64_t random64(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* From four bytes. */
static void take_seed(void)
{
    state = 88172645463325252u;
    for (int i = 0; i < 4; i++)
        state = (state ^ take()) * 0x100000001b3u | 1;
}

static int64_t random_in(int64_t low, int64_t high)
{
    const uint64_t r = random64(), span = (uint64_t)(high - low) + 1;
    return r & 1 << 20 ? (r & 2 << 20 ? low : high) : low + (int64_t)((r >> 24) % span);
}

/* Finite, and small enough for no product to be NaN: subnormals, 0 and -0 among them. */
static float random_float(void)
{
    uint32_t bits = (uint32_t)random64();
    bits = bits >> 28 ? bits & 0xbfffffff : bits & 0x807fffff;
    float value;
    memcpy(&value, &bits, 4);
    return value > 1e30f || value < -1e30f ? 1.0f : value;
}

static void *array(int64_t count, int64_t size)
{
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)(count * size)))
        abort();
    return memory;
}

static void fill_bytes(void *to, int64_t count, int low, int high)
{
    for (int64_t i = 0; i < count; i++)
        ((uint8_t *)to)[i] = (uint8_t)random_in(low, high);
}

/* ------------------------------------------------------------------ replay */

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t bytes[4096];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file)
            return 2;
        const size_t size = fread(bytes, 1, sizeof bytes, file);
        fclose(file);
        uint8_t *exact = malloc(size);
        memcpy(exact, bytes, size);
        LLVMFuzzerTestOneInput(exact, size);
        free(exact);
    }
    printf("replayed %d files\n", argc - 1);
    return 0;
}
#endif

#endif

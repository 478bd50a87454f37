/* vectors.c - check every kernel of the table against results computed by NumPy.
 *
 *     vectors FILE        "checked 600 cases on scalar neondot", or the first difference and status 1
 *
 * A processor without Python runs this, an emulated one among them: see test_neondot.py, which writes
 * the file. It holds the number of cases, and for each case the numbers named in `enum number` and the
 * arrays named in `enum array`, each behind its length in bytes; an array of length -1 is not there.
 * Lengths and numbers are int64; everything has the byte order of the machine.
 *
 * Each array ends where its page ends, and the next page may not be touched: a kernel that reads one
 * byte too many is stopped by the processor. The result lies between guard words, and its rows apart.
 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS, under -std=c11 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "refquant.h"

enum number { N, H, W, C, O, KH, KW, BITS, STRIDE, PADDING, X_ZERO, KIND, Y_ZERO, QMIN, QMAX, NUMBERS };
enum array { X, WEIGHTS, W_ZEROS, INT_BIAS, SCALE, BIAS, RESIDUAL, MANTISSA, SHIFT, WANT, ARRAYS };
enum { GUARD = 19, GAP = 3, PATTERN = 0xa5 };  /* elements around the result, and between its rows */

struct array_at { char *data, *map; int64_t bytes, mapped; };

static void stop(const char *reason)
{
    fprintf(stderr, "vectors: %s\n", reason);
    exit(2);
}

/* `bytes` bytes at the end of a page, before one that may not be touched. */
static struct array_at new_array(int64_t bytes)
{
    const int64_t page = sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    struct array_at a = {.bytes = bytes, .mapped = (pages + 1) * page};
    a.map = mmap(NULL, (size_t)a.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a.map == MAP_FAILED || mprotect(a.map + pages * page, (size_t)page, PROT_NONE))
        stop("no memory");
    a.data = a.map + pages * page - bytes;
    return a;
}

static void free_array(struct array_at a)
{
    if (a.map)
        munmap(a.map, (size_t)a.mapped);
}

static void read_bytes(FILE *file, void *to, int64_t bytes)
{
    if (bytes > 0 && fread(to, (size_t)bytes, 1, file) != 1)
        stop("the file ends too early");
}

static struct array_at read_array(FILE *file)
{
    int64_t bytes;
    read_bytes(file, &bytes, sizeof bytes);
    if (bytes < 0)
        return (struct array_at){0};
    struct array_at a = new_array(bytes);
    read_bytes(file, a.data, bytes);
    return a;
}

static double element(int kind, const char *at)
{
    float real;
    int32_t whole;
    if (kind == RQ_UINT8)
        return (unsigned char)*at;
    if (kind == RQ_INT32)
        return memcpy(&whole, at, sizeof whole), whole;
    return memcpy(&real, at, sizeof real), real;
}

/* Run one kernel; compare the result, what lies between its rows, and what lies around it. */
static int check(int row, int number, const int64_t *n, const struct array_at *a, const struct rq_weights *w)
{
    const struct rq_input x = {
        .data = (uint8_t *)a[X].data, .n = n[N], .h = n[H], .w = n[W], .c = n[C],
        .line_stride = n[W] * n[C], .image_stride = n[H] * n[W] * n[C], .zero_point = (int32_t)n[X_ZERO],
    };
    const int kind = (int)n[KIND];
    const int64_t size = kind == RQ_UINT8 ? 1 : 4, ld = n[O] + GAP, rows = a[WANT].bytes / (n[O] * size);
    const int64_t elements = GUARD + rows * ld + GUARD;
    struct array_at got = new_array(elements * size), want = new_array(elements * size);
    memset(got.data, PATTERN, (size_t)got.bytes);
    memset(want.data, PATTERN, (size_t)want.bytes);
    for (int64_t i = 0; i < rows; i++)
        memcpy(want.data + (GUARD + i * ld) * size, a[WANT].data + i * n[O] * size, (size_t)(n[O] * size));

    const struct rq_output y = {
        .kind = kind, .data = got.data + GUARD * size, .ld = ld, .int_bias = (int32_t *)a[INT_BIAS].data,
        .scale = (float *)a[SCALE].data, .bias = (float *)a[BIAS].data,
        .residual = (float *)a[RESIDUAL].data, .residual_ld = n[O],
        .mantissa = (int32_t *)a[MANTISSA].data, .shift = (int32_t *)a[SHIFT].data,
        .zero_point = (int32_t)n[Y_ZERO], .qmin = (int32_t)n[QMIN], .qmax = (int32_t)n[QMAX],
    };
    const int status = rq_conv2d(row, 1, &x, w, n[STRIDE], n[PADDING], &y);
    if (status != RQ_OK)
        stop("rq_conv2d refused a case");

    int64_t i = 0;
    while (i < elements && !memcmp(got.data + i * size, want.data + i * size, (size_t)size))
        i++;
    if (i < elements)
        printf("%s: case %d, element %lld, rows of %lld + %d: got %.10g, want %.10g\n", rq_kernel_name(row), number,
               (long long)(i - GUARD), (long long)n[O], GAP, element(kind, got.data + i * size),
               element(kind, want.data + i * size));
    free_array(got);
    free_array(want);
    return i == elements;
}

static int run_case(FILE *file, int number)
{
    int64_t n[NUMBERS];
    struct array_at a[ARRAYS];
    read_bytes(file, n, sizeof n);
    for (int i = 0; i < ARRAYS; i++)
        a[i] = read_array(file);

    const int bits = (int)n[BITS];
    const int64_t bytes = rq_packed_bytes(n[O], n[KH], n[KW], n[C], bits);
    if (bytes < 0)
        stop("rq_packed_bytes refused a case");
    struct array_at panels = new_array(bytes), sums = new_array((n[KH] + 1) * (n[KW] + 1) * n[O] * (int64_t)sizeof(int32_t));
    const struct rq_weights w = {
        .outputs = n[O], .kh = n[KH], .kw = n[KW], .c = n[C], .bits = bits, .panels = panels.data,
        .sums = (int32_t *)sums.data, .zero_points = (int32_t *)a[W_ZEROS].data,
    };
    if (rq_pack((int8_t *)a[WEIGHTS].data, n[O], n[KH], n[KW], n[C], bits, panels.data, (int32_t *)sums.data) != RQ_OK)
        stop("rq_pack refused a case");

    int good = 1;
    for (int row = 0; good && row < rq_kernel_count(); row++)
        if (!(rq_kernel_needs(row) & ~rq_cpu_features()))
            good = check(row, number, n, a, &w);

    free_array(panels);
    free_array(sums);
    for (int i = 0; i < ARRAYS; i++)
        free_array(a[i]);
    return good;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (!file)
        stop("usage: vectors FILE");
    int64_t cases;
    read_bytes(file, &cases, sizeof cases);
    for (int i = 0; i < cases; i++)
        if (!run_case(file, i))
            return 1;
    fclose(file);

    printf("checked %d cases on", (int)cases);
    for (int row = 0; row < rq_kernel_count(); row++)
        if (!(rq_kernel_needs(row) & ~rq_cpu_features()))
            printf(" %s", rq_kernel_name(row));
    printf("\n");
    return 0;
}

/* conv.h - a convolution while it runs: what is known of the whole, and what a thread keeps.
 *
 * conv.c cuts the result into units and units into tiles; slab.c brings the pixels of a unit into a
 * form from which tiles can be made.
 */
#ifndef REFQUANT_CONV_H
#define REFQUANT_CONV_H

#include <stdatomic.h>

#include "impl.h"

enum { MOST_RANGES = 16 }; /* more threads share them */

/* A convolution, the same for all threads. */
struct job {
    const struct rq_kernel *kernel;
    const struct rq_input *x;
    const struct rq_weights *w;
    const struct rq_output *y;
    struct rq_layout layout;
    int64_t stride, padding, ho, wo;
    int64_t lines, line_units;  /* of the result: in a unit, units in an image */
    int64_t pairs, pair_units;  /* panel pairs in a unit, units of them */
    int64_t slab_width, slab_lines;
    int copies;                 /* the image must be copied into a slab */
    int sums_pixels;            /* the weights have zero points */
    int64_t scratch_bytes;
    int ranges;                 /* of units, one for each thread */
    struct { _Alignas(64) atomic_llong units; } dealt[MOST_RANGES]; /* so far, of each range */
    atomic_int status;
};

/* Pixels of a unit for which the same part of the window lies inside the image. */
struct part {
    int64_t first, rows;     /* of struct bench's `rows` */
    int64_t p0, p1, q0, q1;  /* window lines p0 .. p1-1 and columns q0 .. q1-1 */
};

/* What a thread keeps while it works on a job; the arrays are in its scratch memory. */
struct bench {
    int64_t first, lines;    /* of the unit: lines of the result; 0 lines at the beginning */
    struct rq_output y;      /* of its image */
    const uint8_t **rows;    /* where the part of the window of each pixel of the unit begins */
    int64_t *at;             /* row of the image's result of each of them */
    struct part *parts;
    int64_t part_count;
    int64_t line_bytes;      /* from a line of the slab, or image, to the next */
    int32_t *row_sums;       /* sum of x over the whole window, of each row */
    uint32_t *pixel_sums;    /* sum over c of each pixel of the slab; */
    uint32_t *column_sums;   /* of kh of them, of each column of one line of windows; */
    uint32_t *window_sums;   /* of kw of those: of each window, line after line */
    int32_t *tile;           /* (12, 32) sums, on their way to the output stage */
    uint8_t *slab;
};

/* Make the pixels of lines first .. first + lines - 1 of image n ready. */
void rq_load_unit(const struct job *j, struct bench *b, int64_t n, int64_t first, int64_t lines);

/* sums.c: the sum of `count` bytes; those of the c bytes of each of `pixels` pixels; and, for `count` k,
 * to[k] = from[k] + from[k + distance] + ..., `terms` of them. */
int32_t rq_sum_bytes(const uint8_t *x, int64_t count);
void rq_sum_pixels(uint32_t *to, const uint8_t *x, int64_t pixels, int64_t c);
void rq_add_up(uint32_t *to, const uint32_t *from, int64_t terms, int64_t distance, int64_t count);

static inline int64_t rq_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t rq_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rq_max(int64_t a, int64_t b) { return a > b ? a : b; }

#endif

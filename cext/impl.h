/* impl.h - what the files of the C core say to each other; private to it.
 *
 * Everything that the core computes is one picture. The rows of A are cut into segments, runs of
 * bytes that lie together; B is packed (pack.c) in panels of 16 outputs, in the order in which a
 * kernel reads it:
 *
 *      segment 0     segment 1                      panel 0    panel 1
 *     [=========]...[=========]  row 0            |  16  | |  16  |
 *     [=========]...[=========]  row 1      x     |  out-| |  out-|  k       =   a tile of C:
 *     [=========]...[=========]  row 2            |  puts| |  puts|  |           rows x outputs
 *               k ->                              |      | |      |  v
 *
 * A matrix product has one segment. A convolution has kh: pixel (i, j) of the result needs kh
 * runs of kw * C bytes of the image, one below the other, at the same distance for every pixel.
 * That is the whole of "implicit convolution": nothing is unfolded, a row is a pointer.
 *
 * A segment is read in steps of RQ_STEP = 8 bytes; where its length is no multiple of 8, the last
 * step reads up to 7 bytes too many, which meet weights of 0 (slab.c sees to it that they exist).
 */
#ifndef REFQUANT_IMPL_H
#define REFQUANT_IMPL_H

#include <stdint.h>

#include "refquant.h"

enum {
    RQ_STEP = 8,    /* bytes of k that a kernel takes at once: two groups of 4, what vpdpbusd sums */
    RQ_PANEL = 16,  /* outputs of a panel: the int32 lanes of a 512-bit register */
    RQ_MAX_ROWS = 12,  /* of a tile: 12 rows x 2 panels are 24 accumulators, of 32 registers */
    RQ_PAIR = 2,    /* panels of a tile */
    RQ_TILE_WIDTH = RQ_PAIR * RQ_PANEL
};

/* One tile: c[at[i]][j] = add[j] + sum over k of (a[i][k] - offset) b[k][j], with the kernel's own offset. */
struct rq_tile {
    const uint8_t *const *a;  /* first byte of each row */
    int64_t segments, segment_stride, steps;  /* of a row: how many, bytes between them, steps in each */
    const int8_t *b;          /* first panel */
    int64_t panel_bytes;      /* from one panel to the next */
    int64_t gap;              /* bytes of a panel to leave out after each segment */
    const int32_t *add;       /* 16 for each panel: zero points, offset and bias */
    int32_t *c;
    int64_t ldc;              /* elements from row to row */
    const int64_t *at;        /* row of c of each row of a */
    int columns;              /* outputs to store: 1 to 16 * panels */
};

/* A micro-kernel: computes the tile of `rows` rows (1 to the kernel's limit) and 1 or 2 panels.
 * It checks nothing: conv.c has refused bad sizes and pointers before, for all of them. */
typedef void rq_tile_fn(const struct rq_tile *t, int rows, int panels);

/* The output stage of a tile: see output.c. `sums` has lines of RQ_TILE_WIDTH, 64-byte aligned. */
typedef void rq_output_fn(const struct rq_output *y, const int32_t *sums, int rows, const int64_t *at, int64_t first,
                          int columns);

/* What zero points of the weights take from a tile of sums, before the output stage: zero_points[j] * row_sums[i] from
 * line i, output j. `columns` of them; a line may be changed up to its end. */
typedef void rq_correct_fn(int32_t *sums, int rows, const int32_t *row_sums, const int32_t *zero_points, int columns);

/* Run the kernel's multiplying instruction on registers alone, `rounds` times what fills the pipeline;
 * return the number of multiplications. Its speed is what no kernel can exceed. */
typedef int64_t rq_peak_fn(int64_t rounds);

/* A row of the kernel table (dispatch.c). */
struct rq_kernel {
    const char *name;
    uint32_t needs;
    int rows;              /* most rows of a tile */
    int offset;            /* 128 where an instruction reads a as signed; else 0 */
    rq_tile_fn *tile_s8;   /* weights of 8 bits */
    rq_tile_fn *tile_s4;   /* weights of 4 bits, two in a byte */
    rq_output_fn *dequantize, *requantize;
    rq_correct_fn *correct;
    rq_peak_fn *peak;      /* NULL: not measured */
};
const struct rq_kernel *rq_kernel_row(int row);  /* NULL: no such row */

rq_tile_fn rq_tile_s8_scalar, rq_tile_s4_scalar;
rq_tile_fn rq_tile_s8_avx2, rq_tile_s4_avx2;
rq_tile_fn rq_tile_s8_avxvnni, rq_tile_s4_avxvnni;
rq_tile_fn rq_tile_s8_avx512vnni, rq_tile_s4_avx512vnni;
rq_tile_fn rq_tile_s8_neondot, rq_tile_s4_neondot;

rq_output_fn rq_dequantize_scalar, rq_requantize_scalar;
rq_output_fn rq_dequantize_avx2, rq_requantize_avx2;
rq_output_fn rq_dequantize_avx512, rq_requantize_avx512;

rq_correct_fn rq_correct_scalar, rq_correct_avx2;

rq_peak_fn rq_peak_avx2, rq_peak_avxvnni, rq_peak_avx512vnni, rq_peak_neondot;

/* How packed weights lie in memory; see pack.c. */
struct rq_layout {
    int64_t segments, length, steps;  /* of k: runs, bytes in a run, steps in a run */
    int64_t panels, panel_bytes;
};
struct rq_layout rq_layout_of(int64_t outputs, int64_t segments, int64_t length, int bits);

/* The thread team (threads.c): run task(context, who) on this thread, number 0, and on up to `threads` - 1 others. A
 * member has the same number in every call: what it has worked on before is in its caches. */
typedef void rq_task(void *context, int who);
void rq_team_run(int threads, rq_task *task, void *context);
/* Scratch memory of the calling thread, at least `bytes` long, 64-byte aligned; it keeps its place and
 * content until the next call of this function by the same thread. NULL: no memory. */
void *rq_scratch(int64_t bytes);

#endif

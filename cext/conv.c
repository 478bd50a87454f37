/* conv.c - convolution and matrix product: cut into units, a unit into tiles.
 *
 *     y[m,o] = sum over k of (x[m,k] - zx) (w[o,k] - zw[o]) + bias[o]        m: a pixel of the result
 *            = sum xw  -  zw[o] sum x[m,k]  +  add[o]
 *     add[o] = bias[o] - zx sum w[o,k] + K zx zw[o]
 *
 * The micro-kernels compute "sum xw + add". The sum over x[m,k] is needed only where zw is not 0, and
 * is the same for all outputs.
 *
 * Five loops, from the outside:
 *
 *     1  units, dealt to threads: lines of one image x a range of panel pairs
 *     2  panel pairs of the unit           K * 32 bytes of weights: stay in the second cache
 *     3  tiles of up to 12 pixels          their K bytes each: in the first cache
 *     4  segments of k                     }  the micro-kernel
 *     5  steps of 8 k                      }
 *
 * The border. A unit copies the lines that it needs into a slab, with pixels of the code zx around
 * them; so a window never leaves the slab, and no loop asks where it is. The copy also ends in 8
 * spare bytes, for the last step of a segment whose length is no multiple of 8. Where there is no
 * border and no such rest, the image itself is the slab. A slab is kept below SLAB_BYTES, that is in
 * the second cache, whatever the size of the image.
 *
 * Zeros as padding would be wrong: the code 0 means the number -zx * scale.
 */
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "impl.h"

enum {
    SLAB_BYTES = 192 * 1024,    /* of a second cache of 1 MiB; it holds a panel pair as well */
    UNITS_PER_THREAD = 4,       /* a thread that is interrupted holds up a quarter of its share */
    MOST_SIZE = 1 << 30         /* of any dimension, so that no product below overflows */
};

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
    int copies, sums_pixels;
    int64_t scratch_bytes;
    atomic_llong next;          /* unit to be dealt */
    atomic_int status;
};

/* What a thread keeps while it works on a job: parts of its scratch memory. */
struct bench {
    int32_t *add;               /* (16 panels) */
    const uint8_t **rows;       /* first byte of each pixel of the unit */
    int32_t *row_sums;          /* sum of x over k of each of them */
    int32_t *pixel_sums;        /* sum over c of each pixel of the slab */
    int32_t *tile;              /* (12, 32) sums, on their way to the output stage */
    uint8_t *slab;
    int64_t unit;               /* of lines, whose slab this is; -1: none yet */
};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up64(int64_t a) { return (a + 63) / 64 * 64; }

/* ------------------------------------------------------------------ a unit's activations */

/* Sum of `count` bytes: 8 at a time, as four sums of 16 bits in one word. A lane grows by at most
 * 510 a word and holds 65535, hence 128 words at a time. */
static int32_t sum_bytes(const uint8_t *x, int64_t count)
{
    const uint64_t even = 0x00ff00ff00ff00ffu;
    int64_t i = 0;
    uint32_t total = 0;
    while (count - i >= 8) {
        const int64_t end = i + min64((count - i) / 8, 128) * 8;
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

/* Copy the lines that `lines` lines of the result from line `first` on need, with their border. */
static void fill_slab(const struct job *j, uint8_t *slab, const uint8_t *image, int64_t first, int64_t lines)
{
    const struct rq_input *x = j->x;
    const int zx = x->zero_point;
    const int64_t side = j->padding * x->c, inner = x->w * x->c;
    for (int64_t i = 0; i < (lines - 1) * j->stride + j->w->kh; i++) {
        const int64_t line = first * j->stride - j->padding + i;
        if (line < 0 || line >= x->h) {
            memset(slab, zx, (size_t)(2 * side + inner));
        } else {
            memset(slab, zx, (size_t)side);
            memcpy(slab + side, image + line * x->line_stride, (size_t)inner);
            memset(slab + side + inner, zx, (size_t)side);
        }
        slab += 2 * side + inner;
    }
    memset(slab, 0, RQ_STEP);
}

/* Sum over the window of each pixel of the unit, from the sums over the channels of each pixel. */
static void sum_windows(const struct job *j, struct bench *b, const uint8_t *first, int64_t line_bytes, int64_t lines)
{
    const int64_t width = j->slab_width, c = j->x->c;
    for (int64_t i = 0; i < (lines - 1) * j->stride + j->w->kh; i++)
        for (int64_t k = 0; k < width; k++)
            b->pixel_sums[i * width + k] = sum_bytes(first + i * line_bytes + k * c, c);
    int32_t *out = b->row_sums;
    for (int64_t i = 0; i < lines; i++)
        for (int64_t k = 0; k < j->wo; k++) {
            uint32_t sum = 0;
            for (int64_t p = 0; p < j->w->kh; p++)
                for (int64_t q = 0; q < j->w->kw; q++)
                    sum += (uint32_t)b->pixel_sums[(i * j->stride + p) * width + k * j->stride + q];
            *out++ = (int32_t)sum;
        }
}

/* Make the pixels of a unit of lines ready: a pointer to each, in the image or in the slab. */
static int64_t load_unit(const struct job *j, struct bench *b, int64_t n, int64_t first, int64_t lines)
{
    const struct rq_input *x = j->x;
    const uint8_t *image = x->data + n * x->image_stride, *start;
    int64_t line_bytes;
    if (j->copies) {
        fill_slab(j, b->slab, image, first, lines);
        start = b->slab;
        line_bytes = j->slab_width * x->c;
    } else {
        start = image + first * j->stride * x->line_stride;
        line_bytes = x->line_stride;
    }
    const uint8_t **row = b->rows;
    for (int64_t i = 0; i < lines; i++)
        for (int64_t k = 0; k < j->wo; k++)
            *row++ = start + i * j->stride * line_bytes + k * j->stride * x->c;
    if (j->sums_pixels)
        sum_windows(j, b, start, line_bytes, lines);
    return line_bytes;
}

/* ------------------------------------------------------------------ a unit's tiles */

/* Take the tile in b->tile, rows m, m + 1, ... of the result, through the output stage. */
static void finish_tile(const struct job *j, struct bench *b, int64_t row, int rows, int64_t m, int64_t first,
                        int columns)
{
    for (int i = 0; j->sums_pixels && i < rows; i++)
        for (int o = 0; o < columns; o++) {
            int32_t *sum = &b->tile[i * RQ_TILE_WIDTH + o];
            *sum = (int32_t)((uint32_t)*sum - (uint32_t)j->w->zero_points[first + o] * (uint32_t)b->row_sums[row + i]);
        }
    if (j->y->kind == RQ_FLOAT32)
        j->kernel->dequantize(j->y, b->tile, rows, m, first, columns);
    else if (j->y->kind == RQ_UINT8)
        j->kernel->requantize(j->y, b->tile, rows, m, first, columns);
    else
        for (int i = 0; i < rows; i++)
            memcpy((int32_t *)j->y->data + (m + i) * j->y->ld + first, b->tile + i * RQ_TILE_WIDTH,
                   sizeof *b->tile * (size_t)columns);
}

/* Rows b->rows[0 .. rows-1], which are rows m, m + 1, ... of the result, times a range of panel pairs. */
static void run_tiles(const struct job *j, struct bench *b, int64_t rows, int64_t m, int64_t line_bytes,
                      int64_t first_pair, int64_t pairs)
{
    const int64_t tiles = ceil_div(rows, j->kernel->rows);
    const int direct = j->y->kind == RQ_INT32 && !j->sums_pixels;
    rq_tile_fn *const run = j->w->bits == 8 ? j->kernel->tile_s8 : j->kernel->tile_s4;
    for (int64_t p = first_pair; p < first_pair + pairs; p++) {
        const int64_t first = p * RQ_TILE_WIDTH;
        const int columns = (int)min64(j->w->outputs - first, RQ_TILE_WIDTH);
        struct rq_tile t = {
            .segments = j->layout.segments, .segment_stride = line_bytes, .steps = j->layout.steps,
            .b = (const int8_t *)j->w->panels + p * RQ_PAIR * j->layout.panel_bytes,
            .panel_bytes = j->layout.panel_bytes, .add = b->add + first, .columns = columns,
            .c = b->tile, .ldc = RQ_TILE_WIDTH,
        };
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t row = rows * i / tiles; /* of equal height */
            const int count = (int)(rows * (i + 1) / tiles - row);
            t.a = b->rows + row;
            if (direct) {
                t.c = (int32_t *)j->y->data + (m + row) * j->y->ld + first;
                t.ldc = j->y->ld;
            }
            run(&t, count, columns > RQ_PANEL ? 2 : 1);
            if (!direct)
                finish_tile(j, b, row, count, m + row, first, columns);
        }
    }
}

/* ------------------------------------------------------------------ the whole job */

static void fill_add(const struct job *j, int32_t *add)
{
    const struct rq_weights *w = j->w;
    const int64_t zx = j->x->zero_point, k = w->kh * w->kw * w->c;
    memset(add, 0, sizeof *add * (size_t)(j->layout.panels * RQ_PANEL));
    for (int64_t o = 0; o < w->outputs; o++) {
        const int64_t zw = w->zero_points ? w->zero_points[o] : 0;
        const int64_t bias = j->y->int_bias ? j->y->int_bias[o] : 0;
        add[o] = (int32_t)(uint32_t)(bias - zx * w->sums[o] + k * zx * zw);
    }
}

/* Cut this thread's scratch memory into the parts of a bench; return the bytes used. memory may be NULL. */
static int64_t lay_out(const struct job *j, uint8_t *memory, struct bench *b)
{
    const int64_t rows = j->lines * j->wo;
    const int64_t slab = j->slab_lines * j->slab_width * j->x->c + RQ_STEP;
    const int64_t sizes[6] = {
        j->layout.panels * RQ_PANEL * (int64_t)sizeof *b->add,
        rows * (int64_t)sizeof *b->rows,
        j->sums_pixels ? rows * (int64_t)sizeof *b->row_sums : 0,
        j->sums_pixels ? j->slab_lines * j->slab_width * (int64_t)sizeof *b->pixel_sums : 0,
        RQ_MAX_ROWS * RQ_TILE_WIDTH * (int64_t)sizeof *b->tile,
        j->copies ? slab : 0,
    };
    int64_t at[7] = {0};
    for (int i = 0; i < 6; i++)
        at[i + 1] = at[i] + round_up64(sizes[i]);
    if (memory) {
        b->add = (int32_t *)(memory + at[0]);
        b->rows = (const uint8_t **)(memory + at[1]);
        b->row_sums = (int32_t *)(memory + at[2]);
        b->pixel_sums = (int32_t *)(memory + at[3]);
        b->tile = (int32_t *)(memory + at[4]);
        b->slab = memory + at[5];
        b->unit = -1;
    }
    return at[6];
}

/* What every thread of the team does: take units until there are none. */
static void work(void *context)
{
    struct job *j = context;
    struct bench b;
    uint8_t *memory = rq_scratch(j->scratch_bytes);
    if (!memory) {
        atomic_store(&j->status, RQ_ERR_MEMORY);
        return;
    }
    lay_out(j, memory, &b);
    fill_add(j, b.add);
    const int64_t all_pairs = ceil_div(j->layout.panels, RQ_PAIR);
    const int64_t units = j->x->n * j->line_units * j->pair_units;
    int64_t line_bytes = 0, unit;
    while ((unit = atomic_fetch_add(&j->next, 1)) < units) {
        const int64_t place = unit / j->pair_units, n = place / j->line_units;
        const int64_t first = place % j->line_units * j->lines, lines = min64(j->lines, j->ho - first);
        if (place != b.unit)
            line_bytes = load_unit(j, &b, n, first, lines);
        b.unit = place;
        const int64_t pair = unit % j->pair_units * j->pairs;
        run_tiles(j, &b, lines * j->wo, (n * j->ho + first) * j->wo, line_bytes, pair, min64(j->pairs, all_pairs - pair));
    }
}

/* Choose the size of a unit, so that its slab fits the cache and there are enough for all threads. */
static void plan(struct job *j, int threads)
{
    const int64_t all_pairs = ceil_div(j->layout.panels, RQ_PAIR), wanted = (int64_t)threads * UNITS_PER_THREAD;
    const int64_t line_bytes = j->stride * j->slab_width * j->x->c;
    int64_t lines = min64(j->ho, SLAB_BYTES / (line_bytes + 1) + 1);
    while (j->x->n * ceil_div(j->ho, lines) * all_pairs < wanted && lines * j->wo > 2 * j->kernel->rows && lines > 1)
        lines = ceil_div(lines, 2);
    j->line_units = ceil_div(j->ho, lines);
    j->lines = ceil_div(j->ho, j->line_units); /* of equal height */
    j->line_units = ceil_div(j->ho, j->lines);
    j->pair_units = min64(all_pairs, ceil_div(wanted, j->x->n * j->line_units));
    j->pairs = ceil_div(all_pairs, j->pair_units);
    j->pair_units = ceil_div(all_pairs, j->pairs);
    j->slab_lines = (j->lines - 1) * j->stride + j->w->kh;
    j->scratch_bytes = lay_out(j, NULL, NULL);
}

static int is_size(int64_t size, int64_t least) { return size >= least && size <= MOST_SIZE; }

/* RQ_OK if the operands describe an operation that stays inside of its memory. */
static int check(const struct rq_input *x, const struct rq_weights *w, int64_t stride, int64_t padding,
                 const struct rq_output *y)
{
    if (!x || !w || !y)
        return RQ_ERR_NULL;
    const int64_t bytes = rq_packed_bytes(w->outputs, w->kh, w->kw, w->c, w->bits);
    if (bytes < 0)
        return (int)bytes;
    if (!is_size(x->n, 0) || !is_size(x->h, 0) || !is_size(x->w, 0) || x->c != w->c || !is_size(w->outputs, 0)
        || !is_size(stride, 1) || !is_size(padding, 0) || y->ld < w->outputs)
        return RQ_ERR_SIZE;
    if (x->line_stride < x->w * x->c || (x->h > 0 && x->image_stride < (x->h - 1) * x->line_stride + x->w * x->c))
        return RQ_ERR_SIZE;
    if (x->zero_point < 0 || x->zero_point > 255 || y->kind < RQ_INT32 || y->kind > RQ_UINT8)
        return RQ_ERR_RANGE;
    if (y->kind == RQ_UINT8 && (y->qmin < 0 || y->qmin > y->qmax || y->qmax > 255))
        return RQ_ERR_RANGE;
    if (w->outputs == 0 || x->n == 0)
        return RQ_OK;
    if (!y->data || !w->sums || (bytes > 0 && !w->panels) || (x->h > 0 && x->w > 0 && x->c > 0 && !x->data))
        return RQ_ERR_NULL;
    if ((y->kind == RQ_FLOAT32 && !y->scale) || (y->kind == RQ_UINT8 && (!y->mantissa || !y->shift)))
        return RQ_ERR_NULL;
    if (y->residual && y->residual_ld < w->outputs)
        return RQ_ERR_SIZE;
    for (int64_t o = 0; y->kind == RQ_UINT8 && o < w->outputs; o++)
        if (y->shift[o] < 0 || y->shift[o] > 62)
            return RQ_ERR_RANGE;
    return RQ_OK;
}

int rq_conv2d(int row, int threads, const struct rq_input *x, const struct rq_weights *w,
              int64_t stride, int64_t padding, const struct rq_output *y)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    if (!kernel || (kernel->needs & ~rq_cpu_features()))
        return RQ_ERR_KERNEL;
    const int status = check(x, w, stride, padding, y);
    if (status != RQ_OK)
        return status;

    const int64_t height = x->h + 2 * padding - w->kh, width = x->w + 2 * padding - w->kw;
    if (height < 0 || width < 0)
        return RQ_ERR_SIZE;
    struct rq_input flat = *x;
    struct job j = {
        .kernel = kernel, .x = &flat, .w = w, .y = y, .stride = stride, .padding = padding,
        .ho = height / stride + 1, .wo = width / stride + 1,
        .layout = rq_layout_of(w->outputs, w->kh, w->kw * w->c, w->bits),
    };
    if (x->n == 0 || w->outputs == 0)
        return RQ_OK; /* nothing to write */
    const int64_t line = x->w * x->c, image = x->h * line;
    if (w->kh * w->kw == 1 && padding == 0 && stride == 1 && x->line_stride == line && x->image_stride == image
        && x->n * x->h * x->w <= MOST_SIZE) {
        /* a matrix product: all pixels in one column, to be cut wherever it suits */
        flat.h = j.ho = x->n * x->h * x->w;
        flat.n = flat.w = j.wo = 1;
        flat.line_stride = x->c;
    }
    for (int64_t o = 0; w->zero_points && !j.sums_pixels && o < w->outputs; o++)
        j.sums_pixels = w->zero_points[o] != 0;
    j.copies = padding > 0 || j.layout.length % RQ_STEP != 0;
    j.slab_width = flat.w + 2 * padding;
    atomic_init(&j.next, 0);
    atomic_init(&j.status, RQ_OK);
    const double work_size = (double)flat.n * (double)j.ho * (double)j.wo * (double)(w->kh * w->kw * w->c) * (double)w->outputs;
    if (threads < 1 || work_size < RQ_ALONE_BELOW)
        threads = 1;
    plan(&j, threads);
    rq_team_run(threads, work, &j);
    return atomic_load(&j.status);
}

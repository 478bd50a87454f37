/* conv.c - convolution and matrix product: cut into units, a unit into tiles.
 *
 *     y[m,o] = sum over k of (x[m,k] - zx) (w[o,k] - zw[o]) + bias[o]        m: a pixel of the result
 *            = sum xw  -  zw[o] sum x[m,k]  +  add[o]
 *     add[o] = bias[o] - zx sum w[o,k] + K zx zw[o]
 *
 * The micro-kernels compute "sum xw + add"; one that reads x as signed, "sum (x - 128) w + add", finds
 * 128 sum w more in "add". The sum over x[m,k] is needed only where zw is not 0, and is the same for all
 * outputs. Where slab.c leaves out a part of the window, sum w runs over the rest: what is left out has
 * x = zx, and xw - zx w = 0.
 *
 * Six loops, from the outside:
 *
 *     1  units, dealt to threads: lines of one image x some panel pairs
 *     2  panel pairs of the unit           K * 32 bytes of weights: stay in the second cache
 *     3  parts of the unit                 pixels that see the same part of the window
 *     4  tiles of up to 12 pixels          their K bytes each: in the first cache
 *     5  segments of k                     }  the micro-kernel
 *     6  steps of 8 k                      }
 */
#include <stddef.h>
#include <string.h>

#include "conv.h"

enum {
    SLAB_BYTES = 192 * 1024,    /* of a second cache of 1 MiB; it holds a panel pair as well */
    UNITS_PER_THREAD = 4,       /* of a thread that is interrupted, the others can take the rest */
    MOST_SIZE = 1 << 30         /* of any dimension: with the next, no product below overflows */
};
static const int64_t MOST_BYTES = (int64_t)1 << 46; /* of an image with its frame: more than any memory */

static int64_t round_up64(int64_t a) { return (a + 63) / 64 * 64; }

/* ------------------------------------------------------------------ a unit's tiles */

/* add[0 .. columns-1] for outputs first, first + 1, ... of a part. The sums of w over a part of the
 * window follow from those over the corner parts that pack.c made. */
static void fill_add(const struct job *j, const struct part *part, int64_t first, int columns, int32_t *add)
{
    const struct rq_weights *w = j->w;
    const int64_t zx = j->x->zero_point, offset = j->kernel->offset, k = w->kh * w->kw * w->c, line = w->kw + 1;
    const int32_t *corner[4] = {
        w->sums + (part->p1 * line + part->q1) * w->outputs + first,
        w->sums + (part->p0 * line + part->q1) * w->outputs + first,
        w->sums + (part->p1 * line + part->q0) * w->outputs + first,
        w->sums + (part->p0 * line + part->q0) * w->outputs + first,
    };
    for (int o = 0; o < columns; o++) {
        const int64_t zw = w->zero_points ? w->zero_points[first + o] : 0;
        const int64_t bias = j->y->int_bias ? j->y->int_bias[first + o] : 0;
        const int64_t sum = (int64_t)corner[0][o] - corner[1][o] - corner[2][o] + corner[3][o];
        add[o] = (int32_t)(uint32_t)(bias - (zx - offset) * sum + k * zx * zw);
    }
}

/* Take the tile in b->tile, rows row, row + 1, ... of the unit, through the output stage. */
static void finish_tile(const struct job *j, struct bench *b, int64_t row, int rows, int64_t first, int columns)
{
    const int64_t *const at = b->at + row;
    if (j->sums_pixels)
        j->kernel->correct(b->tile, rows, b->row_sums + row, j->w->zero_points + first, columns);
    if (b->y.kind == RQ_FLOAT32)
        j->kernel->dequantize(&b->y, b->tile, rows, at, first, columns);
    else if (b->y.kind == RQ_UINT8)
        j->kernel->requantize(&b->y, b->tile, rows, at, first, columns);
    else
        for (int i = 0; i < rows; i++)
            memcpy((int32_t *)b->y.data + at[i] * b->y.ld + first, b->tile + i * RQ_TILE_WIDTH,
                   sizeof *b->tile * (size_t)columns);
}

/* The rows of one part times one panel pair. */
static void run_part(const struct job *j, struct bench *b, const struct part *part, int64_t pair)
{
    static const int64_t in_order[RQ_MAX_ROWS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    const int direct = b->y.kind == RQ_INT32 && !j->sums_pixels;
    rq_tile_fn *const run = j->w->bits == 8 ? j->kernel->tile_s8 : j->kernel->tile_s4;
    const int64_t first = pair * RQ_TILE_WIDTH, steps = j->layout.steps;
    const int64_t step_bytes = RQ_STEP * RQ_PANEL * j->w->bits / 8;
    const int columns = (int)rq_min(j->w->outputs - first, RQ_TILE_WIDTH);
    _Alignas(64) int32_t add[RQ_TILE_WIDTH] = {0};
    fill_add(j, part, first, columns, add);

    struct rq_tile t = {
        .segments = part->p1 - part->p0, .segment_stride = b->line_bytes, .steps = steps,
        .b = (const int8_t *)j->w->panels + pair * RQ_PAIR * j->layout.panel_bytes + part->p0 * steps * step_bytes,
        .panel_bytes = j->layout.panel_bytes, .add = add, .columns = columns,
        .c = direct ? (int32_t *)b->y.data + first : b->tile, .ldc = direct ? b->y.ld : RQ_TILE_WIDTH,
    };
    if (part->q1 - part->q0 < j->w->kw) { /* C is a multiple of the step then: slab.c saw to it */
        const int64_t steps_of_tap = j->x->c / RQ_STEP;
        t.steps = (part->q1 - part->q0) * steps_of_tap;
        t.b += part->q0 * steps_of_tap * step_bytes;
        t.gap = (steps - t.steps) * step_bytes;
    }
    const int64_t tiles = rq_ceil_div(part->rows, j->kernel->rows);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = part->first + part->rows * i / tiles; /* of equal height */
        const int count = (int)(part->first + part->rows * (i + 1) / tiles - row);
        t.a = b->rows + row;
        t.at = direct ? b->at + row : in_order;
        run(&t, count, columns > RQ_PANEL ? 2 : 1);
        if (!direct)
            finish_tile(j, b, row, count, first, columns);
    }
}

/* ------------------------------------------------------------------ the whole job */

/* Cut this thread's scratch memory into the parts of a bench; return the bytes used. memory may be NULL. */
static int64_t lay_out(const struct job *j, uint8_t *memory, struct bench *b)
{
    const int64_t rows = j->lines * j->wo, pixels = j->slab_lines * j->slab_width;
    const int64_t sizes[9] = {
        rows * (int64_t)sizeof *b->rows,
        rows * (int64_t)sizeof *b->at,
        3 * j->lines * (int64_t)sizeof *b->parts,
        j->sums_pixels ? rows * (int64_t)sizeof *b->row_sums : 0,
        j->sums_pixels ? pixels * (int64_t)sizeof *b->pixel_sums : 0,
        j->sums_pixels ? j->slab_width * (int64_t)sizeof *b->column_sums : 0,
        j->sums_pixels ? rows * (int64_t)sizeof *b->window_sums : 0,
        RQ_MAX_ROWS * RQ_TILE_WIDTH * (int64_t)sizeof *b->tile,
        j->copies ? pixels * j->x->c + RQ_STEP : 0,
    };
    int64_t at[10] = {0};
    for (int i = 0; i < 9; i++)
        at[i + 1] = at[i] + round_up64(sizes[i]);
    if (memory) {
        b->rows = (const uint8_t **)(memory + at[0]);
        b->at = (int64_t *)(memory + at[1]);
        b->parts = (struct part *)(memory + at[2]);
        b->row_sums = (int32_t *)(memory + at[3]);
        b->pixel_sums = (uint32_t *)(memory + at[4]);
        b->column_sums = (uint32_t *)(memory + at[5]);
        b->window_sums = (uint32_t *)(memory + at[6]);
        b->tile = (int32_t *)(memory + at[7]);
        b->slab = memory + at[8];
    }
    return at[9];
}

/* The pixels of one unit times its panel pairs. `loaded`: the place (image and lines) whose pixels are
 * ready; the units of a place are neighbours. */
static void run_unit(const struct job *j, struct bench *b, int64_t unit, int64_t *loaded)
{
    const int64_t place = unit / j->pair_units, n = place / j->line_units;
    const int64_t first = place % j->line_units * j->lines;
    if (place != *loaded)
        rq_load_unit(j, b, n, first, rq_min(j->lines, j->ho - first));
    *loaded = place;
    const int64_t pair = unit % j->pair_units * j->pairs;
    const int64_t end = rq_min(pair + j->pairs, rq_ceil_div(j->layout.panels, RQ_PAIR));
    for (int64_t p = pair; p < end; p++)
        for (int64_t i = 0; i < b->part_count; i++)
            run_part(j, b, &b->parts[i], p);
}

/* What every thread of the team does: the units of its own range, then what is left of the others'. A
 * range of its own, for two reasons: its pixels and weights are in the thread's second cache since the
 * call before; and the codes of two panel pairs share a cache line, which two threads that write pairs in
 * turn pull to and fro (the 1 x 1 window of 256 channels on 16 x 16 pixels: up to 60 us instead of 42). */
static void work(void *context, int who)
{
    struct job *j = context;
    struct bench b = {.lines = 0};
    uint8_t *memory = rq_scratch(j->scratch_bytes);
    if (!memory) {
        atomic_store(&j->status, RQ_ERR_MEMORY);
        return;
    }
    lay_out(j, memory, &b);
    const int64_t units = j->x->n * j->line_units * j->pair_units;
    int64_t loaded = -1;
    for (int i = 0; i < j->ranges; i++) {
        const int range = (who + i) % j->ranges;
        const int64_t begin = units * range / j->ranges, count = units * (range + 1) / j->ranges - begin;
        int64_t unit;
        while ((unit = atomic_fetch_add(&j->dealt[range].units, 1)) < count)
            run_unit(j, &b, begin + unit, &loaded);
    }
}

/* Choose the size of a unit, so that its slab fits the cache and there are enough for all threads. */
static void plan(struct job *j, int threads)
{
    const int64_t all_pairs = rq_ceil_div(j->layout.panels, RQ_PAIR), wanted = (int64_t)threads * UNITS_PER_THREAD;
    const int64_t line_bytes = (j->ho > 1 ? j->stride : 1) * j->slab_width * j->x->c;
    int64_t lines = rq_min(j->ho, SLAB_BYTES / (line_bytes + 1) + 1);
    while (j->x->n * rq_ceil_div(j->ho, lines) * all_pairs < wanted && lines * j->wo > 2 * j->kernel->rows && lines > 1)
        lines = rq_ceil_div(lines, 2);
    j->line_units = rq_ceil_div(j->ho, lines);
    j->lines = rq_ceil_div(j->ho, j->line_units); /* of equal height */
    j->line_units = rq_ceil_div(j->ho, j->lines);
    j->pair_units = rq_min(all_pairs, rq_ceil_div(wanted, j->x->n * j->line_units));
    j->pairs = rq_ceil_div(all_pairs, j->pair_units);
    j->pair_units = rq_ceil_div(all_pairs, j->pairs);
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
        || stride < 1 || !is_size(padding, 0) || y->ld < w->outputs)
        return RQ_ERR_SIZE;
    if (x->h + 2 * padding > MOST_SIZE || x->w + 2 * padding > MOST_SIZE)
        return RQ_ERR_SIZE;
    if (x->line_stride < x->w * x->c || (x->h > 1 && x->line_stride > MOST_BYTES / x->h))
        return RQ_ERR_SIZE;
    if (x->h > 0 && (x->image_stride < (x->h - 1) * x->line_stride + x->w * x->c
                     || (x->n > 1 && x->image_stride > MOST_BYTES / x->n)))
        return RQ_ERR_SIZE;
    if (x->zero_point < 0 || x->zero_point > 255 || y->kind < RQ_INT32 || y->kind > RQ_UINT8)
        return RQ_ERR_RANGE;
    if (y->kind == RQ_UINT8
        && (y->zero_point < 0 || y->zero_point > 255 || y->qmin < 0 || y->qmin > y->qmax || y->qmax > 255))
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
    if ((double)(x->h + 2 * padding) * (double)(x->w + 2 * padding) * (double)x->c > (double)MOST_BYTES)
        return RQ_ERR_MEMORY;
    struct rq_input flat = *x;
    if (x->h <= 1)
        flat.line_stride = x->w * x->c; /* there is no next line: the stride means nothing */
    if (x->n <= 1 || x->h == 0)
        flat.image_stride = 0;
    struct job j = {
        .kernel = kernel, .x = &flat, .w = w, .y = y, .padding = padding,
        .stride = rq_min(stride, rq_max(height, width) + 1), /* the next window is outside in any case */
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
    atomic_init(&j.status, RQ_OK);
    const double pixels = (double)flat.n * (double)j.ho * (double)j.wo;
    const double work_size = pixels * (double)(w->kh * w->kw * w->c) * (double)w->outputs;
    if (threads < 1 || work_size < RQ_ALONE_BELOW)
        threads = 1;
    plan(&j, threads);
    j.ranges = threads < MOST_RANGES ? threads : MOST_RANGES;
    for (int i = 0; i < j.ranges; i++)
        atomic_init(&j.dealt[i].units, 0);
    rq_team_run(threads, work, &j);
    return atomic_load(&j.status);
}

/* slab.c - the pixels of a unit of work, ready to be made into tiles.
 *
 * The frame. The lines that a unit needs are copied into a slab, with pixels of the code zx around
 * them: wherever a window lies, it can be read, and no inner loop asks where it is. Zeros around the
 * image would be wrong: the code 0 means the number -zx * scale. The copy ends in 8 spare bytes, for the
 * last step of a segment whose length is no multiple of 8. An image without a frame and without such a
 * rest is read where it is.
 *
 * The next image needs the same lines: frame, parts and addresses are those of the one before, and only
 * the pixels are copied (of 16 images of 32 x 32 pixels and 32 channels, the rest would take 3 % of the
 * time).
 *
 * The parts. A frame pixel means 0 and adds (zx - zx) w = 0: its multiplications can be left out. The
 * pixels of a unit are therefore sorted by the part of the window that lies inside the image,
 *
 *     +---+-----------+---+
 *     |   top line        |      without window line 0
 *     +---+-----------+---+
 *     | l |           | r |      l without window column 0, r without the last one
 *     | e |  inside   | i |
 *     | f |           | g |      a 3 x 3 window on 16 x 16 pixels: 8 % of all multiplications,
 *     | t |           | ht|      on 8 x 8 pixels 15 %
 *     +---+-----------+---+
 *     |  bottom line      |
 *     +---+-----------+---+
 *
 * and each part is a matrix product over its own, shorter k. A side column of fewer than LEAST_ROWS
 * pixels stays with its neighbours, since a tile so flat wastes more than it saves; and window columns can
 * be left out only where their weights begin at a step, that is if C is a multiple of 8.
 */
#include <string.h>

#include "conv.h"

enum { LEAST_ROWS = 4 };

/* Copy the lines that `lines` lines of the result from line `first` on need, with their frame if it is
 * not there yet. */
static void fill_slab(const struct job *j, uint8_t *slab, const uint8_t *image, int64_t first, int64_t lines,
                      int framed)
{
    const struct rq_input *x = j->x;
    const int zx = x->zero_point;
    const int64_t side = j->padding * x->c, inner = x->w * x->c;
    for (int64_t i = 0; i < (lines - 1) * j->stride + j->w->kh; i++) {
        const int64_t line = first * j->stride - j->padding + i;
        const int is_inside = line >= 0 && line < x->h;
        if (is_inside)
            memcpy(slab + side, image + line * x->line_stride, (size_t)inner);
        if (is_inside && !framed) {
            memset(slab, zx, (size_t)side);
            memset(slab + side + inner, zx, (size_t)side);
        } else if (!framed) {
            memset(slab, zx, (size_t)(2 * side + inner));
        }
        slab += 2 * side + inner;
    }
    memset(slab, 0, RQ_STEP);
}

/* Sum over the whole window of each row: of the bytes of each pixel, of kh such below each other, and of kw of those
 * side by side. */
static void sum_windows(const struct job *j, struct bench *b, const uint8_t *start, int64_t first, int64_t lines)
{
    const int64_t width = j->slab_width, kh = j->w->kh, kw = j->w->kw;
    uint32_t *const pixels = b->pixel_sums;
    for (int64_t i = 0; i < (lines - 1) * j->stride + kh; i++)
        rq_sum_pixels(pixels + i * width, start + i * b->line_bytes, width, j->x->c);

    const int one = kh * kw * j->stride == 1; /* a window is a pixel */
    for (int64_t i = 0; i < lines && !one; i++) {
        uint32_t *const window = b->window_sums + i * j->wo;
        rq_add_up(b->column_sums, pixels + i * j->stride * width, kh, width, width);
        if (j->stride == 1)
            rq_add_up(window, b->column_sums, kw, 1, j->wo);
        else
            for (int64_t k = 0; k < j->wo; k++)
                rq_add_up(window + k, b->column_sums + k * j->stride, kw, 1, 1);
    }

    const struct part *last = &b->parts[b->part_count - 1]; /* in the order of the rows */
    const uint32_t *const sums = one ? pixels : b->window_sums;
    for (int64_t r = 0; r < last->first + last->rows; r++)
        b->row_sums[r] = (int32_t)sums[b->at[r] - first * j->wo];
}

/* Window lines (or columns) that lie inside of an image of `size`, for line (or column) i of the result. */
static void inside(const struct job *j, int64_t i, int64_t size, int64_t window, int64_t *from, int64_t *to)
{
    const int64_t begin = i * j->stride - j->padding; /* of the window, in the image */
    *from = rq_min(rq_max(0, -begin), window);
    *to = rq_max(rq_min(window, size - begin), *from);
}

/* Add the pixels of lines i0 .. i1-1 (of the unit) and columns k0 .. k1-1 as a part. */
static void add_part(const struct job *j, struct bench *b, struct part part, const uint8_t *start, int64_t i0,
                     int64_t i1, int64_t k0, int64_t k1, int64_t at)
{
    const int64_t c = j->x->c;
    part.first = b->part_count ? b->parts[b->part_count - 1].first + b->parts[b->part_count - 1].rows : 0;
    part.rows = (i1 - i0) * (k1 - k0);
    if (part.rows == 0)
        return;
    const uint8_t **row = b->rows + part.first;
    int64_t *m = b->at + part.first;
    for (int64_t i = i0; i < i1; i++)
        for (int64_t k = k0; k < k1; k++) {
            *row++ = start + (i * j->stride + part.p0) * b->line_bytes + (k * j->stride + part.q0) * c;
            *m++ = at + i * j->wo + k;
        }
    b->parts[b->part_count++] = part;
}

/* Sort the pixels of lines first .. first + lines - 1 into parts. */
static void cut_parts(const struct job *j, struct bench *b, const uint8_t *start, int64_t first, int64_t lines)
{
    const struct rq_input *x = j->x;
    const int64_t kh = j->w->kh, kw = j->w->kw, at = first * j->wo;
    /* columns 0 .. left-1 and right .. wo-1 have windows that hang over the sides */
    int64_t left = 0, right = j->wo, from, to;
    while (left < j->wo && (inside(j, left, x->w, kw, &from, &to), from > 0))
        left++;
    while (right > 0 && (inside(j, right - 1, x->w, kw, &from, &to), to < kw))
        right--;
    const int splits = left <= right && x->c % RQ_STEP == 0;
    b->part_count = 0;
    for (int64_t i = 0, end; i < lines; i = end) {
        struct part whole = {.q0 = 0, .q1 = kw}, other;
        inside(j, first + i, x->h, kh, &whole.p0, &whole.p1);
        for (end = i + 1; end < lines; end++) { /* lines that see the same part of the window */
            inside(j, first + end, x->h, kh, &other.p0, &other.p1);
            if (other.p0 != whole.p0 || other.p1 != whole.p1)
                break;
        }
        const int64_t l = splits && (end - i) * left >= LEAST_ROWS ? left : 0;
        const int64_t r = splits && (end - i) * (j->wo - right) >= LEAST_ROWS ? right : j->wo;
        other = whole;
        if (l > 0)
            inside(j, l - 1, x->w, kw, &other.q0, &to); /* of the pixel that leaves out the fewest */
        add_part(j, b, other, start, i, end, 0, l, at);
        add_part(j, b, whole, start, i, end, l, r, at);
        other = whole;
        if (r < j->wo)
            inside(j, r, x->w, kw, &from, &other.q1);
        add_part(j, b, other, start, i, end, r, j->wo, at);
    }
}

void rq_load_unit(const struct job *j, struct bench *b, int64_t n, int64_t first, int64_t lines)
{
    const struct rq_input *x = j->x;
    const uint8_t *image = x->data + n * x->image_stride, *start = b->slab;
    const int same_place = first == b->first && lines == b->lines; /* in another image */
    b->y = *j->y;
    b->y.data = (char *)b->y.data + n * j->ho * j->wo * b->y.ld * (b->y.kind == RQ_UINT8 ? 1 : 4);
    if (b->y.residual)
        b->y.residual += n * j->ho * j->wo * b->y.residual_ld;
    if (j->copies) {
        fill_slab(j, b->slab, image, first, lines, same_place);
        b->line_bytes = j->slab_width * x->c;
    } else {
        start = image + first * j->stride * x->line_stride;
        b->line_bytes = x->line_stride;
    }
    if (!(j->copies && same_place)) /* the slab has the same pixels at the same addresses */
        cut_parts(j, b, start, first, lines);
    if (j->sums_pixels)
        sum_windows(j, b, start, first, lines);
    b->first = first;
    b->lines = lines;
}

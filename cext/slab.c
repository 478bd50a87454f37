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

/* Sum of `count` bytes: 8 at a time, as four sums of 16 bits in one word. A lane grows by at most
 * 510 a word and holds 65535, hence 128 words at a time. */
int32_t rq_sum_bytes(const uint8_t *x, int64_t count)
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

/* Sum over the whole window of each row, from the sums over the channels of each pixel. */
static void sum_windows(const struct job *j, struct bench *b, const uint8_t *start, int64_t first, int64_t lines)
{
    const int64_t width = j->slab_width, c = j->x->c;
    for (int64_t i = 0; i < (lines - 1) * j->stride + j->w->kh; i++)
        for (int64_t k = 0; k < width; k++)
            b->pixel_sums[i * width + k] = rq_sum_bytes(start + i * b->line_bytes + k * c, c);
    const struct part *last = &b->parts[b->part_count - 1];
    for (int64_t r = 0; r < last->first + last->rows; r++) {
        const int64_t line = b->at[r] / j->wo - first, column = b->at[r] % j->wo;
        uint32_t sum = 0;
        for (int64_t p = 0; p < j->w->kh; p++)
            for (int64_t q = 0; q < j->w->kw; q++)
                sum += (uint32_t)b->pixel_sums[(line * j->stride + p) * width + column * j->stride + q];
        b->row_sums[r] = (int32_t)sum;
    }
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

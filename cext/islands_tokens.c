/* islands_tokens.c - the islands of a transformer: checked, cut into units, dealt to threads, as in islands.c.
 *
 *     layer norm, gated sum          a unit is a part of the tokens of one image: conditions differ between images
 *     GELU, two signs, parts         a unit is some rows
 *     softmax with two regions       some lines of scores
 *
 * Conditions (shift, scale, gate) are vectors of D numbers for each image, `stride` numbers apart: one row of them
 * holds those of all blocks.
 *
 * Layer norm. z = (x - x0 - m) r factor[p] + offset[p] with factor = (1 + gamma) / unit and offset = beta / unit, all
 * in double. x - x0 is at most 2 sqrt(D) deviations; m loses at most D / 16 + 5 roundings of that, 2^-53 each, and the
 * rest a handful: z is within (D / 16 + 10) sqrt(D) 2^-52 |1 + gamma| + 2^-51 |beta| of exact, for D up to 1000 less
 * than 2^-40 (|1 + gamma| + |beta|).
 */
#include <stddef.h>
#include <string.h>

#include "impl.h"
#include "islands.h"

enum {
    TOKENS = 32,           /* of a unit */
    MOST_PARTS = 64
};

static int64_t chunks_of(int64_t tokens) { return (tokens + TOKENS - 1) / TOKENS; }

/* ------------------------------------------------------------------ units */

/* Which tokens of which image a unit is: returns the number of the first, of all. */
static int64_t tokens_of(const struct rq_island *j, int64_t unit, int64_t *image, int64_t *count)
{
    const int64_t chunks = chunks_of(j->width), first = unit % chunks * TOKENS, rest = j->width - first;
    *image = unit / chunks;
    *count = rest < TOKENS ? rest : TOKENS;
    return *image * j->width + first;
}

static void normalise_tokens(struct rq_island *j, int64_t unit)
{
    const int64_t d = j->c, padded = (d + RQ_BLOCK - 1) / RQ_BLOCK * RQ_BLOCK;
    int64_t image, count;
    const int64_t first = tokens_of(j, unit, &image, &count);
    double *const room = rq_scratch((2 * padded + 2 * TOKENS) * (int64_t)sizeof *room);
    if (!room) {
        rq_island_failed(j, RQ_ERR_MEMORY);
        return;
    }
    double *const factor = room, *const offset = room + padded, *const mean = room + 2 * padded;
    double *const variance = mean + TOKENS;
    const float *const gamma = j->gamma + image * j->stride, *const beta = j->beta + image * j->stride;
    const float *const x = (const float *)j->x + first * d;
    double bad = 0;
    for (int64_t p = 0; p < padded; p++) {
        factor[p] = p < d ? (1 + (double)gamma[p]) / j->f.unit : 0;
        offset[p] = p < d ? (double)beta[p] / j->f.unit : 0;
        bad += (factor[p] - factor[p]) + (offset[p] - offset[p]);
    }
    j->isa->moments(x, count, d, mean, variance);
    for (int64_t t = 0; t < count; t++) {
        bad += mean[t] - mean[t]; /* NaN where a number of the token is not finite */
        variance[t] = 1 / rq_square_root(variance[t] + j->number);
    }
    if (bad != 0) {
        rq_island_failed(j, RQ_ERR_RANGE);
        return;
    }
    j->isa->modulate(x, count, d, mean, variance, factor, offset, &j->f, j->y + first * d * j->y_size);
}

static void add_gated_tokens(struct rq_island *j, int64_t unit)
{
    int64_t image, count;
    const int64_t first = tokens_of(j, unit, &image, &count), at = first * j->c;
    j->isa->gated_add((const float *)j->x + at, j->gamma + image * j->stride, (const float *)j->other + at, count, j->c,
                      (float *)j->y + at);
}

static void gelu_rows(struct rq_island *j, int64_t unit)
{
    const int64_t first = unit * j->width, rest = j->count - first, rows = rest < j->width ? rest : j->width;
    const float *const x = (const float *)j->x + first * j->c;
    int bad = 0;
    if (j->parts == 0)
        bad = j->isa->gelu(x, rows * j->c, &j->f, j->y + first * j->c * j->y_size, NULL);
    for (int64_t r = 0; j->parts != 0 && r < rows; r++) {
        uint8_t *const y = j->y + (first + r) * 2 * j->c;
        bad |= j->isa->gelu(x + r * j->c, j->c, &j->f, y, y + j->c);
    }
    if (bad)
        rq_island_failed(j, RQ_ERR_RANGE);
}

static void quantize_rows(struct rq_island *j, int64_t unit)
{
    const int64_t first = unit * j->width, rest = j->count - first, rows = rest < j->width ? rest : j->width;
    const struct rq_part *const parts = j->other;
    int bad = 0;
    for (int64_t r = first; r < first + rows; r++)
        for (int64_t p = 0; p < j->parts; p++) {
            const int64_t at = (r * j->parts + p) * j->c;
            const struct rq_pointwise f = {.unit = parts[p].scale, .zero_point = parts[p].zero_point,
                                           .qmax = parts[p].qmax, .codes = 1};
            bad |= j->isa->quantize((const float *)j->x + at, j->c, &f, j->y + at);
        }
    if (bad)
        rq_island_failed(j, RQ_ERR_RANGE);
}

/* ------------------------------------------------------------------ calls */

int rq_layer_norm(int row, int threads, const float *x, int64_t n, int64_t tokens, int64_t d, const float *gamma,
                  const float *beta, int64_t stride, double eps, int kind, float scale, int32_t zero_point,
                  int32_t qmax, void *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = normalise_tokens, .x = x, .y = y, .c = d, .width = tokens,
                          .gamma = gamma, .beta = beta, .stride = stride, .number = eps};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(n, tokens, d) || stride < d || !rq_is_volume(n, stride, 1))
        return RQ_ERR_SIZE;
    const int status = rq_island_stage(&j, kind, scale, zero_point, qmax);
    if (status != RQ_OK)
        return status;
    if (!(eps >= 0x1p-1022 && eps <= 0x1p512))
        return RQ_ERR_RANGE;
    j.units = n * chunks_of(tokens);
    if (j.units == 0 || d == 0)
        return RQ_OK;
    if (!x || !gamma || !beta || !y)
        return RQ_ERR_NULL;
    return rq_island_run(&j, threads, n * tokens * d, RQ_COSTLY_BELOW);
}

int rq_gated_add(int row, int threads, const float *x, const float *gate, int64_t stride, const float *h, int64_t n,
                 int64_t tokens, int64_t d, float *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = add_gated_tokens, .x = x, .other = h, .y = (uint8_t *)y,
                          .c = d, .width = tokens, .gamma = gate, .stride = stride};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(n, tokens, d) || stride < d || !rq_is_volume(n, stride, 1))
        return RQ_ERR_SIZE;
    j.units = n * chunks_of(tokens);
    if (j.units == 0 || d == 0)
        return RQ_OK;
    if (!x || !gate || !h || !y)
        return RQ_ERR_NULL;
    return rq_island_run(&j, threads, n * tokens * d, RQ_CHEAP_BELOW);
}

int rq_gelu(int row, int threads, const float *x, int64_t count, int kind, float scale, int32_t zero_point,
            int32_t qmax, void *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = gelu_rows, .x = x, .y = y, .c = 1};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(count, 1, 1))
        return RQ_ERR_SIZE;
    const int status = rq_island_stage(&j, kind, scale, zero_point, qmax);
    if (status != RQ_OK || count == 0)
        return status;
    if (!x || !y)
        return RQ_ERR_NULL;
    rq_cut_rows(&j, count, 1, RQ_CHUNK);
    return rq_island_run(&j, threads, count, RQ_COSTLY_BELOW);
}

int rq_gelu_signs(int row, int threads, const float *x, int64_t rows, int64_t width, float positive, float negative,
                  int32_t qmax, uint8_t *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = gelu_rows, .x = x, .y = y, .c = width, .parts = 2};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(rows, width, 2))
        return RQ_ERR_SIZE;
    int status = rq_island_stage(&j, RQ_UINT8, negative, 0, qmax); /* the last one counts */
    if (status == RQ_OK)
        status = rq_island_stage(&j, RQ_UINT8, positive, 0, qmax);
    if (status != RQ_OK || rows == 0 || width == 0)
        return status;
    if (!x || !y)
        return RQ_ERR_NULL;
    j.f.ratio = (double)positive / (double)negative;
    rq_cut_rows(&j, rows, width, RQ_CHUNK);
    return rq_island_run(&j, threads, rows * width, RQ_COSTLY_BELOW);
}

int rq_quantize_parts(int row, int threads, const float *x, int64_t rows, int64_t count, int64_t width,
                      const struct rq_part *parts, uint8_t *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = quantize_rows, .x = x, .other = parts, .y = y, .c = width,
                          .parts = count};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (count < 1 || count > MOST_PARTS || !rq_is_volume(rows, count, width))
        return RQ_ERR_SIZE;
    if (!parts)
        return RQ_ERR_NULL;
    for (int64_t p = 0; p < count; p++) {
        const int status = rq_island_stage(&j, RQ_UINT8, parts[p].scale, parts[p].zero_point, parts[p].qmax);
        if (status != RQ_OK)
            return status;
    }
    if (rows == 0 || width == 0)
        return RQ_OK;
    if (!x || !y)
        return RQ_ERR_NULL;
    rq_cut_rows(&j, rows, count * width, RQ_CHUNK);
    return rq_island_run(&j, threads, rows * count * width, RQ_CHEAP_BELOW);
}

int rq_softmax_regions(int row, int threads, const float *scores, double factor, int64_t lines, int64_t length,
                       int bits, int shift, uint8_t *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = rq_share_lines, .c = length, .x = scores, .y = y,
                          .number = factor};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(lines, length, 1))
        return RQ_ERR_SIZE;
    if (bits < 3 || bits > 8 || shift < 0 || shift >= bits || !(factor >= 0x1p-1022 && factor <= 0x1p512))
        return RQ_ERR_RANGE;
    const int last = (1 << (bits - 1)) - 1; /* code of a region */
    const float coarse = (float)(1.0 / last);
    const double ratio = 1.0 / (1 << shift);
    const int status = rq_island_stage(&j, RQ_UINT8, coarse * (float)ratio, 0, last); /* of the fine region */
    if (status != RQ_OK || lines == 0 || length == 0)
        return status;
    if (!scores || !y)
        return RQ_ERR_NULL;
    j.f.flag = last + 1;
    j.f.ratio = ratio;
    j.f.split = ratio / j.f.unit; /* 2^-shift in fine steps */
    rq_cut_rows(&j, lines, length, RQ_LINES);
    return rq_island_run(&j, threads, lines * length, RQ_COSTLY_BELOW);
}

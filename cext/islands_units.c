/* islands_units.c - the units of the float islands: what one thread does without the others.
 *
 * Group norm. Seen as a run of numbers, element i of an image belongs to channel i mod C, so that
 * what a channel needs repeats with period C; P, the least multiple of C that 16 divides, is a period in
 * whole blocks. With x0 the first number of the group, all in double:
 *
 *     d = x - x0           m = mean(d)           v = mean((x - (x0 + m))^2)
 *     z = d * slope + (beta - m * slope)         slope = gamma / sqrt(v + eps)
 *
 * Why x0: the sum is one of numbers as large as the spread of the group, not as its distance from 0,
 * and a group of equal numbers gives v = 0 and z = beta exactly, however large they are.
 *
 * Most groups are `tame`. |x0| is below 2^12 sqrt(v + eps): then z = x * slope + offset costs 2^-40 |gamma| and saves
 * an operation. And |z|, which cannot exceed sqrt(M) |gamma| + |beta|, is below 500, so that e^-z needs no limits.
 *
 * Error of z. With M numbers in a group, d is at most sqrt(M) deviations (plus one) away from 0, since x0 is one
 * of the M; so the terms of z are at most 2 sqrt(M) |gamma| and |beta|, and each operation loses 2^-53 of them.
 * The sums lose at most (H W + P / G) 2^-53 of the mean |d|. Together less than (H W + P / G) sqrt(M) 2^-51 |gamma|
 * + 2^-51 |beta|: for 28 x 28 x 16 in 8 groups, 2^-36 |gamma|; measured, 1000 times less.
 *
 * Scratch memory of a thread: 7 P doubles (at most 896 bytes for each channel), or a line of doubles.
 */
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#elif !defined(__aarch64__)
#include <math.h>
#endif

#include "impl.h"
#include "islands.h"

double rq_square_root(double x)
{
#if defined(__x86_64__)
    const __m128d v = _mm_set_sd(x);
    return _mm_cvtsd_f64(_mm_sqrt_sd(v, v));
#elif defined(__aarch64__)
    double root;
    __asm__("fsqrt %d0, %d1" : "=w"(root) : "w"(x));
    return root;
#else
    return sqrt(x);
#endif
}

/* group[g] = (sum of sums[p] over the p of group g) / m. */
static void means_of_groups(const struct rq_island *j, const double *sums, double *group)
{
    const double m = (double)(j->count / j->groups);
    for (int64_t g = 0; g < j->groups; g++)
        group[g] = 0;
    for (int64_t p = 0; p < j->f.period;)
        for (int64_t g = 0; g < j->groups; g++)
            for (int64_t i = 0; i < j->c / j->groups; i++, p++)
                group[g] += sums[p];
    for (int64_t g = 0; g < j->groups; g++)
        group[g] /= m;
}

/* to[p] = group[g] for the p of group g. */
static void spread(const struct rq_island *j, const double *group, double *to)
{
    for (int64_t p = 0; p < j->f.period;)
        for (int64_t g = 0; g < j->groups; g++)
            for (int64_t i = 0; i < j->c / j->groups; i++, p++)
                to[p] = group[g];
}

/* The shift of image n; 0, or 1 where there is no memory. */
static int begin(const struct rq_island *j, const float *x, struct rq_moments *m)
{
    const int64_t period = j->f.period;
    double *const room = rq_scratch(7 * period * (int64_t)sizeof *room);
    if (!room)
        return 1;
    *m = (struct rq_moments){room, room + period, room + 2 * period, room + 3 * period, room + 4 * period,
                             room + 5 * period, (float *)(room + 6 * period), (float *)(room + 6 * period) + period};
    for (int64_t g = 0; g < j->groups; g++)
        m->group[g] = x[g * (j->c / j->groups)];
    spread(j, m->group, m->shift);
    return 0;
}

/* From the sums of x - shift: the mean, and in `offset` the centre. */
static void centre(const struct rq_island *j, const struct rq_moments *m)
{
    means_of_groups(j, m->sums, m->group);
    spread(j, m->group, m->mean);
    for (int64_t p = 0; p < j->f.period; p++)
        m->offset[p] = m->shift[p] + m->mean[p];
}

/* From the sums of squares: the affine map. 0, or 1 where a number of the image is none, which shows in mean or
 * variance. */
static int know(const struct rq_island *j, const float *x, const struct rq_moments *m, struct rq_pointwise *f)
{
    const int64_t period = j->f.period;
    double *const group = m->group, *const slope = m->slope, *const offset = m->offset;
    means_of_groups(j, m->sums, group);
    const double divisor = j->f.codes && !j->f.silu ? j->f.unit : 1; /* SiLU divides by the scale itself */
    const double reach = rq_square_root((double)(j->count / j->groups));
    int tame = 1;
    for (int64_t g = 0; g < j->groups; g++) {
        const double deviation = rq_square_root(group[g] + j->number), x0 = x[g * (j->c / j->groups)];
        tame &= x0 < 4096 * deviation && x0 > -4096 * deviation;
        group[g] = 1 / (deviation * divisor);
    }
    spread(j, group, slope);
    double bad = 0;
    for (int64_t p = 0, channel = 0; p < period; p++) {
        const double gamma = j->gamma[channel], beta = j->beta[channel];
        tame &= reach * (gamma < 0 ? -gamma : gamma) + (beta < 0 ? -beta : beta) < 500;
        slope[p] *= gamma;
        offset[p] = beta / divisor - m->mean[p] * slope[p];
        bad += (slope[p] - slope[p]) + (offset[p] - offset[p]);
        channel = channel + 1 < j->c ? channel + 1 : 0;
    }
    *f = j->f;
    int is_short = tame && f->silu && f->codes;
    for (int64_t p = 0; tame && p < period; p++) {
        offset[p] -= m->shift[p] * slope[p];
        const double steep = slope[p] < 0 ? -slope[p] : slope[p];
        is_short &= steep == 0 || (steep > 1e-30 && steep < 1e30);
        m->slope32[p] = (float)slope[p];
        m->offset32[p] = (float)offset[p];
    }
    f->slope32 = is_short ? m->slope32 : NULL;
    f->offset32 = m->offset32;
    f->tame = tame;
    f->shift = m->shift;
    f->slope = slope;
    f->offset = offset;
    return bad != 0; /* NaN */
}

void rq_normalise_image(struct rq_island *j, int64_t n)
{
    const int64_t count = j->count, period = j->f.period;
    const float *const x = (const float *)j->x + n * count;
    struct rq_moments m;
    struct rq_pointwise f;
    if (begin(j, x, &m)) {
        rq_island_failed(j, RQ_ERR_MEMORY);
        return;
    }
    j->isa->sums(x, count, period, m.shift, 0, period, m.sums);
    centre(j, &m);
    j->isa->squares(x, count, period, m.offset, 0, period, m.sums);
    if (know(j, x, &m, &f))
        rq_island_failed(j, RQ_ERR_RANGE);
    else
        j->isa->pointwise(x, count, &f, j->y + n * count * j->y_size);
}

/* The same in five stages, for an image on which all threads work: the second, fourth and last in units. */
int rq_begin_image(struct rq_island *j, int64_t n)
{
    j->image = (const float *)j->x + n * j->count;
    return begin(j, j->image, &j->moments);
}

void rq_sum_block(struct rq_island *j, int64_t block)
{
    const int64_t p = block * RQ_BLOCK;
    j->isa->sums(j->image, j->count, j->f.period, j->moments.shift, p, p + RQ_BLOCK, j->moments.sums);
}

void rq_centre(struct rq_island *j) { centre(j, &j->moments); }

void rq_square_block(struct rq_island *j, int64_t block)
{
    const int64_t p = block * RQ_BLOCK;
    j->isa->squares(j->image, j->count, j->f.period, j->moments.offset, p, p + RQ_BLOCK, j->moments.sums);
}

void rq_know_image(struct rq_island *j)
{
    if (know(j, j->image, &j->moments, &j->f))
        rq_island_failed(j, RQ_ERR_RANGE);
}

static int64_t chunk_of(const struct rq_island *j) /* in whole periods */
{
    return (RQ_CHUNK + j->f.period - 1) / j->f.period * j->f.period;
}

int64_t rq_map_chunks(const struct rq_island *j) { return (j->count + chunk_of(j) - 1) / chunk_of(j); }

void rq_map_chunk(struct rq_island *j, int64_t chunk)
{
    const int64_t first = chunk * chunk_of(j), rest = j->count - first, count = rest < chunk_of(j) ? rest : chunk_of(j);
    const int64_t image = (j->image - (const float *)j->x) * j->y_size;
    j->isa->pointwise(j->image + first, count, &j->f, j->y + image + first * j->y_size);
}

void rq_share_lines(struct rq_island *j, int64_t unit)
{
    const int64_t padded = (j->c + RQ_BLOCK - 1) / RQ_BLOCK * RQ_BLOCK;
    const int64_t first = unit * j->width, rest = j->count - first, end = first + (rest < j->width ? rest : j->width);
    double *const room = rq_scratch(padded * (int64_t)sizeof *room);
    int bad = 0;
    if (!room) {
        rq_island_failed(j, RQ_ERR_MEMORY);
        return;
    }
    for (int64_t line = first; line < end; line++)
        bad |= j->isa->softmax((const char *)j->x + line * j->c * 4, j->ints, j->c, j->number, &j->f, room,
                               j->y + line * j->c * j->y_size);
    if (bad)
        rq_island_failed(j, RQ_ERR_RANGE);
}

void rq_make_codes(struct rq_island *j, int64_t chunk)
{
    const int64_t first = chunk * RQ_CHUNK, rest = j->count - first, count = rest < RQ_CHUNK ? rest : RQ_CHUNK;
    const float *const x = (const float *)j->x + first;
    uint8_t *const y = j->y + first * j->y_size;
    if (j->f.silu ? j->isa->pointwise(x, count, &j->f, y) : j->isa->quantize(x, count, &j->f, y))
        rq_island_failed(j, RQ_ERR_RANGE);
}

/* A pixel, in steps of 16 bytes: a call of memcpy for so little costs more than the copy. */
static void copy_pixel(uint8_t *to, const uint8_t *from, int64_t bytes)
{
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16)
        memcpy(to + i, from + i, 16);
    for (; i < bytes; i++)
        to[i] = from[i];
}

void rq_double_line(struct rq_island *j, int64_t line)
{
    const int64_t bytes = j->c, out = 2 * j->width * bytes;
    const uint8_t *const x = (const uint8_t *)j->x + line * j->width * bytes;
    uint8_t *const y = j->y + 2 * line * out;
    for (int64_t i = 0; i < j->width; i++) {
        copy_pixel(y + 2 * i * bytes, x + i * bytes, bytes);
        copy_pixel(y + (2 * i + 1) * bytes, x + i * bytes, bytes);
    }
    memcpy(y + out, y, (size_t)out);
}

void rq_concat_chunk(struct rq_island *j, int64_t chunk)
{
    const int64_t first = chunk * RQ_PIXELS, rest = j->count - first, ca = j->c, cb = j->width;
    const float *a = (const float *)j->x + first * ca, *b = (const float *)j->other + first * cb;
    float *y = (float *)j->y + first * (ca + cb);
    for (int64_t i = 0; i < (rest < RQ_PIXELS ? rest : RQ_PIXELS); i++, a += ca, b += cb, y += ca + cb) {
        memcpy(y, a, (size_t)ca * sizeof *y);
        memcpy(y + ca, b, (size_t)cb * sizeof *y);
    }
}

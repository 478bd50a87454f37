/* islands.c - the float islands of an integer network: checked, cut into units, dealt to threads.
 *
 *     group norm     a unit is an image: two passes over it for mean and variance, and one that writes; where
 *                    there are fewer images than threads, each pass has units of its own
 *     softmax        some lines of scores
 *     quantize, SiLU a chunk of elements
 *     enlarging      a line of pixels
 *     side by side   a chunk of pixels
 *
 * What a unit does is in islands_units.c, the arithmetic in islands_body.h. A unit is computed in one
 * order whoever does it: the number of threads changes no bit.
 */
#include <stddef.h>

#include "impl.h"
#include "islands.h"

enum {
    MOST = 1 << 30,      /* of any size */
    STAGED_FROM = 32768  /* elements of an image, some 40 microseconds: worth three meetings of the team */
};
static const int64_t MOST_ELEMENTS = (int64_t)1 << 44;

static void work(void *context, int who)
{
    struct rq_island *j = context;
    (void)who;
    int64_t unit;
    while ((unit = atomic_fetch_add(&j->next, 1)) < j->units)
        j->unit(j, unit);
}

int rq_island_run(struct rq_island *j, int threads, int64_t elements, int64_t alone_below)
{
    atomic_init(&j->next, 0);
    atomic_init(&j->status, RQ_OK);
    rq_team_run(elements < alone_below || j->units < 2 ? 1 : threads, work, j);
    return atomic_load(&j->status);
}

void rq_island_failed(struct rq_island *j, int status) { atomic_store(&j->status, status); }

void rq_cut_rows(struct rq_island *j, int64_t rows, int64_t length, int64_t chunk)
{
    j->count = rows;
    j->width = length < chunk ? chunk / length : 1;
    j->units = (rows + j->width - 1) / j->width;
}

const struct rq_islands *rq_islands_of(int row)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    if (!kernel || (kernel->needs & ~rq_cpu_features()))
        return NULL;
#if defined(__x86_64__) && defined(__GNUC__)
    if (kernel->needs & RQ_CPU_AVX512VNNI)
        return &rq_islands_avx512;
    if (kernel->needs & RQ_CPU_AVX2)
        return &rq_islands_avx2;
#endif
    return &rq_islands_scalar;
}

static int is_size(int64_t size) { return size >= 0 && size <= MOST; }

int rq_is_volume(int64_t a, int64_t b, int64_t c)
{
    return is_size(a) && is_size(b) && is_size(c) && (double)a * (double)b * (double)c <= (double)MOST_ELEMENTS;
}

/* NaN fails each comparison. */
int rq_island_stage(struct rq_island *j, int kind, float scale, int32_t zero_point, int32_t qmax)
{
    if (kind != RQ_FLOAT32 && kind != RQ_UINT8)
        return RQ_ERR_RANGE;
    j->f.codes = kind == RQ_UINT8;
    j->y_size = j->f.codes ? 1 : sizeof(float);
    j->f.unit = 1;
    if (j->f.codes) {
        if (!(scale >= 0x1p-126f && scale <= 0x1.fffffep127f) || qmax < 1 || qmax > 255 || zero_point < 0
            || zero_point > qmax)
            return RQ_ERR_RANGE;
        j->f.unit = scale;
        j->f.zero_point = zero_point;
        j->f.qmax = qmax;
    }
    return RQ_OK;
}

/* Images one after the other, all threads on each. */
static int in_stages(struct rq_island *j, int threads)
{
    const struct rq_pointwise stage = j->f; /* of all images */
    const int64_t images = j->units, blocks = stage.period / RQ_BLOCK;
    int status = RQ_OK;
    for (int64_t n = 0; n < images && status == RQ_OK; n++) {
        j->f = stage;
        if (rq_begin_image(j, n))
            return RQ_ERR_MEMORY;
        j->units = blocks;
        j->unit = rq_sum_block;
        rq_island_run(j, threads, j->count, 0);
        rq_centre(j);
        j->unit = rq_square_block;
        rq_island_run(j, threads, j->count, 0);
        rq_know_image(j);
        status = atomic_load(&j->status);
        j->units = rq_map_chunks(j);
        j->unit = rq_map_chunk;
        if (status == RQ_OK)
            status = rq_island_run(j, threads, j->count, 0);
    }
    return status;
}

int rq_group_norm(int row, int threads, const float *x, int64_t n, int64_t pixels, int64_t c, int64_t groups,
                  const float *gamma, const float *beta, double eps, int silu, int kind, float scale,
                  int32_t zero_point, int32_t qmax, void *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = rq_normalise_image, .x = x, .y = (uint8_t *)y, .c = c,
                       .groups = groups, .gamma = gamma, .beta = beta, .number = eps};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(n, pixels, c) || groups < 1 || c % groups != 0)
        return RQ_ERR_SIZE;
    const int status = rq_island_stage(&j, kind, scale, zero_point, qmax);
    if (status != RQ_OK)
        return status;
    if (!(eps >= 0x1p-1022 && eps <= 0x1p512))
        return RQ_ERR_RANGE;
    j.units = n;
    j.count = pixels * c;
    if (n == 0 || j.count == 0)
        return RQ_OK;
    if (!x || !gamma || !beta || !y)
        return RQ_ERR_NULL;
    j.f.silu = silu != 0;
    j.f.period = c;
    while (j.f.period % RQ_BLOCK != 0)
        j.f.period += c;
    if (n < threads && j.count >= STAGED_FROM)
        return in_stages(&j, threads);
    return rq_island_run(&j, threads, n * j.count, RQ_COSTLY_BELOW);
}

int rq_quantize(int row, int threads, const float *x, int64_t count, int silu, int kind, float scale,
                int32_t zero_point, int32_t qmax, void *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = rq_make_codes, .count = count, .x = x, .y = y};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (count < 0 || count > MOST_ELEMENTS)
        return RQ_ERR_SIZE;
    const int status = silu || kind == RQ_UINT8 ? rq_island_stage(&j, kind, scale, zero_point, qmax) : RQ_ERR_RANGE;
    if (status != RQ_OK)
        return status;
    if (count == 0)
        return RQ_OK;
    if (!x || !y)
        return RQ_ERR_NULL;
    j.f.silu = silu != 0;
    j.units = (count + RQ_CHUNK - 1) / RQ_CHUNK;
    return rq_island_run(&j, threads, count, silu ? RQ_COSTLY_BELOW : RQ_CHEAP_BELOW);
}

int rq_softmax(int row, int threads, const void *scores, int ints, double factor, int64_t lines, int64_t length,
               int kind, float scale, int32_t qmax, void *y)
{
    struct rq_island j = {.isa = rq_islands_of(row), .unit = rq_share_lines, .c = length, .x = scores, .y = y,
                          .number = factor, .ints = ints};
    if (!j.isa)
        return RQ_ERR_KERNEL;
    if (!rq_is_volume(lines, length, 1))
        return RQ_ERR_SIZE;
    const int status = rq_island_stage(&j, kind, scale, 0, qmax);
    if (status != RQ_OK)
        return status;
    if (!(factor >= 0x1p-1022 && factor <= 0x1p512)) /* times a difference of scores, finite */
        return RQ_ERR_RANGE;
    if (lines == 0 || length == 0)
        return RQ_OK;
    if (!scores || !y)
        return RQ_ERR_NULL;
    rq_cut_rows(&j, lines, length, RQ_LINES);
    return rq_island_run(&j, threads, lines * length, RQ_COSTLY_BELOW);
}

int rq_upsample_nearest(int threads, const void *x, int64_t lines, int64_t width, int64_t pixel_bytes, void *y)
{
    struct rq_island j = {.unit = rq_double_line, .units = lines, .x = x, .y = y, .c = pixel_bytes, .width = width};
    if (!rq_is_volume(lines, width, pixel_bytes))
        return RQ_ERR_SIZE;
    if (lines == 0 || width == 0 || pixel_bytes == 0)
        return RQ_OK;
    if (!x || !y)
        return RQ_ERR_NULL;
    return rq_island_run(&j, threads, lines * width * pixel_bytes, RQ_CHEAP_BELOW);
}

int rq_concat(int threads, const float *a, const float *b, int64_t pixels, int64_t ca, int64_t cb, float *y)
{
    struct rq_island j = {.unit = rq_concat_chunk, .count = pixels, .x = a, .other = b, .y = (uint8_t *)y, .c = ca,
                       .width = cb};
    if (!rq_is_volume(pixels, ca, 1) || !rq_is_volume(pixels, cb, 1))
        return RQ_ERR_SIZE;
    if (pixels == 0 || ca + cb == 0)
        return RQ_OK;
    if ((ca > 0 && !a) || (cb > 0 && !b) || !y)
        return RQ_ERR_NULL;
    j.units = (pixels + RQ_PIXELS - 1) / RQ_PIXELS;
    return rq_island_run(&j, threads, pixels * (ca + cb), RQ_CHEAP_BELOW);
}

/* products.c - many small products of activations with activations: attention, for all images and heads at once.
 *
 *     y[i,h,m,n] = scale * sum over k of (a[i,h,m,k] - za) (b[i,h,k,n] - zb)
 *
 * Both operands are codes that the network has just made, uint8. The kernels want one of them as int8 and packed:
 * b - 128 is, with the zero point zb - 128 and the same differences. So a unit, some rows of one product, packs its b
 * in the thread's own memory, in the order of pack.c, takes its rows of a a tile at a time, and multiplies:
 *
 *      b (N, K): "transposed"         b (K, N)                            a panel of 16 outputs
 *      [ o0: k0 k1 k2 k3 ...          [ k0: o0 o1 o2 ...                  o0 k0..k3 | o1 k0..k3 | ... | o15 k0..k3
 *      [ o1: k0 ...                   [ k1: o0 ...               ->       o0 k4..k7 | ...
 *
 * Packing costs 1 / M of the multiplications, and nothing is allocated or copied by the caller: operands and result
 * have strides, so that heads may lie side by side in a row, as a linear layer leaves them.
 *
 * Two regions. With `bits`, a code of a is a flag and bits - 1 bits of magnitude: a step of the fine region, or with the
 * flag one of the coarse region, which is 2^shift fine ones. A row then becomes two rows of the tile,
 *
 *     lo = magnitude where the flag is not set, hi = magnitude where it is, 0 elsewhere
 *     sum = sum(lo b) + (sum(hi b) << shift)
 *
 * in integers, exactly, and scaled once. (lo + (hi << shift) itself has up to 14 bits: no operand of a kernel.)
 */
#include <stddef.h>
#include <string.h>

#include "conv.h"

enum { MOST = 1 << 24, UNITS_PER_THREAD = 4 };
static const int64_t MOST_STRIDE = (int64_t)1 << 40;

struct batch {
    const struct rq_kernel *kernel;
    const struct rq_products *p;
    struct rq_layout layout;
    int64_t cuts;                 /* of the rows of a product, units of their own */
    int64_t packed_bytes, row_bytes;
    int32_t za, zb;               /* zb of b - 128 */
    int ranges;
    struct { _Alignas(64) atomic_llong units; } dealt[MOST_RANGES];
    atomic_int status;
};

/* What a thread keeps: b packed, what to add to each column, rows of a, a tile of sums. */
struct desk {
    int8_t *panels;
    int32_t *add, *tile;
    uint8_t *rows;
};

static int64_t lay_out(const struct batch *j, uint8_t *memory, struct desk *d)
{
    const int64_t sizes[4] = {
        j->packed_bytes,
        j->layout.panels * RQ_PANEL * (int64_t)sizeof *d->add,
        RQ_MAX_ROWS * RQ_TILE_WIDTH * (int64_t)sizeof *d->tile,
        RQ_MAX_ROWS * j->row_bytes,
    };
    int64_t at[5] = {0};
    for (int i = 0; i < 4; i++)
        at[i + 1] = at[i] + (sizes[i] + 63) / 64 * 64;
    if (memory) {
        d->panels = (int8_t *)memory;
        d->add = (int32_t *)(memory + at[1]);
        d->tile = (int32_t *)(memory + at[2]);
        d->rows = memory + at[3];
    }
    return at[4];
}

/* ------------------------------------------------------------------ b */

static int8_t *place(const struct batch *j, struct desk *d, int64_t group, int64_t o)
{
    return d->panels + o / RQ_PANEL * j->layout.panel_bytes + group * 64 + o % RQ_PANEL * 4;
}

/* b (N, K): four codes of a row are four bytes of a panel. */
static void pack_rows(const struct batch *j, struct desk *d, const uint8_t *b)
{
    const int64_t k = j->p->k;
    for (int64_t o = 0; o < j->p->n; o++, b += j->p->b.row_stride) {
        int8_t *to = place(j, d, 0, o);
        for (int64_t i = 0; i < k; i += 4, to += 64) {
            uint8_t four[4] = {128, 128, 128, 128};
            if (i + 4 <= k)
                memcpy(four, b + i, 4);
            else
                memcpy(four, b + i, (size_t)(k - i));
            uint32_t word;
            memcpy(&word, four, 4);
            word ^= 0x80808080u;
            memcpy(to, &word, 4);
        }
        d->add[o] = rq_sum_bytes(b, k) - 128 * (int32_t)k;
    }
}

/* b (K, N): four codes of a column come from four rows. */
static void pack_columns(const struct batch *j, struct desk *d, const uint8_t *b)
{
    const int64_t k = j->p->k, n = j->p->n, stride = j->p->b.row_stride;
    memset(d->add, 0, sizeof *d->add * (size_t)n);
    for (int64_t i = 0; i < k; i += 4) {
        const uint8_t *const r0 = b + i * stride;
        const uint8_t *const r1 = i + 1 < k ? r0 + stride : NULL, *const r2 = i + 2 < k ? r0 + 2 * stride : NULL;
        const uint8_t *const r3 = i + 3 < k ? r0 + 3 * stride : NULL;
        for (int64_t o = 0; o < n; o++) {
            const uint32_t word = (uint32_t)r0[o] | (uint32_t)(r1 ? r1[o] : 128) << 8
                | (uint32_t)(r2 ? r2[o] : 128) << 16 | (uint32_t)(r3 ? r3[o] : 128) << 24;
            const uint32_t code = word ^ 0x80808080u, pairs = (word & 0xff00ffu) + (word >> 8 & 0xff00ffu);
            d->add[o] += (int32_t)((pairs & 0xffff) + (pairs >> 16)) - 4 * 128; /* sums of 4 codes - 128 */
            memcpy(place(j, d, i / 4, o), &code, 4);
        }
    }
}

/* b packed; add[o] = (offset - za) sum over k of b[k,o] + K za zb. */
static void load_b(const struct batch *j, struct desk *d, const uint8_t *b)
{
    memset(d->panels, 0, (size_t)j->packed_bytes); /* also behind the last k and output */
    if (j->p->b_transposed)
        pack_rows(j, d, b);
    else
        pack_columns(j, d, b);
    const uint32_t constant = (uint32_t)j->p->k * (uint32_t)j->za * (uint32_t)j->zb;
    const uint32_t factor = (uint32_t)(j->kernel->offset - j->za);
    for (int64_t o = 0; o < j->p->n; o++)
        d->add[o] = (int32_t)((uint32_t)d->add[o] * factor + constant);
}

/* ------------------------------------------------------------------ a */

/* The two planes of a row of codes. */
static void split_row(const struct batch *j, const uint8_t *codes, uint8_t *lo, uint8_t *hi)
{
    const uint64_t ones = 0x0101010101010101u;
    const int flag = j->p->region_bits - 1;
    for (int64_t k = 0; k < j->row_bytes; k += 8) {
        uint64_t word = 0;
        memcpy(&word, codes + k, (size_t)rq_min(8, rq_max(j->p->k - k, 0)));
        const uint64_t coarse = word >> flag & ones, high = coarse * 255 & (word ^ coarse << flag);
        word &= ~(coarse * 255);
        memcpy(lo + k, &word, 8);
        memcpy(hi + k, &high, 8);
    }
}

/* Copy `count` rows of a, filled up with zeros; less[i] = zb times the sum of row i. */
static void load_rows(const struct batch *j, struct desk *d, const uint8_t *a, int count, uint32_t *less)
{
    const int64_t bytes = j->row_bytes, k = j->p->k;
    const int regions = j->p->region_bits > 0;
    for (int i = 0; i < count; i++, a += j->p->a.row_stride) {
        uint8_t *const row = d->rows + i * bytes, *const coarse = d->rows + (count + i) * bytes;
        if (regions) {
            split_row(j, a, row, coarse);
        } else {
            memcpy(row, a, (size_t)k);
            memset(row + k, 0, (size_t)(bytes - k));
        }
        less[i] = 0;
        if (j->zb != 0) {
            less[i] = (uint32_t)rq_sum_bytes(row, k);
            if (regions)
                less[i] += (uint32_t)rq_sum_bytes(coarse, k) << j->p->region_shift;
            less[i] *= (uint32_t)j->zb;
        }
    }
}

/* ------------------------------------------------------------------ tiles, units, threads */

/* The four sums of a register that every processor of its kind has, where the compiler can say so. */
#if defined(__GNUC__)
typedef uint32_t four __attribute__((vector_size(16), may_alias));
#else
typedef uint32_t four;
#endif

/* A line of the tile: plus its coarse line, shifted, minus what belongs to zb. Behind the last column it does no harm. */
static void finish_sums(int32_t *sums, const int32_t *coarse, int shift, int columns, uint32_t less)
{
    const int lanes = (int)(sizeof(four) / sizeof(uint32_t));
    for (int o = 0; o < columns; o += lanes) {
        four *const sum = (four *)(sums + o);
        if (coarse)
            *sum += *(const four *)(coarse + o) << shift;
        *sum -= less;
    }
}

/* Rows of a times all of b. */
static void run_rows(const struct batch *j, struct desk *d, const uint8_t *a, int count, float *y)
{
    static const int64_t in_order[RQ_MAX_ROWS] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    const int regions = j->p->region_bits > 0, planes = regions ? 2 : 1;
    const uint8_t *rows[RQ_MAX_ROWS];
    uint32_t less[RQ_MAX_ROWS];
    float scale[RQ_TILE_WIDTH];
    for (int o = 0; o < RQ_TILE_WIDTH; o++)
        scale[o] = j->p->scale;
    load_rows(j, d, a, count, less);
    for (int i = 0; i < planes * count; i++)
        rows[i] = d->rows + i * j->row_bytes;

    for (int64_t first = 0; first < j->p->n; first += RQ_TILE_WIDTH) {
        const int columns = (int)rq_min(j->p->n - first, RQ_TILE_WIDTH);
        const struct rq_tile t = {
            .a = rows, .segments = 1, .steps = j->layout.steps, .panel_bytes = j->layout.panel_bytes,
            .b = d->panels + first / RQ_PANEL * j->layout.panel_bytes, .add = d->add + first, .c = d->tile,
            .ldc = RQ_TILE_WIDTH, .at = in_order, .columns = columns,
        };
        j->kernel->tile_s8(&t, planes * count, columns > RQ_PANEL ? 2 : 1);
        for (int i = 0; (regions || j->zb != 0) && i < count; i++) {
            int32_t *const sums = d->tile + i * RQ_TILE_WIDTH;
            finish_sums(sums, regions ? sums + count * RQ_TILE_WIDTH : NULL, j->p->region_shift, columns, less[i]);
        }
        const struct rq_output out = {.kind = RQ_FLOAT32, .data = y + first, .ld = j->p->y_row_stride, .scale = scale};
        j->kernel->dequantize(&out, d->tile, count, in_order, 0, columns);
    }
}

static const uint8_t *matrix(const struct rq_matrices *x, int64_t image, int64_t head)
{
    return x->data + image * x->image_stride + head * x->head_stride;
}

/* A part of the rows of one product; `loaded` is the product whose b is packed. */
static void run_unit(const struct batch *j, struct desk *d, int64_t unit, int64_t *loaded)
{
    const struct rq_products *const p = j->p;
    const int64_t product = unit / j->cuts, cut = unit % j->cuts;
    const int64_t image = product / p->heads, head = product % p->heads;
    if (product != *loaded)
        load_b(j, d, matrix(&p->b, image, head));
    *loaded = product;
    const uint8_t *const a = matrix(&p->a, image, head);
    float *const y = p->y + image * p->y_image_stride + head * p->y_head_stride;
    const int64_t begin = p->m * cut / j->cuts, count = p->m * (cut + 1) / j->cuts - begin;
    const int64_t most = p->region_bits > 0 ? j->kernel->rows / 2 : j->kernel->rows;
    const int64_t tiles = rq_ceil_div(count, most);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t row = begin + count * i / tiles, next = begin + count * (i + 1) / tiles;
        run_rows(j, d, a + row * p->a.row_stride, (int)(next - row), y + row * p->y_row_stride);
    }
}

/* Units in ranges, one for each thread, as in conv.c: the same images go to the same thread in every call. */
static void work(void *context, int who)
{
    struct batch *j = context;
    struct desk d;
    uint8_t *memory = rq_scratch(lay_out(j, NULL, NULL));
    if (!memory) {
        atomic_store(&j->status, RQ_ERR_MEMORY);
        return;
    }
    lay_out(j, memory, &d);
    const int64_t units = j->p->images * j->p->heads * j->cuts;
    int64_t loaded = -1;
    for (int i = 0; i < j->ranges; i++) {
        const int range = (who + i) % j->ranges;
        const int64_t begin = units * range / j->ranges, count = units * (range + 1) / j->ranges - begin;
        int64_t unit;
        while ((unit = atomic_fetch_add(&j->dealt[range].units, 1)) < count)
            run_unit(j, &d, begin + unit, &loaded);
    }
}

static int is_size(int64_t size) { return size >= 0 && size <= MOST; }

static int is_stride(int64_t stride, int64_t least) { return stride >= least && stride <= MOST_STRIDE; }

static int is_operand(const struct rq_matrices *x, int64_t columns)
{
    return is_stride(x->row_stride, columns) && is_stride(x->head_stride, 0) && is_stride(x->image_stride, 0);
}

static int check(const struct rq_products *p)
{
    if (!is_size(p->images) || !is_size(p->heads) || !is_size(p->m) || !is_size(p->n) || !is_size(p->k))
        return RQ_ERR_SIZE;
    if (!is_operand(&p->a, p->k) || !is_operand(&p->b, p->b_transposed ? p->k : p->n)
        || !is_stride(p->y_row_stride, p->n) || !is_stride(p->y_head_stride, 0) || !is_stride(p->y_image_stride, 0))
        return RQ_ERR_SIZE;
    if (p->k > RQ_MAX_K || p->a.zero_point < 0 || p->a.zero_point > 255 || p->b.zero_point < 0
        || p->b.zero_point > 255)
        return RQ_ERR_RANGE;
    if (p->region_bits != 0
        && (p->region_bits < 2 || p->region_bits > 8 || p->region_shift < 0 || p->region_shift >= p->region_bits
            || p->a.zero_point != 0))
        return RQ_ERR_RANGE;
    if ((double)p->images * (double)p->heads * (double)p->m > (double)MOST_STRIDE)
        return RQ_ERR_SIZE;
    return RQ_OK;
}

int rq_products(int row, int threads, const struct rq_products *p)
{
    const struct rq_kernel *kernel = rq_kernel_row(row);
    if (!kernel || (kernel->needs & ~rq_cpu_features()))
        return RQ_ERR_KERNEL;
    if (!p)
        return RQ_ERR_NULL;
    const int status = check(p);
    if (status != RQ_OK)
        return status;
    if (p->images == 0 || p->heads == 0 || p->m == 0 || p->n == 0)
        return RQ_OK;
    if (!p->y || (p->k > 0 && (!p->a.data || !p->b.data)))
        return RQ_ERR_NULL;

    static const uint8_t nothing = 0;
    struct rq_products own = *p;
    if (p->k == 0) /* rows of no bytes, wherever they are */
        own.a = own.b = (struct rq_matrices){.data = &nothing};
    struct batch j = {.kernel = kernel, .p = &own, .layout = rq_layout_of(p->n, 1, p->k, 8),
                      .za = p->a.zero_point, .zb = p->b.zero_point - 128};
    j.packed_bytes = j.layout.panels * j.layout.panel_bytes;
    j.row_bytes = j.layout.steps * RQ_STEP;
    atomic_init(&j.status, RQ_OK);
    const int64_t matrices = p->images * p->heads;
    const double size = (double)matrices * (double)p->m * (double)p->n * (double)p->k;
    if (threads < 1 || size < RQ_ALONE_BELOW)
        threads = 1;
    j.cuts = threads == 1 ? 1 : rq_ceil_div((int64_t)threads * UNITS_PER_THREAD, matrices);
    j.cuts = rq_max(1, rq_min(j.cuts, p->m / (4 * RQ_MAX_ROWS))); /* each packs b for itself */
    j.ranges = threads < MOST_RANGES ? threads : MOST_RANGES;
    for (int i = 0; i < j.ranges; i++)
        atomic_init(&j.dealt[i].units, 0);
    rq_team_run(threads, work, &j);
    return atomic_load(&j.status);
}

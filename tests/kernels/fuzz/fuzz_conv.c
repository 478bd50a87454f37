/* fuzz_conv.c - any bytes make a convolution; every kernel must give what the scalar one gives.
 *
 * The first bytes are sizes, strides and switches, see `take`; then comes a seed, from which all
 * arrays are filled, half with the ends of their range. Each array is an allocation of exactly its
 * size, so that AddressSanitizer sees one byte too many, and the result is compared with what lies
 * between its rows. With the switch `hostile`, one number of the call is replaced by any 64 bits:
 * then either the call still describes memory that is there, or it must be refused.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread -ffp-contract=off \
 *           -I cext cext/[a-z]*.c tests/kernels/fuzz/fuzz_conv.c -o fuzz_conv
 *     ./fuzz_conv -max_len=64 -max_total_time=600 new/ tests/kernels/fuzz/corpus/conv/
 *     ./fuzz_conv -merge=1 tests/kernels/fuzz/corpus/conv/ new/
 *
 * With -DREPLAY it has a main of its own, which runs the files named: test_sanitizers.py.
 */
#include "fuzz.h"

static const int64_t MOST_BYTES = (int64_t)1 << 46; /* above, too */
enum {
    MOST_WORK = 2 * RQ_ALONE_BELOW,  /* multiplications: enough for the team to be called */
    USUAL_WORK = RQ_ALONE_BELOW / 5,
    MOST_SIZE = 1 << 30,      /* above, the core may refuse what fits */
    MOST_PADDING = 64         /* above, its copy of a few lines would fill the memory */
};

static int32_t *random_ints(int64_t count, int64_t low, int64_t high)
{
    int32_t *a = array(count, 4);
    for (int64_t i = 0; i < count; i++)
        a[i] = (int32_t)random_in(low, high);
    return a;
}

static float *random_floats(int64_t count)
{
    float *a = array(count, 4);
    for (int64_t i = 0; i < count; i++)
        a[i] = random_float();
    return a;
}

/* ------------------------------------------------------------------ what a call describes */

struct call {
    int row, threads;
    struct rq_input x;
    struct rq_weights w;
    struct rq_output y;
    int64_t stride, padding;
    int64_t x_bytes, y_bytes, panel_bytes, sums, outputs, residuals; /* what there is */
};

static int64_t element(const struct call *c) { return c->y.kind == RQ_UINT8 ? 1 : 4; }

static wide side(int64_t size, int64_t window, const struct call *c)
{
    return ((wide)size + 2 * (wide)c->padding - window) / c->stride + 1;
}

/* The rules of refquant.h, in numbers that cannot overflow. */
static int is_an_operation(const struct call *c)
{
    const struct rq_input *x = &c->x;
    const struct rq_weights *w = &c->w;
    const struct rq_output *y = &c->y;
    if (c->row < 0 || c->row >= rq_kernel_count() || (rq_kernel_needs(c->row) & ~rq_cpu_features()))
        return 0;
    if (x->n < 0 || x->h < 0 || x->w < 0 || x->c < 0 || w->outputs < 0 || w->kh < 1 || w->kw < 1 || x->c != w->c
        || c->stride < 1 || c->padding < 0 || (w->bits != 8 && w->bits != 4))
        return 0;
    const wide most = w->bits == 8 ? RQ_MAX_K : RQ_MAX_K_INT4;
    if (w->outputs > 0 && (w->kh > most || w->kw > most || w->c > most || (wide)w->kh * w->kw * w->c > most
                           || (wide)w->kh * w->kw > most))
        return 0;
    const wide line = (wide)x->w * x->c;
    if (x->line_stride < line || (x->h > 0 && x->image_stride < ((wide)x->h - 1) * x->line_stride + line))
        return 0;
    if ((wide)x->h + 2 * (wide)c->padding < w->kh || (wide)x->w + 2 * (wide)c->padding < w->kw)
        return 0;
    if (y->kind < RQ_INT32 || y->kind > RQ_UINT8 || y->ld < w->outputs || x->zero_point < 0 || x->zero_point > 255)
        return 0;
    if (y->kind == RQ_UINT8 && (y->qmin < 0 || y->qmin > y->qmax || y->qmax > 255 || y->zero_point < 0 || y->zero_point > 255))
        return 0;
    if (w->outputs == 0 || x->n == 0)
        return 1;
    if (y->residual && y->residual_ld < w->outputs)
        return 0;
    for (int64_t o = 0; y->kind == RQ_UINT8 && o < c->outputs && o < w->outputs; o++)
        if (y->shift[o] < 0 || y->shift[o] > 62)
            return 0;
    return 1;
}

/* Tell whether an operation stays inside of the arrays that there are, and is done in a moment. */
static int is_there(const struct call *c)
{
    const struct rq_input *x = &c->x;
    const struct rq_weights *w = &c->w;
    if (x->n == 0 || w->outputs == 0)
        return 1;
    const wide most = (wide)1 << 40; /* so that the products below fit 128 bits */
    if (x->n > most || x->h > most || x->w > most || c->padding > MOST_PADDING || w->outputs > c->outputs)
        return 0;
    const wide pixels = x->n * side(x->h, w->kh, c) * side(x->w, w->kw, c);
    const wide work = pixels * w->outputs * (w->kh * w->kw * w->c + 1);
    const wide reach = x->h == 0 || x->w == 0 ? 0
        : (wide)(x->n - 1) * x->image_stride + (wide)(x->h - 1) * x->line_stride + (wide)x->w * x->c;
    return pixels <= MOST_WORK && work <= MOST_WORK && reach <= c->x_bytes
        && rq_packed_bytes(w->outputs, w->kh, w->kw, w->c, w->bits) <= c->panel_bytes
        && (w->kh + 1) * (w->kw + 1) * w->outputs <= c->sums
        && c->y.ld <= most && ((pixels - 1) * c->y.ld + w->outputs) * element(c) <= c->y_bytes
        && (!c->y.residual || (c->y.residual_ld <= most && (pixels - 1) * c->y.residual_ld + w->outputs <= c->residuals));
}

static int is_moderate(const struct call *c)
{
    const int64_t sizes[] = {c->x.n, c->x.h, c->x.w, c->w.outputs, c->stride, c->padding};
    for (int i = 0; i < 6; i++)
        if (sizes[i] > MOST_SIZE)
            return 0;
    /* also of an image without pixels: its frame must not be too wide, nor its lines and images too far apart */
    return c->x.h + 2 * c->padding <= MOST_SIZE && c->x.w + 2 * c->padding <= MOST_SIZE
        && (c->x.h < 2 || c->x.line_stride <= MOST_BYTES / c->x.h)
        && (c->x.n < 2 || c->x.image_stride <= MOST_BYTES / c->x.n);
}

static void spoil(struct call *c)
{
    int64_t *const sizes[] = {
        &c->x.n, &c->x.h, &c->x.w, &c->x.c, &c->x.image_stride, &c->x.line_stride, &c->w.outputs, &c->w.kh, &c->w.kw,
        &c->w.c, &c->stride, &c->padding, &c->y.ld, &c->y.residual_ld,
    };
    int32_t *const numbers[] = {
        &c->x.zero_point, &c->y.qmin, &c->y.qmax, &c->y.zero_point, &c->w.bits, &c->row, &c->threads, &c->y.kind,
    };
    enum { SIZES = sizeof sizes / sizeof sizes[0], NUMBERS = sizeof numbers / sizeof numbers[0] };
    const int which = take() % (SIZES + NUMBERS + 1);
    const int64_t value = take_any();
    if (which < SIZES)
        *sizes[which] = value;
    else if (which < SIZES + NUMBERS)
        *numbers[which - SIZES] = (int32_t)value;
    else if (c->outputs > 0)
        ((int32_t *)c->y.shift)[0] = (int32_t)value;
}

/* ------------------------------------------------------------------ one call */

static void complain(const struct call *c, const char *what, int status)
{
    fprintf(stderr,
            "row %d (%s), %d threads: %s, status %d\n"
            "x (%lld, %lld, %lld, %lld) strides %lld %lld zero %d; w (%lld, %lld, %lld, %lld) %d bits; "
            "stride %lld padding %lld; y kind %d ld %lld codes %d..%d\n",
            c->row, rq_kernel_name(c->row) ? rq_kernel_name(c->row) : "none", c->threads, what, status,
            (long long)c->x.n, (long long)c->x.h, (long long)c->x.w, (long long)c->x.c, (long long)c->x.image_stride,
            (long long)c->x.line_stride, c->x.zero_point, (long long)c->w.outputs, (long long)c->w.kh,
            (long long)c->w.kw, (long long)c->w.c, c->w.bits, (long long)c->stride, (long long)c->padding, c->y.kind,
            (long long)c->y.ld, c->y.qmin, c->y.qmax);
    abort();
}

static int run(struct call *c, void *y)
{
    memset(y, PATTERN, (size_t)c->y_bytes);
    c->y.data = y;
    return rq_conv2d(c->row, c->threads, &c->x, &c->w, c->stride, c->padding, &c->y);
}

static void compare(struct call *c, int hostile)
{
    uint8_t *want = array(c->y_bytes, 1), *got = array(c->y_bytes, 1);
    if (!is_an_operation(c)) {
        memset(want, PATTERN, (size_t)c->y_bytes);
        const int status = run(c, got);
        if (status >= 0 || memcmp(want, got, (size_t)c->y_bytes))
            complain(c, "no operation, but not refused", status);
    } else if (is_there(c)) {
        const int row = c->row, threads = c->threads;
        c->row = 0;
        c->threads = 1;
        const int status = run(c, want);
        if (status != RQ_OK && (is_moderate(c) || status != RQ_ERR_SIZE))
            complain(c, "refused", status);
        for (c->row = hostile ? row : 0; c->row < (hostile ? row + 1 : rq_kernel_count()); c->row++)
            for (c->threads = threads; c->threads >= 1; c->threads -= 2) {
                if (rq_kernel_needs(c->row) & ~rq_cpu_features())
                    continue;
                if (run(c, got) != status || memcmp(want, got, (size_t)c->y_bytes))
                    complain(c, "another result than the scalar kernel's on one thread", status);
                if (hostile)
                    break;
            }
    }
    free(want);
    free(got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_end = data + size;
    struct call c = {0};
    const int switches = take();
    const int hostile = switches & 1, has_zeros = switches & 2, has_int_bias = switches & 4, has_bias = switches & 8,
              has_residual = switches & 16, full_codes = switches & 32, apart = switches & 64, deep = switches & 128;
    c.y.kind = (int)take_size(2);
    c.w.bits = take() & 1 ? 4 : 8;
    c.w.outputs = take_size(99);
    c.w.kh = 1 + take_size(5);
    c.w.kw = 1 + take_size(5);
    c.w.c = take_size(deep ? 255 : 40);
    c.stride = 1 + take_size(3);
    c.padding = take_size(5);
    c.x = (struct rq_input){.n = take_size(4), .h = take_size(31), .w = take_size(31), .c = c.w.c};
    c.x.zero_point = take();
    c.threads = 1 + (int)take_size(2);
    c.x.line_stride = c.x.w * c.x.c + (apart ? take_size(9) : 0);
    c.x.image_stride = (c.x.h ? (c.x.h - 1) * c.x.line_stride + c.x.w * c.x.c : 0) + (apart ? take_size(9) : 0);
    c.y.ld = c.outputs = c.w.outputs;
    c.y.ld += apart ? take_size(9) : 0;
    c.y.residual_ld = c.w.outputs + (apart ? take_size(9) : 0);
    c.y.zero_point = take();
    c.y.qmin = full_codes ? 0 : take();
    c.y.qmax = full_codes ? 255 : c.y.qmin + (255 - c.y.qmin) * take() / 255;
    const int shift = take() % 63;
    take_seed();

    const wide pixels = c.x.h + 2 * c.padding < c.w.kh || c.x.w + 2 * c.padding < c.w.kw
        ? 0 : c.x.n * side(c.x.h, c.w.kh, &c) * side(c.x.w, c.w.kw, &c);
    const int64_t k = c.w.kh * c.w.kw * c.w.c;
    if (pixels * k * c.w.outputs > (c.threads == 3 ? MOST_WORK : USUAL_WORK))
        return -1; /* of no interest to the corpus */

    c.x_bytes = c.x.n && c.x.h ? (c.x.n - 1) * c.x.image_stride + (c.x.h - 1) * c.x.line_stride + c.x.w * c.x.c : 0;
    c.y_bytes = pixels ? (int64_t)((pixels - 1) * c.y.ld + c.outputs) * element(&c) : 0;
    c.residuals = pixels ? (int64_t)((pixels - 1) * c.y.residual_ld + c.outputs) : 0;
    c.sums = (c.w.kh + 1) * (c.w.kw + 1) * c.outputs;
    c.panel_bytes = rq_packed_bytes(c.outputs, c.w.kh, c.w.kw, c.w.c, c.w.bits);
    uint8_t *x = array(c.x_bytes, 1), *panels = array(c.panel_bytes, 1);
    int8_t *codes = array(c.outputs * k, 1);
    fill_bytes(x, c.x_bytes, 0, 255);
    fill_bytes(codes, c.outputs * k, c.w.bits == 8 ? -128 : -8, c.w.bits == 8 ? 127 : 7);
    int32_t *sums = array(c.sums, 4), *zeros = random_ints(c.outputs, -128, 127);
    int32_t *int_bias = random_ints(c.outputs, -1000000, 1000000), *mantissa = random_ints(c.outputs, 1 << 30, INT32_MAX);
    int32_t *shifts = random_ints(c.outputs, shift > 3 ? shift - 3 : 0, shift);
    float *scale = random_floats(c.outputs), *bias = random_floats(c.outputs), *residual = random_floats(c.residuals);
    if (rq_pack(codes, c.outputs, c.w.kh, c.w.kw, c.w.c, c.w.bits, panels, sums) != RQ_OK)
        complain(&c, "not packed", 0);

    c.x.data = x;
    c.w.panels = panels;
    c.w.sums = sums;
    c.w.zero_points = has_zeros ? zeros : NULL;
    c.y.int_bias = has_int_bias ? int_bias : NULL;
    c.y.scale = scale;
    c.y.bias = has_bias ? bias : NULL;
    c.y.residual = has_residual ? residual : NULL;
    c.y.mantissa = mantissa;
    c.y.shift = shifts;
    if (hostile)
        spoil(&c);
    compare(&c, hostile);

    void *const all[] = {x, panels, codes, sums, zeros, int_bias, mantissa, shifts, scale, bias, residual};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    return 0;
}

/* fuzz_islands.c - any bytes make a float island, or products of codes; every kernel must give what the scalar one gives.
 *
 * As in fuzz_conv.c the first bytes choose a function, sizes and switches, and a seed fills arrays of exactly their size.
 * What has one definition and no arithmetic (enlarging, pixels side by side) is compared with a loop. Two switches:
 *
 *     wild       numbers of x are any 32 bits, NaN among them: all kernels must then agree on the status, too
 *     hostile    one number of the call is replaced by any other: either the call still describes memory that is there,
 *                or it must be refused and write nothing
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread -ffp-contract=off \
 *           -I cext cext/[a-z]*.c tests/kernels/fuzz/fuzz_islands.c -o fuzz_islands
 *     ./fuzz_islands -max_len=64 -max_total_time=600 new/ tests/kernels/fuzz/corpus/islands/
 *     ./fuzz_islands -merge=1 tests/kernels/fuzz/corpus/islands/ new/
 */
#include "fuzz.h"

enum function {
    GROUP_NORM, QUANTIZE, SOFTMAX, REGIONS, UPSAMPLE, CONCAT, LAYER_NORM, GATED_ADD, GELU, SIGNS, PARTS, PRODUCTS, FUNCTIONS
};
static const char *const names[FUNCTIONS] = {
    "group_norm", "quantize", "softmax", "softmax_regions", "upsample_nearest", "concat", "layer_norm", "gated_add",
    "gelu", "gelu_signs", "quantize_parts", "products",
};
enum operand { X, GAMMA, H, TABLE, Y, OPERANDS }; /* gamma, beta and gate are of one size; TABLE: parts */
enum {
    MOST_ELEMENTS = 80000,    /* of x: enough for the team, and for a group norm in stages */
    USUAL_ELEMENTS = 3000,
    MOST_WORK = 3000000,      /* multiplications of the products */
    MOST_PARTS = 64,
    MODERATE = 1 << 24        /* any size above may be refused */
};

struct call {
    int32_t function, row, threads, kind, silu, ints, bits, shift, zero_point, qmax;
    int64_t n, m, c, groups, stride; /* x (n, m, c); without c or m where the function has fewer sizes */
    float scale, other;
    double number;                   /* eps, or the factor of scores */
    struct rq_products p;
    int in_place;                    /* gated sum: 1 into x, 2 into h */
    void *operand[OPERANDS], *beta;
    wide bytes[OPERANDS];            /* what there is */
};

/* ------------------------------------------------------------------ what a call describes */

static wide matrix_bytes(wide images, wide heads, wide rows, wide columns, int64_t image, int64_t head, int64_t row)
{
    return images && heads && rows && columns ? (images - 1) * image + (heads - 1) * head + (rows - 1) * row + columns : 0;
}

static void measure_products(const struct rq_products *p, wide need[OPERANDS])
{
    const struct rq_matrices *a = &p->a, *b = &p->b;
    const wide outputs = (wide)p->images * p->heads * p->m * p->n;
    need[Y] = 4 * matrix_bytes(p->images, p->heads, p->m, p->n, p->y_image_stride, p->y_head_stride, p->y_row_stride);
    if (outputs == 0)
        return;
    need[X] = matrix_bytes(p->images, p->heads, p->m, p->k, a->image_stride, a->head_stride, a->row_stride);
    need[H] = p->b_transposed
        ? matrix_bytes(p->images, p->heads, p->n, p->k, b->image_stride, b->head_stride, b->row_stride)
        : matrix_bytes(p->images, p->heads, p->k, p->n, b->image_stride, b->head_stride, b->row_stride);
}

/* The bytes of each operand, for sizes that are not negative. */
static void measure(const struct call *c, wide need[OPERANDS])
{
    const wide n = c->n, m = c->m, d = c->c, element = c->kind == RQ_UINT8 ? 1 : 4;
    memset(need, 0, OPERANDS * sizeof *need);
    switch (c->function) {
    case GROUP_NORM:
        need[X] = n * m * d * 4, need[GAMMA] = n && m ? d * 4 : 0, need[Y] = n * m * d * element;
        break;
    case QUANTIZE: case GELU:
        need[X] = n * 4, need[Y] = n * element;
        break;
    case SOFTMAX:
        need[X] = n * m * 4, need[Y] = n * m * element;
        break;
    case REGIONS:
        need[X] = n * m * 4, need[Y] = n * m;
        break;
    case UPSAMPLE:
        need[X] = n * m * d, need[Y] = 4 * n * m * d;
        break;
    case CONCAT:
        need[X] = n * m * 4, need[H] = n * d * 4, need[Y] = n * (m + d) * 4;
        break;
    case LAYER_NORM: case GATED_ADD:
        need[X] = n * m * d * 4, need[GAMMA] = n && m && d ? ((n - 1) * c->stride + d) * 4 : 0;
        need[Y] = n * m * d * (c->function == LAYER_NORM ? element : 4);
        need[H] = c->function == LAYER_NORM ? 0 : need[X];
        break;
    case SIGNS:
        need[X] = n * m * 4, need[Y] = 2 * n * m;
        break;
    case PARTS:
        need[X] = n * m * d * 4, need[TABLE] = m * (wide)sizeof(struct rq_part), need[Y] = n * m * d;
        break;
    default:
        measure_products(&c->p, need);
    }
}

static int is_scale(float scale) { return scale >= 0x1p-126f && scale <= 0x1.fffffep127f; }

static int is_number(double number) { return number >= 0x1p-1022 && number <= 0x1p512; }

static int are_codes(float scale, int32_t zero_point, int32_t qmax)
{
    return is_scale(scale) && qmax >= 1 && qmax <= 255 && zero_point >= 0 && zero_point <= qmax;
}

static int is_stage(const struct call *c)
{
    return c->kind == RQ_FLOAT32 || (c->kind == RQ_UINT8 && are_codes(c->scale, c->zero_point, c->qmax));
}

static int are_products(const struct rq_products *p)
{
    const int64_t least[][2] = { /* number, and what it must reach */
        {p->images, 0}, {p->heads, 0}, {p->m, 0}, {p->n, 0}, {p->k, 0}, {p->a.row_stride, p->k}, {p->a.head_stride, 0},
        {p->a.image_stride, 0}, {p->b.row_stride, p->b_transposed ? p->k : p->n}, {p->b.head_stride, 0},
        {p->b.image_stride, 0}, {p->y_row_stride, p->n}, {p->y_head_stride, 0}, {p->y_image_stride, 0},
    };
    for (size_t i = 0; i < sizeof least / sizeof least[0]; i++)
        if (least[i][0] < least[i][1])
            return 0;
    if (p->k > RQ_MAX_K || p->a.zero_point < 0 || p->a.zero_point > 255 || p->b.zero_point < 0 || p->b.zero_point > 255)
        return 0;
    return p->region_bits == 0
        || (p->region_bits >= 2 && p->region_bits <= 8 && p->region_shift >= 0 && p->region_shift < p->region_bits
            && p->a.zero_point == 0);
}

/* The rules of refquant.h. */
static int is_an_operation(const struct call *c)
{
    const int has_row = c->function != UPSAMPLE && c->function != CONCAT;
    if (has_row && (c->row < 0 || c->row >= rq_kernel_count() || (rq_kernel_needs(c->row) & ~rq_cpu_features())))
        return 0;
    if (c->function == PRODUCTS)
        return are_products(&c->p);
    static const int sizes[FUNCTIONS] = {3, 1, 2, 2, 3, 3, 3, 3, 1, 2, 3, 0};
    if (c->n < 0 || (sizes[c->function] > 1 && c->m < 0) || (sizes[c->function] > 2 && c->c < 0))
        return 0;
    switch (c->function) {
    case GROUP_NORM:
        return is_stage(c) && c->groups >= 1 && c->c % c->groups == 0 && is_number(c->number);
    case QUANTIZE:
        return is_stage(c) && (c->silu || c->kind == RQ_UINT8);
    case SOFTMAX: /* its zero point is 0 */
        return (c->kind == RQ_FLOAT32 || (c->kind == RQ_UINT8 && are_codes(c->scale, 0, c->qmax))) && is_number(c->number);
    case REGIONS:
        return c->bits >= 3 && c->bits <= 8 && c->shift >= 0 && c->shift < c->bits && is_number(c->number);
    case LAYER_NORM:
        return is_stage(c) && c->stride >= c->c && is_number(c->number);
    case GATED_ADD:
        return c->stride >= c->c;
    case GELU:
        return is_stage(c);
    case SIGNS:
        return are_codes(c->scale, 0, c->qmax) && are_codes(c->other, 0, c->qmax);
    case PARTS:
        if (c->m < 1 || c->m > MOST_PARTS)
            return 0;
        for (int64_t i = 0; i < c->m && (wide)(i + 1) * (wide)sizeof(struct rq_part) <= c->bytes[TABLE]; i++) {
            const struct rq_part *part = (const struct rq_part *)c->operand[TABLE] + i;
            if (!are_codes(part->scale, part->zero_point, part->qmax))
                return 0;
        }
        return 1;
    default:
        return 1;
    }
}

static int is_below(const int64_t *sizes, int count, int64_t most)
{
    for (int i = 0; i < count; i++)
        if (sizes[i] > most)
            return 0;
    return 1;
}

static int is_moderate(const struct call *c)
{
    const int64_t sizes[] = {c->n, c->m, c->c, c->stride}, products[] = {
        c->p.images, c->p.heads, c->p.m, c->p.n, c->p.k, c->p.a.image_stride, c->p.a.head_stride, c->p.a.row_stride,
        c->p.b.image_stride, c->p.b.head_stride, c->p.b.row_stride, c->p.y_image_stride, c->p.y_head_stride,
        c->p.y_row_stride,
    };
    return c->function == PRODUCTS ? is_below(products, sizeof products / sizeof products[0], MODERATE)
                                   : is_below(sizes, 4, MODERATE);
}

/* Does an operation stay inside of the arrays that there are, and is it done in a moment? */
static int is_there(const struct call *c, const struct call *honest)
{
    wide need[OPERANDS];
    if (!is_moderate(c))
        return 0;
    if (c->function == PRODUCTS && (c->p.y_row_stride != honest->p.y_row_stride || c->p.y_head_stride != honest->p.y_head_stride
                                    || c->p.y_image_stride != honest->p.y_image_stride))
        return 0; /* parts of the result might lie on each other */
    measure(c, need);
    if (c->function == PARTS && (wide)c->m * (wide)sizeof(struct rq_part) > c->bytes[TABLE])
        return 0;
    for (int i = 0; i < OPERANDS; i++)
        if (need[i] > c->bytes[i])
            return 0;
    return c->function != PRODUCTS || (wide)c->p.images * c->p.heads * c->p.m * c->p.n * c->p.k <= MOST_WORK;
}

/* ------------------------------------------------------------------ one call */

static int call(struct call *c, void *y)
{
    const float *const x = c->operand[X], *const gamma = c->operand[GAMMA], *const beta = c->beta;
    switch (c->function) {
    case GROUP_NORM:
        return rq_group_norm(c->row, c->threads, x, c->n, c->m, c->c, c->groups, gamma, beta, c->number, c->silu, c->kind,
                             c->scale, c->zero_point, c->qmax, y);
    case QUANTIZE:
        return rq_quantize(c->row, c->threads, x, c->n, c->silu, c->kind, c->scale, c->zero_point, c->qmax, y);
    case SOFTMAX:
        return rq_softmax(c->row, c->threads, x, c->ints, c->number, c->n, c->m, c->kind, c->scale, c->qmax, y);
    case REGIONS:
        return rq_softmax_regions(c->row, c->threads, x, c->number, c->n, c->m, c->bits, c->shift, y);
    case UPSAMPLE:
        return rq_upsample_nearest(c->threads, x, c->n, c->m, c->c, y);
    case CONCAT:
        return rq_concat(c->threads, x, c->operand[H], c->n, c->m, c->c, y);
    case LAYER_NORM:
        return rq_layer_norm(c->row, c->threads, x, c->n, c->m, c->c, gamma, beta, c->stride, c->number, c->kind, c->scale,
                             c->zero_point, c->qmax, y);
    case GATED_ADD:
        return rq_gated_add(c->row, c->threads, c->in_place == 1 ? y : x, gamma, c->stride,
                            c->in_place == 2 ? y : c->operand[H], c->n, c->m, c->c, y);
    case GELU:
        return rq_gelu(c->row, c->threads, x, c->n, c->kind, c->scale, c->zero_point, c->qmax, y);
    case SIGNS:
        return rq_gelu_signs(c->row, c->threads, x, c->n, c->m, c->scale, c->other, c->qmax, y);
    case PARTS:
        return rq_quantize_parts(c->row, c->threads, x, c->n, c->m, c->c, c->operand[TABLE], y);
    default:
        c->p.a.data = c->operand[X], c->p.b.data = c->operand[H], c->p.y = y;
        return rq_products(c->row, c->threads, &c->p);
    }
}

static int run(struct call *c, void *y)
{
    memset(y, PATTERN, (size_t)c->bytes[Y]);
    if (c->in_place)
        memcpy(y, c->operand[c->in_place == 1 ? X : H], (size_t)c->bytes[Y]);
    const int status = call(c, y);
    const int has_floats = c->function == PRODUCTS || c->function == GATED_ADD || c->function == LAYER_NORM
        || c->function == GROUP_NORM;
    for (wide i = 0; has_floats && c->kind != RQ_UINT8 && i + 4 <= c->bytes[Y]; i += 4) {
        float value; /* two NaN are equal, whatever their bits */
        memcpy(&value, (uint8_t *)y + i, 4);
        value = value == value ? value : 0x1p-149f;
        memcpy((uint8_t *)y + i, &value, 4);
    }
    return status;
}

static void complain(const struct call *c, const char *what, int status)
{
    const struct rq_products *p = &c->p;
    fprintf(stderr,
            "%s, row %d, %d threads: %s, status %d\n"
            "sizes %lld %lld %lld groups %lld stride %lld, kind %d silu %d ints %d bits %d shift %d, scales %a %a zero %d "
            "qmax %d, number %a, in place %d\n"
            "products %lld x %lld of %lld x %lld x %lld, transposed %d, regions %d %d, scale %a\n",
            names[c->function], c->row, c->threads, what, status, (long long)c->n, (long long)c->m, (long long)c->c,
            (long long)c->groups, (long long)c->stride, c->kind, c->silu, c->ints, c->bits, c->shift, c->scale, c->other,
            c->zero_point, c->qmax, c->number, c->in_place, (long long)p->images, (long long)p->heads, (long long)p->m,
            (long long)p->n, (long long)p->k, p->b_transposed, p->region_bits, p->region_shift, p->scale);
    abort();
}

/* Where pixels go, without a kernel. */
static void check_copies(const struct call *c, const uint8_t *y)
{
    const uint8_t *const x = c->operand[X], *const h = c->operand[H];
    for (int64_t i = 0; c->function == UPSAMPLE && i < 4 * c->n * c->m; i++) {
        const int64_t line = i / (2 * c->m) / 2, column = i % (2 * c->m) / 2;
        if (memcmp(y + i * c->c, x + (line * c->m + column) * c->c, (size_t)c->c))
            complain(c, "a pixel is not where it belongs", 0);
    }
    for (int64_t i = 0; c->function == CONCAT && i < c->n; i++) {
        const int64_t left = 4 * c->m, right = 4 * c->c;
        if (memcmp(y + i * (left + right), x + i * left, (size_t)left)
            || memcmp(y + i * (left + right) + left, h + i * right, (size_t)right))
            complain(c, "a pixel is not where it belongs", 0);
    }
}

static void compare(struct call *c, const struct call *honest, int wild)
{
    const size_t bytes = (size_t)c->bytes[Y];
    uint8_t *want = array((int64_t)bytes, 1), *got = array((int64_t)bytes, 1);
    const int hostile = c != honest, row = c->row, threads = c->threads;
    if (!is_an_operation(c)) {
        const int in_place = c->in_place;
        c->in_place = 0; /* so that a refused call leaves nothing but the pattern */
        c->kind = c->kind == RQ_UINT8 || c->kind == RQ_FLOAT32 ? c->kind : 77;
        memset(want, PATTERN, bytes);
        const int status = run(c, got);
        if (status >= 0 || memcmp(want, got, bytes))
            complain(c, "no operation, but not refused", status);
        c->in_place = in_place;
    } else if (is_there(c, honest)) {
        c->row = 0;
        c->threads = 1;
        const int status = run(c, want);
        if (status != RQ_OK && !(wild && status == RQ_ERR_RANGE) && is_moderate(c))
            complain(c, "refused", status);
        if (status == RQ_OK)
            check_copies(c, want);
        for (c->row = hostile ? row : 0; c->row < (hostile ? row + 1 : rq_kernel_count()); c->row++)
            for (c->threads = threads; c->threads >= 1; c->threads -= 2) {
                if (c->row < 0 || c->row >= rq_kernel_count() || (rq_kernel_needs(c->row) & ~rq_cpu_features()))
                    continue;
                if (run(c, got) != status || (status == RQ_OK && memcmp(want, got, bytes)))
                    complain(c, "another result than the scalar kernel's on one thread", status);
                if (hostile)
                    break;
            }
    }
    free(want);
    free(got);
}

static void spoil(struct call *c)
{
    int64_t *const sizes[] = {
        &c->n, &c->m, &c->c, &c->groups, &c->stride, &c->p.images, &c->p.heads, &c->p.m, &c->p.n, &c->p.k,
        &c->p.a.image_stride, &c->p.a.head_stride, &c->p.a.row_stride, &c->p.b.image_stride, &c->p.b.head_stride,
        &c->p.b.row_stride, &c->p.y_image_stride, &c->p.y_head_stride, &c->p.y_row_stride,
    };
    int32_t *const numbers[] = {
        &c->row, &c->threads, &c->kind, &c->bits, &c->shift, &c->zero_point, &c->qmax, &c->p.a.zero_point,
        &c->p.b.zero_point, &c->p.region_bits, &c->p.region_shift,
    };
    static const double odd[] = {0, -1, 0x1p-130, 0x1p-1060, 0x1p511, 0x1p513, 1.0 / 0.0, 0.0 / 0.0};
    enum { SIZES = sizeof sizes / sizeof sizes[0], NUMBERS = sizeof numbers / sizeof numbers[0] };
    const int which = take() % (SIZES + NUMBERS + 5);
    const double number = odd[take() % (sizeof odd / sizeof odd[0])];
    const float single = number > 0x1p127 && number < 0x1p600 ? 0x1p127f : (float)number;
    const int64_t value = take_any();
    struct rq_part *const part = c->operand[TABLE];
    if (which < SIZES)
        *sizes[which] = value;
    else if (which < SIZES + NUMBERS)
        *numbers[which - SIZES] = (int32_t)value;
    else if (which == SIZES + NUMBERS)
        c->scale = single;
    else if (which == SIZES + NUMBERS + 1)
        c->other = single;
    else if (which == SIZES + NUMBERS + 2)
        c->number = number;
    else if (c->bytes[TABLE] == 0)
        return;
    else if (which == SIZES + NUMBERS + 3)
        part->scale = single;
    else
        part->qmax = (int32_t)value;
}

/* ------------------------------------------------------------------ from bytes */

enum spread { USUAL, FINITE, WILD }; /* a few units around 0; any finite number; any bits */

static void fill_floats(void *to, wide bytes, enum spread spread)
{
    float *const x = to;
    for (wide i = 0; i < bytes / 4; i++) {
        const uint32_t any = (uint32_t)random64();
        x[i] = spread == FINITE ? random_float() : (float)(int32_t)any * 0x1p-28f;
        if (spread == WILD && any % 32 == 0)
            memcpy(&x[i], &(uint32_t){(uint32_t)random64()}, 4);
    }
}

static float take_scale(void)
{
    const int byte = take();
    return byte < 8 ? 0x1p-126f * (float)(1 << byte) : byte > 250 ? 0x1p120f : 0.0003f * (float)byte;
}

/* Heads one after the other, or side by side in a row; y: images, heads, rows. */
static void take_strides(int apart, int64_t images, int64_t heads, int64_t rows, int64_t columns, int64_t *image, int64_t *head,
                         int64_t *row)
{
    const int64_t gap = apart ? take_size(9) : 0;
    if (take() & 1) {
        *head = columns + gap;
        *row = heads * *head + gap;
        *image = rows * *row + gap;
    } else {
        *row = columns + gap;
        *head = rows * *row + gap;
        *image = heads * *head + gap;
    }
    (void)images;
}

static int take_products(struct call *c, int apart)
{
    struct rq_products *const p = &c->p;
    p->images = take_size(4), p->heads = take_size(4), p->m = take_size(99), p->n = take_size(70), p->k = take_size(150);
    p->b_transposed = take() & 1;
    if (take() & 1) {
        p->region_bits = 2 + (int)take_size(6);
        p->region_shift = (int)take_size(p->region_bits - 1);
    }
    p->a.zero_point = p->region_bits ? 0 : take();
    p->b.zero_point = take();
    p->scale = take_scale();
    take_strides(apart, p->images, p->heads, p->m, p->k, &p->a.image_stride, &p->a.head_stride, &p->a.row_stride);
    take_strides(apart, p->images, p->heads, p->b_transposed ? p->n : p->k, p->b_transposed ? p->k : p->n, &p->b.image_stride,
                 &p->b.head_stride, &p->b.row_stride);
    take_strides(apart, p->images, p->heads, p->m, p->n, &p->y_image_stride, &p->y_head_stride, &p->y_row_stride);
    return p->images * p->heads * p->m * p->n * p->k <= (c->threads == 3 ? MOST_WORK : MOST_WORK / 10);
}

static int take_island(struct call *c, int apart, int large)
{
    c->n = take_size(9), c->m = take_size(70), c->c = take_size(100);
    if (large)
        c->n *= 1 + take_size(40);
    c->groups = 1 + take_size(7);
    if (c->function == GROUP_NORM)
        c->c -= c->c % c->groups;
    if (c->function == PARTS)
        c->m = 1 + c->m % MOST_PARTS;
    if (c->function == QUANTIZE || c->function == GELU)
        c->n *= c->m * c->c; /* one run of numbers */
    c->stride = c->c + (apart ? take_size(9) : 0);
    wide need[OPERANDS];
    measure(c, need);
    return need[X] <= 4 * (large ? MOST_ELEMENTS : USUAL_ELEMENTS) && need[H] <= 4 * MOST_ELEMENTS;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_end = data + size;
    struct call c = {0};
    c.function = (int32_t)take_size(FUNCTIONS - 1);
    const int switches = take(), hostile = switches & 1, apart = switches & 2, large = switches & 4;
    c.silu = switches >> 3 & 1;
    c.ints = switches >> 4 & 1;
    c.kind = switches & 32 ? RQ_UINT8 : RQ_FLOAT32;
    const enum spread spread = (enum spread)take_size(2);
    c.ints &= spread == USUAL;
    if (c.function == QUANTIZE && !c.silu)
        c.kind = RQ_UINT8;
    c.threads = 1 + (int)take_size(2);
    c.in_place = c.function == GATED_ADD ? (int)take_size(2) : 0;
    c.bits = 3 + (int)take_size(5);
    c.shift = (int)take_size(c.bits - 1);
    c.qmax = 1 + take() % 255;
    c.zero_point = take() % (c.qmax + 1);
    c.scale = take_scale();
    c.other = take_scale();
    c.number = take() & 1 ? 1e-5 : 0.0625 * (1 + take());
    take_seed();
    if (c.function == PRODUCTS ? !take_products(&c, apart) : !take_island(&c, apart, large))
        return -1; /* of no interest to the corpus */

    measure(&c, c.bytes);
    for (int i = 0; i < OPERANDS; i++)
        c.operand[i] = i == Y ? NULL : array((int64_t)c.bytes[i], 1);
    c.beta = array((int64_t)c.bytes[GAMMA], 1);
    if (c.function == PRODUCTS || c.function == UPSAMPLE) {
        fill_bytes(c.operand[X], (int64_t)c.bytes[X], 0, c.p.region_bits ? (1 << c.p.region_bits) - 1 : 255);
        fill_bytes(c.operand[H], (int64_t)c.bytes[H], 0, 255);
    } else {
        fill_floats(c.operand[X], c.bytes[X], spread);
        fill_floats(c.operand[H], c.bytes[H], spread);
        fill_floats(c.operand[GAMMA], c.bytes[GAMMA], spread == FINITE ? FINITE : USUAL);
        fill_floats(c.beta, c.bytes[GAMMA], USUAL);
    }
    for (int64_t i = 0; i < (int64_t)(c.bytes[TABLE] / (wide)sizeof(struct rq_part)); i++) {
        const int32_t qmax = (int32_t)random_in(1, 255);
        const float scale = 0.001f * (float)random_in(1, 300);
        ((struct rq_part *)c.operand[TABLE])[i] = (struct rq_part){scale, (int32_t)random_in(0, qmax), qmax};
    }

    struct call spoilt = c;
    if (hostile)
        spoil(&spoilt);
    compare(hostile ? &spoilt : &c, &c, spread == WILD);

    for (int i = 0; i < OPERANDS; i++)
        free(c.operand[i]);
    free(c.beta);
    return 0;
}

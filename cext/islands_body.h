/* islands_body.h - the arithmetic of the float islands, written once for a register of any width.
 *
 * islands_scalar.c, islands_avx2.c and islands_avx512.c define a register of doubles (`wide`, LANES of
 * them) and one of floats (`narrow`, FLOATS of them) with a dozen operations, and include this file.
 *
 *     a block      x0 x1 x2 x3 x4 x5 x6 x7 x8 x9 x10 x11 x12 x13 x14 x15       float32
 *     scalar      [x0][x1][x2][x3] ...                                         16 wides of 1
 *     avx2        [x0 x1 x2 x3][x4 ...                                          4 wides of 4
 *     avx512      [x0 x1 x2 x3 x4 x5 x6 x7][x8 ...                              2 wides of 8
 *
 * Same bits everywhere: every element has its own chain of operations (+ - * /, each rounded once; no
 * fused multiply-add, which plain C does not have everywhere), and every sum is 16 or `period` sums with
 * a fixed order, which a wider register computes side by side and not otherwise.
 *
 * Why double. A code is at most 255 steps away from 0, and there half an ulp of float32 is 1.5e-5 steps,
 * so float32 cannot promise codes that are right up to 1e-5. In double the rounding of all operations
 * together stays below 1e-12, and what is left is the error of e^-z, which costs 6 multiplications for
 *
 *     e^-z = 2^k e^-r,   k = round(-z log2(e)),   r = z + k ln 2 in [-0.3466, 0.3466]
 *     e^-r = 1 + c1 r + ... + c6 r^6              relative error < 2.0e-9, 0 at r = 0
 *
 * that is 0.033 ulp of float32, or 5.1e-7 steps at 255 steps (softmax, which divides by a sum of these:
 * twice that; measured 0.532 and 0.538 ulp with the final rounding). c1 to c6 minimise the largest relative
 * error with c0 = 1, so that softmax of one score is 1. A degree of 5 would leave 9.2e-8: 1.5 ulp.
 * |z| is limited to 600, where 2^k times any float32 still is a normal number: beyond, y is 0 or z anyway.
 * Where group norm knows that no |z| comes near that (`tame`), two of 25 operations are saved.
 * Codes of SiLU there, of GELU and of softmax are tried in float32 first, with the same result: islands_short.h.
 * Tails: a block that is not full is computed in a copy. No element outside of the arrays is touched.
 */
#define VECTORS (RQ_BLOCK / LANES)
#define NARROWS (RQ_BLOCK / FLOATS)

/* unit * e^-z. The factor is in the coefficients, which are computed before the loop. */
RQ_INLINE wide exp_of_minus(wide z, double unit, int tame)
{
    const wide magic = all(0x1.8p52); /* from 2^52 to 2^53 doubles are the integers: adding it rounds */
    if (!tame)
        z = least(all(600.0), most(all(-600.0), z)); /* a NaN passes */
    const wide t = z * all(-0x1.71547652b82fep+0) + magic; /* log2(e); k is in the low bits of t */
    const wide r = z + (t - magic) * all(0x1.62e42fefa39efp-1); /* ln 2 */
    const wide rr = r * r; /* three short chains instead of a long one: 24 cycles instead of 36 */
    wide p = (all(0x1.6ae7205ce8ab0p-10 * unit) * r + all(-0x1.126780654d164p-7 * unit)) * rr;
    p = (p + (all(0x1.5558224ee0bc1p-5 * unit) * r + all(-0x1.555419636bad0p-3 * unit))) * rr;
    p = (p + (all(0x1.fffffc1d1712dp-2 * unit) * r + all(-0x1.0000008a243f9p+0 * unit))) * r + all(unit);
    return times_power(p, t);
}

/* The sum of 16 lanes, halves added to halves. */
RQ_INLINE double sum_of_lanes(const wide *v)
{
    double lanes[RQ_BLOCK];
    for (int i = 0; i < VECTORS; i++)
        store(lanes + i * LANES, v[i]);
    for (int half = RQ_BLOCK / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

RQ_INLINE int is_nan(double x) { return x != x; }

/* ------------------------------------------------------------------ sums over an image */

RQ_INLINE void add_up(const float *x, int64_t count, int64_t period, const double *shift, int squared, int64_t from,
                      int64_t to, double *out)
{
    for (int64_t p = from; p < to; p += RQ_BLOCK) {
        wide sum[VECTORS];
        RQ_UNROLL
        for (int v = 0; v < VECTORS; v++)
            sum[v] = all(0.0);
        int64_t i = p;
        for (; i + RQ_BLOCK <= count; i += period) {
            RQ_UNROLL
            for (int v = 0; v < VECTORS; v++) {
                wide d = load_floats(x + i + v * LANES) - load(shift + p + v * LANES);
                if (squared)
                    d = d * d;
                sum[v] = sum[v] + d;
            }
        }
        RQ_UNROLL
        for (int v = 0; v < VECTORS; v++)
            store(out + p + v * LANES, sum[v]);
        for (int64_t q = p; i < count; i++, q++) { /* the end of the image, inside of this block */
            const double d = (double)x[i] - shift[q];
            out[q] = out[q] + (squared ? d * d : d);
        }
    }
}

static void sums(const float *x, int64_t count, int64_t period, const double *shift, int64_t from, int64_t to,
                 double *out)
{
    add_up(x, count, period, shift, 0, from, to, out);
}

static void squares(const float *x, int64_t count, int64_t period, const double *shift, int64_t from, int64_t to,
                    double *out)
{
    add_up(x, count, period, shift, 1, from, to, out);
}

/* ------------------------------------------------------------------ one number in, one number out */

/* Not above the largest code; store_codes sees to the other end. A NaN passes. */
RQ_INLINE wide limited(wide z, const struct rq_pointwise *f) { return least(all(f->qmax - f->zero_point), z); }

RQ_INLINE void store_block(void *out, const wide *y, const struct rq_pointwise *f, int codes)
{
    if (codes)
        store_codes(out, y, f->zero_point);
    else
        for (int v = 0; v < VECTORS; v++)
            store_floats((float *)out + v * LANES, y[v]);
}

#ifdef RQ_SHORT
#include "islands_short.h"
#endif

enum { PLAIN, TAME, WILD }; /* z = x; the affine map, nothing special; the affine map with shift and all limits */

RQ_INLINE void pointwise_block(const float *x, const struct rq_pointwise *f, int64_t p, int map, int silu, int codes,
                               void *out, wide *bad)
{
    wide y[VECTORS];
    RQ_UNROLL
    for (int v = 0; v < VECTORS; v++) {
        const int at = v * LANES;
        wide z = load_floats(x + at);
        if (map == WILD)
            z = z - load(f->shift + p + at);
        if (map != PLAIN)
            z = z * load(f->slope + p + at) + load(f->offset + p + at);
        else
            *bad = *bad + (z - z); /* 0, or NaN where z is not finite */
        if (silu)
            z = z / (all(f->unit) + exp_of_minus(z, f->unit, map == TAME)); /* one division for both */
        y[v] = codes ? limited(z, f) : z;
    }
    store_block(out, y, f, codes);
}

RQ_INLINE int pointwise_with(const float *x, int64_t count, const struct rq_pointwise *given, int map, int silu,
                             int codes, uint8_t *out)
{
    const struct rq_pointwise own = *given, *const f = &own; /* own: no store of a code can change it */
    const int64_t size = codes ? 1 : sizeof(float);
    wide bad = all(0.0);
    int64_t i = 0, p = 0;
#ifdef RQ_SHORT
    const int may_be_short = map == TAME && silu && codes && f->slope32;
    const struct rough g = roughly(f);
#endif
    for (; i + RQ_BLOCK <= count; i += RQ_BLOCK) {
        int done = 0;
#ifdef RQ_SHORT
        if (may_be_short)
            done = short_block(x + i, f, &g, p, out + i);
#endif
        if (!done)
            pointwise_block(x + i, f, p, map, silu, codes, out + i * size, &bad);
        p = p + RQ_BLOCK < f->period ? p + RQ_BLOCK : 0;
    }
    if (i < count) {
        float in[RQ_BLOCK] = {0}, end[RQ_BLOCK];
        memcpy(in, x + i, (size_t)(count - i) * sizeof *in);
        pointwise_block(in, f, p, map, silu, codes, end, &bad);
        memcpy(out + i * size, end, (size_t)((count - i) * size));
    }
    double lanes[LANES], all_lanes = 0;
    store(lanes, bad);
    for (int v = 0; v < LANES; v++)
        all_lanes += lanes[v];
    return is_nan(all_lanes);
}

static int pointwise(const float *x, int64_t count, const struct rq_pointwise *f, void *out)
{
    const int map = f->period == 0 ? PLAIN : f->tame ? TAME : WILD;
    switch (4 * map + 2 * (f->silu != 0) + (f->codes != 0)) {
    case 4 * PLAIN + 2: return pointwise_with(x, count, f, PLAIN, 1, 0, out);
    case 4 * PLAIN + 3: return pointwise_with(x, count, f, PLAIN, 1, 1, out);
    case 4 * TAME: return pointwise_with(x, count, f, TAME, 0, 0, out);
    case 4 * TAME + 1: return pointwise_with(x, count, f, TAME, 0, 1, out);
    case 4 * TAME + 2: return pointwise_with(x, count, f, TAME, 1, 0, out);
    case 4 * TAME + 3: return pointwise_with(x, count, f, TAME, 1, 1, out);
    case 4 * WILD: return pointwise_with(x, count, f, WILD, 0, 0, out);
    case 4 * WILD + 1: return pointwise_with(x, count, f, WILD, 0, 1, out);
    case 4 * WILD + 2: return pointwise_with(x, count, f, WILD, 1, 0, out);
    case 4 * WILD + 3: return pointwise_with(x, count, f, WILD, 1, 1, out);
    }
    return 1;
}

/* ------------------------------------------------------------------ softmax of a line */

/* The codes or floats of a block of e^... / sum. */
RQ_INLINE void share_block(const double *e, double factor, const struct rq_pointwise *f, int codes, void *out)
{
    wide y[VECTORS];
    RQ_UNROLL
    for (int v = 0; v < VECTORS; v++) {
        y[v] = load(e + v * LANES) * all(factor);
        if (codes && f->flag) /* the flag is even: it moves no tie */
            y[v] = where_at_least(y[v], f->split, limited(y[v] * all(f->ratio), f) + all(f->flag), y[v]);
        else if (codes)
            y[v] = limited(y[v], f);
    }
    store_block(out, y, f, codes);
}

RQ_INLINE void shares(const double *e, int64_t count, double factor, const struct rq_pointwise *given, int codes,
                      uint8_t *out)
{
    const struct rq_pointwise own = *given, *const f = &own;
    const int64_t size = codes ? 1 : sizeof(float);
    int64_t i = 0;
    for (; i + RQ_BLOCK <= count; i += RQ_BLOCK)
        share_block(e + i, factor, f, codes, out + i * size);
    if (i < count) {
        float end[RQ_BLOCK];
        share_block(e + i, factor, f, codes, end);
        memcpy(out + i * size, end, (size_t)((count - i) * size));
    }
}

static int softmax(const void *scores, int ints, int64_t count, double scale, const struct rq_pointwise *f,
                   double *room, void *out)
{
    const float *const x = scores;
    const int32_t *const s = scores;
#ifdef RQ_SHORT
    if (f->codes && !ints && short_softmax(x, count, scale, f, (float *)room, out))
        return 0;
#endif
    const double nothing = -HUGE_VAL; /* behind the line: e^-600 is nothing beside a sum that is at least 1 */
    wide top[VECTORS];
    int64_t i = 0;
    for (int v = 0; v < VECTORS; v++)
        top[v] = all(nothing);
    for (; i + RQ_BLOCK <= count; i += RQ_BLOCK)
        for (int v = 0; v < VECTORS; v++) {
            const wide t = ints ? load_ints(s + i + v * LANES) : load_floats(x + i + v * LANES);
            store(room + i + v * LANES, t);
            top[v] = most(top[v], t);
        }
    double lanes[RQ_BLOCK], largest = nothing;
    for (int v = 0; v < VECTORS; v++)
        store(lanes + v * LANES, top[v]);
    for (int v = 0; v < RQ_BLOCK; v++)
        largest = lanes[v] > largest ? lanes[v] : largest;
    for (; i < count; i++) {
        room[i] = ints ? (double)s[i] : (double)x[i];
        largest = room[i] > largest ? room[i] : largest;
    }
    for (; i % RQ_BLOCK != 0; i++)
        room[i] = nothing;

    wide sum[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        sum[v] = all(0.0);
    for (int64_t b = 0; b < i; b += RQ_BLOCK) {
        RQ_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const wide e = exp_of_minus((all(largest) - load(room + b + v * LANES)) * all(scale), 1, 0);
            store(room + b + v * LANES, e);
            sum[v] = sum[v] + e;
        }
    }
    const double total = sum_of_lanes(sum);
    if (f->codes)
        shares(room, count, 1.0 / (total * f->unit), f, 1, out);
    else
        shares(room, count, 1.0 / total, f, 0, out);
    return is_nan(total);
}

/* ------------------------------------------------------------------ float32 as it is */

RQ_INLINE void quantize_block(const float *x, const struct rq_pointwise *f, uint8_t *out, narrow *bad)
{
    narrow q[NARROWS];
    RQ_UNROLL
    for (int v = 0; v < NARROWS; v++) {
        q[v] = load_narrow(x + v * FLOATS) / all_narrow((float)f->unit);
        q[v] = least_narrow(all_narrow((float)(f->qmax - f->zero_point)), q[v]); /* a NaN passes */
        q[v] = most_narrow(all_narrow((float)-f->zero_point), q[v]);
        *bad = *bad + q[v]; /* at most 255 each: never infinite */
    }
    store_narrow_codes(out, q, f->zero_point);
}

static int quantize(const float *x, int64_t count, const struct rq_pointwise *given, uint8_t *out)
{
    const struct rq_pointwise own = *given, *const f = &own;
    narrow bad = all_narrow(0.0f);
    int64_t i = 0;
    for (; i + RQ_BLOCK <= count; i += RQ_BLOCK)
        quantize_block(x + i, f, out + i, &bad);
    if (i < count) {
        float in[RQ_BLOCK] = {0};
        uint8_t end[RQ_BLOCK];
        memcpy(in, x + i, (size_t)(count - i) * sizeof *in);
        quantize_block(in, f, end, &bad);
        memcpy(out + i, end, (size_t)(count - i));
    }
    float lanes[FLOATS], all_lanes = 0;
    store_narrow(lanes, bad);
    for (int v = 0; v < FLOATS; v++)
        all_lanes += lanes[v];
    return is_nan(all_lanes);
}

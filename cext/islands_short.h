/* islands_short.h - the shorter way to codes of softmax, GELU, and SiLU behind a group norm: float32, where that is sure.
 *
 * The code is what islands_body.h computes in double. Float32 finds the same number up to a tolerance, in a register
 * that holds twice as many; unless half a step lies within the tolerance, rounding gives the same code. A block of 16
 * in which one does, of real networks one in a hundred, is computed in double after all. So this is no other
 * definition, and wider registers still give the bits of islands_scalar.c, which has no shorter way.
 *
 * The tolerance. With u = 2^-24, A = |x * slope| + |offset| and y = SiLU(z) / unit: slope, product, offset and sum put
 * z wrong by at most 3 u A, and SiLU grows at most 1.1 times as fast as z; e^-z is wrong by 4 u of itself at most (its
 * polynomial by 2e-9, k ln 2 is subtracted in two parts, of which k times the first is exact), sum, product and
 * quotient by 4 u more, of a y that is at most A / unit. Together less than 12 u A / unit; TOLERANCE is twice that.
 * What underflows is below 2^-20 of a step: slopes are normal numbers (islands_units.c), and so is the unit.
 * Beyond |z| = 80 e^-z is that of 80: y is z / unit, or nothing, by far less than the tolerance.
 *
 * GELU, x / (1 + e^-w) with A = |x|: w is wrong by 6 u of itself, which moves y by at most 0.224 * 6 u A / unit, since
 * |w| times the slope of 1 / (1 + e^-w) is nowhere above 0.224; the rest as above, and 2 u more for the steps of
 * negative numbers. Where A is not finite, nothing is sure.
 *
 * Softmax of a line of up to 512. z = (largest - x) scale is wrong by 3 u of itself, e^-z by 4 u more: by (3 z + 4) u e^-z,
 * at most (1.2 + 4 e^-z) u. The sum S of L of these is wrong by (3 ln L + 8 + L / 8) u of itself: the mean of z, each
 * counted e^-z / S times, is at most ln L (no distribution over L has more entropy), a lane has at most L / 8 terms, and
 * the lanes are added in four steps at most. A share in steps, e^-z / (S unit), is then wrong by less than
 * (16 + 3 ln L + L / 8) u / (S unit), of which (80 + L / 4) u / (S unit) is twice as much. A line with one doubtful code is
 * computed in double, and so is one with a number that is not finite.
 */
#define TOLERANCE 0x1.8p-20 /* 24 u, times A, in units */
#define SLACK 0x1p-24       /* u */

/* What is the same for all blocks, so that no block divides for it. */
struct rough { narrow unit, tolerance, top, bottom; };

RQ_INLINE struct rough roughly(const struct rq_pointwise *f)
{
    const double tolerance = f->unit > 1e-30 ? TOLERANCE / f->unit : 1e30;
    return (struct rough){all_narrow((float)f->unit), all_narrow((float)tolerance),
                          all_narrow((float)(f->qmax - f->zero_point)), all_narrow((float)(-1 - f->zero_point))};
}

/* e^-z, of |z| up to 80. */
RQ_INLINE narrow exp_of_minus_narrow(narrow z)
{
    const narrow magic = all_narrow(0x1.8p23f), end = all_narrow(80.0f);
    const narrow near = least_narrow(end, most_narrow(all_narrow(0.0f) - end, z));
    const narrow t = times_plus(near, all_narrow(-0x1.715476p+0f), magic), k = t - magic;
    const narrow r = times_plus(k, all_narrow(0x1.7f7d1cp-20f), times_plus(k, all_narrow(0x1.62e4p-1f), near));
    narrow e = times_plus(r, all_narrow(0x1.6ae720p-10f), all_narrow(-0x1.126780p-7f));
    e = times_plus(e, r, all_narrow(0x1.555822p-5f));
    e = times_plus(e, r, all_narrow(-0x1.555420p-3f));
    e = times_plus(e, r, all_narrow(0x1.fffffcp-2f));
    e = times_plus(e, r, all_narrow(-1.0f));
    return times_power_narrow(times_plus(e, r, all_narrow(1.0f)), t);
}

/* The nearest integer of |y| below 2^22, ties to even. */
RQ_INLINE narrow nearest_narrow(narrow y) { return (y + all_narrow(0x1.8p23f)) - all_narrow(0x1.8p23f); }

/* 1 if the block has its codes. */
RQ_INLINE int short_block(const float *x, const struct rq_pointwise *f, const struct rough *g, int64_t p, uint8_t *out)
{
    narrow q[NARROWS], off = all_narrow(0.0f);
    RQ_UNROLL
    for (int v = 0; v < NARROWS; v++) {
        const int64_t at = v * FLOATS;
        const narrow scaled = load_narrow(x + at) * load_narrow(f->slope32 + p + at);
        const narrow offset = load_narrow(f->offset32 + p + at), z = scaled + offset;
        const narrow y = least_narrow(g->top, z / times_plus(exp_of_minus_narrow(z), g->unit, g->unit));
        q[v] = nearest_narrow(y);
        off = most_narrow(off, times_plus(size(scaled) + size(offset), g->tolerance, size(y - q[v])));
    }
    if (any_above(off, 0.5f - 0x1p-20f))
        return 0;
    store_narrow_codes(out, q, f->zero_point);
    return 1;
}

/* The same of GELU; down: NULL, or where the codes of negative numbers go. `bad` becomes NaN where x is not finite. */
RQ_INLINE int short_gelu(const float *x, const struct rq_pointwise *f, const struct rough *g, uint8_t *out, uint8_t *down,
                         narrow *bad)
{
    const narrow finer = all_narrow((float)-f->ratio), below = all_narrow(-1.0f);
    narrow q[NARROWS], minus[NARROWS], off = all_narrow(0.0f);
    RQ_UNROLL
    for (int v = 0; v < NARROWS; v++) {
        const narrow in = load_narrow(x + v * FLOATS);
        const narrow w = in * times_plus(in * in, all_narrow(0x1.2444f2p-4f), all_narrow(0x1.988454p+0f));
        const narrow y = in / times_plus(exp_of_minus_narrow(w), g->unit, g->unit);
        const narrow up = most_narrow(g->bottom, least_narrow(g->top, y));
        q[v] = nearest_narrow(up);
        *bad = *bad + (in - in);
        off = most_narrow(off, times_plus(size(in), g->tolerance, size(up - q[v])));
        if (down) { /* what is above 0 becomes -1 at most, which is stored as 0 */
            const narrow m = most_narrow(below, least_narrow(g->top, y * finer));
            minus[v] = nearest_narrow(m);
            off = most_narrow(off, times_plus(size(in) * g->tolerance, size(finer), size(m - minus[v])));
        }
    }
    if (any_above(off, 0.5f - 0x1p-20f))
        return 0;
    store_narrow_codes(out, q, f->zero_point);
    if (down)
        store_narrow_codes(down, minus, 0);
    return 1;
}

enum { LONGEST = 512 }; /* of the lines above */

/* 1 if the line has its codes; room: `count` floats, at least a block. The last block ends with the line and overlaps the
 * one before: its numbers are taken twice, and counted once. */
RQ_INLINE int short_softmax(const float *x, int64_t count, double scale, const struct rq_pointwise *f, float *room,
                            uint8_t *out)
{
    static const float counted[3 * RQ_BLOCK] = {[RQ_BLOCK] = 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t given = count;
    float few[RQ_BLOCK];
    if (count > LONGEST || !(scale > 1e-30 && scale < 1e30))
        return 0;
    if (count < RQ_BLOCK) {
        for (int64_t i = 0; i < RQ_BLOCK; i++)
            few[i] = x[i < count ? i : 0];
        x = few;
        count = RQ_BLOCK;
    }
    const int64_t last = count - RQ_BLOCK;

    narrow top = load_narrow(x), odd = all_narrow(0.0f), sum = all_narrow(0.0f);
    for (int64_t b = 0; b < count; b += RQ_BLOCK) {
        const float *const in = x + (b < last ? b : last);
        RQ_UNROLL
        for (int v = 0; v < NARROWS; v++) {
            const narrow number = load_narrow(in + v * FLOATS);
            top = most_narrow(top, number);
            odd = odd + (number - number);
        }
    }
    if (sum_of_narrow(odd) != 0) /* NaN */
        return 0;

    const narrow largest = all_narrow(largest_of_narrow(top)), steep = all_narrow((float)scale);
    for (int64_t b = 0; b < count; b += RQ_BLOCK) {
        const int64_t at = b < last ? b : last;
        const float *const once = counted + (given < RQ_BLOCK ? 2 * RQ_BLOCK - given : RQ_BLOCK - (b - at));
        RQ_UNROLL
        for (int v = 0; v < NARROWS; v++) {
            const narrow e = exp_of_minus_narrow((largest - load_narrow(x + at + v * FLOATS)) * steep);
            store_narrow(room + at + v * FLOATS, e);
            sum = sum + e * load_narrow(once + v * FLOATS);
        }
    }

    const double factor = 1 / ((double)sum_of_narrow(sum) * f->unit), slack = SLACK * (double)(80 + count / 4) * factor;
    if (!(factor < 1e30 && slack < 0.25))
        return 0;
    const narrow limit = all_narrow((float)(f->qmax - f->zero_point)), tolerance = all_narrow((float)slack);
    const narrow shrink = all_narrow((float)factor), split = all_narrow((float)f->split), ratio = all_narrow((float)f->ratio);
    narrow off = all_narrow(0.0f), close = all_narrow(-1.0f);
    for (int64_t b = 0; b < count; b += RQ_BLOCK) {
        const int64_t at = b < last ? b : last;
        narrow q[NARROWS];
        uint8_t end[RQ_BLOCK];
        RQ_UNROLL
        for (int v = 0; v < NARROWS; v++) {
            const narrow y = load_narrow(room + at + v * FLOATS) * shrink;
            if (f->flag) {
                const narrow steps = where_at_least_narrow(y, split, least_narrow(limit, y * ratio), y);
                const narrow whole = nearest_narrow(steps);
                close = most_narrow(close, tolerance - size(y - split));
                off = most_narrow(off, size(steps - whole));
                q[v] = where_at_least_narrow(y, split, whole + all_narrow((float)f->flag), whole);
            } else {
                const narrow steps = least_narrow(limit, y);
                q[v] = nearest_narrow(steps);
                off = most_narrow(off, size(steps - q[v]));
            }
        }
        store_narrow_codes(given < RQ_BLOCK ? end : out + at, q, f->zero_point);
        if (given < RQ_BLOCK)
            memcpy(out, end, (size_t)given);
    }
    return !any_above(off, 0.5f - 0x1p-20f - (float)slack) && !any_above(close, 0);
}

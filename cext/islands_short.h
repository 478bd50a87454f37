/* islands_short.h - the shorter way to codes of GELU, and of SiLU behind a group norm: in float32, where that is sure.
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
 */
#define TOLERANCE 0x1.8p-20 /* 24 u, times A, in units */

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

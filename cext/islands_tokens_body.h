/* islands_tokens_body.h - the islands of a transformer, in the words of islands_body.h, which is included before.
 *
 *     layer norm       z = (x - x0 - m) r factor[p] + offset[p]       x0: the token's first number, m the mean of
 *                      x - x0, r = 1 / sqrt(v + eps); p: the feature
 *     GELU             y = x / (1 + e^-w),  w = 2 sqrt(2/pi) (x + 0.044715 x^3)
 *     two signs        GELU, with a step of its own for y >= 0 and for y < 0: two codes, one of which is 0
 *     gated sum        y = x + gate[p] h, in float32, rounded twice: what NumPy gives
 *
 * GELU by its tanh formula is x/2 (1 + tanh(w/2)), and 1 + tanh(w/2) = 2 / (1 + e^-w): SiLU with another exponent.
 * The error of e^-w is that of islands_body.h; w loses at most 2^-51 |w|, which beside it is nothing up to |w| = 600,
 * where y is 0 or x in any case. Its codes are tried in float32 first, with the same result: islands_short.h.
 */

/* ------------------------------------------------------------------ layer norm */

/* The sum of d = x[i] - x0 over a token, or of (d - mean)^2: 16 sums, the end in plain C, halves added to halves. */
RQ_INLINE double sum_token(const float *x, int64_t d, double mean, int squared)
{
    const double x0 = x[0];
    wide sum[VECTORS];
    double lanes[RQ_BLOCK];
    RQ_UNROLL
    for (int v = 0; v < VECTORS; v++)
        sum[v] = all(0.0);
    int64_t i = 0;
    for (; i + RQ_BLOCK <= d; i += RQ_BLOCK) {
        RQ_UNROLL
        for (int v = 0; v < VECTORS; v++) {
            wide term = load_floats(x + i + v * LANES) - all(x0);
            if (squared) {
                term = term - all(mean);
                term = term * term;
            }
            sum[v] = sum[v] + term;
        }
    }
    for (int v = 0; v < VECTORS; v++)
        store(lanes + v * LANES, sum[v]);
    for (int lane = 0; i < d; i++, lane++) {
        const double term = (double)x[i] - x0, rest = term - mean;
        lanes[lane] += squared ? rest * rest : term;
    }
    for (int half = RQ_BLOCK / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* Mean of x - x0, and variance, of each token. Why x0: the sums are of numbers as large as the token's spread, not as
 * its distance from 0, and equal numbers have exactly the variance 0. */
static void moments(const float *x, int64_t tokens, int64_t d, double *mean, double *variance)
{
    for (int64_t t = 0; t < tokens; t++, x += d) {
        mean[t] = sum_token(x, d, 0, 0) / (double)d;
        variance[t] = sum_token(x, d, mean[t], 1) / (double)d;
    }
}

RQ_INLINE void modulate_block(const float *x, double x0, double mean, double rstd, const double *factor, const double *offset,
                              const struct rq_pointwise *f, int codes, void *out)
{
    wide y[VECTORS];
    RQ_UNROLL
    for (int v = 0; v < VECTORS; v++) {
        const int at = v * LANES;
        const wide normed = (load_floats(x + at) - all(x0) - all(mean)) * all(rstd);
        y[v] = normed * load(factor + at) + load(offset + at);
        if (codes)
            y[v] = limited(y[v], f);
    }
    store_block(out, y, f, codes);
}

RQ_INLINE void modulate_tokens(const float *x, int64_t tokens, int64_t d, const double *mean, const double *rstd,
                               const double *factor, const double *offset, const struct rq_pointwise *given,
                               int codes, uint8_t *out)
{
    const struct rq_pointwise own = *given, *const f = &own;
    const int64_t size = codes ? 1 : sizeof(float);
    for (int64_t t = 0; t < tokens; t++, x += d, out += d * size) {
        int64_t i = 0;
        for (; i + RQ_BLOCK <= d; i += RQ_BLOCK)
            modulate_block(x + i, x[0], mean[t], rstd[t], factor + i, offset + i, f, codes, out + i * size);
        if (i < d) {
            float in[RQ_BLOCK] = {0}, end[RQ_BLOCK];
            memcpy(in, x + i, (size_t)(d - i) * sizeof *in);
            modulate_block(in, x[0], mean[t], rstd[t], factor + i, offset + i, f, codes, end);
            memcpy(out + i * size, end, (size_t)((d - i) * size));
        }
    }
}

/* factor and offset are filled up to a whole block. */
static void modulate(const float *x, int64_t tokens, int64_t d, const double *mean, const double *rstd,
                     const double *factor, const double *offset, const struct rq_pointwise *f, void *out)
{
    if (f->codes)
        modulate_tokens(x, tokens, d, mean, rstd, factor, offset, f, 1, out);
    else
        modulate_tokens(x, tokens, d, mean, rstd, factor, offset, f, 0, out);
}

/* ------------------------------------------------------------------ GELU */

enum { GELU_FLOATS, GELU_CODES, GELU_SIGNS }; /* what is made of y */

/* GELU of x, divided by `unit`. */
RQ_INLINE wide gelu_of(wide x, double unit)
{
    const wide w = x * (all(1.5957691216057308) + all(0.07135481627260025) * (x * x));
    return x / (all(unit) + exp_of_minus(w, unit, 0));
}

RQ_INLINE void gelu_block(const float *x, const struct rq_pointwise *f, int kind, void *out, void *down, wide *bad)
{
    wide y[VECTORS], minus[VECTORS];
    RQ_UNROLL
    for (int v = 0; v < VECTORS; v++) {
        const wide in = load_floats(x + v * LANES);
        *bad = *bad + (in - in);
        y[v] = gelu_of(in, f->unit);
        minus[v] = limited(y[v] * all(-f->ratio), f); /* below 0 it becomes the code 0, and so does y */
        if (kind != GELU_FLOATS)
            y[v] = limited(y[v], f);
    }
    store_block(out, y, f, kind != GELU_FLOATS);
    if (kind == GELU_SIGNS)
        store_codes(down, minus, 0);
}

RQ_INLINE int gelu_with(const float *x, int64_t count, const struct rq_pointwise *given, int kind, uint8_t *out,
                        uint8_t *down)
{
    const struct rq_pointwise own = *given, *const f = &own;
    const int64_t size = kind == GELU_FLOATS ? sizeof(float) : 1;
    wide bad = all(0.0);
    int64_t i = 0;
#ifdef RQ_SHORT
    const int may_be_short = kind == GELU_CODES || (kind == GELU_SIGNS && f->ratio > 1e-30 && f->ratio < 1e30);
    const struct rough g = roughly(f);
    narrow odd = all_narrow(0.0f);
#endif
    for (; i + RQ_BLOCK <= count; i += RQ_BLOCK) {
        uint8_t *const under = kind == GELU_SIGNS ? down + i : NULL;
        int done = 0;
#ifdef RQ_SHORT
        if (may_be_short)
            done = short_gelu(x + i, f, &g, out + i, under, &odd);
#endif
        if (!done)
            gelu_block(x + i, f, kind, out + i * size, under, &bad);
    }
    if (i < count) {
        float in[RQ_BLOCK] = {0}, end[RQ_BLOCK], other[RQ_BLOCK];
        memcpy(in, x + i, (size_t)(count - i) * sizeof *in);
        gelu_block(in, f, kind, end, other, &bad);
        memcpy(out + i * size, end, (size_t)((count - i) * size));
        if (kind == GELU_SIGNS)
            memcpy(down + i, other, (size_t)(count - i));
    }
    double lanes[LANES], all_lanes = 0;
    store(lanes, bad);
    for (int v = 0; v < LANES; v++)
        all_lanes += lanes[v];
#ifdef RQ_SHORT
    float odd_lanes[FLOATS];
    store_narrow(odd_lanes, odd);
    for (int v = 0; v < FLOATS; v++)
        all_lanes += odd_lanes[v];
#endif
    return is_nan(all_lanes);
}

/* down: NULL, or where the codes of negative numbers go, in steps of unit / ratio. */
static int gelu(const float *x, int64_t count, const struct rq_pointwise *f, uint8_t *out, uint8_t *down)
{
    if (down)
        return gelu_with(x, count, f, GELU_SIGNS, out, down);
    return f->codes ? gelu_with(x, count, f, GELU_CODES, out, NULL) : gelu_with(x, count, f, GELU_FLOATS, out, NULL);
}

/* ------------------------------------------------------------------ a branch behind its gate */

static void gated_add(const float *x, const float *gate, const float *h, int64_t tokens, int64_t d, float *out)
{
    for (int64_t t = 0; t < tokens; t++, x += d, h += d, out += d) {
        int64_t i = 0;
        for (; i + FLOATS <= d; i += FLOATS)
            store_narrow(out + i, load_narrow(x + i) + load_narrow(gate + i) * load_narrow(h + i));
        for (; i < d; i++) {
            const float part = gate[i] * h[i];
            out[i] = x[i] + part;
        }
    }
}

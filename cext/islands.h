/* islands.h - what the files islands*.c say to each other; private to them.
 *
 * A float island is the part of an integer network between two integer layers that is computed in real
 * numbers: normalise, apply SiLU or softmax, and make codes again. islands.c cuts an island into units
 * (an image, a line of scores, a chunk of elements), islands_units.c does a unit with the functions below.
 * These are written once, in islands_body.h, for a register of any width, and compiled three times.
 */
#ifndef REFQUANT_ISLANDS_H
#define REFQUANT_ISLANDS_H

#include <stdatomic.h>
#include <stdint.h>

enum {
    RQ_BLOCK = 16, /* elements that are taken at once whatever the register: a line of 64 bytes of float32 */
    RQ_CHUNK = 8192, /* elements of a unit where any cut will do: 32 KiB of float32 */
    RQ_LINES = 2048, /* elements of a unit of softmax: lines enough not to meet the other threads at each of them */
    RQ_PIXELS = 64   /* pixels of a unit of a concatenation */
};

/* y = f(z), z = (x - shift[p]) * slope[p] + offset[p] for element i of x, p = i mod period; or z = x. */
struct rq_pointwise {
    int64_t period;  /* a multiple of RQ_BLOCK; 0: z = x, and numbers that are not finite are reported */
    const double *shift, *slope, *offset;
    const float *slope32, *offset32; /* the same, where the shorter way to codes may be tried (islands_short.h) */
    int tame;        /* no |z| is above 600, and shift is 0 */
    int silu;        /* f(z) = z / (unit + unit e^-z), else z */
    int codes;       /* y is rounded to a code; else it is stored as float32 */
    double unit;     /* the scale of the codes, or 1 */
    int zero_point, qmax;
    /* softmax: 0, or the flag of codes from `split` steps on, which are counted in coarse steps, 1 / ratio each;
     * GELU of two signs: a step of positive numbers over one of negative numbers */
    int flag;
    double split, ratio;
};

/* Each function reads and writes exactly the elements that it is given. The int is 0, or 1 where there
 * is something that has no code (NaN; where said, infinities); the result then has no meaning. */
struct rq_islands {
    /* out[p] = sum over i = p, p + period, ... < count of x[i] - shift[p], in this order, in double, for p = from, ...
     * to - 1, multiples of RQ_BLOCK */
    void (*sums)(const float *x, int64_t count, int64_t period, const double *shift, int64_t from, int64_t to,
                 double *out);
    /* the same of (x[i] - shift[p])^2 */
    void (*squares)(const float *x, int64_t count, int64_t period, const double *shift, int64_t from, int64_t to,
                    double *out);
    int (*pointwise)(const float *x, int64_t count, const struct rq_pointwise *f, void *out);
    /* codes of x / unit, divided in float32; infinities saturate */
    int (*quantize)(const float *x, int64_t count, const struct rq_pointwise *f, uint8_t *out);
    /* softmax of scale * scores of a line (float32, or int32 if `ints`); room: `count` doubles, rounded up to a block */
    int (*softmax)(const void *scores, int ints, int64_t count, double scale, const struct rq_pointwise *f,
                   double *room, void *out);
    /* of transformers: see islands_tokens_body.h */
    void (*moments)(const float *x, int64_t tokens, int64_t d, double *mean, double *variance);
    void (*modulate)(const float *x, int64_t tokens, int64_t d, const double *mean, const double *rstd,
                     const double *factor, const double *offset, const struct rq_pointwise *f, void *out);
    int (*gelu)(const float *x, int64_t count, const struct rq_pointwise *f, uint8_t *out, uint8_t *down);
    void (*gated_add)(const float *x, const float *gate, const float *h, int64_t tokens, int64_t d, float *out);
};

extern const struct rq_islands rq_islands_scalar, rq_islands_avx2, rq_islands_avx512;

/* What group norm knows of an image; each of `period` numbers, in a thread's scratch memory. */
struct rq_moments {
    double *shift, *slope, *offset, *sums, *mean, *group;
    float *slope32, *offset32;
};

/* A call: the operands, and what is left to do. */
struct rq_island {
    const struct rq_islands *isa;
    void (*unit)(struct rq_island *, int64_t);
    int64_t units, count;  /* count: elements altogether or of an image; or rows */
    const void *x, *other;
    uint8_t *y;
    int64_t y_size;        /* bytes of an element of y */
    struct rq_pointwise f;
    int64_t c, groups, width, stride, parts;
    const float *gamma, *beta;
    double number;         /* eps of group norm, scale of the scores */
    int ints;
    const float *image;    /* of a group norm in which all threads work on one image */
    struct rq_moments moments;
    atomic_int_least64_t next;
    atomic_int status;
};

void rq_normalise_image(struct rq_island *j, int64_t n);
int rq_begin_image(struct rq_island *j, int64_t n);
void rq_sum_block(struct rq_island *j, int64_t block);
void rq_centre(struct rq_island *j);
void rq_square_block(struct rq_island *j, int64_t block);
void rq_know_image(struct rq_island *j);
void rq_map_chunk(struct rq_island *j, int64_t chunk);
int64_t rq_map_chunks(const struct rq_island *j);
void rq_share_lines(struct rq_island *j, int64_t unit);
void rq_make_codes(struct rq_island *j, int64_t chunk);
void rq_concat_chunk(struct rq_island *j, int64_t chunk);
void rq_double_line(struct rq_island *j, int64_t line);
void rq_island_failed(struct rq_island *j, int status);

enum {
    RQ_CHEAP_BELOW = 65536,   /* elements, some 10 microseconds where there is no e^x: not worth a team */
    RQ_COSTLY_BELOW = 8192    /* the same where there is one */
};
/* What the kernel of a row has for islands, by what it needs; NULL: this processor cannot run the row. */
const struct rq_islands *rq_islands_of(int row);
/* Is a * b * c a number of elements? */
int rq_is_volume(int64_t a, int64_t b, int64_t c);
/* The output stage of a call; a wrong scale, zero point or number of codes is found here. */
int rq_island_stage(struct rq_island *j, int kind, float scale, int32_t zero_point, int32_t qmax);
/* Units of rows of `length` elements, about `chunk` of them in a unit: count rows, width of them in a unit. */
void rq_cut_rows(struct rq_island *j, int64_t rows, int64_t length, int64_t chunk);
/* Do the units, on a team if there are so many elements. */
int rq_island_run(struct rq_island *j, int threads, int64_t elements, int64_t alone_below);
/* sqrt of a number that is not negative, rounded once, without the C library. */
double rq_square_root(double x);

#endif
